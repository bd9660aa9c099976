"""Translations of an IOMMU: views against a readable reference, limits, and what becomes of misses."""

from __future__ import annotations

import os
import random
import select
from collections.abc import Iterator
from itertools import pairwise

import pytest

from vq_core.guest_memory import GuestMemory
from vq_core.iotlb import Iotlb
from vq_core.memory import MemoryMap
from vq_core.queue import settle

PAGE = 4096
END = 1 << 64
GPA, UVA = 0x4000_0000, 0x7E12_0000_0000
READ, WRITE, BOTH = 1, 2, 3
SIZE = 64 * PAGE


class Reference:
    """What an IOTLB means: for each byte, here for each unit of 256, its guest address and permissions."""

    UNIT = 256

    def __init__(self) -> None:
        self.units: dict[int, tuple[int, int]] = {}

    def update(self, iova: int, size: int, guest_addr: int, perm: int) -> bool:
        changed = False
        for offset in range(0, size, self.UNIT):
            old = self.units.get(iova + offset)
            new = (guest_addr + offset, perm)
            changed |= old is not None and (old[0] != new[0] or bool(old[1] & ~perm))
            self.units[iova + offset] = new
        return changed

    def invalidate(self, iova: int, last: int) -> bool:
        gone = [unit for unit in self.units if iova <= unit <= last]
        for unit in gone:
            del self.units[unit]
        return bool(gone)

    def translate(self, iova: int, length: int, perm: int) -> tuple[int, int] | None:
        """The first address, and how far all that follows lies behind it, as far as permissions are the same."""
        first = self.units.get(iova // self.UNIT * self.UNIT)
        if first is None or perm & ~first[1]:
            return None
        base = first[0] + iova % self.UNIT
        part = self.UNIT - iova % self.UNIT
        while part < length and self.units.get(iova + part) == (base + part, first[1]):
            part += self.UNIT
        return base, min(part, length)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(SIZE, guest_addr=GPA, user_addr=UVA) as memory:
        memory.add_region(SIZE)
        yield memory


@pytest.fixture
def iotlb(memory: GuestMemory) -> Iterator[Iotlb]:
    iotlb = Iotlb()
    iotlb.set_memory(MemoryMap(memory.regions))
    yield iotlb
    iotlb.close()


@pytest.mark.parametrize("seed", range(6))
def test_random_changes_mean_what_the_reference_says(iotlb: Iotlb, seed: int) -> None:
    dice = random.Random(seed)
    reference = Reference()
    start = dice.choice([0, 0x7FFF_FFFF_0000, END - 128 * PAGE])
    unit = Reference.UNIT
    for step in range(600):
        iova = start + dice.randrange(128) * PAGE + dice.choice([0, 0, unit, 7 * unit])
        size = dice.choice([unit, PAGE, PAGE, 3 * PAGE, 16 * PAGE])
        size = min(size, END - iova)
        kind = dice.random()
        if kind < 0.5:
            offset = dice.randrange(SIZE - size) // unit * unit
            perm = dice.choice([READ, WRITE, BOTH, BOTH])
            assert iotlb.update(iova, size, UVA + offset, perm) == reference.update(iova, size, GPA + offset, perm)
        elif kind < 0.6:
            last = dice.choice([iova + size - 1, END - 1])
            gone = reference.invalidate(iova, last)
            assert iotlb.invalidate(iova, last) or not gone
            settle(iotlb, [])
        for _ in range(8):
            at, length = start + dice.randrange(128 * PAGE), dice.choice([1, 100, PAGE, 20 * PAGE])
            length = min(length, END - at)
            perm = dice.choice([READ, WRITE, BOTH])
            assert iotlb.translate(at, length, perm) == reference.translate(at, length, perm), f"step {step}"
    entries = iotlb.entries
    assert all(one[1] < other[0] for one, other in pairwise(entries))
    iotlb.invalidate(0, END - 1)
    assert iotlb.entries == []


def test_neighbours_are_one_entry_only_if_they_are_contiguous_everywhere(iotlb: Iotlb) -> None:
    iotlb.update(0x1000, PAGE, UVA, BOTH)
    iotlb.update(0x3000, PAGE, UVA + 2 * PAGE, BOTH)
    iotlb.update(0x2000, PAGE, UVA + PAGE, BOTH)
    assert iotlb.entries == [(0x1000, 0x3FFF, GPA, BOTH)]
    iotlb.update(0x4000, PAGE, UVA + 3 * PAGE, READ)  # other permissions
    iotlb.update(0x5000, PAGE, UVA + 8 * PAGE, READ)  # other memory
    assert [entry[0] for entry in iotlb.entries] == [0x1000, 0x4000, 0x5000]
    assert iotlb.guest_address(0x1000, 4 * PAGE, READ) == GPA
    assert iotlb.guest_address(0x1000, 4 * PAGE, WRITE) is None
    assert iotlb.guest_address(0x1000, 5 * PAGE, READ) is None


def test_regions_that_follow_for_the_guest_alone_are_two_entries(iotlb: Iotlb, memory: GuestMemory) -> None:
    second = memory.regions[1]
    memory_map = MemoryMap([(GPA, SIZE, UVA, 0, memory.regions[0][4]), (GPA + SIZE, SIZE, *second[2:])])
    iotlb.set_memory(memory_map)
    iotlb.update(0, SIZE, UVA, BOTH)
    iotlb.update(SIZE, SIZE, second[2], BOTH)
    assert len(iotlb.entries) == 2
    assert iotlb.translate(SIZE - 10, 20, READ) == (GPA + SIZE - 10, 10)
    assert iotlb.guest_address(SIZE - 10, 20, READ) is None
    assert iotlb.lacking(SIZE - 10, 20, READ) == []


@pytest.mark.parametrize(
    ("iova", "size", "address", "perm"),
    [
        (0, 0, UVA, BOTH),
        (END - PAGE, PAGE + 1, UVA, BOTH),
        (0, PAGE, UVA, 0),
        (0, PAGE, UVA, 4),
        (0, PAGE, UVA - 1, BOTH),
        (0, SIZE + 1, UVA, BOTH),
        (0, PAGE, UVA + SIZE - PAGE + 1, BOTH),
        (0, END - 1, UVA, BOTH),
        (0, PAGE, END - 1, BOTH),
        (0, PAGE, GPA, BOTH),
    ],
)
def test_what_an_update_must_not_say(iotlb: Iotlb, iova: int, size: int, address: int, perm: int) -> None:
    iotlb.update(0x1000, PAGE, UVA, BOTH)
    with pytest.raises(ValueError, match="IOTLB update"):
        iotlb.update(iova, size, address, perm)
    assert iotlb.entries == [(0x1000, 0x1FFF, GPA, BOTH)]


def test_updates_by_guest_address(iotlb: Iotlb) -> None:
    iotlb.update(0, PAGE, GPA + PAGE, READ, guest_addresses=True)
    assert iotlb.entries == [(0, PAGE - 1, GPA + PAGE, READ)]
    with pytest.raises(ValueError, match="one memory region"):
        iotlb.update(0, PAGE, UVA, READ, guest_addresses=True)


def test_a_range_may_end_where_the_address_space_ends(iotlb: Iotlb) -> None:
    iotlb.update(END - PAGE, PAGE, UVA, BOTH)
    assert iotlb.translate(END - 1, 1, WRITE) == (GPA + PAGE - 1, 1)
    assert iotlb.guest_address(END - PAGE, PAGE, BOTH) == GPA
    assert iotlb.lacking(END - PAGE, PAGE, BOTH) == []
    assert iotlb.invalidate(0xFEF0_0000, END - 1)
    assert iotlb.entries == []


def test_the_cache_is_bounded_and_keeps_what_came_last(iotlb: Iotlb) -> None:
    for number in range(5000):
        iotlb.update(number * 2 * PAGE, PAGE, UVA + number % 64 * PAGE, BOTH)
        assert iotlb.translate(number * 2 * PAGE, 1, BOTH) is not None
        if iotlb.crowded:
            settle(iotlb, [])
    assert len(iotlb.entries) == 2048
    iotlb.invalidate(iotlb.entries[5][0] + 10, iotlb.entries[5][0] + 20)
    assert len(iotlb.entries) == 2048  # one was cut in two, another driven out


def test_memory_that_goes_takes_its_entries_along(iotlb: Iotlb, memory: GuestMemory) -> None:
    table = MemoryMap(memory.regions)
    iotlb.set_memory(table)
    second = memory.regions[1]
    iotlb.update(0, SIZE, UVA, BOTH)
    iotlb.update(SIZE, SIZE, second[2], BOTH)
    third = memory.add_region(PAGE)
    more = table.plus(memory.regions[2])
    assert not iotlb.set_memory(more)  # nothing is lost by a region more
    assert len(iotlb.entries) == 2
    assert iotlb.set_memory(more.minus(*second[:3]))
    assert iotlb.entries == [(0, SIZE - 1, GPA, BOTH)]
    with pytest.raises(ValueError, match="one memory region"):
        iotlb.update(SIZE, PAGE, second[2], BOTH)
    iotlb.update(SIZE, PAGE, third.user_addr, BOTH)
    assert iotlb.set_memory(MemoryMap(memory.regions))  # the same table mapped anew lies elsewhere
    assert iotlb.entries == []
    iotlb.update(0, PAGE, UVA, BOTH)
    assert iotlb.set_memory(None)
    assert iotlb.entries == []
    settle(iotlb, [])
    with pytest.raises(ValueError, match="no memory table"):
        iotlb.update(0, PAGE, UVA, BOTH)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_a_miss_is_asked_for_once_until_it_is_answered_or_too_old(iotlb: Iotlb) -> None:
    assert not readable(iotlb.fileno())
    for iova in (0x1010, 0x1020, 0x2000):
        iotlb.miss(iova, WRITE)
    iotlb.miss(0x1030, READ)
    assert readable(iotlb.fileno())
    assert sorted(iotlb.ask(64)) == [(0x1010, WRITE), (0x1030, READ), (0x2000, WRITE)]
    assert not readable(iotlb.fileno())
    iotlb.miss(0x1010, WRITE)
    assert not readable(iotlb.fileno())
    assert (iotlb.ask(64), iotlb.open) == ([], 3)
    iotlb.update(0x1000, PAGE, UVA, READ)  # answers one of them
    assert iotlb.open == 2
    assert iotlb.expire(3600) == 0
    assert iotlb.expire(0) == 2
    iotlb.miss(0x1010, WRITE)
    assert iotlb.ask(64) == [(0x1010, WRITE)]


def test_what_has_come_meanwhile_is_not_asked_for(iotlb: Iotlb) -> None:
    """Somebody misses a page in an older view: its driver may have taken it away again when the question arrives."""
    iotlb.update(0x1000, PAGE, UVA, READ)
    iotlb.miss(0x1010, READ)
    iotlb.miss(0x1010, WRITE)
    assert iotlb.ask(64) == [(0x1010, WRITE)]
    assert iotlb.open == 1
    iotlb.invalidate(0x1000, 0x1FFF)
    iotlb.miss(0x1010, READ)
    assert iotlb.ask(64) == [(0x1010, READ)]


def test_questions_in_doubt_are_old(iotlb: Iotlb) -> None:
    assert iotlb.age == 0
    for iova in (0x1010, 0x3010):
        iotlb.miss(iova, READ)
    iotlb.ask(64)
    assert not iotlb.doubt(0x2000, 0x2FFF, 100)
    assert iotlb.age < 50
    assert iotlb.doubt(0x3000, 0x3FFF, 100)
    assert 100 < iotlb.age < 150
    assert iotlb.doubt(0, 0xFFFF, 10)  # the older remains so
    assert 100 < iotlb.age < 150
    assert (iotlb.expire(50), iotlb.open) == (1, 1)
    iotlb.miss(0x3010, READ)
    assert iotlb.ask(64) == [(0x3010, READ)]


def test_open_questions_are_bounded(iotlb: Iotlb) -> None:
    for number in range(1000):
        iotlb.miss(number * PAGE, READ)
    assert len(iotlb.ask(10)) == 10
    assert iotlb.ask(10) == []
    assert len(iotlb.ask(1000)) == 54  # a table has 64 places
    iotlb.update(0, 3 * PAGE, UVA, READ)
    assert iotlb.open == 61


def test_nothing_is_left_of_it(memory: GuestMemory) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        iotlb = Iotlb()
        iotlb.set_memory(MemoryMap(memory.regions))
        iotlb.update(0, PAGE, UVA, READ)
        iotlb.close()
        iotlb.close()
    del iotlb
    assert len(os.listdir("/proc/self/fd")) == before
