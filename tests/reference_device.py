"""A device in plain Python, written from the specification (VIRTIO 1.3, 2.7 and 2.8) for reading, not for speed.

It knows the driver only by the raw bytes of the rings: no line of it is shared with the code under test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy

from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2
EVENT_IDX = 1 << 29
DESCRIPTOR = numpy.dtype([("addr", "<u8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")])
PACKED_DESCRIPTOR = numpy.dtype([("addr", "<u8"), ("len", "<u4"), ("id", "<u2"), ("flags", "<u2")])


@dataclass
class Chain:
    """A buffer as the device sees it."""

    head: int
    slots: int = 1
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

    def append(self, part: memoryview, flags: int) -> None:
        """Add a descriptor's bytes; readable ones come first."""
        if flags & WRITE:
            self.writable.append(part)
        else:
            assert not self.writable, "readable after writable"
            self.readable.append(part)

    def write(self, data: bytes) -> int:
        """Fill the device-writable parts in order; how many bytes went in."""
        at = 0
        for part in self.writable:
            piece = data[at : at + len(part)]
            part[: len(piece)] = piece
            at += len(piece)
        return at


class Device(ABC):
    """The device side of one DriverQueue."""

    def __init__(self, queue: DriverQueue) -> None:
        self.memory: GuestMemory = queue.memory
        self.size = queue.size
        self.desc = queue.desc
        self.event_idx = bool(queue.features & EVENT_IDX)

    @abstractmethod
    def pop(self) -> Chain | None:
        """Take the next available buffer."""

    @abstractmethod
    def unpop(self, chains: Sequence[Chain]) -> None:
        """Give back the buffers that were taken last, as if they had not been."""

    @abstractmethod
    def put(self, head: int, length: int, skipped: Sequence[Chain] = ()) -> None:
        """Write a used element; the driver sees it after `publish`. IN_ORDER: it stands for `skipped` too."""

    @abstractmethod
    def publish(self) -> None:
        """Show the used elements."""

    @abstractmethod
    def want_kick(self, ahead: int) -> None:
        """Ask for a kick when the position `ahead` of what was made available so far is passed."""

    @abstractmethod
    def want_kicks(self, wanted: bool) -> None:
        """Ask for all kicks or for none."""

    @abstractmethod
    def wants_call(self) -> bool:
        """Decide about a call, by looking at the positions since the last decision one by one."""

    def serve(self, answer: Callable[[Chain], int]) -> int:
        """Complete everything that is available with the length that `answer` gives; how many buffers."""
        count = 0
        while (chain := self.pop()) is not None:
            self.put(chain.head, answer(chain))
            count += 1
        self.publish()
        return count


class SplitDevice(Device):
    """VIRTIO 1.3, 2.7."""

    def __init__(self, queue: DriverQueue) -> None:
        super().__init__(queue)
        self.avail, self.used = queue.avail, queue.used
        self.used_head, self.avail_event = queue.used_head, queue.avail_event
        self.next_avail = self.next_used = int(self.used_head[1])
        self.decided = self.next_used

    def pop(self) -> Chain | None:
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
            chain.append(self.memory.view(addr, length), flags)
            if not flags & NEXT:
                return chain
            index = after

    def unpop(self, chains: Sequence[Chain]) -> None:
        self.next_avail = (self.next_avail - len(chains)) % 65536

    def put(self, head: int, length: int, skipped: Sequence[Chain] = ()) -> None:
        self.used[self.next_used % self.size] = (head, length)
        self.skip(1 + len(skipped))

    def skip(self, count: int) -> None:
        """Move the used index without writing an element."""
        self.next_used = (self.next_used + count) % 65536

    def publish(self) -> None:
        self.used_head[1] = self.next_used

    def want_kick(self, ahead: int) -> None:
        self.avail_event[0] = (int(self.avail[1]) + ahead) % 65536

    def want_kicks(self, wanted: bool) -> None:
        self.used_head[0] = not wanted

    def wants_call(self) -> bool:
        passed, position = set(), self.decided
        while position != self.next_used:
            passed.add(position)
            position = (position + 1) % 65536
        self.decided = self.next_used
        if not self.event_idx:
            return bool(passed) and not int(self.avail[0]) & 1
        return int(self.avail[2 + self.size]) in passed


class Place:
    """A slot of a packed ring and the wrap counter that belongs to it."""

    def __init__(self, size: int, slot: int, wrap: int) -> None:
        self.size, self.slot, self.wrap = size, slot, wrap

    def moved(self, count: int) -> Place:
        """The place `count` slots on, or back."""
        laps, slot = divmod(self.slot + count, self.size)
        return Place(self.size, slot, (self.wrap + laps) % 2)

    @property
    def available(self) -> int:
        """AVAIL and USED of a descriptor that was made available here."""
        return AVAIL if self.wrap else USED

    @property
    def used(self) -> int:
        """AVAIL and USED of a descriptor that was used here."""
        return AVAIL | USED if self.wrap else 0

    @property
    def off_wrap(self) -> int:
        """The form of event structures."""
        return self.slot | self.wrap << 15


class PackedDevice(Device):
    """VIRTIO 1.3, 2.8."""

    def __init__(self, queue: DriverQueue) -> None:
        super().__init__(queue)
        self.driver_event, self.device_event = queue.driver_event, queue.device_event
        position = queue.used_idx  # what a front-end says with SET_VRING_BASE
        self.next_avail = self.next_used = Place(self.size, position & 0x7FFF, position >> 15)
        self.decided = self.next_used
        self.taken: dict[int, Chain] = {}
        self.staged: list[tuple[Place, int, int, int]] = []

    def pop(self) -> Chain | None:
        place = self.next_avail
        if int(self.desc[place.slot]["flags"]) & (AVAIL | USED) != place.available:
            return None
        chain = Chain(-1, 0)
        while True:
            addr, length, chain.head, flags = (int(value) for value in self.desc[place.slot])
            assert flags & (AVAIL | USED) == place.available, "the end of a chain was not there with its head"
            place = place.moved(1)
            chain.slots += 1
            assert chain.slots <= self.size, "loop"
            if flags & INDIRECT:
                assert chain.slots == 1
                assert not flags & (NEXT | WRITE)
                assert length > 0
                assert length % 16 == 0
                for entry in numpy.frombuffer(self.memory.view(addr, length), PACKED_DESCRIPTOR):
                    part, size, _, table_flags = (int(value) for value in entry)
                    assert table_flags & ~WRITE == 0, "2.8.8: reserved in a table"
                    chain.append(self.memory.view(part, size), table_flags)
            else:
                chain.append(self.memory.view(addr, length), flags)
            if not flags & NEXT:
                break
        assert chain.head < self.size
        assert chain.head not in self.taken, "the id of another buffer"
        self.taken[chain.head] = chain
        self.next_avail = place
        return chain

    def unpop(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            del self.taken[chain.head]
        self.next_avail = self.next_avail.moved(-sum(chain.slots for chain in chains))

    def put(self, head: int, length: int, skipped: Sequence[Chain] = ()) -> None:
        # A device that breaks the rules may name what it never took: one slot.
        chains = [*skipped, self.taken.get(head, Chain(head))]
        self.put_raw(head, length, WRITE if length else 0)
        self.next_used = self.next_used.moved(sum(chain.slots for chain in chains) - 1)
        for chain in chains:
            self.taken.pop(chain.head, None)

    def put_raw(self, head: int, length: int, flags: int) -> None:
        """Write a used descriptor of one slot, whatever it says."""
        self.staged.append((self.next_used, head, length, flags))
        self.next_used = self.next_used.moved(1)

    def publish(self) -> None:
        for place, head, length, flags in reversed(self.staged):
            addr = self.desc[place.slot]["addr"]
            self.desc[place.slot] = (addr, length, head, flags | place.used)
        self.staged.clear()

    def want_kick(self, ahead: int) -> None:
        place = self.seen_avail().moved(ahead)
        self.device_event[:] = (place.off_wrap, DESC)

    def seen_avail(self) -> Place:
        """The first place that was not made available yet."""
        place = self.next_avail
        for _ in range(self.size):
            if int(self.desc[place.slot]["flags"]) & (AVAIL | USED) != place.available:
                break
            place = place.moved(1)
        return place

    def want_kicks(self, wanted: bool) -> None:
        self.device_event[1] = ENABLE if wanted else DISABLE

    def wants_call(self) -> bool:
        passed, place = set(), self.decided
        while place.off_wrap != self.next_used.off_wrap:
            passed.add(place.off_wrap)
            place = place.moved(1)
        self.decided = self.next_used
        off_wrap, flags = (int(value) for value in self.driver_event)
        if not passed or flags == DISABLE:
            return False
        if flags == DESC:
            assert self.event_idx, "EVENT_IDX was not negotiated"
            return off_wrap in passed
        return True


def reference_device(queue: DriverQueue) -> Device:
    """The device side of a queue, in its layout."""
    return (PackedDevice if queue.layout == "packed" else SplitDevice)(queue)
