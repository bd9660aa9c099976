"""Many connections, and what they leave behind."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path

from vq.check.outcome import Failed, Gone, Skipped
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import harmless
from vq.check.waiting import until
from vq.errors import VqError
from vq.frontend import Frontend
from vq.message import Request
from vq.payload import VringState

SECTION = "vhost-user, Communication"
ROUNDS = 30
SETTLE_S = 2.0


@check(SECTION)
def storm(target: Target) -> str:
    """A hundred connections that come and go at once."""
    for _ in range(100):
        with suppress(VqError):
            Frontend.connect(target.path, timeout=target.timeout).close()
    return "served afterwards"


@check(SECTION)
def crowd(target: Target) -> str:
    """Ten connections at the same time: the first one works on."""
    with target.guest() as guest, ExitStack() as crowd:
        for _ in range(10):
            with suppress(VqError):
                crowd.enter_context(Frontend.connect(target.path, timeout=0.2))
        target.driving.exchange(guest)
    return "the first one works on"


def _holdings(pid: int) -> tuple[int, int]:
    """Descriptors of a process, and its shared mappings."""
    folder = Path(f"/proc/{pid}")
    maps = [line for line in (folder / "maps").read_text().splitlines() if " rw-s" in line and "memfd:vq-" in line]
    return len(os.listdir(folder / "fd")), len(maps)


@check(SECTION)
def leaks(target: Target) -> str:
    """Connections that end in the middle of their work leave no fd and no mapping behind."""
    try:
        pid = target.process()
        if pid is None:
            raise Skipped("the process of the back-end belongs to somebody else, so it cannot be looked at")
        _rounds(target, 3)  # what is made once and kept is made now
        before = _settled(pid)
        _rounds(target, ROUNDS)
    except OSError as problem:
        raise Gone(f"the process cannot be looked at any more: {problem}") from problem
    fds, maps = before
    if not until(lambda: all(now <= then for now, then in zip(_holdings(pid), before, strict=True)), SETTLE_S):
        more, mapped = _holdings(pid)
        raise Failed(f"after {ROUNDS} connections {more - fds} fds and {mapped - maps} mappings more than before")
    return f"{fds} fds before and after {ROUNDS} connections"


def _settled(pid: int) -> tuple[int, int]:
    seen = [_holdings(pid)]

    def stable() -> bool:
        seen.append(_holdings(pid))
        return len(seen) >= 8 and len(set(seen[-8:])) == 1

    until(stable, SETTLE_S)
    return seen[-1]


def _rounds(target: Target, count: int) -> None:
    for _ in range(count):
        with target.guest() as guest:
            regions, fds = guest.regions
            # One that fails with its fds on the way, and one for a ring that does not exist.
            wrong = tuple(region._replace(size=1 << 50) for region in regions)
            with suppress(VqError):
                harmless(guest.frontend, Request.SET_MEM_TABLE, wrong, fds)
                harmless(guest.frontend, Request.SET_VRING_KICK, 255, [guest.err_fd])
                harmless(guest.frontend, Request.SET_VRING_NUM, VringState(255, 8), fds)
