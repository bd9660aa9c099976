"""A disk behind an IOMMU: requests wait for their translations, also those that were in flight when a process died."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blk_rig import GET_ID, IN, IOERR, OK, OUT, content, header, make_file
from dirty_rig import LogFile, Watch
from disk_rig import VERSION_1, serving
from engine_rig import every_layout
from vq import virtio as v
from vq.check.inflight_region import leave_packed, leave_split
from vq.errors import BackendError
from vq.frontend import Frontend, RingSetup
from vq.iommu import PAGE, READ, WRITE, Iommu
from vq.message import Request
from vq.payload import Region
from vq.server import Server
from vq_core.driver import Buffer, DriverQueue
from vq_core.guest_memory import GuestMemory
from waiting import wait_for

IOVA = 0x7_FF00_0000  # of all memory, for the driver
GPA = 0x10_0000  # and for the memory table
WINDOW = 0x5_0000_0000  # where tests map pages in an order of their own
SIZE = 64
DISK_BYTES = 4 << 20
ACCESS_PLATFORM = v.mask(v.VIRTIO_F_ACCESS_PLATFORM)
PROTOCOL = v.mask(
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
)  # fmt: skip


class Guest:
    """A guest with one request queue, all of whose addresses are I/O virtual."""

    def __init__(self, path: str, features: int, protocol: int = PROTOCOL) -> None:
        self.memory = GuestMemory(8 << 20, guest_addr=IOVA)
        self.frontend = Frontend.connect(path, timeout=60)
        self.features = self.frontend.negotiate(features | ACCESS_PLATFORM, protocol)
        self.frontend.set_features(self.features & ~v.mask(v.VHOST_F_LOG_ALL))
        self.iommu = Iommu(self.frontend)
        self.driver = DriverQueue(self.memory, SIZE, features=self.features)
        self.share()
        ((iova, size, user, _, _),) = self.memory.regions
        self.iommu.map(iova, size, user)

    def share(self) -> None:
        rows = [Region(iova - IOVA + GPA, size, user, offset) for iova, size, user, offset, _ in self.memory.regions]
        self.frontend.set_mem_table(rows, [row[4] for row in self.memory.regions])

    def ring(self, *, logged: bool = False) -> RingSetup:
        driver = self.driver
        base = 0x80008000 if driver.layout == "packed" else driver.used_idx
        places = driver.guest_addresses
        flags = v.VHOST_VRING_F_LOG if logged else 0
        fds = (driver.kick_fd, driver.call_fd, None)
        return RingSetup(0, driver.size, *places, base, *fds, places[2], flags)

    def start(self) -> None:
        self.frontend.start_ring(self.ring())

    def pages(self, count: int, seed: int = 1) -> Pages:
        return Pages(self, count, seed)

    def go(self) -> None:
        self.driver.publish()
        self.driver.kick()

    def finish(self, count: int = 1) -> list[tuple[Buffer, int]]:
        """Answer misses until so many requests are done."""
        done: list[tuple[Buffer, int]] = []

        def came() -> bool:
            done.extend(self.driver.poll())
            return len(done) >= count

        assert self.frontend.serve(came, 20), f"{len(done)} of {count} requests are done"
        return done

    def ask(self, kind: int, sector: int, data: list[Any], **options: Any) -> int:
        """One request, from beginning to end; its status."""
        first: list[Any] = [header(kind, sector)]
        readable, writable = ([*first, *data], [1]) if kind == OUT else (first, [*data, 1])
        buffer = self.driver.add(readable, writable, **options)
        self.go()
        self.finish()
        return bytes(buffer.writable[-1])[0]

    def close(self) -> None:
        self.frontend.close()
        self.driver.close()
        self.memory.close()


class Pages:
    """Pages of I/O virtual addresses in a row, whose memory lies in a random order."""

    def __init__(self, guest: Guest, count: int, seed: int) -> None:
        self.guest = guest
        self.block = guest.memory.alloc(count * PAGE, PAGE)
        self.order = random.Random(seed).sample(range(count), count)
        self.start = WINDOW
        for number, place in enumerate(self.order):
            guest.iommu.map(self.start + number * PAGE, PAGE, self.block.user_addr + place * PAGE)

    def write(self, data: bytes) -> None:
        for number in range(0, len(data), PAGE):
            place = self.order[number // PAGE] * PAGE
            part = data[number : number + PAGE]
            memoryview(self.block)[place : place + len(part)] = part

    def read(self, length: int) -> bytes:
        view = memoryview(self.block)
        return b"".join(bytes(view[place * PAGE : (place + 1) * PAGE]) for place in self.order)[:length]


@contextmanager
def guest_on(tmp_path: Path, features: int = VERSION_1, **options: Any) -> Iterator[tuple[Guest, Server]]:
    make_file(tmp_path / "disk.img", DISK_BYTES)
    with serving(tmp_path / "disk.img", str(tmp_path / "s")) as server:
        guest = Guest(str(tmp_path / "s"), features, **options)
        try:
            yield guest, server
        finally:
            guest.close()


def stands(server: Server) -> bool:
    """Whether the worker of a disk sleeps."""
    (worker,) = server.device.workers  # type: ignore[attr-defined]
    before = worker.snapshot()["rounds"]
    time.sleep(0.05)
    return bool(before == worker.snapshot()["rounds"])


@every_layout
@pytest.mark.shows("IOTLB_MSG", "BACKEND_IOTLB_MSG", "VIRTIO_F_ACCESS_PLATFORM")
@pytest.mark.parametrize("indirect", [False, True])
def test_requests_over_pages_that_lie_apart(tmp_path: Path, layout: int, indirect: bool) -> None:
    """What is written is on the disk, what is on the disk is read, and nothing known is asked for again."""
    options = {"indirect": indirect}
    with guest_on(tmp_path, layout | v.mask(v.VIRTIO_F_INDIRECT_DESC)) as (guest, _):
        guest.start()
        pages = guest.pages(24)
        place = (pages.start, 24 * PAGE)
        assert guest.ask(IN, 8, [place], **options) == OK
        assert pages.read(24 * PAGE) == content(DISK_BYTES)[8 * 512 :][: 24 * PAGE]
        data = os.urandom(24 * PAGE)
        pages.write(data)
        assert guest.ask(OUT, 64, [place], **options) == OK
        with (tmp_path / "disk.img").open("rb") as disk:
            disk.seek(64 * 512)
            assert disk.read(len(data)) == data
        asked = len(guest.iommu.missed)
        assert asked >= 24
        for _ in range(20):
            assert guest.ask(IN, 8, [place], **options) == OK
        # Header, status and table lie in fresh memory now and then.
        assert len(guest.iommu.missed) < asked + 24


@every_layout
@pytest.mark.parametrize("hidden", ["header", "data", "status"])
def test_a_request_waits_for_any_of_its_parts(tmp_path: Path, layout: int, hidden: str) -> None:
    """Nothing is done before all is known: nothing is written, the worker sleeps, and the UPDATE alone wakes it."""
    with guest_on(tmp_path, layout) as (guest, server):
        guest.start()
        pages = {name: guest.memory.alloc(PAGE, PAGE) for name in ("header", "data", "status")}
        memoryview(pages["header"])[:16] = header(IN, 8)
        for name in ("data", "status"):
            memoryview(pages[name])[:] = b"\xee" * PAGE
        assert guest.ask(IN, 0, [512]) == OK
        missing = pages[hidden].guest_addr
        user, _ = guest.iommu.pages.pop(missing // PAGE)
        rows = [(pages["data"].guest_addr + 512, 1024), (pages["status"].guest_addr + 7, 1)]
        guest.driver.add([(pages["header"].guest_addr, 16)], rows)
        guest.go()
        assert guest.frontend.serve(lambda: missing // PAGE in {iova // PAGE for iova, _ in guest.iommu.missed}, 20)
        wait_for(lambda: stands(server))
        assert not guest.driver.poll()
        assert bytes(pages["data"]) == bytes(pages["status"]) == b"\xee" * PAGE
        guest.iommu.pages[missing // PAGE] = (user, READ | WRITE)
        guest.iommu.update(missing, PAGE, user, READ | WRITE)
        guest.finish()
        assert bytes(pages["data"]) == b"\xee" * 512 + content(DISK_BYTES)[8 * 512 :][:1024] + b"\xee" * (PAGE - 1536)
        assert bytes(pages["status"]) == b"\xee" * 7 + b"\0" + b"\xee" * (PAGE - 8)


@every_layout
def test_too_many_parts_fail_one_request(tmp_path: Path, layout: int) -> None:
    """A buffer over more pages than a request may have: an error in its status, at once, and the queue goes on."""
    with guest_on(tmp_path, layout) as (guest, _):
        guest.start()
        pages = guest.pages(700)
        assert guest.ask(IN, 0, [(pages.start, 600 * PAGE), (pages.start + 650 * PAGE, 512)]) == IOERR
        assert pages.read(700 * PAGE) == bytes(700 * PAGE)
        assert guest.ask(IN, 0, [(pages.start, 100 * PAGE)]) == OK
        assert pages.read(100 * PAGE) == content(DISK_BYTES)[: 100 * PAGE]


@every_layout
def test_a_storm_of_invalidations(tmp_path: Path, layout: int) -> None:
    """Pages move away under reads that are under way: what was left is not touched after the answer to INVALIDATE."""
    count, requests = 40, 300
    with guest_on(tmp_path, layout) as (guest, _):
        guest.start()
        pages = guest.pages(count)
        spare = guest.memory.alloc(2 * count * PAGE, PAGE)
        free = [spare.user_addr + number * PAGE for number in range(2 * count)]
        views = {block.user_addr: memoryview(block) for block in (pages.block, spare)}
        dice = random.Random(3)
        wanted = content(DISK_BYTES)

        def at(user: int) -> memoryview:
            base = max(start for start in views if start <= user)
            return views[base][user - base : user - base + PAGE]

        end = time.monotonic() + 4
        done = 0
        while done < requests and time.monotonic() < end:
            places = [number * 8 for number in range(5)]
            for number in places:
                guest.driver.add([header(IN, number * 8)], [(WINDOW + number * PAGE, 8 * PAGE), 1])
            guest.go()
            left: dict[int, tuple[int, bytes]] = {}
            for number in dice.sample(range(count), 6):
                user, perm = guest.iommu.pages[WINDOW // PAGE + number]
                guest.iommu.unmap(WINDOW + number * PAGE, PAGE)
                canary = os.urandom(PAGE)
                before = bytes(at(user))
                at(user)[:] = canary
                fresh = free.pop(0)
                free.append(user)
                left[number] = (user, canary)
                at(fresh)[:] = before
                guest.iommu.pages[WINDOW // PAGE + number] = (fresh, perm)
                # It may have been asked for while it was nowhere.
                guest.iommu.update(WINDOW + number * PAGE, PAGE, fresh, perm)
            guest.iommu.invalidate(0, 0)
            got = guest.finish(len(places))
            assert all(bytes(buffer.writable[-1]) == b"\0" for buffer, _ in got)
            for number in range(count):
                user, _ = guest.iommu.pages[WINDOW // PAGE + number]
                assert bytes(at(user)) == wanted[number * PAGE :][:PAGE]
            for number, (user, canary) in left.items():
                assert bytes(at(user)) == canary, f"page {number} was written after it had been taken away"
            done += len(got)
        assert done >= 50


@every_layout
def test_what_was_in_flight_waits_for_its_translations(tmp_path: Path, layout: int) -> None:
    """A process has died in the middle of requests. The next one does them again, as soon as it may reach them."""
    with guest_on(tmp_path, layout) as (guest, server):
        shape, fd = guest.frontend.get_inflight(1, SIZE)
        guest.frontend.set_inflight(shape, fd)
        data = [guest.memory.alloc(PAGE, PAGE) for _ in range(6)]
        taken = []
        for number, block in enumerate(data):
            taken.append(guest.driver.add([header(IN, number * 8)], [(block.guest_addr, PAGE), 1]))
        guest.driver.publish()
        if guest.driver.layout == "packed":
            leave_packed(fd, guest.driver, taken, 3)
        else:
            leave_split(fd, guest.driver, taken[1:], taken[0])
        # One in the middle has no page; those before it are done, those after it wait for their turn.
        hidden = data[3].guest_addr
        user, _ = guest.iommu.pages.pop(hidden // PAGE)
        guest.start()
        first = guest.finish(3)
        assert {buffer for buffer, _ in first} == set(taken[:3])
        assert guest.frontend.serve(lambda: (hidden, WRITE) in guest.iommu.missed, 20)
        wait_for(lambda: stands(server))
        assert guest.driver.outstanding == 3
        assert bytes(data[4]) == bytes(PAGE)
        guest.iommu.pages[hidden // PAGE] = (user, READ | WRITE)
        guest.iommu.update(hidden, PAGE, user, READ | WRITE)  # nobody kicks
        assert {buffer for buffer, _ in guest.finish(3)} == set(taken[3:])
        skipped = 0 if guest.driver.layout == "packed" else 1  # of this one the crash has left the used element
        for number, block in enumerate(data[skipped:], skipped):
            assert bytes(block) == content(DISK_BYTES)[number * PAGE :][:PAGE]
        assert guest.ask(IN, 0, [512]) == OK
        os.close(fd)


@every_layout
def test_the_dirty_log_has_guest_addresses(tmp_path: Path, layout: int) -> None:
    """Exactly what the device has written is marked, where it lies for the guest."""
    with guest_on(tmp_path, layout | v.mask(v.VHOST_F_LOG_ALL)) as (guest, _):
        guest.start()
        pages = guest.pages(10)
        assert guest.ask(IN, 0, [(pages.start, 10 * PAGE)]) == OK
        log = LogFile(pages=8192)
        guest.frontend.set_log_base(log.fd, log.size)
        guest.frontend.set_features(guest.features)
        guest.frontend.set_ring_addresses(guest.ring(logged=True))
        guest.iommu.invalidate(0, 0)
        outer = guest.memory.alloc(PAGE, PAGE)
        status = guest.memory.alloc(PAGE, PAGE)
        memoryview(outer)[:16] = header(IN, 800)
        log.marked()
        watch = Watch(guest.memory)
        guest.driver.add([(outer.guest_addr, 16)], [(pages.start + 100, 3 * PAGE - 200), (status.guest_addr, 1)])
        memoryview(status)[0] = 0xFF
        guest.go()
        guest.finish()
        marked = log.marked()
        log.close()
        shift = (IOVA - GPA) // PAGE
        written = {pages.block.guest_addr // PAGE + place - shift for place in pages.order[:3]}
        ring = {place // PAGE - shift for place in guest.driver.guest_addresses}
        wanted = written | {status.guest_addr // PAGE - shift}
        assert wanted <= marked <= wanted | ring
        assert marked & ring
        driver = {page for place in guest.driver.guest_addresses for page in (place // PAGE, place // PAGE + 1)}
        assert watch.changed() - driver <= {page + shift for page in marked}


@pytest.mark.shows("VHOST_USER_PROTOCOL_F_GPA_ADDRESSES")
@every_layout
def test_ring_addresses_of_the_guest_without_an_iommu(tmp_path: Path, layout: int) -> None:
    """With GPA_ADDRESSES rings are named as the guest sees them; a front-end's own addresses mean nothing then."""
    make_file(tmp_path / "disk.img", DISK_BYTES)
    with serving(tmp_path / "disk.img", str(tmp_path / "s")):
        protocol = v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES)
        frontend = Frontend.connect(str(tmp_path / "s"), timeout=60)
        memory = GuestMemory(1 << 20, guest_addr=GPA)
        features = frontend.negotiate(layout, protocol)
        frontend.set_features(features)
        assert frontend.has_protocol(v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES)
        driver = DriverQueue(memory, SIZE, features=features)
        frontend.set_mem_table([Region(*row[:4]) for row in memory.regions], [row[4] for row in memory.regions])
        base = 0x8000 if driver.layout == "packed" else 0
        with pytest.raises(BackendError, match="refused"):
            frontend.start_ring(RingSetup(0, SIZE, *driver.addresses, base, driver.kick_fd, driver.call_fd, None))
        frontend.start_ring(RingSetup(0, SIZE, *driver.guest_addresses, base, driver.kick_fd, driver.call_fd, None))
        buffer = driver.add([header(GET_ID)], [20, 1])
        driver.publish()
        driver.kick()
        wait_for(driver.poll)
        assert bytes(buffer.writable[0]).rstrip(b"\0") == b"disk.img"
        frontend.close()
        driver.close()
        memory.close()


def test_without_its_channel_a_connection_ends(tmp_path: Path) -> None:
    """Nobody could be asked for an address any more; the next connection is served as ever."""
    with guest_on(tmp_path) as (guest, _):
        guest.start()
        assert guest.ask(IN, 0, [512]) == OK
        assert guest.frontend.channel is not None
        guest.frontend.channel.close()
        guest.driver.add([header(IN, 0)], [(0x3_0000_0000, 512), 1])
        guest.go()
        assert guest.frontend.wait_closed(20)
        again = Guest(str(tmp_path / "s"), VERSION_1)
        try:
            again.start()
            assert again.ask(IN, 0, [512]) == OK
        finally:
            again.close()


def test_a_channel_that_talks_nonsense_ends_the_connection(tmp_path: Path) -> None:
    with guest_on(tmp_path) as (guest, _):
        guest.start()
        assert guest.ask(IN, 0, [512]) == OK
        ours, theirs = socket.socketpair()
        with ours, theirs:
            guest.frontend.request(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
            ours.send(b"\xff" * 100)
            assert guest.frontend.wait_closed(20)
