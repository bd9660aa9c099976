"""Extension modules and compiler directives; everything else stands in pyproject.toml."""
import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DIRECTIVES = {
    "language_level": "3",
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "embedsignature": True,
    "freethreading_compatible": True,
}
# `cdef inline` really inlines; guest memory may alias anything.
FLAGS = ["-O3", "-fno-strict-aliasing", "-fwrapv", "-Wall", "-Wno-unused-function", "-Wno-unreachable-code",
         "-DCYTHON_INLINE=inline __attribute__((always_inline, unused))"]


def extension(path: Path) -> Extension:
    return Extension(".".join(path.with_suffix("").parts), [str(path)], include_dirs=["vq_core/include"],
                     extra_compile_args=FLAGS, depends=[str(p) for p in Path("vq_core/include").glob("*.h")])


setup(ext_modules=cythonize([extension(path) for path in sorted(Path("vq_core").rglob("*.pyx"))],
                            compiler_directives=DIRECTIVES, nthreads=0, build_dir="build/cython",
                            emit_linenums=bool(os.environ.get("VQ_LINE_NUMBERS"))))
