"""Checklist line 16: translations of an IOMMU, from a front-end and a guest that mean no good."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommu_rig import GPA, IOVA, IommuGuest
from pump_rig import USUAL, Background, every_layout, pumping
from vq.errors import BackendError
from vq.iommu import INVALIDATE, PAGE, READ, UPDATE, WRITE
from vq.message import Request
from vq.payload import Iotlb, Region
from vq.pump import Pump
from vq_core.guest_memory import GuestMemory
from waiting import wait_for

END = 1 << 64
USER = 0x7E12_0000_0000


@pytest.fixture
def pump(tmp_path: Path) -> Iterator[Pump]:
    with pumping(f"vhost:{tmp_path}/s") as pump:
        yield pump


@pytest.fixture
def guest(tmp_path: Path, pump: Pump) -> Iterator[IommuGuest]:
    with IommuGuest(f"{tmp_path}/s") as guest:
        yield guest


def works(guest: IommuGuest) -> None:
    """Insist that a packet still comes back."""
    guest.post(1500)
    for _ in range(10):  # a packet is dropped when translations for it take too long, on a busy machine
        guest.send(b"still there")
        if guest.frontend.serve(guest.receiveqs[0].arm, 2):
            break
    assert [token.written(length)[12:] for token, length in guest.receiveqs[0].poll()] == [b"still there"]


@pytest.mark.checklist(16)
@pytest.mark.parametrize(
    "entry",
    [
        Iotlb(IOVA, 0, USER, 3, UPDATE),
        Iotlb(END - PAGE, 2 * PAGE, USER, 3, UPDATE),
        Iotlb(IOVA, END - 1, USER, 3, UPDATE),
        Iotlb(IOVA, PAGE, END - 1, 3, UPDATE),
        Iotlb(IOVA, PAGE, USER - 1, 3, UPDATE),
        Iotlb(IOVA, PAGE, USER + (8 << 20) - PAGE + 1, 3, UPDATE),
        Iotlb(IOVA, PAGE, 0, 3, UPDATE),
        Iotlb(IOVA, PAGE, USER, 0, UPDATE),
        Iotlb(IOVA, PAGE, USER, 4, UPDATE),
        Iotlb(IOVA, PAGE, USER, 255, UPDATE),
        Iotlb(IOVA, 0, 0, 3, 1),
        Iotlb(IOVA, PAGE, USER, 3, 4),
        Iotlb(IOVA, PAGE, USER, 3, 0),
        Iotlb(IOVA, PAGE, USER, 3, 5),
        Iotlb(END - 1, END - 1, END - 1, 255, 255),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(guest: IommuGuest, entry: Iotlb) -> None:
    """Line 16: size 0, overflow, memory that is not there, permissions and types that do not exist."""
    works(guest)
    with pytest.raises(BackendError, match="refused"):
        guest.frontend.request(Request.IOTLB_MSG, entry)
    works(guest)


@pytest.mark.checklist(16)
def test_an_invalidation_may_name_anything(guest: IommuGuest) -> None:
    """Line 16: up to 2^64 exactly, past it, and the whole space."""
    for iova, size in ((0xFEF0_0000, END - 0xFEF0_0000), (END - 1, END - 1), (0, END - 1), (0, 0), (END - 1, 1)):
        works(guest)
        guest.frontend.request(Request.IOTLB_MSG, Iotlb(iova, size, END - 1, 255, INVALIDATE))
    works(guest)


@pytest.mark.checklist(16)
def test_endless_updates_are_bounded(guest: IommuGuest, pump: Pump) -> None:
    """Line 16: more updates than are kept, while the ring runs; memory and speed stay as they were."""
    works(guest)
    for number in range(6000):
        guest.iommu.update(number * 2 * PAGE, PAGE, USER + number % 512 * PAGE, 3)
    backend = pump.ports[0].backend
    assert backend is not None
    assert backend._translation is not None
    assert len(backend._translation.iotlb.entries) <= 2048
    works(guest)


@pytest.mark.checklist(16)
@every_layout
def test_a_ring_whose_translations_were_driven_out_goes_with_its_memory(
    tmp_path: Path, pump: Pump, layout: int
) -> None:
    """Line 16: so many updates that those of the rings are not kept, and then their memory is taken away.

    The rings worked on without them, and so must be found by their places. Afterwards they come back.
    """
    with IommuGuest(f"{tmp_path}/s", USUAL | layout) as guest:
        works(guest)
        backend = pump.ports[0].backend
        assert backend is not None
        assert backend._translation is not None
        iotlb, regions = backend._translation.iotlb, guest.memory.regions
        extra = GuestMemory(PAGE, guest_addr=1 << 40, user_addr=1 << 45)
        rows = [Region(iova - IOVA + GPA, size, user, offset) for iova, size, user, offset, _ in regions]
        rows.append(Region(*extra.regions[0][:4]))
        guest.frontend.request(Request.ADD_MEM_REG, rows[-1], fds=[extra.regions[0][4]])
        works(guest)
        number = 0
        while any(IOVA <= iova < IOVA + (8 << 20) for iova, _, _, _ in iotlb.entries):
            for _ in range(200):
                number += 2
                guest.iommu.update(number * PAGE, PAGE, 1 << 45, 3)
        receiveq, used_ring = backend.device.queues[0], guest.ring(0).used // PAGE * PAGE
        assert receiveq.mapped
        guest.iommu.answering = False
        guest.iommu.update(used_ring, PAGE, 1 << 45, 3)
        assert not receiveq.mapped, "it works at the old place"
        guest.iommu.invalidate(used_ring, PAGE)
        guest.frontend.request(Request.REM_MEM_REG, rows[0])
        assert not any(queue.mapped for queue in backend.device.queues)
        guest.transmitqs[0].kick()
        guest.iommu.answering = True
        guest.frontend.request(Request.ADD_MEM_REG, rows[0], fds=[regions[0][4]])
        works(guest)
        extra.close()


@pytest.mark.checklist(16)
def test_a_flood_of_misses_is_bounded(guest: IommuGuest) -> None:
    """Line 16: a guest whose addresses nobody knows; few questions are open, and other rings go on."""
    works(guest)
    guest.iommu.missed.clear()
    wild = 0x6666_0000_0000
    for number in range(60):
        guest.transmitqs[0].add([(wild + number * 16 * PAGE, 16 * PAGE), (wild + (number << 32), 0xFFFF_FFFF)])
    guest.transmitqs[0].kick()
    guest.frontend.serve(lambda: False, 1)
    assert 0 < len(guest.iommu.missed) <= 64
    # The receiveq has its translations all the same: what others send still comes.
    guest.frontend.serve(lambda: False, 2)
    assert len(guest.iommu.missed) <= 3 * 64
    guest.stop()
    guest.frontend.request(Request.GET_FEATURES)


@pytest.mark.checklist(16)
@every_layout
def test_buffers_and_tables_over_entries(tmp_path: Path, pump: Pump, layout: int) -> None:
    """Line 16: each page of a buffer, and of an indirect table, lies elsewhere; entries end in the middle of both."""
    with IommuGuest(f"{tmp_path}/s", USUAL | layout) as guest:
        dice = random.Random(1)
        # IOVA pages in a row, whose memory lies in a random order.
        pages = guest.memory.alloc(64 * PAGE, PAGE)
        start = 0x5_0000_0000
        order = dice.sample(range(64), 64)
        for number, place in enumerate(order):
            guest.iommu.map(start + number * PAGE, PAGE, pages.user_addr + place * PAGE)

        def poke(iova: int, data: bytes) -> None:
            for at, byte in enumerate(data, iova - start):
                memoryview(pages)[order[at // PAGE] * PAGE + at % PAGE] = byte

        for number in range(6):
            data = bytes(dice.randrange(256) for _ in range(9000))
            poke(start + 100, bytes(12) + data)
            lengths = [1, 5, 6, 3000, 4096, 1904]
            rows, at = [], start + 100
            for length in lengths:
                rows.append((at, length))
                at += length
            guest.post(9000)
            if number % 2 and layout:
                guest.transmitqs[0].add(rows, indirect=True)
            elif number % 2:
                # An entry of the table lies over the end of a page: its two halves are far apart.
                table = start + 63 * PAGE - 24
                for index, (addr, length) in enumerate(rows):
                    last = index == len(rows) - 1
                    poke(table + 16 * index, struct.pack("<QIHH", addr, length, not last, 0 if last else index + 1))
                token = guest.transmitqs[0].add([(table, 16 * len(rows))])
                guest.transmitqs[0].desc["flags"][token.id] |= 4
            else:
                guest.transmitqs[0].add(rows)
            guest.transmitqs[0].kick()
            guest.iommu.invalidate(start + dice.randrange(64) * PAGE, PAGE)
            guest.serve(guest.receiveqs[0].arm)
            ((token, length),) = guest.receiveqs[0].poll()
            assert token.written(length)[12:] == data
            wait_for(lambda: guest.transmitqs[0].poll())


@pytest.mark.checklist(16)
@every_layout
def test_invalidations_of_ring_memory_under_traffic(tmp_path: Path, pump: Pump, layout: int) -> None:
    """Line 16: the parts of running rings are taken away again and again, one by one; nothing is lost track of."""
    with IommuGuest(f"{tmp_path}/s", USUAL | layout) as guest:
        traffic = Background(guest.streams(), patience=10)
        places = [place for index in (0, 1) for place in guest.queue(index).guest_addresses]
        try:
            end = time.monotonic() + 3
            while time.monotonic() < end:
                for place in places:
                    guest.iommu.invalidate(place, 1)
                guest.frontend.serve(lambda: False, 0.01)
            before = traffic.traffic.counters["verified"]
            guest.serve(lambda: traffic.traffic.counters["verified"] > before + 200)
        finally:
            traffic.traffic.stop()
            traffic.thread.join(60)
        counters = traffic.traffic.counters
        assert traffic.problem is None
        assert (counters["changed"], counters["duplicated"], counters["reordered"]) == (0, 0, 0)


@pytest.mark.checklist(16)
def test_ring_parts_that_are_not_in_one_piece(guest: IommuGuest, pump: Pump, caplog: pytest.LogCaptureFixture) -> None:
    """Line 16: a ring over two entries whose memory lies apart stands, with a warning; the connection goes on."""
    guest.stop()
    apart = 0x5_0000_0000
    memory = guest.memory.alloc(64 * PAGE, PAGE)
    for number in range(8):
        guest.iommu.map(apart + number * PAGE, PAGE, memory.user_addr + number * 2 * PAGE)
    ring = guest.ring(1)
    moved = type(ring)(1, 256, apart + PAGE - 2048, ring.avail, ring.used, 0, ring.kick_fd, ring.call_fd)
    guest.frontend.start_ring(moved)
    guest.frontend.serve(lambda: "one piece" in caplog.text, 5)
    assert "does not lie in one piece of memory behind the IOMMU" in caplog.text
    assert guest.frontend.get_vring_base(1) == 0
    guest.frontend.start_ring(guest.ring(1))
    guest.frontend.start_ring(guest.ring(0))
    backend = pump.ports[0].backend
    assert backend is not None
    guest.serve(lambda: all(queue.live for queue in backend.device.queues[:2]))
    works(guest)


@pytest.mark.checklist(16)
def test_too_little_of_a_permission(guest: IommuGuest) -> None:
    """Line 16: an answer with less than was asked for is not asked for again at once, and permits nothing more."""
    works(guest)
    block = guest.memory.alloc(PAGE, PAGE)
    guest.iommu.pages[block.guest_addr // PAGE] = (block.user_addr, READ)
    guest.iommu.missed.clear()
    guest.receiveqs[0].add(writable=[(block.guest_addr, PAGE)])
    guest.receiveqs[0].kick()
    for _ in range(20):
        guest.iommu.update(block.guest_addr, PAGE, block.user_addr, READ)
        guest.send(b"\x77" * 99)
        guest.frontend.serve(lambda: False, 0.01)
    assert guest.iommu.missed.count((block.guest_addr, WRITE)) <= 2
    assert bytes(block) == bytes(PAGE)
