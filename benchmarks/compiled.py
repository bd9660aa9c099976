"""The compiled part of the stage benchmarks, built against the engine that is imported, with the engine's own flags."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import vq_core
from vq_core.compiled import compiled

HERE = Path(__file__).resolve().parent
_folder = TemporaryDirectory(prefix="vq-stages-")  # lives as long as the process: the module is loaded from it

# In a process of its own: compilers and setuptools leave traces in the one that measures.
BUILD = """
import json, sys
from Cython.Build import cythonize
from setuptools import Distribution, Extension
job = json.loads(sys.argv[1])
extension = Extension("stages", ["stages.pyx"], include_dirs=[job["headers"]], extra_compile_args=job["flags"])
modules = cythonize([extension], include_path=[job["root"]], compiler_directives=job["directives"], quiet=True)
build = Distribution({"ext_modules": modules, "script_args": ["-q", "build_ext", "--inplace"]})
build.parse_command_line()
build.run_commands()
"""


@cache
def settings() -> dict[str, Any]:
    """What setup.py compiles the engine with: ``FLAGS`` and ``DIRECTIVES``, read from its text.

    Raises
    ------
    LookupError
        setup.py has no such literals any more.
    """
    found = {}
    for node in ast.parse((HERE.parent / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in {"FLAGS", "DIRECTIVES"}:
                found[name] = ast.literal_eval(node.value)
    if len(found) != 2:
        raise LookupError(f"setup.py: of the literals FLAGS and DIRECTIVES only {sorted(found)} were found")
    return found


def flags() -> list[str]:
    """Flags of the stages: setup.py's, and those by which this engine was compiled for another processor (CFLAGS)."""
    return [*settings()["FLAGS"], *(word for word in compiled()["flags"].split() if word.startswith("-m"))]


@cache
def stages() -> ModuleType:
    """Build and import stages.pyx, once a process.

    Raises
    ------
    RuntimeError
        Cython or the compiler failed; with their output.
    """
    package = Path(vq_core.__path__[0]).resolve()
    folder = Path(_folder.name)
    (folder / "stages.pyx").write_text((HERE / "stages.pyx").read_text())
    job = {
        "root": str(package.parent),
        "headers": str(package / "include"),
        "flags": flags(),
        "directives": settings()["DIRECTIVES"],
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, json.dumps(job)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    modules = list(folder.glob("stages.*.so"))
    if done.returncode or not modules:
        raise RuntimeError(f"stages.pyx: build failed; are Cython and a compiler there?\n{done.stdout}{done.stderr}")
    spec = importlib.util.spec_from_file_location("stages", modules[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
