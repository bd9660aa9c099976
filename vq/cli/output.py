"""Standard output and standard error of the program: closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["OutputError", "check_output", "discard_output", "open_closed_streams", "write_json"]


class OutputError(Exception):
    """Standard output took no more; the cause is the `OSError` of the write."""


@contextmanager
def check_output() -> Iterator[None]:
    """Turn what goes wrong inside into an `OutputError`: there is nothing else to write to in there."""
    try:
        yield
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from error


def write_json(line: bytes) -> None:
    """Write a record at once."""
    with check_output():
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def discard_output() -> None:
    """Send what is still buffered nowhere: the interpreter flushes once more at its end, and would complain."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def open_closed_streams() -> None:
    """Replace streams that were closed before the program began (``vq pump ... >&-``)."""
    if sys.stdout is None or sys.stderr is None:
        # A socket or a TAP must not become descriptor 1 or 2, where libraries write their complaints.
        fd = os.open(os.devnull, os.O_RDWR)
        while fd <= 2:
            fd = os.dup(fd)
        os.close(fd)
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
