"""Random rings under a device in Python, against a walk in plain Python: chain by chain, and by the burst."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import vq
from hostile.walker import INDIRECT, NEXT, WRITE, BrokenError, walk
from vq.testing import Guest
from waiting import wait_for

NUM = 16
MEMORY = 4 << 20
DATA = 2 << 20  # from here on: the pattern, and tables
LIMIT = 5000
Seen = list[tuple[bytes, int]]
Connect = Callable[..., Guest]
pytest_plugins = ["vq.testing.plugin"]


class Looker(vq.Device):
    """Notes what comes, and gives it back."""

    max_bytes = LIMIT

    def __init__(self, by_burst: bool) -> None:
        self.by_burst = by_burst
        self.seen: Seen = []
        self.errors: list[Exception] = []

    def handle(self, queue: vq.DeviceQueue) -> None:
        if self.by_burst:
            while burst := queue.pull(5):
                data, offsets = burst.gather()
                parts = [bytes(data[first:end]) for first, end in pairwise(offsets)]
                self.seen += zip(parts, burst.rooms.tolist(), strict=True)
                burst.complete()
        for chain in queue:
            self.seen.append((chain.read(), chain.writable_bytes))
            chain.complete(0)

    def on_error(self, queue: vq.DeviceQueue | None, error: Exception) -> None:
        self.errors.append(error)


def rarely(odd: st.SearchStrategy[Any], usual: st.SearchStrategy[Any], times: int) -> st.SearchStrategy[Any]:
    return st.sampled_from([True] + [False] * (times - 1)).flatmap(lambda is_odd: odd if is_odd else usual)


addresses = rarely(
    st.sampled_from([MEMORY - 7, MEMORY, -1, -(1 << 30), (1 << 64) - (1 << 30) - 8, (1 << 64) - (1 << 30) - 1]),
    st.integers(DATA, MEMORY - 6000),
    25,
)
lengths = rarely(st.sampled_from([0xFFFFFFFF, 0x80000000, 6000]), st.sampled_from([0, 1, 7, 40, 300, 2000]), 25)
flags = rarely(st.sampled_from([WRITE | NEXT | 8, 0xFFF8]), st.sampled_from([0, NEXT, WRITE, WRITE | NEXT]), 15)
rows = st.tuples(addresses, lengths, flags, rarely(st.integers(NUM, 65535), st.integers(0, NUM - 1), 15))
tables = st.lists(rows, min_size=1, max_size=6)


def shown(ring: list[tuple[int, int, int, int]], byte: Callable[[int], int | None], head: int) -> tuple[bytes, int]:
    """What a device sees of a chain."""
    data, room = bytearray(), 0
    for part in walk(ring, byte, head):
        if part.addr + part.length >= 1 << 64:
            raise BrokenError("address outside the guest's memory")
        if part.writable:
            length = min(part.length, LIMIT - room)
            room += length
        elif part.length > LIMIT - len(data):
            raise BrokenError("too long")
        else:
            length = part.length
        found = [byte(part.addr + i) for i in ((0, length - 1) if part.writable else range(length)) if length]
        if None in found:
            raise BrokenError("address outside the guest's memory")
        if not part.writable:
            data += bytes(found)  # type: ignore[arg-type]
    return bytes(data), room


@pytest.mark.checklist(27, 28, 29, 32)
@pytest.mark.parametrize("by_burst", [False, True], ids=["chains", "bursts"])
@given(
    ring=st.lists(rows, min_size=NUM, max_size=NUM),
    indirect=st.lists(st.tuples(st.integers(0, NUM - 1), tables, rarely(st.just(8), st.just(0), 10)), max_size=3),
    heads=st.lists(rarely(st.just(NUM), st.integers(0, NUM - 1), 60), min_size=1, max_size=NUM),
)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_rings(
    vq_guest: Connect, by_burst: bool, ring: list[Any], indirect: list[Any], heads: list[int]
) -> None:
    """Lines 27, 28, 29, 32: a device in Python sees what a walk in plain Python sees, or the queue is broken."""
    device = Looker(by_burst)
    with vq_guest(device, size=NUM, memory_bytes=MEMORY) as guest:
        base, size, *_, fd = guest.memory.regions[0]
        assert size == MEMORY
        with mmap.mmap(fd, MEMORY) as memory:
            memory[DATA:] = bytes(range(251)) * ((MEMORY - DATA) // 251) + bytes((MEMORY - DATA) % 251)
            table = [(base + addr & (1 << 64) - 1, *rest) for addr, *rest in ring]
            for number, (index, entries, odd) in enumerate(indirect):
                place = DATA + 64 * 1024 * number
                for at, (addr, length, flag, after) in enumerate(entries):
                    words = ((base + addr & (1 << 64) - 1, 8), (length, 4), (flag, 2), (after % 8, 2))
                    memory[place + 16 * at : place + 16 * at + 16] = b"".join(
                        value.to_bytes(count, "little") for value, count in words
                    )
                table[index] = (base + place, 16 * len(entries) + odd, INDIRECT, 0)
            copy = bytes(memory)

            def byte(addr: int) -> int | None:
                return copy[addr - base] if base <= addr < base + MEMORY else None

            expected: Seen = []
            cause = None
            for head in heads:
                try:
                    expected.append(shown(table, byte, head))
                except BrokenError as error:
                    cause = str(error)
                    break
            driver = guest.drivers[0]
            for at, row in enumerate(table):
                for name, value in zip(("addr", "len", "flags", "next"), row, strict=True):
                    driver.desc[name][at] = value
            driver.avail[2 : 2 + len(heads)] = heads
            driver.avail[1] = len(heads)
            driver.kick()
            event("whole" if cause is None else cause)
            if cause is None:
                wait_for(lambda: len(device.seen) == len(heads))
            else:
                wait_for(lambda: device.queues[0].broken)
                assert cause in device.queues[0].broken
            guest.frontend.barrier()
            assert device.seen == expected
            assert not device.errors
