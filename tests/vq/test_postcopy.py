"""The destination of a postcopy migration: whole pumps and disks whose guest's pages are still on their way."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import vq.check
from blk_rig import IN, OK, header, make_file
from disk_rig import VERSION_1, serving
from postcopy_rig import POSTCOPY, MovingDisk, MovingGuest
from pump_rig import USUAL, Background, Guest, every_layout, mapped, pumping
from vq import postcopy
from vq import virtio as v
from vq.devices.blk import BlkDevice
from vq.devices.net import NetDevice
from vq.errors import BackendError, ConnectionClosed, ResourceError
from vq.frontend import Frontend
from vq.payload import Region
from vq.pump import Pump
from vq_core.disk import Disk
from vq_core.guest_memory import GuestMemory
from vq_core.userfault import Userfault
from waiting import wait_for

MIB = 1 << 20


def permitted() -> bool:
    try:
        Userfault().close()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not permitted(), reason="userfaultfd is not permitted here")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "a.sock")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postcopy, "PATIENCE_S", 1.0)


@pytest.fixture(autouse=True)
def no_mapping_is_left() -> Iterator[None]:
    gc.collect()
    before = mapped()
    yield
    gc.collect()
    assert mapped() == before


class IdleGuest(MovingGuest):
    """Its rings are not started."""

    def start(self, pair: int = 0, *, enable: bool = True) -> None:
        pass


class ReadingDisk(MovingDisk):
    """Sixteen reads wait in its ring."""

    def prepare(self) -> None:
        self.buffers = [self.driver.add([header(IN, number * 8)], [4096, 1]) for number in range(16)]


def received(guest: MovingGuest) -> list[bytes]:
    """The packets that came back, all of them."""
    came: list[bytes] = []
    wait_for(
        lambda: (
            came.extend(token.written(n)[12:] for token, n in guest.receiveqs[0].poll()) or len(came) >= guest.packets
        )
    )
    return came


def watchers() -> int:
    return sum(thread.name == "vq-postcopy" for thread in threading.enumerate())


@pytest.mark.shows("POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END", "SET_MEM_TABLE")
@pytest.mark.shows("VHOST_USER_PROTOCOL_F_PAGEFAULT")
@every_layout
def test_a_guest_arrives_with_packets_in_its_rings(path: str, layout: int) -> None:
    with pumping(f"vhost:{path},postcopy"), MovingGuest(path, USUAL | layout) as guest:
        wait_for(lambda: guest.pager.asked > 20)  # rings, headers, payloads, receive buffers
        guest.arrive()
        assert watchers() == 0
        assert received(guest) == guest.sent
        wait_for(lambda: guest.transmitqs[0].poll() and not guest.transmitqs[0].outstanding)
        background = Background(guest.streams())
        background.goes_on(500)
        background.finish()


@every_layout
def test_an_arrived_ring_answers_where_it_stopped(path: str, layout: int) -> None:
    with pumping(f"vhost:{path},postcopy"), MovingGuest(path, USUAL | layout) as guest:
        guest.pager.bring_all()
        assert len(received(guest)) == guest.packets
        positions = [guest.frontend.stop_ring(index) & 0x7FFF for index in (0, 1)]
        assert positions == [guest.packets] * 2
        guest.frontend.postcopy_end()


@every_layout
def test_a_ring_whose_place_is_not_known_yet_answers_its_base(path: str, layout: int) -> None:
    """A disabled receiveq is not touched, so nobody asks for its pages; its base is still the front-end's."""
    with pumping(f"vhost:{path},postcopy"), IdleGuest(path, USUAL | layout) as guest:
        guest.frontend.start_ring(replace(guest.ring(0), base=0x8005 if layout else 5), enable=False)
        assert guest.frontend.get_vring_base(0) & 0x7FFF == 5
        assert guest.pager.asked == 0
        guest.arrive()


def test_memory_comes_anew_while_pages_are_on_their_way(path: str) -> None:
    """As after a reset of the device, which stops its rings first: pages that came are not lost by it."""
    with pumping(f"vhost:{path},postcopy"), IdleGuest(path, USUAL) as guest:
        regions = [Region(*row[:4]) for row in guest.pager.rows]
        for _ in range(3):
            places = guest.frontend.send_postcopy_table(regions, [row[4] for row in guest.pager.rows])
            guest.pager.move(places)
            guest.frontend.release_postcopy_table()
        MovingGuest.start(guest)
        guest.arrive()
        assert received(guest) == guest.sent


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_a_disk_arrives_with_requests_in_its_ring(tmp_path: Path, path: str, direct: bool) -> None:
    """Direct input goes into the pages themselves, which the kernel must have in hand first."""
    image = tmp_path / "disk.img"
    make_file(image, MIB)
    data = image.read_bytes()
    with (
        serving(image, path, direct=direct, postcopy=True),
        ReadingDisk(path, VERSION_1, GuestMemory(4 * MIB)) as guest,
    ):
        wait_for(lambda: guest.pager.asked > 3)
        guest.pager.bring_all()
        guest.frontend.postcopy_end()
        wait_for(lambda: guest.driver.poll() and not guest.driver.outstanding)
        for number, buffer in enumerate(guest.buffers):
            assert bytes(buffer.writable[0]) == data[number * 4096 :][:4096]
            assert bytes(buffer.writable[1]) == bytes([OK])


def test_vq_check_finds_nothing_wrong(path: str) -> None:
    with pumping(f"vhost:{path},postcopy"):
        results = vq.check.run(path, device="net", only=["postcopy.*"])
    assert [(result.name, result.outcome.value) for result in results] == [
        ("postcopy.advise", "pass"),
        ("postcopy.order", "pass"),
        ("postcopy.listen-with-memory", "pass"),
    ]


# ---- front-ends that do not do their part ----


def settled_threads() -> None:
    wait_for(lambda: watchers() == 0)


@every_layout
def test_a_page_that_never_comes_ends_its_connection_alone(
    tmp_path: Path, path: str, layout: int, hasty: None, caplog: pytest.LogCaptureFixture
) -> None:
    other = str(tmp_path / "b.sock")
    with pumping([f"vhost:{path},postcopy"], [f"vhost:{other}"]) as pump, Guest(other) as neighbour:
        background = Background(neighbour.streams(), patience=60)
        background.goes_on()
        with MovingGuest(path, USUAL | layout, serving=False) as guest:
            assert guest.pager.heard.wait(60)
            assert guest.frontend.wait_closed(60)
            settled_threads()
            background.goes_on()  # by the same worker
            # Nothing of ours came into the guest's memory in place of its pages.
            assert guest.pager.resident() == 0
        background.finish()
        assert pump.ports[0].backend is not None
        assert pump.ports[0].backend.state == "listening"
    assert "for a page of its guest" in caplog.text


def test_a_closed_userfaultfd_ends_the_connection(path: str, hasty: None) -> None:
    with pumping(f"vhost:{path},postcopy"), MovingGuest(path, USUAL, serving=False) as guest:
        assert guest.pager.heard.wait(60)
        guest.pager.close()
        assert guest.frontend.wait_closed(60)
        settled_threads()


@every_layout
def test_a_front_end_that_dies_while_a_worker_waits(path: str, layout: int) -> None:
    """Long before the worker's patience is over: the end of the connection ends the wait."""
    with pumping(f"vhost:{path},postcopy") as pump:
        for _ in range(5):
            with MovingGuest(path, USUAL | layout, serving=False) as guest:
                assert guest.pager.heard.wait(60)
            backend = pump.ports[0].backend
            assert backend is not None
            wait_for(lambda backend=backend: backend.state == "listening", 4)
            settled_threads()
        with Guest(path, USUAL | layout) as guest:
            background = Background(guest.streams())
            background.goes_on()
            background.finish()


def test_the_control_thread_waits_for_a_stuck_worker_no_longer_than_its_patience(path: str, hasty: None) -> None:
    with pumping(f"vhost:{path},postcopy"), MovingGuest(path, USUAL, serving=False) as guest:
        assert guest.pager.heard.wait(60)
        guest.frontend.timeout = 60
        with suppress(ConnectionClosed, BackendError):
            guest.frontend.get_vring_base(1)
        assert guest.frontend.wait_closed(60)


@pytest.mark.parametrize("way", ["never", "dies"])
def test_a_disk_whose_pages_never_come(tmp_path: Path, path: str, hasty: None, way: str) -> None:
    image = tmp_path / "disk.img"
    make_file(image, MIB)
    with serving(image, path, postcopy=True) as server:
        with ReadingDisk(path, VERSION_1, GuestMemory(4 * MIB), serving=False) as guest:
            assert guest.pager.heard.wait(60)
            if way == "never":
                assert guest.frontend.wait_closed(60)
        assert server.backend is not None
        wait_for(lambda: server.backend.state == "listening")
        settled_threads()


def test_a_pump_ends_while_its_worker_waits(path: str, hasty: None) -> None:
    with pumping(f"vhost:{path},postcopy") as pump:
        guest = MovingGuest(path, USUAL, serving=False)
        assert guest.pager.heard.wait(60)
        pump.request_stop()
        assert guest.frontend.wait_closed(60)
    guest.close()
    assert watchers() == 0


def test_advice_again_and_again_leaks_nothing(path: str) -> None:
    with pumping(f"vhost:{path},postcopy"), Frontend.connect(path) as frontend:
        frontend.negotiate(USUAL, POSTCOPY)
        for _ in range(1000):
            fd = frontend.postcopy_advise()
            assert fd is not None
            os.close(fd)


def test_a_file_that_cannot_be_served_is_refused_before_any_answer(path: str, tmp_path: Path) -> None:
    with pumping(f"vhost:{path},postcopy"), Frontend.connect(path) as frontend, GuestMemory(MIB) as memory:
        frontend.negotiate(USUAL, POSTCOPY)
        uffd = frontend.postcopy_advise()
        assert uffd is not None
        frontend.postcopy_listen()
        row = memory.regions[0]
        with pytest.raises(ConnectionClosed):  # in the middle of a page
            frontend.send_postcopy_table([Region(row[0], row[1] - 4096, row[2], 512)], [row[4]])
        os.close(uffd)


@pytest.mark.shows("VHOST_USER_PROTOCOL_F_PAGEFAULT")
def test_what_does_not_go_with_it_is_not_offered() -> None:
    disk = BlkDevice(Disk(None, size=MIB), postcopy=True)
    for device in (NetDevice("net", postcopy=True), disk):
        offered = device.offer.protocol_features
        assert v.has(offered, v.VHOST_USER_PROTOCOL_F_PAGEFAULT)
        assert not v.has(offered, v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
        assert not v.has(offered, v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)
    assert not v.has(NetDevice("net").offer.protocol_features, v.VHOST_USER_PROTOCOL_F_PAGEFAULT)
    disk.close()


def test_without_permission_nothing_is_offered(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> Userfault:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(postcopy, "Userfault", refused)
    with pytest.raises(ResourceError, match="run with CAP_SYS_PTRACE"), Pump([f"vhost:{path},postcopy"]):
        pass


def test_a_permission_that_is_lost_later_leaves_the_connection(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pumping(f"vhost:{path},postcopy"):
        monkeypatch.setattr(postcopy, "Userfault", lambda: os.open("/dev/null/x", 0))
        with Frontend.connect(path) as frontend:
            frontend.negotiate(USUAL, POSTCOPY)
            assert frontend.postcopy_advise() is None
            with pytest.raises(BackendError, match="refused"):
                frontend.postcopy_listen()
    assert "cannot open a userfaultfd" in caplog.text
