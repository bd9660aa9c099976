"""A split-ring device in plain Python, written from the specification (VIRTIO 1.3, 2.7) for reading, not for speed.

It knows the driver only by the raw bytes of the rings: no line of it is shared with the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy

from vq_core.driver import DriverQueue, GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
DESCRIPTOR = numpy.dtype([("addr", "<u8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")])


@dataclass
class Chain:
    """A buffer as the device sees it."""

    head: int
    readable: list[memoryview] = field(default_factory=list)
    writable: list[memoryview] = field(default_factory=list)

    @property
    def payload(self) -> bytes:
        """All device-readable bytes."""
        return b"".join(self.readable)

    @property
    def room(self) -> int:
        """Device-writable bytes."""
        return sum(len(part) for part in self.writable)

    def write(self, data: bytes) -> int:
        """Fill the device-writable parts in order; how many bytes went in."""
        at = 0
        for part in self.writable:
            piece = data[at : at + len(part)]
            part[: len(piece)] = piece
            at += len(piece)
        return at


class ReferenceDevice:
    """The device side of one DriverQueue."""

    def __init__(self, queue: DriverQueue, *, event_idx: bool = False) -> None:
        self.memory: GuestMemory = queue.memory
        self.size = queue.size
        self.desc, self.avail, self.used = queue.desc, queue.avail, queue.used
        self.used_head, self.avail_event = queue.used_head, queue.avail_event
        self.event_idx = event_idx
        self.next_avail = self.next_used = int(self.used_head[1])
        self.decided = self.next_used

    def pop(self) -> Chain | None:
        """Take the next available buffer."""
        if int(self.avail[1]) == self.next_avail:
            return None
        head = int(self.avail[2 + self.next_avail % self.size])
        self.next_avail = (self.next_avail + 1) % 65536
        assert head < self.size
        return self._walk(head)

    def _walk(self, head: int) -> Chain:
        chain = Chain(head)
        table, index, seen = self.desc, head, 0
        while True:
            addr, length, flags, after = (int(value) for value in table[index])
            seen += 1
            assert seen <= len(table), "loop"
            if flags & INDIRECT:
                assert table is self.desc, "nested"
                assert not flags & NEXT
                assert length > 0
                assert length % 16 == 0
                table = numpy.frombuffer(self.memory.view(addr, length), DESCRIPTOR)
                index = seen = 0
                continue
            part = self.memory.view(addr, length)
            if flags & WRITE:
                chain.writable.append(part)
            else:
                assert not chain.writable, "readable after writable"
                chain.readable.append(part)
            if not flags & NEXT:
                return chain
            index = after

    def put(self, head: int, length: int) -> None:
        """Write a used element; the driver sees it after `publish`."""
        self.used[self.next_used % self.size] = (head, length)
        self.next_used = (self.next_used + 1) % 65536

    def skip(self, count: int) -> None:
        """IN_ORDER: the element just written stands for `count` more buffers before it."""
        self.next_used = (self.next_used + count) % 65536

    def publish(self) -> None:
        """Show the used elements."""
        self.used_head[1] = self.next_used

    def wants_call(self) -> bool:
        """Decide about a call, by counting the positions since the last decision one by one."""
        passed, position = set(), self.decided
        while position != self.next_used:
            passed.add(position)
            position = (position + 1) % 65536
        self.decided = self.next_used
        if not self.event_idx:
            return bool(passed) and not int(self.avail[0]) & 1
        return int(self.avail[2 + self.size]) in passed

    def serve(self, answer: Callable[[Chain], int]) -> int:
        """Complete everything that is available with the length that `answer` gives; how many buffers."""
        count = 0
        while (chain := self.pop()) is not None:
            self.put(chain.head, answer(chain))
            count += 1
        self.publish()
        return count
