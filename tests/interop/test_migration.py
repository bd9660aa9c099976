"""A guest's network on the move: QEMU to QEMU over a switch of three ports, while a checked stream runs."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from interop import migration
from interop.backend import Pump
from interop.features import PACKED, assert_packed, negotiated
from interop.guest import Guest
from interop.iommu import BEHIND, MACHINE, STRICT
from interop.process import Child, wait_until
from interop.rig import Rig
from interop.stream import EchoStream
from interop.traffic import await_path

pytestmark = pytest.mark.guest
LAYOUTS: dict[str, dict[str, str | int]] = {"split": {}, "packed": PACKED}
MIGRATIONS = 20
MIGRATIONS_IOMMU = 4
ACCESS_PLATFORM = 33
RARP = "80350001080006040003"
LOG_ALL = 1 << 26
SNIFFER = Path(__file__).with_name("sniffer.py")


class Line:
    """A host's TAP and two sockets at one switch; the guest is at one of the sockets, and can go to the other."""

    def __init__(self, rig: Rig, properties: dict[str, str | int], *, more: Sequence[str] = (), **machine: str) -> None:
        self.rig = rig
        self.properties = properties
        self.more = more
        self.machine = machine
        self.host = rig.host()
        ports = [f"vhost:{rig.sock('a')}", f"vhost:{rig.sock('b')}", "tap:vq0"]
        self.backend = rig.backend(*ports, host=self.host, options=["-v", "-v"])
        if not isinstance(self.backend, Pump):
            pytest.skip("the stand-in has no switch")
        self.place = 0
        self.guest: Guest = rig.guest(self.sock, properties=properties, more=more, **machine)
        self.host.configure(1)
        self.guest.configure(2)
        assert_packed(self.guest, "packed" in properties)
        await_path(self.guest, self.host)

    @property
    def sock(self) -> Path:
        """The socket that the guest is at."""
        return self.rig.sock("ab"[self.place])

    def destination(self) -> Guest:
        """Start QEMU at the other socket."""
        sock = self.rig.sock("ab"[1 - self.place])
        properties = {**self.properties, "mac": self.guest.mac}
        more = [*self.more, *migration.INCOMING]
        return self.rig.guest(sock, boot=False, properties=properties, more=more, **self.machine)

    def arrived(self, destination: Guest) -> None:
        self.guest = destination
        self.place = 1 - self.place

    def move(self, **more: Any) -> migration.Moved:
        """Have the guest go to the other socket."""
        destination = self.destination()
        moved = migration.migrate(self.guest, destination, **more)
        self.arrived(destination)
        return moved

    def start_slowly(self) -> Guest:
        """Begin to move the guest at a speed that does not come to an end; gives the destination."""
        destination = self.destination()
        migration.prepare(destination, self.guest)
        migration.start(self.guest, destination, parameters=migration.SLOW)
        migration.wait_status(self.guest, "active")
        self.wait_logging(True)
        return destination

    def messages(self, name: str) -> list[str]:
        """What came by messages of this name at the socket where the guest is."""
        pattern = rf"device=vhost:{re.escape(str(self.sock))} message=Message\({name}, flags=\w+, (.*)$"
        return re.findall(pattern, self.backend.child.errors(), re.MULTILINE)

    def wait_logging(self, on: bool) -> None:
        """Wait until the front-end has switched logging on or off, of both rings."""
        wanted = (on, [on, on])
        wait_until(f"logging {on}", lambda: self.logging() == wanted, 20, [self.backend.child])

    def logging(self) -> tuple[bool, list[bool]]:
        """Whether the guest's front-end has LOG_ALL on, and VRING_F_LOG of each ring, after its last messages."""
        features = int(self.messages("SET_FEATURES")[-1].split(",")[0]) if self.messages("SET_FEATURES") else 0
        rings: dict[str, bool] = {}
        for text in self.messages("SET_VRING_ADDR"):
            found = re.match(r"VringAddr\(ring=(\d+), flags=(\d+),", text)
            assert found, text
            rings[found[1]] = found[2] == "1"
        return bool(features & LOG_ALL), [rings[index] for index in sorted(rings)]


@pytest.fixture(scope="module", params=LAYOUTS)
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    """Give a guest of each layout, which lives on from test to test."""
    with Rig(request.config.getoption("--backend"), f"migration[{request.param}]") as rig:
        yield Line(rig, LAYOUTS[request.param])


@pytest.mark.shows("SET_LOG_BASE", "VHOST_F_LOG_ALL", "VHOST_USER_PROTOCOL_F_LOG_SHMFD", "SET_VRING_ADDR")
def test_stream_survives_migrations(line: Line) -> None:
    """There and back again; every second time only after memory was gone through several times."""
    moves: list[migration.Moved] = []
    gaps: list[int] = []
    with EchoStream(line.host, line.guest) as stream:
        for number in range(MIGRATIONS):
            stream.take_gap()
            before = stream.verified
            if number % 2:
                moves.append(line.move(parameters=migration.MANY_ROUNDS, rounds=4))
                assert stream.verified > before
            else:
                moves.append(line.move())
            stream.wait_progress()
            gaps.append(stream.take_gap())
        total = stream.verified
    downtimes = [moved.downtime_ms for moved in moves]
    line.rig.note(
        f"{len(moves)} migrations, {total >> 20} MiB there and back; "
        f"downtime {statistics.median(downtimes):.0f} ms, at most {max(downtimes)} ms, "
        f"silence as the peer sees it {statistics.median(gaps):.0f} ms, at most {max(gaps)} ms"
    )


@pytest.mark.shows("VIRTIO_F_ACCESS_PLATFORM", "VHOST_F_LOG_ALL")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stream_survives_migrations_behind_an_iommu(rig: Rig, layout: str) -> None:
    """What is logged are guest addresses, though the driver knows none; translations begin anew at each place."""
    line = Line(rig, {**BEHIND, **LAYOUTS[layout]}, kernel_words=STRICT, **MACHINE)
    assert ACCESS_PLATFORM in negotiated(line.guest)
    with EchoStream(line.host, line.guest) as stream:
        for number in range(MIGRATIONS_IOMMU):
            line.move(parameters=migration.MANY_ROUNDS, rounds=3 if number % 2 else 0)
            stream.wait_progress()
        rig.note(f"{MIGRATIONS_IOMMU} migrations behind an IOMMU, {stream.verified >> 10} KiB there and back")


def test_migrations_that_come_to_nothing(line: Line) -> None:
    """Cancelled twice, then the destination dies; each time logging ends and the stream goes on. Then it succeeds."""
    with EchoStream(line.host, line.guest) as stream:
        for _ in range(2):
            destination = line.start_slowly()
            stream.wait_progress()
            migration.cancel(line.guest)
            destination.kill()
            line.wait_logging(False)
            stream.wait_progress()
        destination = line.start_slowly()
        destination.kill()
        migration.wait_status(line.guest, "failed")
        line.wait_logging(False)
        stream.wait_progress()
        for _ in range(2):
            line.move(parameters=migration.MANY_ROUNDS, rounds=3)
            stream.wait_progress()
        line.wait_logging(False)


def test_back_end_restarts_during_a_migration(line: Line) -> None:
    """The back-end is killed and comes back while memory is copied: the log is there again, and no byte is lost."""
    with EchoStream(line.host, line.guest) as stream:
        destination = line.start_slowly()
        line.backend.kill()
        line.backend.start()
        line.host.configure(1)
        line.wait_logging(True)
        stream.wait_progress()
        line.guest.qmp("migrate-set-parameters", **migration.FAST)
        migration.finish(line.guest, destination)
        line.guest.kill()
        line.arrived(destination)
        stream.wait_progress()


def test_rings_start_again_during_a_migration(line: Line) -> None:
    """The guest's driver goes and comes back while memory is copied: its new rings are logged from the start."""
    destination = line.start_slowly()
    line.guest.rmmod()
    line.guest.modprobe()
    line.guest.configure(2)
    await_path(line.host, line.guest)
    line.wait_logging(True)
    with EchoStream(line.host, line.guest) as stream:
        line.guest.qmp("migrate-set-parameters", **migration.FAST)
        migration.finish(line.guest, destination)
        line.guest.kill()
        line.arrived(destination)
        stream.wait_progress()


class Announcement:
    """A move while somebody listens on the host's side; the old place stays connected."""

    def __init__(self, line: Line) -> None:
        # The host never asks for the guest's address, so that nothing but an announcement can tell where it is.
        guest = line.guest
        line.host.check(f"ip neigh replace {guest.address} lladdr {guest.mac} nud permanent dev vq0")
        self.line = line
        scratch = line.rig.scratch
        self.sniffer = Child("sniffer", [sys.executable, str(SNIFFER), "vq0"], scratch, netns=line.host.netns)
        wait_until("the sniffer", lambda: "ready" in self.sniffer.output(), 10, [self.sniffer])
        self.source, destination = guest, line.destination()
        migration.prepare(destination, guest)
        migration.start(guest, destination)
        migration.finish(guest, destination)
        line.arrived(destination)
        # An announcement comes several times, and what was heard until here may belong to a move before this one.
        self._heard = len(self.sniffer.output())

    def count(self, beginning: str) -> int:
        """How many broadcasts of the guest were heard that begin so behind the two addresses."""
        frame = "ff" * 6 + self.line.guest.mac.replace(":", "") + beginning
        return self.sniffer.output()[self._heard :].count(frame)

    def wait_frame(self, beginning: str) -> None:
        """Wait for such a broadcast."""
        wait_until("an announcement", lambda: self.count(beginning), 30, [self.sniffer])

    def assert_found(self) -> None:
        """Check that the next packet of the host goes to the new place."""
        assert self.source.child.running
        begin = time.monotonic()
        assert self.line.host.run(f"/bin/ping -q -n -c 1 -W 5 {self.line.guest.address}", 10).code == 0
        self.line.rig.note(f"first answer {1000 * (time.monotonic() - begin):.0f} ms after the announcement")

    def close(self) -> None:
        self.sniffer.kill()
        self.source.kill()
        self.line.host.check("ip neigh flush all nud permanent")


@pytest.mark.shows("SEND_RARP", "VHOST_USER_PROTOCOL_F_RARP")
def test_a_rarp_tells_the_new_place(rig: Rig) -> None:
    """A guest that cannot announce itself: the switch learns by our RARP, before the guest has said anything."""
    line = Line(rig, {"guest_announce": "off"})
    move = Announcement(line)
    try:
        mac = line.guest.mac.replace(":", "")
        move.wait_frame(f"{RARP}{mac}00000000{mac}00000000{'00' * 18}")
        assert line.messages("SEND_RARP")
        move.assert_found()
    finally:
        move.close()


@pytest.mark.shows("VIRTIO_NET_F_GUEST_ANNOUNCE")
def test_the_guest_tells_its_new_place(line: Line) -> None:
    """A guest that can: by a gratuitous ARP request of its own. There is no RARP that QEMU has not asked for.

    It does that as well when it is resumed before it has looked whether this guest can.
    """
    move = Announcement(line)
    try:
        address = bytes(map(int, line.guest.address.split("."))).hex()
        move.wait_frame(f"08060001080006040001{line.guest.mac.replace(':', '')}{address}")
        move.assert_found()
        assert move.count(RARP) <= len(line.messages("SEND_RARP"))
    finally:
        move.close()
