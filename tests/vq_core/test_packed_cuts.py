"""A packed ring whose device ends after any one of its stores: another one goes on, and each buffer is used once.

The engine is stopped after each instruction. Wherever the ring has changed, another engine goes on from there, with
nothing to go by but the marks in the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest

from dirty_rig import LogFile
from engine_rig import PACKED, PAGE, Guest, send_chain
from stepping import states
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

SIZE = 8
BEGINNING = 0x8000_8000  # what QEMU says for a ring whose back-end is gone


class World:
    """A transmitq at some place of its ring, with a burst on it; each world is like every other."""

    def __init__(self, harness: ModuleType, place: int, burst: Sequence[int]) -> None:
        self.harness = harness
        self.memory = GuestMemory(2 << 20)
        self.guest = Guest(PACKED, size=SIZE, memory=self.memory)
        self.prepare(place, burst)
        start, _, _ = self.queue.guest_addresses
        self.ring = self.memory.view(start, 16 * SIZE)

    @property
    def queue(self) -> DriverQueue:
        return self.guest.transmitq

    def prepare(self, place: int, burst: Sequence[int]) -> None:
        self.target = self.harness.Collect()
        for number in range(place):
            send_chain(self.guest, bytes([number]), 1)
            self.guest.transmitq.publish()
            self.act()
            assert len(self.guest.transmitq.poll()) == 1
        for number, descriptors in enumerate(burst):
            send_chain(self.guest, bytes([100 + number] * 9), descriptors)
        self.guest.transmitq.publish()

    def act(self) -> None:
        """Send and use everything, in one burst."""
        self.harness.move(self.guest.port, 0, self.target, 0)

    def close(self) -> None:
        self.guest.stop()
        self.memory.close()


class Receiver(World):
    """The same with a receiveq; packets come that fill a part of each buffer."""

    @property
    def queue(self) -> DriverQueue:
        return self.guest.receiveq

    def prepare(self, place: int, burst: Sequence[int]) -> None:
        self.source = self.harness.Feed()
        for _ in range(place):
            self.offer([1])
            self.act()
            assert len(self.queue.poll()) == 1
        self.offer(burst)

    def offer(self, burst: Sequence[int]) -> None:
        for number, descriptors in enumerate(burst):
            self.queue.add((), [*[self.guest.header_bytes] * (descriptors - 1), 40])
            self.source.add(bytes([100 + number] * 9))
        self.queue.publish()

    def act(self) -> None:
        self.harness.move(self.source, 0, self.guest.port, 0)


def used_after(world: World, state: bytes) -> tuple[list[int], list[int]]:
    """The lengths of what is used by those who ended, and by those who go on from there."""
    world.guest.stop()
    world.ring[:] = state
    before = [length for _, length in world.queue.poll()]
    world.guest.start(base=BEGINNING)
    world.act()
    after = [length for _, length in world.queue.poll()]
    world.close()
    return before, after


BURSTS = [
    *[(place, [1, 1, 1, 1]) for place in (0, 2, 5, 7, 8, 13)],  # at the beginning, over the end, in both laps
    *[(place, [3, 2, 2]) for place in (0, 4, 6, 7, 8, 15)],
    (7, [1]),
    (8, [4]),
]


@pytest.mark.parametrize(("place", "burst"), BURSTS)
def test_each_store_of_a_transmitq(harness: ModuleType, place: int, burst: Sequence[int]) -> None:
    world = World(harness, place, burst)
    seen = list(states(world.act, lambda: bytes(world.ring)))
    world.close()
    assert len(seen) > len(burst)  # as many stores, and how it was before
    for state in seen:
        before, after = used_after(World(harness, place, burst), state)
        assert before + after == [0] * len(burst), (seen.index(state), before, after)


@pytest.mark.parametrize(("place", "burst"), [*BURSTS[:6], (7, [1])])
def test_each_store_of_a_receiveq(harness: ModuleType, place: int, burst: Sequence[int]) -> None:
    """The first buffer of a burst that was cut has its length from the store behind the one that began it."""
    world = Receiver(harness, place, burst)
    seen = list(states(world.act, lambda: bytes(world.ring)))
    length = world.guest.header_bytes + 9
    world.close()
    assert len(seen) > len(burst)
    whole = 0
    for state in seen:
        before, after = used_after(Receiver(harness, place, burst), state)
        used = before + after
        assert len(used) == len(burst), (seen.index(state), before, after)
        if used != [length] * len(burst):
            assert used == [40, *[length] * (len(burst) - 1)]
            whole += 1
    assert whole == (len(burst) > 1)


def test_what_a_successor_exposes_is_in_the_dirty_log(harness: ModuleType) -> None:
    """A guest that is on its way to another host: of a page that is not marked the other host keeps the old one."""
    world = World(harness, 0, [1, 1, 1, 1])
    first = bytes(world.ring[:16])
    world.act()
    world.guest.stop()
    world.ring[:16] = first
    ring, _, events = world.queue.guest_addresses
    log = LogFile(pages=ring // PAGE + 32)
    world.guest.start(base=BEGINNING, log=log.log, log_guest_addr=events)
    assert bytes(world.ring[:16]) != first
    assert log.marked() == {ring // PAGE}
    world.close()
    log.close()


@pytest.mark.parametrize(("burst", "whole"), [([3, 2, 2], 5), ([3], 1), ([2], 1)])
def test_each_store_of_a_receiveq_with_chains(harness: ModuleType, burst: Sequence[int], whole: int) -> None:
    """Here the mark of the second slot and the length in the first are the two stores."""
    world = Receiver(harness, 6, burst)
    seen = list(states(world.act, lambda: bytes(world.ring)))
    world.close()
    assert len(seen) > sum(burst)
    wrong = []
    for state in seen:
        before, after = used_after(Receiver(harness, 6, burst), state)
        used = before + after
        assert len(used) == len(burst)
        if used != [21] * len(burst):
            wrong.append(used)
    for used in wrong:
        assert all(length in (12, 21, 40, 52, 64) for length in used)  # what was used, or all there is
    assert len(wrong) <= whole
