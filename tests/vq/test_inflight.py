"""The in-flight region over the socket of a block device: asked for, given back, kept over a suspension and a crash."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import reference_inflight as reference
from blk_rig import IN, OUT, header, make_file
from disk_rig import VERSION_1, serving
from engine_rig import RING_PACKED, every_layout
from vq import shared_file
from vq import virtio as v
from vq.errors import BackendError, ConnectionClosed, UsageError
from vq.frontend import Frontend, RingSetup
from vq.message import Request
from vq.payload import Inflight, Region
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.inflight import inflight_bytes
from waiting import wait_for

SIZE = 64
PROTOCOL = v.mask(
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT, v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
)  # fmt: skip
KEPT = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class Guest:
    """A guest that outlives its connections: memory, a ring, and an in-flight region."""

    def __init__(self, path: str, features: int) -> None:
        self.path, self.features = path, features
        self.memory = GuestMemory(32 << 20)
        self.driver = DriverQueue(self.memory, SIZE, features=features)
        self.packed = bool(features & RING_PACKED)
        self.shape: Inflight | None = None
        self.fd = -1
        self.connect()

    def connect(self, protocol: int = PROTOCOL) -> None:
        """Connect, with the region if there is one; the ring stands."""
        self.frontend = Frontend.connect(self.path, timeout=60)
        self.frontend.set_features(self.frontend.negotiate(self.features, protocol))
        regions = self.memory.regions
        self.frontend.set_mem_table([Region(*one[:4]) for one in regions], [one[4] for one in regions])
        if self.shape is not None:
            self.frontend.set_inflight(self.shape, self.fd)

    def ask_region(self) -> None:
        self.shape, self.fd = self.frontend.get_inflight(1, SIZE)
        self.frontend.set_inflight(self.shape, self.fd)

    def start(self, base: int | None = None, *, enable: bool = True) -> None:
        if base is None:
            base = 0x80008000 if self.packed else self.driver.used_idx
        setup = RingSetup(
            0, SIZE, *self.driver.addresses, base, kick_fd=self.driver.kick_fd, call_fd=self.driver.call_fd
        )
        self.frontend.start_ring(setup, enable=enable)

    def read(self, sector: int, sectors: int = 1) -> None:
        self.driver.add([header(IN, sector)], [sectors * 512, 1])

    def write(self, sector: int, sectors: int) -> None:
        self.driver.add([header(OUT, sector), bytes(sectors * 512)], [1])

    def go(self) -> None:
        self.driver.publish()
        self.driver.kick()

    def finish(self) -> int:
        """Wait until nothing is under way; how many requests came."""
        count = 0

        def done() -> bool:
            nonlocal count
            for buffer, length in self.driver.poll():
                assert length == sum(map(len, buffer.writable))
                assert bytes(buffer.writable[-1]) == b"\0"
                count += 1
            return self.driver.outstanding == 0

        wait_for(done)
        return count

    def found(self) -> reference.Found:
        region = os.pread(self.fd, 1 << 20, 0)
        if self.packed:
            found = reference.packed(region, SIZE, SIZE, [int(word) for word in self.driver.desc["flags"]])
        else:
            found = reference.split(region, SIZE, SIZE, int(self.driver.used_head[1]))
        assert found is not None
        return found

    def close(self) -> None:
        self.frontend.close()
        self.driver.close()
        self.memory.close()
        if self.fd >= 0:
            os.close(self.fd)


@contextmanager
def guest_on(tmp_path: Path, features: int) -> Iterator[Guest]:
    make_file(tmp_path / "disk.img", 4 << 20)
    with serving(tmp_path / "disk.img", str(tmp_path / "s")):
        guest = Guest(str(tmp_path / "s"), features)
        try:
            yield guest
        finally:
            guest.close()


@pytest.mark.shows("GET_INFLIGHT_FD", "VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD")
@every_layout
@pytest.mark.checklist(14)
def test_region_is_made_as_large_as_it_must_be(tmp_path: Path, layout: int) -> None:
    """It is all zero and keeps its size; asked for a thousand times, nothing of it stays with the back-end."""
    with guest_on(tmp_path, layout) as guest:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(1000):
            shape, fd = guest.frontend.get_inflight(1, SIZE)
            assert shape == Inflight(inflight_bytes(1, SIZE, guest.packed), 0, 1, SIZE)
            assert os.pread(fd, 1 << 20, 0) == bytes(shape.mmap_size)
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & KEPT == KEPT
            os.close(fd)
        guest.frontend.barrier()
        guest.frontend.request(Request.GET_FEATURES)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.checklist(14)
def test_region_of_no_good_shape_is_not_made(tmp_path: Path) -> None:
    with guest_on(tmp_path, VERSION_1) as guest:
        for queues, size in ((0, 64), (2, 64), (65535, 64), (1, 0), (1, 32769), (65535, 65535)):
            reply, fd = guest.frontend.request_fd(Request.GET_INFLIGHT_FD, Inflight(0, 0, queues, size))
            assert (reply, fd) == (Inflight(0, 0, queues, size), None)
            with pytest.raises(BackendError, match="none of this shape"):
                guest.frontend.get_inflight(queues, size)


def test_region_lies_in_a_file_that_nobody_can_withhold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read by the control thread when a ring starts, and written to by the worker for each request."""
    size = inflight_bytes(1, SIZE, False)
    (tmp_path / "region").write_bytes(bytes(size))
    with guest_on(tmp_path, VERSION_1) as guest, (tmp_path / "region").open("r+b") as region:
        monkeypatch.setattr(shared_file, "_file_system", lambda fd: "fuse.sshfs")
        with pytest.raises(BackendError, match="refused"):
            guest.frontend.set_inflight(Inflight(size, 0, 1, SIZE), region.fileno())
        monkeypatch.setattr(shared_file, "_file_system", lambda fd: "xfs")
        guest.frontend.set_inflight(Inflight(size, 0, 1, SIZE), region.fileno())


@pytest.mark.shows("SET_INFLIGHT_FD", "VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD")
@every_layout
@pytest.mark.checklist(13)
def test_region_that_does_not_fit_is_refused(tmp_path: Path, layout: int) -> None:
    """And the back-end goes on without; a region that fits is taken afterwards."""
    with guest_on(tmp_path, layout) as guest:
        size = inflight_bytes(1, SIZE, guest.packed)
        fd = os.memfd_create("region")
        os.ftruncate(fd, size)
        good = Inflight(size, 0, 1, SIZE)
        for shape in (
            good._replace(num_queues=0), good._replace(num_queues=2), good._replace(num_queues=65535),
            good._replace(queue_size=0), good._replace(queue_size=65535), good._replace(queue_size=SIZE * 2),
            good._replace(mmap_size=0), good._replace(mmap_size=size - 1), good._replace(mmap_size=size + 1),
            good._replace(mmap_size=2**64 - 1, mmap_offset=2**64 - 1), good._replace(mmap_offset=4096),
            good._replace(mmap_offset=4), good._replace(mmap_size=2**63, mmap_offset=2**63),
        ):  # fmt: skip
            with pytest.raises(BackendError, match="refused"):
                guest.frontend.set_inflight(shape, fd)
        guest.frontend.set_inflight(good, fd)
        guest.start()
        with pytest.raises(BackendError, match="refused"):  # the ring has this region until it stops
            guest.frontend.set_inflight(good, fd)
        guest.read(1)
        guest.go()
        assert guest.finish() == 1
        assert struct.unpack_from("<8xHH", os.pread(fd, 16, 0)) == (1, SIZE)
        os.close(fd)


@pytest.mark.checklist(13)
def test_region_with_fewer_entries_than_the_ring(tmp_path: Path) -> None:
    with guest_on(tmp_path, VERSION_1) as guest:
        guest.frontend.set_inflight(*(region := guest.frontend.get_inflight(1, SIZE // 2)))
        os.close(region[1])
        with pytest.raises(BackendError, match="refused"):
            guest.start()


@pytest.mark.shows(
    "GET_VRING_BASE_SKIP_DRAIN",
    "VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT",
    "VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN",
)
@every_layout
def test_suspended_ring_goes_on_over_another_connection(tmp_path: Path, layout: int) -> None:
    """What was not begun stays in flight, and nothing is touched after the answer; then all of it is done."""
    with guest_on(tmp_path, layout) as guest:
        guest.ask_region()
        left = 0
        for moment in range(300):
            if left >= 20:
                break
            guest.start()
            for i in range(20):  # so long that all of them wait for the pool, and for the medium if there is one
                guest.write(i, 512)
            guest.go()
            time.sleep(moment % 10 / 2000)
            base = guest.frontend.get_vring_base_skip_drain(0)
            before = os.pread(guest.fd, 1 << 20, 0), guest.memory.view(guest.memory.regions[0][0], 1 << 20).tobytes()
            found = guest.found()
            left += len(found.requests)
            assert base == (found.avail | found.used << 16 if guest.packed else found.avail)
            guest.frontend.close()
            guest.connect()
            after = os.pread(guest.fd, 1 << 20, 0), guest.memory.view(guest.memory.regions[0][0], 1 << 20).tobytes()
            assert before == after
            guest.start()
            guest.finish()
            guest.frontend.stop_ring(0)
            assert not guest.found().requests
        assert left > 0


@every_layout
def test_ring_without_a_region_is_drained(tmp_path: Path, layout: int) -> None:
    with guest_on(tmp_path, layout) as guest:
        guest.start()
        for i in range(20):
            guest.read(i, 512)
        guest.go()
        base = guest.frontend.get_vring_base_skip_drain(0)
        assert base & 0xFFFF == guest.driver.used_idx or guest.driver.poll()
        guest.start(base)
        guest.finish()


@every_layout
def test_reset_device_forgets_the_region(tmp_path: Path, layout: int) -> None:
    with guest_on(tmp_path, layout) as guest:
        guest.ask_region()
        guest.start()
        guest.read(1)
        guest.go()
        guest.frontend.request(Request.RESET_DEVICE)
        kept = os.pread(guest.fd, 1 << 20, 0)
        guest.driver.reset()
        guest.start(0x80008000 if guest.packed else 0)
        guest.read(1)
        guest.go()
        guest.finish()
        assert os.pread(guest.fd, 1 << 20, 0) == kept


@every_layout
@pytest.mark.checklist(13)
def test_region_that_contradicts_itself_starts_no_ring(tmp_path: Path, layout: int) -> None:
    with guest_on(tmp_path, layout) as guest:
        guest.ask_region()
        os.pwrite(guest.fd, struct.pack("<H", 7), 8)
        with pytest.raises(BackendError, match="refused"):
            guest.start()
        os.pwrite(guest.fd, bytes(inflight_bytes(1, SIZE, guest.packed)), 0)
        guest.start()
        guest.read(1)
        guest.go()
        guest.finish()


@every_layout
@pytest.mark.checklist(11, 13)
def test_region_that_is_truncated_ends_the_connection(tmp_path: Path, layout: int) -> None:
    with guest_on(tmp_path, layout) as guest:
        fd = os.memfd_create("region")
        size = inflight_bytes(1, SIZE, guest.packed)
        os.ftruncate(fd, size)
        guest.frontend.set_inflight(Inflight(size, 0, 1, SIZE), fd)
        guest.start()
        os.ftruncate(fd, 0)
        with pytest.raises((ConnectionClosed, BackendError)):  # noqa: PT012
            for _ in range(100):
                guest.read(1)
                guest.go()
                guest.frontend.request(Request.GET_FEATURES)
        os.close(fd)
        guest.driver.reset()
        guest.connect()
        guest.start(0x80008000 if guest.packed else 0)
        guest.read(1)
        guest.go()
        guest.finish()


def test_what_was_not_negotiated_is_not_sent(tmp_path: Path) -> None:
    with guest_on(tmp_path, VERSION_1) as guest:
        guest.frontend.close()
        guest.connect(0)
        with pytest.raises(UsageError, match="INFLIGHT_SHMFD"):
            guest.frontend.get_inflight(1, SIZE)
        with pytest.raises(UsageError, match="SKIP_DRAIN"):
            guest.frontend.get_vring_base_skip_drain(0)
