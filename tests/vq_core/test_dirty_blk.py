"""The log of a disk: whatever a request asks for, right or wrong, each page that changes is marked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blk_rig import DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES, BlkGuest, content, header, ranges
from dirty_rig import LogFile, Watch, ring_pages
from engine_rig import EVENT_IDX, INDIRECT, PACKED, PAGE, VERSION_1, Arena, every_layout
from vq_core.disk import Disk
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from waiting import wait_for

FIRST = 0x10_0000
RINGS = 64 * PAGE
ARENA_PAGES = 96
SECTORS = 1 << 11
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("blk") / "disk.img"
    made.write_bytes(content(SECTORS * 512, 9))
    yield made
    made.unlink()


class LoggedDisk:
    """A guest on a disk whose log is on from the start, its memory scattered over regions of a page."""

    def __init__(self, path: Path, features: int, *, read_only: bool = False) -> None:
        memory = GuestMemory(RINGS, guest_addr=FIRST)
        self.arena = Arena(memory, ARENA_PAGES, FIRST + RINGS)
        self.guest = BlkGuest(Disk(path, read_only), features | INDIRECT, memory=memory, start=False)
        self.log = LogFile((FIRST + RINGS) // PAGE + ARENA_PAGES)
        self.writable: set[int] = set()
        self.at = 0

    @property
    def driver(self) -> DriverQueue:
        return self.guest.driver

    def place(self, lengths: list[int], gap: int) -> list[tuple[int, int]]:
        parts, self.at = self.arena.place(self.at, lengths, [gap] * len(lengths))
        return parts

    def add(self, readable: list[bytes], lengths: list[int], *, gap: int = 0, indirect: bool = False) -> None:
        parts = self.place(lengths, gap)
        for addr, length in parts:
            self.writable |= set(range(addr // PAGE, (addr + length - 1) // PAGE + 1))
        self.driver.add(readable, parts, indirect=indirect)

    def run(self, count: int, *, with_ring: bool = True) -> tuple[set[int], set[int]]:
        """Have `count` requests done, or the ring broken: the pages that changed, and those that are marked."""
        self.driver.publish()
        before = Watch(self.guest.memory)
        used = self.driver.guest_addresses[2]
        self.guest.start(log=self.log.log, log_guest_addr=used if with_ring else None)
        queue, done = self.guest.queue, []
        wait_for(lambda: done.extend(self.driver.poll()) or len(done) >= count or queue.broken is not None)
        queue.stop()
        return before.changed(), self.log.marked()

    def ring(self) -> set[int]:
        used = self.driver.guest_addresses[2]
        return ring_pages(self.driver) | {(used + at) // PAGE for at in (0, 4 + 8 * self.driver.size)}

    def close(self) -> None:
        self.guest.close()
        self.log.close()


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[bytes], list[int]]:
    """One request: its readable parts, and the lengths of its writable ones, the status byte behind all data."""
    kind = draw(st.sampled_from([IN, IN, IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77]))
    sector = draw(st.sampled_from([0, 1, 1000, SECTORS - 1, SECTORS, 1 << 62]))
    readable, writable = [header(kind, sector)], [1]
    if kind == IN:
        lengths = st.sampled_from([1, 500, 12, 512, 1024, 4096, 5120, 20000])
        writable = [*draw(st.lists(lengths, min_size=0, max_size=5)), 1]
    elif kind == OUT:
        readable.append(content(draw(st.sampled_from([512, 1536, 4096])), 5))
    elif kind == GET_ID:
        writable = [draw(st.sampled_from([1, 20, 30])), 1]
    elif kind in (DISCARD, WRITE_ZEROES):
        readable.append(ranges((draw(st.sampled_from([8, 1 << 40])), 8, draw(st.sampled_from([0, 1, 4])))))
    if draw(st.booleans()):
        readable = [b"".join(readable)]
    if draw(st.booleans()):
        writable = [*writable[:-2], sum(writable[-2:])]
    return readable, writable


@pytest.mark.shows("VHOST_F_LOG_ALL", "SET_VRING_ADDR")
@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, PACKED, PACKED | EVENT_IDX])
@many
@given(data=st.data())
def test_every_changed_page_is_marked(path: Path, features: int, data: st.DataObject) -> None:
    disk = LoggedDisk(path, features, read_only=data.draw(st.booleans(), "read-only"))
    try:
        count = 0
        for readable, writable in data.draw(st.lists(requests(), min_size=1, max_size=8), "requests"):
            gap = data.draw(st.sampled_from([0, 1, 3000]), "gap")
            if disk.at + sum(writable) + gap * len(writable) > disk.arena.size:
                break
            disk.add(readable, writable, gap=gap, indirect=data.draw(st.booleans(), "indirect"))
            count += 1
        with_ring = data.draw(st.booleans(), "VRING_F_LOG")
        changed, marked = disk.run(count, with_ring=with_ring)
        if with_ring:
            assert changed <= marked <= disk.writable | disk.ring()
        else:
            assert changed - disk.ring() <= marked <= disk.writable
    finally:
        disk.close()


@every_layout
@pytest.mark.parametrize("kind", [IN, GET_ID, OUT, FLUSH, DISCARD, 77])
def test_the_status_byte_has_a_page_of_its_own(path: Path, layout: int, kind: int) -> None:
    """Data ends a page, the status begins the next: both are marked, and only they; a failed request tells as well."""
    disk = LoggedDisk(path, layout)
    try:
        size = {IN: 4096, GET_ID: 20}.get(kind, 0)
        more = {OUT: [content(512)], DISCARD: [ranges((8, 8, 0))]}.get(kind, [])
        disk.at = 4 * PAGE - size
        disk.add([header(kind, 3), *more], [*([size] if size else []), 1])
        disk.arena.poke(disk.arena.start + 4 * PAGE, b"\xff")
        changed, marked = disk.run(1)
        first = disk.arena.start // PAGE
        assert marked - disk.ring() == {first + 4} | ({first + 3} if size else set())
        assert changed <= marked
    finally:
        disk.close()


@every_layout
def test_a_read_that_fails_midway_is_marked_whole(tmp_path: Path, layout: int) -> None:
    """The file ends in the middle of what is read: the first part was written to the guest, and says so."""
    path = tmp_path / "short.img"
    path.write_bytes(content(1 << 20, 4))
    disk = LoggedDisk(path, layout)
    try:
        os.truncate(path, 4096)
        disk.add([header(IN, 0)], [4096, 4096, 4096, 1])
        changed, marked = disk.run(1)
        assert changed <= marked
        assert len(changed - disk.ring()) >= 2
    finally:
        disk.close()


@every_layout
def test_requests_under_way_when_the_ring_breaks(path: Path, layout: int) -> None:
    """Good ones before a bad one: they are done, and logged, although the ring is broken meanwhile."""
    disk = LoggedDisk(path, layout)
    try:
        for _ in range(3):
            disk.add([header(IN, 5)], [100 * 1024, 1], gap=100)
        disk.add([b"short"], [1])
        changed, marked = disk.run(4)
        assert disk.guest.queue.broken is not None
        assert len(changed - disk.ring()) >= 75
        assert changed <= marked
    finally:
        disk.close()
