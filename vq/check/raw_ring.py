"""Rings by their bytes, so that a check can write what no driver would.

Both layouts take chains as rows (guest address, length, flags), between which `joined` adds NEXT.

Spec: VIRTIO 1.3, 2.7 and 2.8.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from vq_core.driver import DriverQueue

__all__ = ["INDIRECT", "NEXT", "WRITE", "RawRing", "Row", "joined", "table"]

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
PACKED_AVAIL: Final = 1 << 7
PACKED_USED: Final = 1 << 15

Row = tuple[int, int, int]  # guest address, length, flags
_DESC: Final = struct.Struct("<QIHH")


def joined(rows: Sequence[Row]) -> list[Row]:
    """Add NEXT between rows."""
    last = len(rows) - 1
    return [(addr, length, flags | (NEXT if row < last else 0)) for row, (addr, length, flags) in enumerate(rows)]


def table(rows: Sequence[Row], packed: bool) -> bytes:
    """Lay out an indirect table whose entries follow each other."""
    entries = []
    for number, (addr, length, flags) in enumerate(joined(rows)):
        after = number + 1 if flags & NEXT else 0
        entries.append(_DESC.pack(addr, length, 0, flags) if packed else _DESC.pack(addr, length, flags, after))
    return b"".join(entries)


class RawRing:
    """A fresh ring of a driver that does not keep the rules.

    Parameters
    ----------
    queue
        Whose memory and fds are used; the queue itself must not be used besides.
    """

    def __init__(self, queue: DriverQueue) -> None:
        self.queue = queue
        self.num = queue.size
        self.packed = queue.layout == "packed"
        self._slot = 0

    def put(self, index: int, row: Row, after: int = 0) -> None:
        """Write a descriptor of a split ring."""
        addr, length, flags = row
        self.queue.desc[index] = (addr, length, flags, after)

    def chain(self, rows: Sequence[Row]) -> None:
        """Write a whole chain and make it available: at descriptor 0, or at the next slots of a packed ring."""
        rows = joined(rows)
        if self.packed:
            self.slots(rows)
            return
        for number, row in enumerate(rows):
            self.put(number, row, number + 1 if row[2] & NEXT else 0)
        self.offer(0)

    def slots(self, rows: Sequence[Row], buffer_id: int = 0) -> None:
        """Write slots of a packed ring and make them available, whatever they say; the first one becomes so last."""
        first = self._slot
        for number, (addr, length, flags) in reversed(list(enumerate(rows))):
            self.queue.desc[first + number] = (addr, length, buffer_id, flags | PACKED_AVAIL)
        self._slot += len(rows)

    def offer(self, *heads: int) -> None:
        """Make heads of a split ring available, whatever they are."""
        avail = self.queue.avail
        position = int(avail[1])
        for head in heads:
            avail[2 + position % self.num] = head
            position = (position + 1) % 65536
        avail[1] = position

    def jump(self, index: int) -> None:
        """Set the available index of a split ring."""
        self.queue.avail[1] = index % 65536

    @property
    def used(self) -> bool:
        """Whether the device has used anything of the ring."""
        if self.packed:
            return bool(int(self.queue.desc[0]["flags"]) & PACKED_USED)
        return int(self.queue.used_head[1]) != 0

    @property
    def used_length(self) -> int:
        """What the device says it wrote of the first buffer that it used."""
        return int(self.queue.desc[0]["len"] if self.packed else self.queue.used[0]["len"])
