"""Disks that are no plain file in the page cache: block devices, direct input and output, media that fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blk_rig import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    SECTOR,
    WRITE_ZEROES,
    BlkGuest,
    blk_guest,
    content,
    header,
    make_file,
    ranges,
)
from engine_rig import VERSION_1
from vq_core.disk import Disk

SIZE = 1 << 20
BLOCK = 4096
UNMAP = 1

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root: sudo make test")


class Loop:
    """A block device of the host with logical blocks of 4096 bytes, on a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        words = ["losetup", "--find", "--show", "--sector-size", str(BLOCK), str(file)]
        self.path = Path(subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip())

    def stat(self) -> tuple[int, int]:
        """Sectors that were written to the device, and how often it was flushed."""
        words = Path(f"/sys/block/{self.path.name}/stat").read_text().split()
        return int(words[6]), int(words[15])

    def read(self, offset: int, length: int) -> bytes:
        """What the guest of another host would find: the file below, written out."""
        fd = os.open(self.path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        with self.file.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def close(self) -> None:
        subprocess.run(["losetup", "--detach", str(self.path)], check=True)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    make_file(tmp_path / "loop.img", SIZE)
    loop = Loop(tmp_path / "loop.img")
    yield loop
    loop.close()


@needs_root
def test_block_device(loop: Loop) -> None:
    data = content(SIZE)
    with blk_guest(loop.path) as guest:
        assert (guest.disk.capacity, guest.disk.block_bytes) == (SIZE // SECTOR, BLOCK)
        assert not guest.disk.ready
        assert guest.ask(IN, 8, size=BLOCK) == (OK, data[BLOCK : 2 * BLOCK], BLOCK + 1)
        assert guest.ask(OUT, 8, content(BLOCK, seed=3))[0] == OK
        assert guest.ask(FLUSH)[0] == OK
        assert loop.read(BLOCK, BLOCK) == content(BLOCK, seed=3)
        assert guest.ask(IN, SIZE // SECTOR, size=SECTOR)[0] == IOERR


@needs_root
@pytest.mark.parametrize("direct", [False, True])
def test_requests_that_are_no_multiple_of_the_logical_block(loop: Loop, direct: bool) -> None:
    """Firmware reads and writes single sectors of 512 bytes: their neighbours in the block stay as they were."""
    expected = bytearray(content(SIZE))
    guest = BlkGuest(Disk(loop.path, direct=direct))
    try:
        for sector, count in ((3, 1), (7, 2), (17, 30), (8, 8)):
            new = content(count * SECTOR, seed=sector)
            assert guest.ask(OUT, sector, new)[0] == OK
            expected[sector * SECTOR : sector * SECTOR + len(new)] = new
            assert guest.ask(IN, sector, size=len(new))[:2] == (OK, new)
        for sector, count, flags in ((1, 2, 0), (21, 22, UNMAP), (64, 16, UNMAP), (103, 1, 0)):
            assert guest.ask(WRITE_ZEROES, 0, ranges((sector, count, flags)))[0] == OK
            expected[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
        assert guest.ask(FLUSH)[0] == OK
        assert guest.ask(IN, 0, size=65536)[1] == bytes(expected[:65536])
        assert loop.read(0, SIZE) == bytes(expected)
    finally:
        guest.close()


@needs_root
def test_discard_reaches_whole_blocks_only(loop: Loop) -> None:
    with blk_guest(loop.path) as guest:
        used = loop.file.stat().st_blocks
        assert guest.ask(DISCARD, 0, ranges((1, 6, 0)))[0] == OK  # inside a block: nothing can be done
        assert guest.ask(DISCARD, 0, ranges((9, 512, 0), (1024, 512, 0)))[0] == OK
        data = content(SIZE)
        assert guest.ask(IN, 0, size=16 * SECTOR)[1][: 16 * SECTOR] == data[: 16 * SECTOR]
        kept = guest.ask(IN, 520, size=8 * SECTOR)[1]
        assert kept == data[520 * SECTOR :][: 8 * SECTOR]
        assert loop.file.stat().st_blocks < used
        assert loop.read(1024 * SECTOR, BLOCK) == bytes(BLOCK)


@needs_root
def test_a_stable_write_has_reached_the_medium_when_it_is_acknowledged(loop: Loop) -> None:
    """Seen at the device: sectors written and flushes, at once; with a cache only after FLUSH."""
    with blk_guest(loop.path) as guest:
        for number in range(1, 6):
            guest.disk.set_stable(True)
            sectors, flushes = loop.stat()
            assert guest.ask(OUT, 8 * number, content(BLOCK, seed=number))[0] == OK
            now = loop.stat()
            assert now[0] >= sectors + 8
            assert now[1] > flushes
            guest.disk.set_stable(False)
            assert guest.ask(OUT, 8 * number, content(BLOCK, seed=-number & 0xFFFF))[0] == OK
            assert loop.stat()[1] == now[1]  # written out it may be by now, but nobody has flushed the device
            assert guest.ask(FLUSH)[0] == OK
            after = loop.stat()
            assert after[0] >= now[0] + 8
            assert after[1] > now[1]
        guest.disk.set_stable(True)
        sectors, flushes = loop.stat()
        assert guest.ask(WRITE_ZEROES, 0, ranges((256, 8, 0)))[0] == OK
        assert loop.stat()[1] > flushes


@needs_root
def test_a_medium_that_fails(loop: Loop) -> None:
    """The file below is cut: those blocks fail, and all others go on."""
    guest = BlkGuest(Disk(loop.path, direct=True))
    try:
        os.truncate(loop.file, SIZE // 2)
        aligned = guest.memory.alloc(BLOCK, align=BLOCK)
        buffer = guest.add([header(IN, SIZE // SECTOR - 8)], [aligned, 1])
        guest.go()
        assert guest.wait() == [(buffer, 1)]
        assert bytes(buffer.writable[-1]) == bytes([IOERR])
        assert guest.ask(IN, 8, size=BLOCK)[:2] == (OK, content(SIZE)[BLOCK : 2 * BLOCK])
        assert guest.queue.broken is None
    finally:
        guest.close()


@pytest.fixture
def medium(tmp_path: Path) -> Iterator[Path]:
    """A folder on a medium that can be reached past the page cache: the scratch folder may lie in memory."""
    for folder in (tmp_path, Path("/var/tmp"), Path.cwd()):
        path = folder / f"vq-medium-{os.getpid()}"
        try:
            path.write_bytes(bytes(BLOCK))
            in_memory = Disk(path).ready
            Disk(path, direct=True).close()
        except (OSError, ValueError):
            continue
        finally:
            path.unlink(missing_ok=True)
        if not in_memory:
            with tempfile.TemporaryDirectory(prefix="vq-medium-", dir=folder) as name:
                yield Path(name)
            return
    pytest.skip("no folder on a medium with direct input and output; let TMPDIR name one")


def read_bytes() -> int:
    """Bytes that this process has fetched from a medium."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def test_direct(medium: Path) -> None:
    """What fits goes past the page cache each time; what does not fit is done all the same."""
    path = medium / "disk.img"
    data = make_file(path, SIZE)
    guest = BlkGuest(Disk(path, direct=True))
    try:
        assert guest.disk.direct
        aligned = guest.memory.alloc(16 * BLOCK, align=BLOCK)
        before = read_bytes()
        for sector in (0, 8, 8, 8):
            buffer = guest.add([header(IN, sector)], [aligned, 1])
            guest.go()
            assert guest.wait() == [(buffer, 16 * BLOCK + 1)]
            assert bytes(buffer.writable[0]) == data[sector * SECTOR :][: 16 * BLOCK]
        if guest.disk.block_bytes <= SECTOR and Path("/proc/self/io").exists():
            assert read_bytes() - before >= 4 * 16 * BLOCK
        memoryview(aligned)[:] = content(16 * BLOCK, seed=5)
        guest.add([header(OUT, 128), aligned], [1])
        guest.go()
        ((done, _),) = guest.wait()
        assert bytes(done.writable[-1]) == bytes([OK])
        # At an odd address, and shorter than a block of the file system.
        odd = guest.memory.alloc(2 * BLOCK, align=BLOCK)
        place = (odd.guest_addr + 1, SECTOR)
        memoryview(odd)[1 : 1 + SECTOR] = content(SECTOR, seed=6)
        guest.add([header(OUT, 129), place], [1])
        guest.go()
        ((done, _),) = guest.wait()
        assert bytes(done.writable[-1]) == bytes([OK])
        expected = content(16 * BLOCK, seed=5)
        expected = expected[:SECTOR] + content(SECTOR, seed=6) + expected[2 * SECTOR :]
        assert guest.ask(IN, 128, size=16 * BLOCK)[:2] == (OK, expected)
        assert guest.ask(WRITE_ZEROES, 0, ranges((130, 3, 0)))[0] == OK
        assert guest.ask(FLUSH)[0] == OK
        assert path.read_bytes()[128 * SECTOR :][: 2 * SECTOR] == expected[: 2 * SECTOR]
        assert guest.worker.queue_snapshot(0)["waited"] > 4
    finally:
        guest.close()


def test_direct_to_the_end_of_an_odd_file(medium: Path) -> None:
    """The last sectors of a file do not fill a block of its file system."""
    path = medium / "disk.img"
    data = make_file(path, SIZE + 3 * SECTOR)
    guest = BlkGuest(Disk(path, direct=True))
    try:
        aligned = guest.memory.alloc(2 * BLOCK, align=BLOCK)
        length = BLOCK + 3 * SECTOR
        buffer = guest.add([header(IN, (SIZE - BLOCK) // SECTOR)], [(aligned.guest_addr, length), 1])
        guest.go()
        assert guest.wait() == [(buffer, length + 1)]
        assert bytes(memoryview(aligned)[:length]) == data[SIZE - BLOCK :]
    finally:
        guest.close()


@pytest.mark.parametrize("direct", [False, True])
def test_a_write_that_the_file_system_refuses(medium: Path, direct: bool) -> None:
    """Beyond a limit of the process every write fails, as on a file system that is full; nothing else does."""
    path = medium / "disk.img"
    path.touch()
    os.truncate(path, SIZE)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    guest = BlkGuest(Disk(path, direct=direct), VERSION_1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, old[1]))
        try:
            assert guest.ask(OUT, SIZE // 2 // SECTOR, content(BLOCK))[0] == IOERR
            assert guest.ask(OUT, SIZE // 2 // SECTOR - 8, content(BLOCK))[0] == OK
            assert guest.ask(OUT, SIZE // 2 // SECTOR - 8, content(2 * BLOCK))[0] == IOERR  # the first half fits
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert guest.ask(OUT, SIZE // 2 // SECTOR, content(BLOCK))[0] == OK
        assert guest.worker.queue_snapshot(0)["failed"] == 2
    finally:
        guest.close()
        signal.signal(signal.SIGXFSZ, handler)


@needs_root
def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    """A sparse file on a tmpfs of 1 MiB: what it has room for is written, and the rest fails."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True)
    try:
        path = folder / "disk.img"
        path.touch()
        os.truncate(path, 4 << 20)
        with blk_guest(path) as guest:
            assert guest.disk.ready
            found = [guest.ask(OUT, sector, content(65536, seed=sector + 1))[0] for sector in range(0, 8192, 128)]
            assert found.count(OK) == 16 and set(found[16:]) == {IOERR}
            for sector in range(0, 16 * 128, 128):
                assert guest.ask(IN, sector, size=65536)[:2] == (OK, content(65536, seed=sector + 1))
            assert guest.ask(DISCARD, 0, ranges((0, 128, 0)))[0] == OK
            assert guest.ask(OUT, 4096, content(65536, seed=9))[0] == OK
            assert guest.queue.broken is None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_direct_where_there_is_none(tmp_path: Path) -> None:
    """Old kernels have no direct input and output on tmpfs; newer ones do it through memory."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    path = folder / f"vq-direct-{os.getpid()}"
    data = make_file(path, SIZE)
    guest = None
    try:
        guest = BlkGuest(Disk(path, direct=True))
        assert guest.ask(IN, 8, size=BLOCK)[:2] == (OK, data[BLOCK : 2 * BLOCK])
    except ValueError as error:
        if "no direct input and output" not in str(error):
            raise
    finally:
        path.unlink()
        if guest is not None:
            guest.close()
