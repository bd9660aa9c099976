"""A QEMU guest on ``vq blk``: what it sees of the disk, and that every byte arrives on both sides."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy
import pytest

from interop.guest import DiskGuest
from interop.process import Child, wait_until
from interop.rig import Rig

pytestmark = pytest.mark.guest
MIB = 1 << 20
BLOCK = "/sys/block/vda"


@pytest.fixture(params=["split", "packed"])
def disk(rig: Rig, request: pytest.FixtureRequest) -> Disk:
    """Give a guest with a disk of 64 MiB and two queues, in either layout."""
    return Disk(rig, packed="on" if request.param == "packed" else "off")


class Disk:
    """A file, ``vq blk`` on it, and a guest that has it as /dev/vda."""

    def __init__(self, rig: Rig, *words: str, size: int = 64 * MIB, **properties: str) -> None:
        self.path = rig.scratch / "disk.img"
        with self.path.open("wb") as made:
            made.truncate(size)
        self.backend: Child = rig.disk(self.path, "--queues", "2", *words)
        self.guest: DiskGuest = rig.disk_guest(rig.sock(), queues=2, cpus=2, properties=properties)

    def sysfs(self, name: str) -> str:
        return self.guest.check(f"cat {BLOCK}/{name}").strip()


def test_filesystem_and_bytes(disk: Disk) -> None:
    """The guest makes a file system, writes and reads back; the file on the host has the same bytes."""
    guest = disk.guest
    assert disk.sysfs("size") == str(64 * MIB // 512)
    assert disk.sysfs("queue/logical_block_size") == "512"
    assert disk.sysfs("queue/physical_block_size") == "4096"
    assert disk.sysfs("queue/minimum_io_size") == "4096"
    assert disk.sysfs("cache_type") == "write back"
    assert disk.sysfs("serial") == "disk.img"
    assert disk.sysfs("ro") == "0"
    assert len(guest.check(f"ls {BLOCK}/mq").split()) == 2
    guest.check("mke2fs /dev/vda && mkdir -p /tmp/m && mount -t ext2 /dev/vda /tmp/m", timeout=60)
    guest.check("dd if=/dev/urandom of=/tmp/m/data bs=1M count=20 && sync", timeout=60)
    inside = guest.check("echo 3 >/proc/sys/vm/drop_caches; sha256sum </tmp/m/data", timeout=60).split()[0]
    guest.check("cp /tmp/m/data /tmp/m/copy && rm /tmp/m/copy && umount /tmp/m", timeout=60)
    whole = guest.check("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M 2>/dev/null | sha256sum", timeout=60)
    assert whole.split()[0] == hashlib.sha256(disk.path.read_bytes()).hexdigest()
    if shutil.which("debugfs"):  # another reader of the same file system
        shown = subprocess.run(["debugfs", "-R", "cat /data", disk.path], capture_output=True, check=True).stdout
        assert hashlib.sha256(shown).hexdigest() == inside
    assert_writeback_can_be_switched(disk)
    assert_discard_frees_room(disk)
    assert_the_guest_sees_the_disk_grow(disk)
    disk.backend.process.send_signal(signal.SIGTERM)
    assert disk.backend.process.wait(60) == 0


def assert_writeback_can_be_switched(disk: Disk) -> None:
    disk.guest.check(f"echo 'write through' >{BLOCK}/cache_type")
    assert disk.sysfs("cache_type") == "write through"
    disk.guest.check("dd if=/dev/urandom of=/dev/vda bs=64k count=4 oflag=direct")
    disk.guest.check(f"echo 'write back' >{BLOCK}/cache_type")
    assert disk.sysfs("cache_type") == "write back"


def assert_discard_frees_room(disk: Disk) -> None:
    before = disk.path.stat().st_blocks
    assert before > 20 * MIB // 512
    disk.guest.check("blkdiscard /dev/vda", timeout=60)
    wait_until("room is given back", lambda: disk.path.stat().st_blocks < before // 4, 5, [disk.backend])
    assert disk.guest.check("dd if=/dev/vda bs=1M count=8 2>/dev/null | tr -d '\\0' | wc -c").strip() == "0"


def assert_the_guest_sees_the_disk_grow(disk: Disk) -> None:
    with disk.path.open("r+b") as grown:
        grown.truncate(96 * MIB)
    disk.backend.process.send_signal(signal.SIGHUP)
    size = str(96 * MIB // 512)
    wait_until("the guest sees the new size", lambda: disk.sysfs("size") == size, 10, [disk.guest.child, disk.backend])
    disk.guest.check("printf end | dd of=/dev/vda bs=512 seek=196607 conv=sync && sync")
    assert disk.path.read_bytes()[-512:] == b"end".ljust(512, b"\0")


def test_random_writes_of_many_threads_are_verified_on_both_sides(disk: Disk) -> None:
    """Four threads on two processors and two queues; each block is right in the guest, and in the file afterwards."""
    program = disk.path.with_name("writer")
    source = Path(__file__).with_name("blk_writer.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-pthread", "-o", program, source], check=True)
    binary = program.read_bytes()
    # The guest finds it where it is not written later: in the last part of its disk.
    last = 8 * MIB
    with disk.path.open("r+b") as file:
        file.seek(disk.path.stat().st_size - last)
        file.write(binary)
    guest, blocks = disk.guest, 2048
    skipped = (64 * MIB - last) // MIB
    guest.check(f"dd if=/dev/vda of=/tmp/writer bs=1M skip={skipped} && chmod +x /tmp/writer", timeout=60)
    out = guest.check(f"/tmp/writer /dev/vda 256 {blocks} 4 1500", timeout=120)
    assert out.strip() == "right"
    with disk.path.open("rb") as file:
        file.seek(256 * 4096)
        found = numpy.frombuffer(file.read(blocks * 4096), "<u8").reshape(blocks, 512)
    numbers, generations = found[:, :1], found[:, 1:2]
    assert (numbers[:, 0] == numpy.arange(blocks)).all()
    assert generations.max() > 1  # some were written again
    with numpy.errstate(over="ignore"):
        seeds = numbers * numpy.uint64(0x9E3779B97F4A7C15) ^ generations * numpy.uint64(0xC2B2AE3D27D4EB4F)
        expected = seeds + numpy.arange(512, dtype="<u8") * numpy.uint64(0x165667B19E3779F9)
    assert (found[:, 2:] == expected[:, 2:]).all()
    disk.backend.process.send_signal(signal.SIGTERM)
    assert disk.backend.process.wait(60) == 0


def test_read_only_disk(rig: Rig) -> None:
    disk = Disk(rig, "--read-only", size=MIB)
    assert disk.sysfs("ro") == "1"
    assert disk.guest.run("dd if=/dev/zero of=/dev/vda bs=512 count=1").code != 0
    assert re.search(r"\b0\b", disk.guest.check("dd if=/dev/vda bs=1M count=1 2>/dev/null | tr -d '\\0' | wc -c"))


BLOCK_BYTES = 65536
BLOCKS = 120
KILLS = 5
WRITERS = 3
# Numbered blocks, each acknowledged before the next one comes; in the end all are read back.
WRITER = """
i={first}
while [ $i -lt {blocks} ]; do
    yes block$i | head -c {size} >/tmp/b{first}
    dd if=/tmp/b{first} of=/dev/vda bs={size} seek=$i oflag=direct conv=notrunc 2>/dev/null || exit 1
    dd if=/dev/vda bs={size} skip=$i count=1 iflag=direct 2>/dev/null | cmp -s - /tmp/b{first} || exit 2
    i=$((i + {step}))
done
"""


def numbered(number: int) -> bytes:
    line = f"block{number}\n".encode()
    return (line * (BLOCK_BYTES // len(line) + 1))[:BLOCK_BYTES]


@pytest.mark.shows("GET_INFLIGHT_FD", "SET_INFLIGHT_FD", "VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD")
def test_guest_goes_on_after_its_back_end_was_killed(disk: Disk, rig: Rig) -> None:
    """SIGKILL in the middle of writes, several times: no write is lost, none comes late, none fails."""
    words = {"blocks": BLOCKS, "size": BLOCK_BYTES, "step": WRITERS}
    writers = " ".join(f"( {WRITER.format(first=first, **words)} ) & p{first}=$!;" for first in range(WRITERS))
    command = f"{writers} {' && '.join(f'wait $p{first}' for first in range(WRITERS))}"
    done: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: done.append(disk.guest.run(command, timeout=120)))
    thread.start()

    def blocks() -> int:
        return disk.path.stat().st_blocks

    for _ in range(KILLS):
        before = blocks()
        wait_until("the guest writes", lambda before=before: blocks() > before, 60, [disk.guest.child, disk.backend])
        disk.backend.kill()
        before = blocks()
        rig.sock().unlink()
        disk.backend = rig.disk(disk.path, "--queues", "2", "-vv")
        begin = time.monotonic()
        wait_until("writes go on", lambda before=before: blocks() > before, 60, [disk.guest.child, disk.backend])
        rig.note(f"writes go on {time.monotonic() - begin:.2f} s after the new back-end is up")
    assert "SET_INFLIGHT_FD" in disk.backend.errors(), "QEMU has kept no region"
    thread.join(150)
    assert [result[0] for result in done] == [0], done
    content = disk.path.read_bytes()
    for number in range(BLOCKS):
        assert content[number * BLOCK_BYTES :][:BLOCK_BYTES] == numbered(number), f"block {number}"
    whole = disk.guest.check("dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum", timeout=60)
    assert whole.split()[0] == hashlib.sha256(content).hexdigest()
