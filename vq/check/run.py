"""A run: all checks that apply, one after the other, each with its outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from vq.check.outcome import Failed, Gone, Group, Outcome, Result, Skipped
from vq.check.program import Program
from vq.check.registry import Check, checks
from vq.check.target import Target
from vq.errors import UsageError, VqError

__all__ = ["run", "select"]


def select(only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Check]:
    """Choose checks by their names.

    Parameters
    ----------
    only, skip
        Patterns of names or groups as a shell has them, such as "rings.*" or "hostile"; none: all, nothing.

    Raises
    ------
    UsageError
        A pattern matches no check.
    """
    every = list(checks())
    for pattern in (*only, *skip):
        if not any(_matches(check, pattern) for check in every):
            raise UsageError(f"no check is named {pattern!r}; see vq check --list")
    return [
        check
        for check in every
        if (not only or any(_matches(check, pattern) for pattern in only))
        and not any(_matches(check, pattern) for pattern in skip)
    ]


def _matches(check: Check, pattern: str) -> bool:
    return fnmatchcase(check.name, pattern) or check.group == pattern


def run(
    path: str,
    *,
    device: str = "any",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    timeout: float = 2.0,
    start: str | Sequence[str] | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Check the back-end that listens on a socket.

    Parameters
    ----------
    path
        The socket.
    device
        "net", "blk" or "any": which checks apply, and how the device is driven. A block device is only read.
    only, skip
        Patterns that choose checks by name; see `select`.
    timeout
        Seconds that any answer may take.
    start
        Command that runs the back-end; it is started at first, and again after a check has ended it. None: the
        back-end runs already, and what comes after its end is skipped.
    on_result
        Gets each result as soon as it is there, in the caller's thread.

    Returns
    -------
    list of Result
        One for each check, in the order in which they ran.

    Raises
    ------
    ResourceError
        Nobody serves the socket at the beginning.
    UsageError
        An argument is wrong.
    """
    if timeout <= 0:
        raise UsageError(f"timeout {timeout:g} is no time to wait; it must be more than 0 seconds")
    chosen = select(only, skip)
    program = Program(start) if start is not None else None
    target = Target(path, device, timeout=timeout, program=program)
    results: list[Result] = []
    gone = ""
    try:
        target.start()
        target.probe()
        for check in chosen:
            begin = time.monotonic()
            outcome, reason, gone = _skip(gone) if gone else _one(check, target)
            result = Result(
                check.name, check.group, check.section, check.title, outcome, reason, time.monotonic() - begin
            )
            results.append(result)
            if on_result is not None:
                on_result(result)
    finally:
        if program is not None:
            program.end()
    return results


def _skip(gone: str) -> tuple[Outcome, str, str]:
    return Outcome.SKIPPED, f"the back-end is gone since {gone}", gone


def _one(check: Check, target: Target) -> tuple[Outcome, str, str]:
    """Run one check; gives its outcome, the reason, and its own name if the back-end is gone."""
    lacking = check.lacking(target.device, target.features, target.protocol_features)
    if lacking:
        return Outcome.SKIPPED, lacking, ""
    reason = ""
    try:
        reason = check.run(target) or ""
        if check.group is Group.HOSTILE:
            target.works()
    except Skipped as problem:
        return Outcome.SKIPPED, str(problem), ""
    except Gone as problem:
        return Outcome.FAIL, str(problem), "" if target.revive() else check.name
    except VqError as problem:
        return Outcome.FAIL, str(problem), _gone_after(check, target)
    return Outcome.PASS, reason, ""


def _gone_after(check: Check, target: Target) -> str:
    """After a failure: the check's name if the back-end is gone and cannot be started again."""
    try:
        target.verify()
    except Gone:
        return "" if target.revive() else check.name
    except Failed:
        pass
    return ""
