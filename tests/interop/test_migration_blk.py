"""A guest's disk on the move: a `vq blk` at each end, both on the same file, while the guest writes and reads."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from interop import migration
from interop.features import PACKED
from interop.guest import DiskGuest
from interop.iommu import BEHIND, MACHINE, STRICT
from interop.process import wait_until
from interop.rig import Rig

pytestmark = pytest.mark.guest
HERE = Path(__file__).parent
LAYOUTS: dict[str, dict[str, str | int]] = {"split": {}, "packed": PACKED}
MIGRATIONS = 20
MIGRATIONS_IOMMU = 3
ACCESS_PLATFORM = 33
MIB = 1 << 20
WRITERS, SLOTS, BLOCK = 2, 32, 65536  # as disk_work.sh has them
WORK_SECONDS = 60  # for some blocks more, on a busy machine


class Disk:
    """A file with a back-end for each of two sockets; the guest is at one of them, and can go to the other."""

    def __init__(self, rig: Rig, properties: dict[str, str | int], **machine: Any) -> None:
        self.rig = rig
        self.properties = properties
        self.machine = {"more": [], **machine}
        self.path = rig.scratch / "disk.img"
        self.content = os.urandom(4 * MIB)
        with self.path.open("wb") as made:
            made.truncate(96 * MIB)
            made.seek(64 * MIB)
            made.write(self.content)
        self.back_ends = [rig.disk(self.path, "--queues", "2", name=name) for name in "ab"]
        self.place = 0
        self.guest: DiskGuest = self._qemu()

    def _qemu(self, **more: Any) -> DiskGuest:
        sock = self.rig.sock("ab"[self.place])
        more["more"] = [*self.machine["more"], *more.get("more", [])]
        return self.rig.disk_guest(sock, queues=2, cpus=2, properties=self.properties, **{**self.machine, **more})

    def destination(self) -> DiskGuest:
        """Start QEMU at the other socket, which is the guest's place from now on."""
        self.place = 1 - self.place
        return self._qemu(boot=False, more=migration.INCOMING)

    def move(self, **more: Any) -> migration.Moved:
        """Have the guest go to the other socket."""
        destination = self.destination()
        moved = migration.migrate(self.guest, destination, **more)
        self.guest = destination
        return moved


class Work:
    """What the guest does meanwhile: some write numbered blocks, one reads what never changes."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        guest = disk.guest
        guest.check("rm -f /tmp/stop /tmp/done.* /tmp/work.* /tmp/wrong.*")
        for name in ("disk_work.sh", "disk_read.sh"):
            guest.check(f"cat >/tmp/{name} <<'END'\n{(HERE / name).read_text()}\nEND")
        self.names = [*map(str, range(WRITERS)), "read"]
        for number in range(WRITERS):
            guest.background(f"sh /tmp/disk_work.sh {number}")
        guest.background(f"sh /tmp/disk_read.sh {hashlib.sha256(disk.content).hexdigest()}")

    def counts(self) -> list[int]:
        """How many blocks each writer has written, and how often the reader was through."""
        guest = self.disk.guest
        script = "; ".join(f"cat /tmp/work.{name} 2>/dev/null || echo 0" for name in self.names)
        counts = list(map(int, guest.check(script).split()))
        wrong = guest.run("cat /tmp/wrong.* 2>/dev/null").output
        assert not wrong, f"the guest read what it has not written: {wrong}"
        return counts

    def wait_progress(self) -> None:
        """Wait until each of them has done more."""
        before = self.counts()
        wait_until(
            "the guest's work goes on",
            lambda: all(now > then for now, then in zip(self.counts(), before, strict=True)),
            WORK_SECONDS,
            [self.disk.guest.child, *self.disk.back_ends],
        )

    def finish(self) -> list[int]:
        """End it, and compare the file with what the guest was told is written."""
        guest = self.disk.guest
        guest.check("touch /tmp/stop")
        script = " && ".join(f"[ -e /tmp/done.{name} ]" for name in self.names)
        wait_until("all writers end", lambda: bool(self.counts()) and guest.run(script).code == 0, WORK_SECONDS)
        counts = self.counts()
        data = self.disk.path.read_bytes()
        for part, count in enumerate(counts[:-1]):
            for number in range(max(0, count - SLOTS), count):
                line = f"part {part} block {number}\n".encode()
                at = (part * SLOTS + number % SLOTS) * BLOCK
                wanted = (line * (BLOCK // len(line) + 1))[:BLOCK]
                assert data[at : at + BLOCK] == wanted, f"block {number} of part {part} is not in the file"
        return counts


@pytest.fixture(scope="module", params=LAYOUTS)
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    """Give a guest of each layout, which lives on from test to test."""
    with Rig(request.config.getoption("--backend"), f"migration-blk[{request.param}]") as rig:
        yield Disk(rig, LAYOUTS[request.param])


@pytest.mark.shows("SET_LOG_BASE", "VHOST_F_LOG_ALL")
def test_blocks_survive_migrations(disk: Disk) -> None:
    """There and back again; every second time only after memory was gone through several times."""
    work = Work(disk)
    moves = []
    for number in range(MIGRATIONS):
        if number % 2:
            moves.append(disk.move(parameters=migration.MANY_ROUNDS, rounds=4))
        else:
            moves.append(disk.move())
        if number % 5 == 4:
            work.wait_progress()
    *written, rounds = work.finish()
    downtimes = [moved.downtime_ms for moved in moves]
    disk.rig.note(
        f"{len(moves)} migrations, {sum(written)} blocks written and {rounds * 4} MiB read; "
        f"downtime {statistics.median(downtimes):.0f} ms, at most {max(downtimes)} ms"
    )


@pytest.mark.shows("VIRTIO_F_ACCESS_PLATFORM", "VHOST_F_LOG_ALL")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_survive_migrations_behind_an_iommu(rig: Rig, layout: str) -> None:
    """What is logged are guest addresses, though the driver knows none; translations begin anew at each place."""
    disk = Disk(rig, {**BEHIND, **LAYOUTS[layout]}, kernel_words=STRICT, **MACHINE)
    assert disk.guest.check("cat /sys/block/vda/device/features")[ACCESS_PLATFORM] == "1"
    work = Work(disk)
    for number in range(MIGRATIONS_IOMMU):
        disk.move(parameters=migration.MANY_ROUNDS, rounds=3 if number % 2 else 0)
        work.wait_progress()
    *written, rounds = work.finish()
    rig.note(f"{MIGRATIONS_IOMMU} migrations behind an IOMMU, {sum(written)} blocks written and {rounds * 4} MiB read")


def test_migrations_that_come_to_nothing(disk: Disk) -> None:
    """Cancelled, then the destination dies; each time the guest goes on with its disk. Then it succeeds."""
    work = Work(disk)
    work.wait_progress()
    for end in ("cancelled", "failed"):
        destination = disk.destination()
        migration.prepare(destination, disk.guest)
        migration.start(disk.guest, destination, parameters=migration.SLOW)
        migration.wait_status(disk.guest, "active")
        work.wait_progress()
        if end == "cancelled":
            migration.cancel(disk.guest)
        destination.kill()
        migration.wait_status(disk.guest, end)
        disk.place = 1 - disk.place
        work.wait_progress()
    disk.move(parameters=migration.MANY_ROUNDS, rounds=3)
    work.wait_progress()
    work.finish()
