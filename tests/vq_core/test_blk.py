"""Requests of a virtio-blk driver: what they do to the disk, in both layouts and from every kind of file."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blk_rig import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTOR,
    UNSUPP,
    WRITE_ZEROES,
    BlkGuest,
    blk_guest,
    content,
    header,
    make_file,
    ranges,
)
from engine_rig import EVENT_IDX, PACKED, VERSION_1, Arena, every_layout
from vq_core.dirty import DirtyLog
from vq_core.disk import Disk
from vq_core.guest_memory import GuestMemory

SIZE = 1 << 20
SECTORS = SIZE // SECTOR


@pytest.fixture(params=["tmpfs", "disk"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Name a file in memory, and one in a file system that may make a request wait."""
    if request.param == "disk":
        yield tmp_path / "disk.img"
        return
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    made = folder / f"vq-test-{os.getpid()}.img"
    yield made
    made.unlink(missing_ok=True)


@pytest.mark.shows("VIRTIO_BLK_F_FLUSH", "VIRTIO_BLK_F_DISCARD", "VIRTIO_BLK_F_WRITE_ZEROES")
@every_layout
def test_each_request(path: Path, layout: int) -> None:
    data = make_file(path)
    with blk_guest(path, layout) as guest:
        assert guest.disk.capacity == SECTORS
        assert guest.ask(IN, 3, size=1024) == (OK, data[3 * SECTOR :][:1024], 1025)
        new = content(8192, seed=7)
        assert guest.ask(OUT, 100, new) == (OK, b"", 1)
        assert guest.ask(IN, 100, size=8192) == (OK, new, 8193)
        assert guest.ask(FLUSH) == (OK, b"", 1)
        name = path.name.encode()[:20].ljust(20, b"\0")
        assert guest.ask(GET_ID, size=20) == (OK, name, 21)
        assert guest.ask(GET_ID, size=4) == (OK, name[:4], 5)
        assert guest.ask(GET_ID, size=30) == (OK, name + bytes(10), 20)
        assert guest.ask(DISCARD, data=ranges((8, 8, 0), (32, 8, 0))) == (OK, b"", 1)
        assert guest.ask(WRITE_ZEROES, data=ranges((16, 8, 0))) == (OK, b"", 1)
        assert guest.ask(WRITE_ZEROES, data=ranges((24, 8, 1))) == (OK, b"", 1)
        expected = data[: 8 * SECTOR] + bytes(32 * SECTOR) + data[40 * SECTOR : 100 * SECTOR] + new
        assert path.read_bytes() == expected + data[len(expected) :]
        counters = guest.worker.queue_snapshot(0)
        assert (counters["reads"], counters["writes"], counters["flushes"], counters["others"]) == (2, 1, 1, 6)
        assert (counters["read_bytes"], counters["written_bytes"], counters["failed"]) == (9216, 8192, 0)


def test_null_disk() -> None:
    with blk_guest(None) as guest:
        assert guest.ask(OUT, 0, content(4096)) == (OK, b"", 1)
        assert guest.ask(IN, 0, size=4096) == (OK, bytes(4096), 4097)
        assert guest.ask(IN, 2048, size=512)[0] == IOERR
        assert guest.ask(FLUSH)[0] == guest.ask(WRITE_ZEROES, data=ranges((0, 8, 0)))[0] == OK


@every_layout
def test_long_requests_and_many_at_once(path: Path, layout: int) -> None:
    """More than a worker moves itself; they are done in any order, each once."""
    data = make_file(path)
    with blk_guest(path, layout | EVENT_IDX, size=128) as guest:
        wanted = {}
        for i in range(20):
            length = 262144 if i % 3 == 0 else 4096
            sector = i * 37 % (SECTORS - length // SECTOR)
            buffer = guest.add([header(IN, sector)], [length // 4] * 4 + [1])
            wanted[buffer] = (sector * SECTOR, length)
            if i % 8 == 7:
                guest.go()
        guest.go()
        for buffer, used in guest.wait(20):
            start, length = wanted.pop(buffer)
            assert used == length + 1
            assert b"".join(bytes(part) for part in buffer.writable) == data[start : start + length] + b"\0"
        assert not wanted


@every_layout
def test_any_split_into_descriptors(tmp_path: Path, layout: int) -> None:
    """Header, data and status in pieces that respect nothing, over regions of one page each."""
    path = tmp_path / "disk.img"
    data = make_file(path)
    memory = GuestMemory(1 << 20)
    arena = Arena(memory)
    with blk_guest(path, layout, memory=memory) as guest:
        arena.poke(arena.start + 4090, header(OUT, 5) + content(1024, 3))
        readable, _ = arena.place(4090, [1, 7, 8, 100, 412, 512], [0] * 6)
        status, _ = arena.place(2 * 4096 - 1, [1], [0])
        guest.add(readable, status)
        guest.go()
        assert [length for _, length in guest.wait()] == [1]
        assert path.read_bytes()[5 * SECTOR :][:1024] == content(1024, 3)
        # One descriptor for header, one for data and status, both over a border.
        arena.poke(arena.start + 4 * 4096 - 3, header(IN, 9))
        head, _ = arena.place(4 * 4096 - 3, [16], [0])
        back, _ = arena.place(7 * 4096 - 700, [2049], [0])
        guest.add(head, back)
        guest.go()
        assert [length for _, length in guest.wait()] == [2049]
        assert arena.peek(back[0][0], 2049) == data[9 * SECTOR :][:2048] + b"\0"


@every_layout
def test_indirect(tmp_path: Path, layout: int) -> None:
    path = tmp_path / "disk.img"
    data = make_file(path)
    with blk_guest(path, layout | 1 << 28) as guest:
        assert guest.ask(IN, 1, size=4096, indirect=True) == (OK, data[512:4608], 4097)


@pytest.mark.shows("VIRTIO_BLK_F_RO")
@pytest.mark.parametrize(
    ("kind", "data", "size", "status"),
    [
        (OUT, content(512), 0, IOERR),
        (DISCARD, ranges((0, 8, 0)), 0, IOERR),
        (WRITE_ZEROES, ranges((0, 8, 0)), 0, IOERR),
        (IN, b"", 512, OK),
        (FLUSH, b"", 0, OK),
    ],
)
def test_read_only(tmp_path: Path, kind: int, data: bytes, size: int, status: int) -> None:
    path = tmp_path / "disk.img"
    before = make_file(path)
    with blk_guest(path, read_only=True) as guest:
        assert guest.ask(kind, 0, data, size)[0] == status
    assert path.read_bytes() == before


def test_unknown_requests(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    make_file(path)
    with blk_guest(path) as guest:
        for kind in (2, 3, 5, 10, 14, 16, 2**31, 2**32 - 1):
            assert guest.ask(kind, 0, bytes(16), 16)[::2] == (UNSUPP, 1)


def test_disabled_ring_takes_nothing_and_stop_waits(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    make_file(path)
    with blk_guest(path, enabled=False) as guest:
        guest.add([header(IN)], [512, 1])
        guest.go()
        threading.Event().wait(0.05)
        assert not guest.driver.poll()
        guest.queue.set_enabled(True)  # the kick came before
        guest.wait()
        for _ in range(15):
            guest.add([header(IN)], [262144, 1])
        guest.go()
        base = guest.queue.stop()
        assert base == int(guest.driver.used_head[1])  # everything that was taken is published
        guest.start(base=base)
        guest.wait(15)


@pytest.mark.parametrize("layout", [VERSION_1, PACKED], ids=["split", "packed"])
def test_dirty_log(tmp_path: Path, layout: int) -> None:
    """What is read into the guest and each status byte are marked, and nothing else."""
    path = tmp_path / "disk.img"
    make_file(path)
    memory = GuestMemory(1 << 20, guest_addr=0)
    log_fd = os.memfd_create("log")
    os.ftruncate(log_fd, 4096)
    log = DirtyLog(log_fd, 4096, 0)
    with blk_guest(path, layout, memory=memory, log=log) as guest:
        block = memory.alloc(6 * 4096, 4096)
        page = block.guest_addr // 4096
        memory.view(block.guest_addr, 16)[:] = header(IN, 1)
        guest.add([(block.guest_addr, 16)], [(block.guest_addr + 4096, 4096), (block.guest_addr + 3 * 4096, 1)])
        guest.go()
        guest.wait()
        bits = int.from_bytes(os.pread(log_fd, 4096, 0), "little")
        assert [i - page for i in range(256) if bits >> i & 1] == [1, 3]
    os.close(log_fd)


def test_file_that_shrinks_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    make_file(path)
    with blk_guest(path) as guest:
        os.truncate(path, 4096)
        assert guest.ask(IN, 16, size=512)[0] == IOERR  # nobody has told us, and there is nothing
        assert guest.disk.measure()
        assert guest.ask(IN, 7, size=512)[0] == OK
        assert guest.ask(IN, 8, size=512)[0] == IOERR
        os.truncate(path, 8192)
        assert guest.disk.measure()
        assert not guest.disk.measure()
        assert guest.ask(IN, 8, size=512) == (OK, bytes(512), 513)


def test_stable_writes(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    make_file(path)
    with blk_guest(path) as guest:
        guest.disk.set_stable(True)
        assert guest.ask(OUT, 0, content(4096, 5))[0] == OK
        assert guest.ask(WRITE_ZEROES, data=ranges((8, 8, 0)))[0] == OK
        waited = 1 if guest.disk.ready else 2  # for the medium, if there is one
        assert guest.worker.queue_snapshot(0)["waited"] == waited
    assert path.read_bytes()[:8192] == content(4096, 5) + bytes(4096)


def test_what_is_no_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a regular file"):
        Disk("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="neither a regular file"):
        Disk(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        Disk(tmp_path / "none")


def test_worker_sleeps_and_wakes(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    make_file(path)
    with blk_guest(path, EVENT_IDX | VERSION_1) as guest:
        for _ in range(5):
            threading.Event().wait(0.01)
            assert guest.ask(IN, size=512)[0] == OK
            assert guest.ask(FLUSH)[0] == OK
        assert guest.worker.snapshot()["sleeps"] >= 5


def test_two_workers_share_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    make_file(path)
    with blk_guest(path) as one:
        other = BlkGuest(Disk(path))
        assert other.ask(OUT, 1, content(512, 8))[0] == OK
        assert one.ask(IN, 1, size=512) == (OK, content(512, 8), 513)
        other.close()
