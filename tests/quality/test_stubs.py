"""The stubs of the compiled modules say what is there: by mypy's stubtest, and by the source where that cannot look."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from quality.tree import ROOT, below, name

ALLOWED = Path(__file__).with_name("stubtest.txt")
CLASS = re.compile(r"^cdef class (\w+)\b.*?:\n(.*?)(?=^\S)", re.S | re.M)
TAKES = re.compile(r"    def __cinit__\(self, ([^)]*(?:\(\)[^)]*)*)\):")


def module(path: Path) -> str:
    """The module that a file of the package is."""
    return name(path.with_suffix("")).replace("/", ".")


STUBS = {module(path): path for path in below("vq_core", ".pyi")}
SOURCES = {module(path): path for path in below("vq_core", ".pyx")}


def in_source(path: Path) -> dict[str, list[str]]:
    """Names of what each class takes in __cinit__; a star where the rest goes by name."""
    found = {}
    for kind, body in CLASS.findall(path.read_text() + "\nend"):
        if takes := TAKES.search(body):
            words = [word.partition("=")[0].replace(" not None", "").split()[-1] for word in takes[1].split(", ")]
            found[kind] = words
    return found


def in_stub(path: Path) -> dict[str, list[str]]:
    """The same of the stub's __init__."""
    found = {}
    for kind in (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)):
        for method in kind.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                star = ["*"] if method.args.kwonlyargs else []
                arguments = [*method.args.args[1:], *star, *method.args.kwonlyargs]
                found[kind.name] = [each if isinstance(each, str) else each.arg for each in arguments]
    return found


def test_stubtest(tmp_path: Path) -> None:
    # What a class takes in __cinit__ has no signature at run time: it is compared with the source, below.
    unseen = [f"{stub}.{kind}.__init__" for stub in STUBS if stub in SOURCES for kind in in_source(SOURCES[stub])]
    hidden = tmp_path / "hidden.txt"
    hidden.write_text("\n".join(unseen).replace(".", r"\."))
    command = [sys.executable, "-m", "mypy.stubtest", *STUBS, "--concise", "--ignore-disjoint-bases"]
    command += ["--allowlist", str(ALLOWED), "--allowlist", str(hidden), "--ignore-unused-allowlist"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_has_no_stub_has_nothing_for_python() -> None:
    public = {}
    for without in SOURCES.keys() - STUBS.keys():
        found = vars(import_module(without)).items()
        public[without] = [key for key, value in found if getattr(value, "__module__", None) == without]
    assert {key: names for key, names in public.items() if any(not each.startswith("_") for each in names)} == {}


def test_what_is_taken_before_init() -> None:
    compared = {stub: (in_source(SOURCES[stub]), in_stub(path)) for stub, path in STUBS.items() if stub in SOURCES}
    assert "batches" in compared["vq_core.queue"][0]["Queue"]  # or nothing is compared at all
    for stub, (source, declared) in compared.items():
        assert {kind: declared.get(kind) for kind in source} == source, stub
