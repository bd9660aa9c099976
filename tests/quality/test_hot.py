"""Functions on the way of a packet call nothing of Python: read from the generated C."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from quality.tree import ROOT, below, name, without_comments

GENERATED = ROOT / "build/cython"
# The signature up to its colon may run over several lines; an extern declaration or a type has none after it.
SIGNATURE = re.compile(r"^[ \t]*cdef\s+[^\n(=]*?(\w+)\s*\(([^:]*?)\)\s*noexcept\s+nogil\s*:", re.M)
CLASS = re.compile(r"^cdef class (\w+)", re.M)
DEFINITION = re.compile(r"^static [^;={}]*?\b(__pyx_f_\w+)\([^;{}]*\)\s*\{\n(.*?)^\}", re.M | re.S)
# Anything of the C API: Py_INCREF, PyErr_Occurred, __Pyx_WriteUnraisable, __Pyx_PyGILState_Ensure, ...
API = re.compile(r"\b(_?Py[A-Z_]\w*|__Pyx_\w+)\s*\(")


def mangled(module: str, function: str) -> str:
    return "__pyx_f_" + "".join(f"{len(part)}{part}_" for part in module.split(".")) + function


@cache
def hot_functions() -> dict[str, Path]:
    """C name of each ``noexcept nogil`` function with a body, and the file that it stands in."""
    found = {}
    for path in below("vq_core", ".pyx", ".pxd"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        text = without_comments(path.read_text())
        for match in SIGNATURE.finditer(text):
            owner = module
            if match[0].startswith(" "):  # a method
                owner += "." + CLASS.findall(text[: match.start()])[-1]
            found[mangled(owner, match[1])] = path
    return found


@cache
def bodies(path: Path) -> dict[str, str]:
    # Comments quote the source, which may well speak of Python.
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    return {match[1]: match[2] for match in DEFINITION.finditer(text)}


def modules() -> list[Path]:
    return below("vq_core", ".pyx")


def generated(path: Path) -> Path:
    c_file = GENERATED / path.relative_to(ROOT).with_suffix(".c")
    assert c_file.exists(), f"{name(c_file)} is missing; run make build"
    assert c_file.stat().st_mtime >= path.stat().st_mtime, f"{name(path)} is newer than its C; run make build"
    return c_file


@pytest.mark.parametrize("path", modules(), ids=name)
def test_no_python_in_hot_functions(path: Path) -> None:
    hot = hot_functions()
    found = bodies(generated(path))
    own = {function for function, home in hot.items() if home == path}
    assert own <= set(found), "the C of these was not found"
    calls = {function: sorted(set(API.findall(found[function]))) for function in set(hot) & set(found)}
    assert {function: names for function, names in calls.items() if names} == {}


def test_the_way_of_a_packet_is_covered() -> None:
    stems = {path.stem for path in hot_functions().values()}
    assert {"worker", "vhost_pull", "vhost_push", "split", "packed", "chain", "memory", "queue", "net"} <= stems
    assert len(hot_functions()) > 60


def test_the_check_sees_a_python_call(tmp_path: Path) -> None:
    c_file = tmp_path / "x.c"
    c_file.write_text("static int __pyx_f_1x_f(int a) {\n  /* Py_None(x) */\n  return PyErr_Occurred() ? a : 0;\n}\n")
    assert API.findall(bodies(c_file)["__pyx_f_1x_f"]) == ["PyErr_Occurred"]
