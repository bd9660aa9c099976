"""Files for results: whether they can be written is asked before a minute of measuring, not after it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vq.errors import ResourceError

__all__ = ["check_writable"]


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written; what it holds stays as it is.

    Raises
    ------
    ResourceError
        Its folder is not there, or it cannot be written.
    """
    if not path.parent.is_dir():
        raise ResourceError("there is no such folder", path=str(path.parent), remedy="make it first")
    if path.is_dir():
        raise ResourceError("a folder is there", path=str(path), remedy="name a file")
    try:
        if path.is_file():
            os.close(os.open(path, os.O_WRONLY))
        elif not path.exists():  # a pipe or a terminal is opened only once, to be written
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        remedy = "check its permissions, or name another file"
        raise ResourceError("cannot be written", errno=error.errno or 0, path=str(path), remedy=remedy) from error
