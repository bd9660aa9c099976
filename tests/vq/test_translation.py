"""Guests behind an IOMMU, from socket to rings: our own front-end answers the misses of a whole pump."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommu_rig import GPA, IOMMU_PROTOCOL, IOVA, IommuGuest
from pump_rig import USUAL, Background, every_layout, pumping
from vq import translation
from vq import virtio as v
from vq.errors import BackendError
from vq.iommu import PAGE, READ, WRITE
from vq.message import Request
from vq.pump import Pump
from vq.translation import PAGES_MAX
from waiting import wait_for


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def pump(path: str) -> Iterator[Pump]:
    with pumping(f"vhost:{path}") as pump:
        yield pump


def echo(guest: IommuGuest, data: bytes) -> None:
    """Send a packet, and get it back."""
    guest.post(3000)
    guest.send(data)
    guest.serve(guest.receiveqs[0].arm)
    ((token, length),) = guest.receiveqs[0].poll(1)
    assert token.written(length)[12:] == data
    wait_for(lambda: guest.transmitqs[0].poll())


@every_layout
@pytest.mark.shows("IOTLB_MSG", "VIRTIO_F_ACCESS_PLATFORM")
def test_everything_is_asked_for(path: str, pump: Pump, layout: int) -> None:
    with IommuGuest(path, USUAL | layout) as guest:
        for number in range(20):
            echo(guest, bytes([number]) * 300)
        asked = {iova // PAGE for iova, _ in guest.iommu.missed}
        assert {place // PAGE for queue in range(2) for place in guest.queue(queue).guest_addresses} <= asked
        assert len(guest.iommu.missed) < 40  # nothing is asked for again while it is known


@every_layout
def test_a_ring_waits_for_its_memory_and_keeps_its_place(path: str, pump: Pump, layout: int) -> None:
    """Started without a translation, invalidated while it runs, stopped while it waits."""
    with IommuGuest(path, USUAL | layout, mapped=False) as guest:
        guest.post(100, 4)
        guest.send(b"early")
        assert not guest.frontend.serve(guest.receiveqs[0].arm, 0.2)
        assert guest.iommu.missed
        guest.map_all()
        for desc, avail, used in (guest.queue(0).guest_addresses, guest.queue(1).guest_addresses):
            for place in {desc // PAGE, avail // PAGE, used // PAGE}:
                guest.iommu.update(place * PAGE, PAGE, guest.iommu.pages[place][0], READ | WRITE)
        guest.serve(guest.receiveqs[0].arm)
        wait_for(lambda: guest.transmitqs[0].poll())
        assert [token.written(length)[12:] for token, length in guest.receiveqs[0].poll()] == [b"early"]
        for number in range(3):
            guest.iommu.invalidate(0, 0)
            echo(guest, bytes([number]) * 77)
        guest.iommu.answering = False
        guest.iommu.invalidate(0, 0)
        bases = guest.stop()
        guest.iommu.answering = True
        assert bases == [guest.queue(0).used_idx, guest.queue(1).used_idx]
        guest.start()
        backend = pump.ports[0].backend
        assert backend is not None
        guest.serve(lambda: all(queue.live for queue in backend.device.queues[:2]))
        echo(guest, b"again")


def test_others_go_on_while_a_queue_waits(path: str, pump: Pump) -> None:
    """A queue that misses is parked: it takes no processor, and what it cannot translate is not consumed."""
    with IommuGuest(path) as guest:
        echo(guest, b"known")
        hidden = guest.memory.alloc(PAGE, PAGE)
        memoryview(hidden)[:8] = bytes(8)
        place = guest.iommu.pages.pop(hidden.guest_addr // PAGE)
        guest.post(1500)
        guest.transmitqs[0].add([bytes(12), (hidden.guest_addr, 100)])
        guest.transmitqs[0].kick()
        missed = len(guest.iommu.missed)
        guest.serve(lambda: len(guest.iommu.missed) > missed)
        worker = pump.workers[0]
        wait_for(lambda: _stands(worker))  # it sleeps, though there is something in the ring
        assert guest.transmitqs[0].outstanding == 1
        # It is asked for again after a while, and that is all.
        again = len(guest.iommu.missed)
        guest.serve(lambda: len(guest.iommu.missed) > again)
        assert len(guest.iommu.missed) - again < 8
        guest.iommu.pages[hidden.guest_addr // PAGE] = place
        guest.iommu.update(hidden.guest_addr, PAGE, place[0], READ)
        guest.serve(guest.receiveqs[0].arm)  # no kick has come
        ((_, length),) = guest.receiveqs[0].poll()
        assert length == 112


@every_layout
def test_what_waits_is_not_dropped_when_the_wait_ends(path: str, pump: Pump, layout: int) -> None:
    """The worker looks at the ring in the very moment in which a translation comes, any one."""
    with IommuGuest(path, USUAL | layout) as guest:
        echo(guest, b"known")
        hidden = guest.memory.alloc(PAGE, PAGE)
        user, _ = guest.iommu.pages.pop(hidden.guest_addr // PAGE)
        guest.post(1500)
        guest.transmitqs[0].add([(hidden.guest_addr, 100)])
        guest.transmitqs[0].kick()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            guest.iommu.update(0x5000_0000, PAGE, user, READ)
        assert guest.transmitqs[0].poll() == []
        guest.iommu.update(hidden.guest_addr, PAGE, user, READ)
        guest.serve(guest.receiveqs[0].arm)


def test_a_question_that_was_too_early_is_put_again_after_an_invalidation(
    path: str, pump: Pump, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The front-end finds nothing, and says nothing; an address gets another meaning only after an INVALIDATE."""
    monkeypatch.setattr(translation, "PATIENCE_S", 600)  # else it would be put again by itself
    with IommuGuest(path) as guest:
        echo(guest, b"known")
        hidden = guest.memory.alloc(PAGE, PAGE)
        place = guest.iommu.pages.pop(hidden.guest_addr // PAGE)
        guest.post(1500)
        guest.transmitqs[0].add([bytes(12), (hidden.guest_addr, 100)])
        guest.transmitqs[0].kick()
        missed = len(guest.iommu.missed)
        guest.serve(lambda: len(guest.iommu.missed) > missed)
        guest.iommu.pages[hidden.guest_addr // PAGE] = place
        guest.iommu.invalidate(hidden.guest_addr, PAGE)
        guest.serve(guest.receiveqs[0].arm)


def test_a_storm_of_invalidations_does_not_put_a_question_off(path: str, pump: Pump) -> None:
    """A guest in full flow has its whole space flushed hundreds of times a second."""
    with IommuGuest(path) as guest:
        echo(guest, b"known")
        hidden = guest.memory.alloc(PAGE, PAGE)
        guest.iommu.pages.pop(hidden.guest_addr // PAGE)
        guest.transmitqs[0].add([bytes(12), (hidden.guest_addr, 100)])
        guest.transmitqs[0].kick()
        guest.serve(lambda: hidden.guest_addr in (iova for iova, _ in guest.iommu.missed))
        guest.iommu.missed.clear()
        end = time.monotonic() + 60
        while hidden.guest_addr not in (iova for iova, _ in guest.iommu.missed):
            assert time.monotonic() < end, "the question is not put again"
            guest.iommu.invalidate(hidden.guest_addr, PAGE)


def _stands(worker: object) -> bool:
    before = worker.snapshot()["rounds"]  # type: ignore[attr-defined]
    time.sleep(0.05)
    return before == worker.snapshot()["rounds"]  # type: ignore[attr-defined]


def test_permissions_are_kept(path: str, pump: Pump) -> None:
    """What may only be read is not written: the ring waits, and the page stays as it is."""
    with IommuGuest(path) as guest:
        block = guest.memory.alloc(PAGE, PAGE)
        page = block.guest_addr // PAGE
        guest.iommu.map(block.guest_addr, PAGE, block.user_addr, READ)
        guest.receiveqs[0].add(writable=[(block.guest_addr, PAGE)])
        guest.receiveqs[0].kick()
        guest.iommu.update(block.guest_addr, PAGE, block.user_addr, READ)
        guest.send(b"\x55" * 64)
        assert not guest.frontend.serve(guest.receiveqs[0].arm, 0.3)
        assert bytes(block) == bytes(PAGE)
        assert (block.guest_addr, WRITE) in guest.iommu.missed
        guest.iommu.map(block.guest_addr, PAGE, block.user_addr, WRITE)
        guest.iommu.update(block.guest_addr, PAGE, guest.iommu.pages[page][0], WRITE)
        guest.send(b"\x66" * 64)
        guest.serve(guest.receiveqs[0].arm)
        assert bytes(block)[12:13] in (b"\x55", b"\x66")


@every_layout
def test_traffic_stays_right_through_a_storm_of_invalidations(path: str, pump: Pump, layout: int) -> None:
    """Pages of receive buffers move in the middle of traffic; the page that was left is never touched again."""
    with IommuGuest(path, USUAL | layout) as guest:
        spare = guest.memory.add_region(64 * PAGE)  # ends of moves, unknown to the device at first
        guest.share()
        mover = Mover(guest, spare)
        traffic = Background(guest.streams(), patience=10)
        try:
            guest.serve(lambda: traffic.traffic.counters["verified"] > 500)
            mover.find()
            end = time.monotonic() + 4
            while time.monotonic() < end:
                mover.move()
                guest.iommu.invalidate(0, 0)
                mover.look()
            guest.serve(lambda: traffic.traffic.counters["verified"] > 3000)
            mover.look()
        finally:
            traffic.traffic.stop()
            traffic.thread.join(60)
        assert traffic.problem is None
        counters = traffic.traffic.counters
        assert (counters["changed"], counters["duplicated"], counters["reordered"]) == (0, 0, 0)
        assert mover.moves > 10


class Mover:
    """Moves pages under a driver's hands: same address for the driver and the device, other memory behind it."""

    def __init__(self, guest: IommuGuest, spare: object) -> None:
        self.guest = guest
        self.spare = spare
        self.moves = 0
        self.left: list[tuple[int, bytes]] = []  # address in this process, and what stands there
        self.free = [spare.user_addr + number * PAGE for number in range(64)]  # type: ignore[attr-defined]
        self.pages: list[int] = []
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
        ]  # fmt: skip

    def find(self) -> None:
        """Choose pages that the device only writes: whole pages of receive buffers."""
        asked = {iova // PAGE for iova, perm in self.guest.iommu.missed if perm == WRITE}
        read = {iova // PAGE for iova, perm in self.guest.iommu.missed if perm & READ}
        self.pages = sorted(asked - read)[2:]
        assert len(self.pages) > 4

    def move(self) -> None:
        """Move one page: after the INVALIDATE nobody else writes it, so it can be copied and filled."""
        if not self.free:
            return
        page = self.pages[self.moves % len(self.pages)]
        old, _ = self.guest.iommu.pages.pop(page)
        self.guest.iommu.invalidate(page * PAGE, PAGE)
        new = self.free.pop()
        fds = {row[2]: row[4] for row in self.guest.memory.regions}
        base = max(user for user in fds if user <= old)
        if base == self.spare.user_addr:  # type: ignore[attr-defined]
            self.guest.iommu.pages[page] = (old, READ | WRITE)
            self.free.append(new)
            self.moves += 1
            return
        data = os.pread(fds[base], PAGE, old - base)
        spare_base = self.spare.user_addr  # type: ignore[attr-defined]
        os.pwrite(fds[spare_base], data, new - spare_base)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.guest.memory.view(page * PAGE, PAGE)))
        got = self.libc.mmap(address, PAGE, 3, 0x11, fds[spare_base], new - spare_base)  # shared, fixed
        assert got == address
        canary = os.urandom(PAGE)
        os.pwrite(fds[base], canary, old - base)
        self.left.append((fds[base], old - base, canary))  # type: ignore[arg-type]
        self.guest.iommu.pages[page] = (new, READ | WRITE)
        self.moves += 1

    def look(self) -> None:
        """Insist that no page that was left has changed."""
        for fd, offset, canary in self.left:  # type: ignore[misc]
            assert os.pread(fd, PAGE, offset) == canary


def test_the_dirty_log_has_what_was_written_by_guest_address(path: str, pump: Pump) -> None:
    with IommuGuest(path, USUAL | v.mask(v.VHOST_F_LOG_ALL), memory_bytes=256 * PAGE) as guest:
        guest.frontend.set_features(guest.features & ~v.mask(v.VHOST_F_LOG_ALL))
        echo(guest, b"before" * 20)
        before = bytes(guest.memory.view(IOVA, 256 * PAGE))
        log = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(log, PAGE)
        guest.frontend.set_log_base(log, PAGE)
        guest.frontend.set_features(guest.features | v.mask(v.VHOST_F_LOG_ALL))
        for index in range(2):
            guest.frontend.set_ring_addresses(guest.ring(index, logged=True))
        guest.iommu.invalidate(0, 0)
        for number in range(6):
            echo(guest, bytes([65 + number]) * 2900)
        guest.frontend.set_features(guest.features & ~v.mask(v.VHOST_F_LOG_ALL))
        after = bytes(guest.memory.view(IOVA, 256 * PAGE))
        bits = os.pread(log, PAGE, 0)
        os.close(log)
        marked = {page for page in range(8 * PAGE) if bits[page // 8] >> page % 8 & 1}
        first = GPA // PAGE
        assert marked
        assert marked <= set(range(first, first + 256))
        changed = {first + page for page in range(256) if before[page * PAGE :][:PAGE] != after[page * PAGE :][:PAGE]}
        driver = {queue.guest_addresses[part] // PAGE for queue in (guest.queue(0), guest.queue(1)) for part in (0, 1)}
        sent = changed - marked  # what the driver wrote by itself: its half of the rings, and what it sent
        readable = {iova // PAGE for iova, perm in guest.iommu.missed if perm == READ} | driver
        assert sent <= {first + page - IOVA // PAGE for page in readable}


def test_memory_that_is_replaced_is_not_translated_to_any_more(path: str, pump: Pump) -> None:
    with IommuGuest(path) as guest:
        echo(guest, b"one")
        missed = len(guest.iommu.missed)
        guest.memory.add_region(PAGE)
        guest.share()  # mapped anew: all translations are void
        echo(guest, b"two")
        assert len(guest.iommu.missed) > missed


@pytest.mark.shows("VHOST_USER_PROTOCOL_F_GPA_ADDRESSES")
def test_updates_by_guest_address(path: str, pump: Pump) -> None:
    protocol = IOMMU_PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES)
    with IommuGuest(path, protocol=protocol, mapped=False, start=False) as guest:
        iova, size, *_ = guest.memory.regions[0]
        guest.iommu.map(iova, size, GPA)
        guest.start()
        echo(guest, b"by guest address")
        with pytest.raises(BackendError, match="refused"):
            guest.iommu.update(iova, PAGE, guest.memory.regions[0][2], READ)


def test_without_the_feature_there_is_nothing_to_translate(path: str, pump: Pump) -> None:
    with IommuGuest(path, start=False) as guest:
        guest.frontend.set_features(guest.features & ~v.mask(v.VIRTIO_F_ACCESS_PLATFORM))
        with pytest.raises(BackendError, match="refused"):
            guest.iommu.update(IOVA, PAGE, guest.memory.regions[0][2], READ)
        guest.frontend.set_features(guest.features)
        guest.start()
        echo(guest, b"on again")
        assert guest.frontend.request(Request.GET_FEATURES) == guest.frontend.offered_features


def test_a_ring_asks_for_some_of_its_pages_at_once(path: str, pump: Pump) -> None:
    """Each message looks at all rings that lack something: a large one must not make that long."""
    with IommuGuest(path, size=32768, mapped=False, start=False) as guest:
        guest.iommu.answering = False
        guest.frontend.start_ring(guest.ring(0))
        guest.serve(lambda: len(guest.iommu.missed) >= PAGES_MAX)
        assert not guest.frontend.serve(lambda: len(guest.iommu.missed) > PAGES_MAX, 0.1)
        guest.iommu.answering = True
        guest.iommu.missed.clear()
        guest.map_all()
        queue = next(iter(pump._by_fd.values())).device.queues[0]
        guest.serve(lambda: queue.mapped)


def test_posted_is_known_behind_an_iommu(path: str, pump: Pump) -> None:
    """A guest that posts no buffer is told of in the same way with an IOMMU as without."""
    with IommuGuest(path) as guest:
        queue = next(iter(pump._by_fd.values())).device.queues[0]
        guest.serve(lambda: queue.mapped)
        assert not queue.posted
        guest.post(1500)
        assert queue.posted
