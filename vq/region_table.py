"""The memory table as the session knows it: which regions are live, and whether a new one may join them.

Two key spaces: guest addresses and the front-end's user addresses. Live regions overlap in neither. What the file
behind a region really holds is checked where it is mapped.

Spec: vhost-user, "Memory regions description".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vq.effects import MemoryRegion
from vq.errors import FrontendError
from vq.payload import Region

ADDRESS_END = 1 << 64


class LiveRegion(NamedTuple):
    """A region that is mapped, and the file it came from."""

    region: Region
    device: int
    inode: int


def live(region: Region, fd: int) -> LiveRegion:
    """Describe a region with the identity of its file, so that the same table sent twice can be recognised."""
    status = os.fstat(fd)
    return LiveRegion(region, status.st_dev, status.st_ino)


def with_fd(region: Region, fd: int = -1) -> MemoryRegion:
    """Make the record that the data plane gets."""
    return MemoryRegion(*region, fd)


def same_region(one: Region, other: Region) -> bool:
    """Tell whether two records name the same region; the offset in the file does not count."""
    return one[:3] == other[:3]


def check_regions(request: str, regions: Sequence[Region]) -> None:
    """Check that regions may live together.

    Raises
    ------
    FrontendError
        A region is empty, passes the end of an address space, or overlaps another.
    """
    for region in regions:
        where = f"region at {region.guest_addr:#x}: "
        if region.size == 0:
            raise FrontendError(request, where + "size", 0, "a region has at least 1 byte")
        for field in ("guest_addr", "user_addr", "mmap_offset"):
            start: int = getattr(region, field)
            if start > ADDRESS_END - region.size:
                limit = f"with {region.size:#x} bytes it passes 2^64"
                raise FrontendError(request, where + field, f"{start:#x}", limit)
    _check_overlap(request, "guest_addr", ((region.guest_addr, region.size) for region in regions))
    _check_overlap(request, "user_addr", ((region.user_addr, region.size) for region in regions))


def _check_overlap(request: str, field: str, ranges: Iterable[tuple[int, int]]) -> None:
    end = 0
    for start, size in sorted(ranges):
        if start < end:
            raise FrontendError(request, field, f"{start:#x}", f"a region before it ends at {end:#x}; no overlaps")
        end = start + size
