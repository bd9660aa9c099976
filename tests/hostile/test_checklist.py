"""The security checklist (protocol section 11) as a table: which lines have tests, and why the others have none."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent  # a line may have its tests in the room of what it is about

LINES = {
    1: "sizes in headers",
    2: "pieces of messages, and their end",
    3: "version, flags, unknown requests",
    4: "number and place of fds",
    5: "kinds of fds",
    6: "ring indices",
    7: "number of entries",
    8: "SET_MEM_TABLE",
    9: "a memory table that fails in the middle",
    10: "ADD_MEM_REG, REM_MEM_REG",
    11: "memory and log that are truncated",
    12: "SET_LOG_BASE",
    13: "SET_INFLIGHT_FD",
    14: "GET_INFLIGHT_FD",
    15: "GET_CONFIG, SET_CONFIG",
    16: "IOTLB",
    17: "messages in every state",
    18: "features that were not offered",
    19: "SET_BACKEND_REQ_FD",
    20: "device state",
    21: "floods",
    22: "connections and socket files",
    23: "RARP, MTU, status",
    24: "placement of rings",
    25: "storms of messages while packets move",
    26: "available ring",
    27: "chains",
    28: "indirect tables",
    29: "addresses of descriptors",
    30: "memory that changes while it is looked at",
    31: "memory that overlaps",
    32: "directions of descriptors",
    33: "headers in pieces",
    34: "small receive buffers",
    35: "offloads",
    36: "packed rings",
    37: "notification suppression",
    38: "the used ring is the device's",
    39: "virtio-blk",
    40: "control queue",
    41: "kicks and calls",
    42: "allocations",
    43: "fairness",
    44: "dirty log",
    45: "memory that goes while packets are under way",
    46: "what failures leave behind",
    47: "core dumps, exceptions",
    48: "used lengths, disclosure",
    49: "back-ends that our front-end does not trust",
}

# Parts of lines without a test here, and why.
IN_PART = {
    25: "with threads and verified packets; not under a thread sanitizer, which the interpreter is not built with",
}


def marked() -> dict[int, list[str]]:
    """The tests of each line, read from their marks."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.checklist"):
                for argument in node.args:
                    assert isinstance(argument, ast.Constant)
                    found.setdefault(argument.value, []).append(f"{path.name}:{node.lineno}")
    return found


def all_tests() -> list[tuple[str, ast.FunctionDef]]:
    """All test functions of this folder."""
    return [
        (path.name, node)
        for path in sorted(HERE.glob("test_*.py"))
        if path.name != Path(__file__).name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_every_line_has_a_test() -> None:
    """Each line is covered, if only by showing that what it is about cannot be reached."""
    assert set(LINES) == set(range(1, 50))
    assert sorted(marked()) == sorted(LINES)


def test_every_test_names_its_lines() -> None:
    """Each test carries marks (or its parameters do), and names the same lines in its docstring."""
    for file, node in all_tests():
        text = ast.get_docstring(node) or ""
        assert text.startswith(("Line ", "Lines ")), f"{file}: {node.name} does not name its line"
        marks = {
            argument.value
            for decorator in node.decorator_list
            for call in ast.walk(decorator)
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.checklist")
            for argument in call.args
            if isinstance(argument, ast.Constant)
        }
        by_parameters = any("NOT_" in ast.unparse(decorator) for decorator in node.decorator_list)
        assert marks or by_parameters, f"{file}: {node.name} has no mark"


def test_exceptions_are_lines() -> None:
    """The reasons above are about lines that exist."""
    assert set(IN_PART) <= set(LINES)
    assert all(reason.strip() for reason in IN_PART.values())
