"""Cython modules of the tests: built once a session into a folder of its own, against the package under test."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import vq_core

SOURCES = Path(__file__).resolve().parent
_folders: list[TemporaryDirectory[str]] = []  # keeps them to the end of the process, and then removes them

SCRIPT = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup
name, source, package = sys.argv[1:4]
extension = Extension(name, [source], include_dirs=[package + "/include"], extra_compile_args=["-O1"])
setup(name=name, packages=[], py_modules=[], script_args=["-q", "build_ext", "--inplace"],
      ext_modules=cythonize([extension], include_path=[package + "/.."], language_level=3, quiet=True))
"""


@cache
def load(name: str) -> ModuleType:
    """Build and import ``NAME.pyx`` of this folder.

    Parameters
    ----------
    name
        Name of the file without its ending.

    Returns
    -------
    ModuleType
        The module.

    Raises
    ------
    RuntimeError
        Cython or the compiler failed; with their output.
    """
    package = Path(vq_core.__path__[0]).resolve()
    folder = TemporaryDirectory(prefix="vq-cython-")
    _folders.append(folder)
    source = Path(folder.name, f"{name}.pyx")
    source.write_text((SOURCES / source.name).read_text())
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, source.name, str(package)],
        cwd=folder.name,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    built = list(Path(folder.name).glob(f"{name}.*.so"))
    if result.returncode or not built:
        raise RuntimeError(f"{name}.pyx: build failed:\n{result.stdout}{result.stderr}")
    spec = importlib.util.spec_from_file_location(name, built[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
