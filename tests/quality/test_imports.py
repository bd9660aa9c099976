"""Who imports whom, and how little a plain import loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quality.tree import ROOT, below, name, without_comments

HEAVY = {"asyncio", "cyclopts", "msgspec", "numpy", "pyroute2", "rich", "vq_core"}

# The rooms without input and output: what they may not know, so that they can be tested and reused by themselves.
SANS_IO = ["effects", "message", "payload", "session", "session_state", "offer", "region_table", "ring_state", "virtio"]
SANS_IO += ["handle_device", "handle_features", "handle_memory", "handle_postcopy", "handle_rings"]
SOCKETS = {"asyncio", "selectors", "socket", "ssl"}
OUTER_ROOMS = {"vq.transport", "vq.endpoint", "vq.backend", "vq.frontend", "vq.frontend_messages", "vq.pump"}
OUTER_ROOMS |= {"vq.apply", "vq.cli"}


def loaded_by(code: str) -> set[str]:
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}


def imported_by(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import; rooms are named in full"
            modules |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_import_vq_loads_no_library_and_no_engine() -> None:
    new = loaded_by("import vq") - loaded_by("pass")
    assert "vq" in new
    assert {module for module in new if module.partition(".")[0] in HEAVY} == set()
    assert {module for module in new if module.startswith("vq.")} == set()


def test_help_loads_no_engine() -> None:
    loaded = loaded_by("import vq.cli; vq.cli.main(['pump', '--help'])")
    assert "vq.cli.pump" in loaded
    assert {module for module in loaded if module.partition(".")[0] in {"numpy", "pyroute2", "vq_core"}} == set()


def test_every_public_name_is_there() -> None:
    code = "import vq; [getattr(vq, name) for name in vq.__all__]; assert set(vq.__all__) <= set(dir(vq))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_the_lazy_table_and_the_typed_imports_agree() -> None:
    import vq

    tree = ast.parse((ROOT / "vq/__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == vq._HOME
    assert sorted(typed) == vq.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    import vq

    with pytest.raises(AttributeError, match="no attribute 'Pumpe'"):
        vq.Pumpe  # noqa: B018


def test_vq_core_imports_nothing_of_vq() -> None:
    wrong = []
    sources = below("vq_core", ".py", ".pyx", ".pxd", ".pyi")
    assert len(sources) > 20
    for path in sources:
        for line in without_comments(path.read_text()).splitlines():
            if re.match(r"\s*(from\s+vq[\s.]|c?import\s+(.*,\s*)?vq(\s|\.|,|$))", line):
                wrong.append(f"{name(path)}: {line.strip()}")
    assert wrong == []


def test_no_port_imports_another() -> None:
    wrong = []
    for path in below("vq_core/ports", ".pyx", ".pxd"):
        for other in re.findall(r"vq_core\.ports\.(\w+)", without_comments(path.read_text())):
            # pcap_replay belongs to pcap: parts of one port carry its name.
            if other.split("_")[0] != path.stem.split("_")[0]:
                wrong.append(f"{name(path)} knows {other}")
    assert wrong == []


@pytest.mark.parametrize("room", SANS_IO)
def test_sans_io_rooms_know_no_socket_and_no_engine(room: str) -> None:
    modules = imported_by(ROOT / f"vq/{room}.py")
    assert {module for module in modules if module.partition(".")[0] in SOCKETS | {"vq_core"}} == set()
    assert modules & OUTER_ROOMS == set()


def test_vq_holds_no_pointer() -> None:
    wrong = [name(path) for path in below("vq", ".py") if {"ctypes", "cffi", "mmap"} & imported_by(path)]
    assert wrong == []


def test_only_the_transport_sends_and_receives_messages() -> None:
    users = {name(path) for path in below("vq", ".py") if re.search(r"\.(sendmsg|recvmsg)(_into)?\(", path.read_text())}
    assert users == {"vq/transport.py"}
