"""Forms of arguments that more than one command takes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Annotated, Final

from cyclopts import Parameter, Token

from vq.errors import UsageError

__all__ = ["Whole", "parse_bytes", "parse_cpus", "positive_seconds"]

CPU_MAX: Final = 8191  # NR_CPUS of the largest kernels
SIZE: Final = re.compile(r"([0-9]+)([KMGT]?)")
SIZE_MAX: Final = 1 << 62
WHOLE: Final = re.compile(r"[+-]?[0-9]+")


def parse_cpus(text: str | None) -> list[int] | None:
    """Read a list of processors, such as ``0,2-3``.

    Returns
    -------
    list of int or None
        In the order written; None if `text` is None.

    Raises
    ------
    UsageError
        Wrong form, a processor twice, or one that this process may not use.
    """
    if text is None:
        return None
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [first, last] if dash else [first]
        if not all(end.isascii() and end.isdigit() and int(end) <= CPU_MAX for end in ends):
            raise UsageError(f"--cpu {text}: {part!r} is no processor or range; write a list such as 0,2-3")
        low, high = int(ends[0]), int(ends[-1])
        if low > high:
            raise UsageError(f"--cpu {text}: {part!r} runs backwards; write {high}-{low}")
        cpus.extend(range(low, high + 1))
    if len(set(cpus)) < len(cpus):
        raise UsageError(f"--cpu {text}: a processor is named twice; each worker needs one of its own")
    usable = os.sched_getaffinity(0)
    for cpu in cpus:
        if cpu not in usable:
            known = ",".join(map(str, sorted(usable)))
            raise UsageError(f"--cpu {text}: processor {cpu} is not usable here; usable are {known}")
    return cpus


def parse_bytes(name: str, text: str) -> int:
    """Read a size such as ``4096``, ``64M`` or ``2G``; K, M, G and T are powers of 1024."""
    match = SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{name} {text}: write a number of bytes, or one with K, M, G or T, such as 16G")
    size = int(match[1]) << 10 * " KMGT".index(match[2] or " ")
    if not 512 <= size <= SIZE_MAX:
        raise UsageError(f"{name} {text}: a disk has 512 bytes to {SIZE_MAX >> 40}T")
    return size


def positive_seconds(name: str, value: float | None) -> float | None:
    """Check a time in seconds that must be more than zero; None passes."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise UsageError(f"{name} is {value:g}; write seconds, more than 0")
    return value


def _read_whole(_kind: type, tokens: Sequence[Token]) -> int:
    text = tokens[0].value
    if not WHOLE.fullmatch(text):
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


# Left to itself cyclopts rounds 1.5 to 2 and says nothing.
Whole = Annotated[int, Parameter(converter=_read_whole)]
