"""The Cython parts of these tests, compiled once a session against vq_core as it is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vq_core

HERE = Path(__file__).parent
DIRECTIVES = {"language_level": "3", "freethreading_compatible": True}
FLAGS = ["-O2", "-fno-strict-aliasing", "-fwrapv", "-DCYTHON_INLINE=inline __attribute__((always_inline, unused))"]


def compile_module(source: Path, build: Path) -> ModuleType:
    """Compile one Cython file that cimports vq_core, and import it."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    root = Path(vq_core.__file__).resolve().parents[1]
    name = source.stem
    # Relative: setuptools would otherwise repeat the absolute path of the C file below the build directory.
    before = Path.cwd()
    os.chdir(build)
    try:
        copy = build / source.name
        copy.write_text(source.read_text())
        extension = Extension(
            name, [copy.name], include_dirs=[str(root / "vq_core" / "include")], extra_compile_args=FLAGS
        )
        modules = cythonize([extension], include_path=[str(root)], compiler_directives=DIRECTIVES, quiet=True)
        command = Distribution({"name": name, "ext_modules": modules}).get_command_obj("build_ext")
        command.build_lib = command.build_temp = str(build)
        command.ensure_finalized()
        command.run()
        path = build / command.get_ext_filename(name)
    finally:
        os.chdir(before)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled harness.pyx: Feed, Collect and what drives them by hand."""
    return compile_module(HERE / "harness.pyx", tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="session")
def blk_hand(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled blk_hand.pyx: the steps of a block device's worker, one by one."""
    return compile_module(HERE / "blk_hand.pyx", tmp_path_factory.mktemp("blk_hand"))


@pytest.fixture(scope="session")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled harvest.pyx: what takes bits out of a dirty log while others set them."""
    return compile_module(HERE / "harvest.pyx", tmp_path_factory.mktemp("harvest"))
