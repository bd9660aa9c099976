"""Queues behind an IOMMU, seen from their worker: what a look ahead costs, and when there is nothing to do."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from engine_rig import MRG_RXBUF, PACKED, VERSION_1, asleep, every_layout, running
from vq_core.guest_memory import GuestMemory
from vq_core.iotlb import Iotlb
from vq_core.memory import MemoryMap
from vq_core.plan import Plan
from vq_core.ports.gen import GenPort
from vq_core.ports.vhost import VhostPort
from vq_core.queue import wake
from vq_core.worker import Worker
from waiting import wait_for

ACCESS_PLATFORM = 1 << 33
GPA = 0x4000_0000
DESC, AVAIL, USED, TABLES = GPA, GPA + 0x10_0000, GPA + 0x20_0000, GPA + 0x40_0000
PAIR = 0x8_0000  # from a part of the receiveq to that of the transmitq
SIZE = 16 << 20
WILD = 0x6666_0000_0000  # nothing is mapped there
NUM = 1024
NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL_BIT, USED_BIT = 1 << 7, 1 << 15


class Ring:
    """A pair of rings that are written by hand; their addresses are I/O virtual, and the same as the guest's."""

    def __init__(self, layout: int) -> None:
        features = layout | ACCESS_PLATFORM | MRG_RXBUF
        self.packed = bool(layout & PACKED & ~VERSION_1)
        self.memory = GuestMemory(SIZE, guest_addr=GPA)
        self.map = MemoryMap(self.memory.regions)
        self.iotlb = Iotlb()
        self.iotlb.set_memory(self.map)
        self.iotlb.update(GPA, SIZE, GPA, 3, guest_addresses=True)
        self.port = VhostPort("guest", 1)
        self.port.configure(features)
        base = 0x8000 if self.packed else 0
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        options: dict[str, Any] = {"enabled": True, "iotlb": self.iotlb, "kick_fd": self.kick_fd}
        for queue, at in zip(self.port.queues, (0, PAIR), strict=True):
            queue.start(self.map, NUM, DESC + at, AVAIL + at, USED + at, base, features, **options)

    def write(self, addr: int, data: bytes) -> None:
        self.memory.view(addr, len(data))[:] = data

    def describe(self, slot: int, addr: int, length: int, flags: int, at: int = 0) -> None:
        """Write a descriptor of the ring; packed, it is available in the first lap."""
        if self.packed:
            self.write(DESC + at + 16 * slot, struct.pack("<QIHH", addr, length, slot, flags | AVAIL_BIT))
        else:
            self.write(DESC + at + 16 * slot, struct.pack("<QIHH", addr, length, flags, 0))

    def table(self, addr: int, entries: list[tuple[int, int, int]]) -> None:
        """Write an indirect table, chained in its order."""
        rows = []
        for i, (where, length, flags) in enumerate(entries):
            if self.packed:
                rows.append(struct.pack("<QIHH", where, length, 0, flags))
            else:
                flags |= NEXT if i + 1 < len(entries) else 0
                rows.append(struct.pack("<QIHH", where, length, flags, i + 1))
        self.write(addr, b"".join(rows))

    def offer(self, count: int, at: int = 0) -> None:
        """Make the first heads available, in their order."""
        if not self.packed:
            self.write(AVAIL + at + 4, struct.pack(f"<{count}H", *range(count)))
            self.write(AVAIL + at + 2, struct.pack("<H", count))

    def used(self, at: int = 0) -> int:
        """How many of the first heads were given back."""
        if not self.packed:
            return int(struct.unpack("<H", self.memory.view(USED + at + 2, 2))[0])
        flags = [struct.unpack("<H", self.memory.view(DESC + at + 16 * slot + 14, 2))[0] for slot in range(NUM)]
        return sum(word & USED_BIT != 0 for word in flags)

    def close(self) -> None:
        for queue in self.port.queues:
            queue.stop()
        os.close(self.kick_fd)
        self.iotlb.close()
        self.memory.close()


@pytest.fixture
def ring(layout: int) -> Iterator[Ring]:
    ring = Ring(layout)
    yield ring
    ring.close()


@every_layout
def test_empty_descriptors_end_a_look_as_well(harness: ModuleType, ring: Ring) -> None:
    """Tables of a thousand descriptors of length 0, and one behind them that is not mapped, for each buffer.

    How far a look goes is seen by what it asks for.
    """
    for head in range(32):
        at = TABLES + head * 16 * 1024
        ring.table(at, [(0, 0, WRITE)] * 1023 + [(WILD + head * 4096, 2048, WRITE)])
        ring.describe(head, at, 16 * 1024, INDIRECT)
    ring.offer(32)
    for _ in range(3):
        harness.room(ring.port, 0)
    assert 1 <= len(ring.iotlb.ask(64)) <= 5


@every_layout
def test_buffers_that_are_too_small_are_no_work(harness: ModuleType, ring: Ring) -> None:
    """One that is mapped and that a packet does not fit into: the worker sleeps until there is more, or a translation.

    A driver that says nothing more would keep it awake.
    """
    feed = harness.Feed("feed")
    feed.add(bytes(1500))
    ring.describe(0, TABLES, 100, WRITE)
    ring.offer(1)
    assert harness.room(ring.port, 0) == 1
    assert harness.move(feed, 0, ring.port, 0) == (1, 0)
    assert not harness.arm(ring.port, 0, pull=False, push=True)
    ring.iotlb.update(WILD, 4096, TABLES, 3, guest_addresses=True)
    assert harness.arm(ring.port, 0, pull=False, push=True), "there may be more of what was missing"


@every_layout
def test_buffers_that_nobody_maps_are_no_work(harness: ModuleType, ring: Ring) -> None:
    """The worker sleeps until there is a translation, which may be never."""
    for slot in range(NUM):
        ring.describe(slot, WILD, 2048, WRITE)
    ring.offer(NUM)
    assert harness.room(ring.port, 0) < 0
    assert not harness.arm(ring.port, 0, pull=False, push=True)
    ring.iotlb.again()
    assert harness.arm(ring.port, 0, pull=False, push=True)


@every_layout
def test_a_receive_buffer_that_passes_the_end_of_all_addresses_breaks_its_queue(
    harness: ModuleType, ring: Ring
) -> None:
    """No translation can come for it, so that waiting for one would never end."""
    feed = harness.Feed("feed")
    feed.add(bytes(1500))
    ring.describe(0, (1 << 64) - 100, 2048, WRITE)
    ring.offer(1)
    harness.move(feed, 0, ring.port, 0)
    assert ring.port.queues[0].broken == "address outside the guest's memory"


@every_layout
def test_nothing_more_is_asked_for_a_packet_that_is_too_long(harness: ModuleType, ring: Ring) -> None:
    """One descriptor of a GiB, of which more than a packet is mapped: it would take more pages than can be kept."""
    sink = harness.Collect("sink")
    ring.describe(0, GPA + SIZE - (1 << 17), 1 << 30, 0, at=PAIR)
    ring.offer(1, at=PAIR)
    harness.move(ring.port, 0, sink, 0)
    assert ring.iotlb.ask(64) == []
    assert ring.used(PAIR) == 1
    assert ring.port.queues[1].snapshot()["dropped"] == {"too_long": 1}


@every_layout
def test_nothing_more_is_asked_for_a_packet_in_too_many_pieces(harness: ModuleType, ring: Ring) -> None:
    """A table whose entries lie over two pages each that are no neighbours in memory."""
    sink = harness.Collect("sink")
    for page in range(2):
        ring.iotlb.update(WILD - (2 - page) * 4096, 4096, TABLES + (1 << 20) + 2 * page * 4096, 3, guest_addresses=True)
    ring.table(TABLES, [(WILD - 4097, 2, 0)] * 1023 + [(WILD, 1, 0)])
    ring.describe(0, TABLES, 16 * 1024, INDIRECT, at=PAIR)
    ring.offer(1, at=PAIR)
    harness.move(ring.port, 0, sink, 0)
    assert ring.iotlb.ask(64) == []
    assert ring.used(PAIR) == 1
    assert ring.port.queues[1].snapshot()["dropped"] == {"segments": 1}


@every_layout
def test_what_a_look_ahead_has_found_is_work_for_who_waits_for_room(harness: ModuleType, ring: Ring) -> None:
    """A driver that has not been asked for a kick posts a buffer in the moment in which its worker goes to sleep."""

    def post() -> None:
        early.on_arm = None
        ring.describe(0, TABLES, 2048, WRITE)
        ring.offer(1)

    early, sink, source = harness.Collect("early"), harness.Collect("sink"), GenPort("gen", 64, 1)
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(early, 0, sink, 0), (ring.port, 0, sink, 0), (source, 0, ring.port, 0)]))
        asleep(worker)
        early.on_arm = post
        wake(ring.port.queues)
        wait_for(lambda: ring.used() == 1)


@every_layout
def test_a_disabled_transmitq_is_emptied_once_its_tables_are_mapped(harness: ModuleType, ring: Ring) -> None:
    """Where the next buffer stands must be read of a table in the packed layout: what was missing for that may come."""
    feed = harness.Feed("feed")
    ring.port.queues[1].set_enabled(False)
    ring.table(TABLES, [(TABLES + 4096, 100, 0)])
    ring.describe(0, WILD, 16, INDIRECT, PAIR)
    ring.offer(1, PAIR)
    harness.move(ring.port, 0, feed, 0)
    ring.iotlb.update(WILD, 4096, TABLES, 3, guest_addresses=True)
    harness.move(ring.port, 0, feed, 0)
    assert ring.used(PAIR) == 1


@every_layout
def test_whether_a_driver_has_posted_anything(ring: Ring) -> None:
    """The driver's index says so behind an IOMMU as well."""
    receiveq = ring.port.queues[0]
    assert not receiveq.posted
    ring.describe(0, TABLES, 100, WRITE)
    ring.offer(1)
    assert receiveq.posted
