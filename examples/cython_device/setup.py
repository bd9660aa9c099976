"""Builds fnv.pyx against the installed vq: pip install . (or: python setup.py build_ext --inplace)."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

import vq_core

setup(
    py_modules=["hashing"],
    ext_modules=cythonize(
        [Extension("fnv", ["fnv.pyx"], include_dirs=[vq_core.get_include()])],
        include_path=[str(Path(vq_core.__path__[0]).parent)],  # an editable vq is not on sys.path
        compiler_directives={"language_level": "3", "freethreading_compatible": True},
    ),
)
