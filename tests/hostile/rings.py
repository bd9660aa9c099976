"""Rings of both layouts by their bytes: nothing keeps their user from writing nonsense.

Both have the same verbs, so that a test which is not about a layout is written once. Descriptors are laid out in a
table (`put`, `chain`) and made available from there (`offer`); used elements are read by their position.
"""

from __future__ import annotations

from typing import Any

import numpy

from reference_device import AVAIL, DESC, DESCRIPTOR, DISABLE, NEXT, PACKED_DESCRIPTOR, USED, WRITE, Place
from vq import virtio as v
from vq_core.driver import DriverQueue

LAYOUTS = {"split": 0, "packed": v.mask(v.VIRTIO_F_RING_PACKED)}


class Table:
    """The descriptors that a test writes, and the heads that it names.

    Parameters
    ----------
    desc : ndarray
        Entries (addr, len, flags, next).
    """

    def __init__(self, desc: Any) -> None:
        self.desc = desc
        self.num = len(desc)

    def put(self, index: int, addr: int, length: int, flags: int = 0, after: int = 0) -> None:
        """Write a descriptor."""
        self.desc[index] = (addr, length, flags, after)

    def chain(self, *parts: tuple[int, int, int], first: int = 0) -> int:
        """Write parts (addr, length, flags) into neighbouring descriptors joined by NEXT; gives the head."""
        for number, (addr, length, flags) in enumerate(parts):
            last = number == len(parts) - 1
            self.put(first + number, addr, length, flags | (0 if last else NEXT), 0 if last else first + number + 1)
        return first


class SplitRing(Table):
    """A split ring, where the table is the ring's own.

    Parameters
    ----------
    desc, avail, used, used_head : ndarray
        Views of the driver API.
    """

    def __init__(self, desc: Any, avail: Any, used: Any, used_head: Any) -> None:
        super().__init__(desc)
        self.avail, self.used, self.used_head = avail, used, used_head

    @property
    def avail_idx(self) -> int:
        return int(self.avail[1])

    @property
    def used_idx(self) -> int:
        return int(self.used_head[1])

    def want_no_calls(self) -> None:
        """Ask for no call before thousands of buffers more."""
        self.avail[2 + self.num] = (self.used_idx + 30000) % 65536

    def want_call(self) -> None:
        """Ask for a call at the next used buffer."""
        self.avail[2 + self.num] = self.used_idx

    def restart(self, base: int) -> None:
        """The ring was cleared and goes on at `base`; all that is known stands in it."""

    def offer(self, *heads: int) -> None:
        """Make heads available, whatever they are."""
        position = self.avail_idx
        for head in heads:
            self.avail[2 + position % self.num] = head
            position = (position + 1) % 65536
        self.avail[1] = position

    def again(self, count: int | None = None) -> None:
        """Make buffers available once more, whatever they are: so many, or as many as the ring has."""
        self.avail[1] = (self.used_idx + (self.num if count is None else count)) % 65536

    def overwrite(self, table: Any) -> None:
        """Replace all descriptors."""
        self.desc[:] = table

    def heads_in_order(self, base: int) -> None:
        """Let each entry of the available ring, which stands at `base`, name the descriptor of its number."""
        self.avail[2:-1] = numpy.arange(self.num)
        self.avail[1] = base

    def element(self, position: int) -> tuple[int, int]:
        """The used element at a position: (id, length)."""
        used = self.used[position % self.num]
        return int(used["id"]), int(used["len"])


def packed_table(table: Any) -> Any:
    """The entries of a split table in the packed form, with `next` as the buffer id."""
    entries = numpy.empty(len(table), PACKED_DESCRIPTOR)
    entries["addr"], entries["len"], entries["id"], entries["flags"] = (
        table[name] for name in ("addr", "len", "next", "flags")
    )
    return entries


class PackedRing(Table):
    """A packed ring and the table that its chains are copied from, under the head as their buffer id.

    Positions count buffers from the last restart on.

    Parameters
    ----------
    queue : DriverQueue
        Whose ring it is. As soon as the driver itself uses it, only the driver knows where it stands.
    """

    def __init__(self, queue: DriverQueue) -> None:
        super().__init__(numpy.zeros(queue.size, DESCRIPTOR))
        self.queue, self.ring = queue, queue.desc
        self.restart(queue.used_idx)

    def restart(self, base: int) -> None:
        """The ring was cleared and goes on at `base`: a slot and its wrap counter."""
        self._avail = self._used = Place(self.num, base & 0x7FFF, base >> 15 & 1)
        self._lap = self._avail.moved(self.num).available
        self._slots: dict[int, list[int]] = {}
        self._elements: list[tuple[int, int]] = []
        self.avail_idx = 0

    @property
    def used_idx(self) -> int:
        while self.avail_idx != len(self._elements):
            flags = int(self.ring[self._used.slot]["flags"])  # before all else: the device writes them last
            if flags & (AVAIL | USED) != self._used.used:
                break
            _, length, number, _ = (int(value) for value in self.ring[self._used.slot])
            self._elements.append((number, length if flags & WRITE else 0))
            self._used = self._used.moved(self._slots[number].pop(0))
        return len(self._elements)

    def want_no_calls(self) -> None:
        """Ask for no call."""
        self.queue.driver_event[1] = DISABLE

    def want_call(self) -> None:
        """Ask for a call at the next used buffer."""
        self.queue.driver_event[:] = (self._used.off_wrap, DESC)

    def offer(self, *heads: int) -> None:
        """Make the chains at these heads available, all at once."""
        held = None
        for head in heads:
            rows = self._rows(head)
            self._slots.setdefault(head, []).append(len(rows))
            for addr, length, flags in rows:
                slot, flags = self._avail.slot, flags & ~(AVAIL | USED) | self._avail.available
                if held is None:
                    held = slot, flags
                    self.ring[slot] = (addr, length, head, self._avail.used)
                else:
                    self.ring[slot] = (addr, length, head, flags)
                self._avail = self._avail.moved(1)
        if held is not None:
            self.ring[held[0]]["flags"] = held[1]
        self.avail_idx += len(heads)

    def again(self, count: int | None = None) -> None:
        """Copy the table into the ring once more, as available in the other lap than the last time.

        In the end the device has passed all of it, as often as this is done.
        """
        self._lap ^= AVAIL | USED
        self._copy()

    def overwrite(self, table: Any) -> None:
        """Replace all descriptors, as available as those before."""
        self.desc[:] = table
        self._copy()

    def _copy(self) -> None:
        entries = packed_table(self.desc)
        entries["flags"] ^= self._lap
        self.ring[:] = entries

    def heads_in_order(self, base: int) -> None:
        """There are no heads apart from the descriptors."""

    def _rows(self, head: int) -> list[tuple[int, int, int]]:
        rows, flags = [], NEXT
        while flags & NEXT:
            addr, length, flags, after = (int(value) for value in self.desc[head])
            rows.append((addr, length, flags))
            head = after
            assert len(rows) <= self.num, "a chain has an end here"
        return rows

    def element(self, position: int) -> tuple[int, int]:
        """The used element at a position: (id, length)."""
        assert position < self.used_idx
        return self._elements[position]


def ring_of(queue: DriverQueue) -> Any:
    """The ring of a driver's queue, by its bytes."""
    if queue.layout == "packed":
        return PackedRing(queue)
    return SplitRing(queue.desc, queue.avail, queue.used, queue.used_head)
