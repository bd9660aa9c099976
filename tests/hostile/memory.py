"""Memory that its owner can take away: unsealed files with a ring in them, which a front-end may truncate."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy

from hostile.rings import SplitRing
from vq.frontend import Frontend, RingSetup
from vq.payload import Region

HUGE_PAGE = 2 << 20
DESC, AVAIL, USED = 0, 0x8000, 0x10000  # offsets of a ring's parts
DESCRIPTOR = [("addr", "<u8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")]


def huge_pages_free() -> int:
    """How many huge pages this machine can give."""
    with open("/proc/meminfo") as info:
        return next((int(line.split()[1]) for line in info if line.startswith("HugePages_Free")), 0)


class LoseableMemory:
    """A file of memory that is not sealed, mapped here as well.

    Parameters
    ----------
    size : int
        Bytes.
    guest_addr, user_addr : int
        Where it lies for the guest and the front-end.
    huge : bool
        Out of huge pages.
    """

    def __init__(self, size: int, guest_addr: int, user_addr: int, *, huge: bool = False) -> None:
        self.size, self.guest_addr, self.user_addr = size, guest_addr, user_addr
        self.fd = os.memfd_create("loseable", os.MFD_CLOEXEC | (os.MFD_HUGETLB if huge else 0))
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)

    @property
    def region(self) -> Region:
        return Region(self.guest_addr, self.size, self.user_addr, 0)

    def ring(self, num: int, offset: int = 0) -> SplitRing:
        """A ring whose parts lie at their places behind `offset`."""

        def view(at: int, kind: Any, count: int) -> Any:
            return numpy.frombuffer(self.bytes, kind, count, offset + at)

        return SplitRing(
            view(DESC, DESCRIPTOR, num),
            view(AVAIL, "<u2", num + 3),
            view(USED + 4, [("id", "<u4"), ("len", "<u4")], num),
            view(USED, "<u2", 2),
        )

    def start(
        self, frontend: Frontend, index: int, num: int, kick: int, call: int | None, err: int, offset: int = 0
    ) -> None:
        """Start such a ring."""
        base = self.user_addr + offset
        frontend.start_ring(RingSetup(index, num, base + DESC, base + AVAIL, base + USED, 0, kick, call, err))

    def truncate(self, size: int = 0) -> None:
        """Take the memory away; who touches it gets a SIGBUS (here as well: nobody here does)."""
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        os.close(self.fd)
