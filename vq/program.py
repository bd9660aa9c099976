"""Programs between ports: found by their name, or made of a Python function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from vq.errors import UsageError
from vq_core.code_address import is_compiled
from vq_core.program import Burst, Program, PythonProgram, bind

__all__ = ["as_program", "load_program"]


def as_program(found: Program | Callable[[Burst], Any] | None, name: str = "") -> Program | None:
    """A program of whatever is one; None stays None.

    Raises
    ------
    UsageError
        It is neither a `vq.Program` with a function to call nor a Python function.
    """
    if found is None:
        return None
    if isinstance(found, Program):
        try:
            bind(found)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return found
    if isinstance(found, type):
        raise UsageError(f"program {name or found.__name__} is a class; give an object of it, or a function")
    if is_compiled(found) or not callable(found):
        what = f"program {name or found!r} is of type {type(found).__name__}"
        raise UsageError(f"{what}; wrap compiled code: vq.NativeProgram(function, abi=1), or give a Python function")
    if type(found).__module__.partition(".")[0] == "numba":
        what = f"program {name or found!r} is compiled by numba for its types, and a burst has none"
        raise UsageError(f"{what}; make it by numba.cfunc and wrap it: vq.NativeProgram(function, abi=1)")
    if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found):
        kind = "coroutine" if inspect.iscoroutinefunction(found) else "generator"
        raise UsageError(f"program {name or found!r} is a {kind}, which nobody runs; write a plain function")
    return PythonProgram(found, name)


def load_program(words: str) -> Program:
    """Find a program by ``module:name`` or ``path/to/file.py:name``.

    Raises
    ------
    UsageError
        There is no such module or name, or it is no program, or was made for another ABI.
    """
    place, separator, name = words.rpartition(":")
    if not separator or not place or not name.isidentifier() or _has_another_name(place):
        raise UsageError(f"program {words!r}; write module:function or path/to/file.py:function")
    with redirect_stdout(sys.stderr):  # what a module prints is no part of results, which may be JSON
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    try:
        found = getattr(module, name)
    except AttributeError:
        names = ", ".join(key for key, value in vars(module).items() if _is_one(value, module) and key[0] != "_")
        raise UsageError(f"program {words!r}: {place} has no {name}; it has {names or 'nothing'}") from None
    program = as_program(found, words)
    if program is None:
        raise UsageError(f"program {words!r} is None")
    return program


def _has_another_name(place: str) -> bool:
    """Whether a second colon stands behind the file or the module; the path of a file may have some before."""
    return ":" in place and not place.endswith(".py")


def _is_one(value: Any, module: ModuleType) -> bool:
    """Whether a name of a module is likely to be meant for a program."""
    return isinstance(value, Program) or (callable(value) and getattr(value, "__module__", "") == module.__name__)


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        remedy = "give the path of its file, or set PYTHONPATH" if isinstance(error, ModuleNotFoundError) else "mend it"
        raise UsageError(f"program: {name} cannot be imported ({type(error).__name__}: {error}); {remedy}") from error


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"program: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]
        raise UsageError(f"program: {path} cannot be loaded ({type(error).__name__}: {error}); mend it") from error
    return module
