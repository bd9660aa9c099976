"""Extension modules and compiler directives; everything else stands in pyproject.toml."""
import os
import sys
import sysconfig
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

# What vq_core/compiled.pyx says of itself: those of Python's own build come first on the command line.
ALL_FLAGS = " ".join([sysconfig.get_config_var("CFLAGS") or "", os.environ.get("CFLAGS", ""), *FLAGS])
MACROS = {"compiled": [("VQ_BUILD_FLAGS", '"' + " ".join(ALL_FLAGS.split()).replace('"', '\\"') + '"')]}


def extension(path: Path) -> Extension:
    return Extension(".".join(path.with_suffix("").parts), [str(path)], include_dirs=["vq_core/include"],
                     define_macros=MACROS.get(path.stem, []), extra_compile_args=FLAGS,
                     depends=[str(p) for p in Path("vq_core/include").glob("*.h")])


def extensions() -> list[Extension]:
    """All of them, as C; as they are for commands that compile nothing, which then take no time either."""
    found = [extension(path) for path in sorted(Path("vq_core").rglob("*.pyx"))]
    building = any(word.startswith(("build", "bdist", "install", "develop", "editable")) for word in sys.argv[1:])
    if not building and {"egg_info", "dist_info", "sdist"} & set(sys.argv[1:]):
        return found
    return cythonize(found, compiler_directives=DIRECTIVES, nthreads=os.cpu_count() or 1, build_dir="build/cython",
                     emit_linenums=bool(os.environ.get("VQ_LINE_NUMBERS")))


# The option stands here since setuptools calls the table of pyproject.toml for it experimental, each time.
setup(options={"build_ext": {"parallel": True}}, ext_modules=extensions())
