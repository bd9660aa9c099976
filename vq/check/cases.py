"""One check over several cases: each on connections of its own, with a look whether the back-end still lives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from vq.check.guest import LAYOUTS
from vq.check.outcome import Failed, Gone, Skipped
from vq.errors import VqError

if TYPE_CHECKING:
    from vq.check.target import Target

__all__ = ["each", "over_layouts"]

Case = TypeVar("Case")


def each(target: Target, cases: Mapping[str, Case], act: Callable[[Case], str]) -> str:
    """Go through cases, collecting what is wrong with each, and what became of those that are right.

    Parameters
    ----------
    target
        The back-end; after each case it must serve a fresh connection.
    cases
        Cases under the names that people see.
    act
        What to do with a case; returns in a few words what became of it.

    Returns
    -------
    str
        How many cases ended in which way.

    Raises
    ------
    Failed
        Cases failed; the message names them.
    Skipped
        A case found out that the whole check does not apply.
    Gone
        The back-end is gone, and cannot be started again.
    """
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    for name, case in cases.items():
        try:
            end = act(case)
            target.verify()
            ends[end] += 1
        except Skipped:
            raise
        except Gone as gone:
            wrong.append(f"{name}: {gone}")
            if not target.revive():
                raise Gone("; ".join(wrong)) from gone
        except VqError as problem:
            wrong.append(f"{name}: {problem}")
            _outlive(target, wrong)
    if wrong:
        raise Failed("; ".join(wrong))
    return ", ".join(f"{end} ({count})" if count > 1 else end for end, count in ends.items())


def over_layouts(target: Target, cases: Mapping[str, Case]) -> dict[str, tuple[Case, str]]:
    """The cases over each ring layout that the back-end offers: with the layout behind each, and in its name."""
    layouts = [layout for layout, needed in LAYOUTS.items() if not needed & ~target.features]
    return {f"{name} ({layout})": (case, layout) for layout in layouts for name, case in cases.items()}


def _outlive(target: Target, wrong: list[str]) -> None:
    """After a case that failed: see whether the back-end goes on."""
    try:
        target.verify()
    except Gone as gone:
        wrong[-1] += f"; {gone}"
        if not target.revive():
            raise Gone("; ".join(wrong)) from gone
