"""The back-end on real sockets: both roles, again and again, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pump_rig import USUAL, Guest, mapped
from vhost_rig import open_fds
from vq import virtio as v
from vq.backend import Backend
from vq.devices.net import ControlledNetDevice, NetDevice
from vq.endpoint import listen
from vq.errors import BackendError, ConnectionClosed, ResourceError, UsageError
from vq.frontend import Frontend


@contextmanager
def serving(**options: Any) -> Iterator[Backend]:
    """A back-end of a network device with two pairs, dispatched by a thread."""
    stop = threading.Event()
    backend = Backend(NetDevice("net", pairs=2), **options)

    def loop() -> None:
        poll = select.poll()
        poll.register(backend.fileno(), select.POLLIN)
        while not stop.is_set():
            if poll.poll(60):
                backend.dispatch()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield backend
    finally:
        stop.set()
        thread.join(60)
        backend.close()


def soon(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "vhost.sock")


def test_states_of_a_listening_back_end(path: str) -> None:
    with serving(path=path) as backend:
        assert (backend.state, backend.connections, backend.features) == ("listening", 0, 0)
        with Guest(path, running=0) as guest:
            soon(lambda: backend.state == "connected")
            assert (backend.connections, backend.features) == (1, guest.features)
            guest.start()
            assert backend.state == "running"
            guest.stop()
            assert backend.state == "connected"
        soon(lambda: backend.state == "listening")
        assert backend.features == 0
    assert backend.state == "closed"
    assert not os.path.exists(path)


def test_client_role_connects_when_somebody_listens_and_again(path: str) -> None:
    with serving(path=path, client=True) as backend:
        assert backend.state == "connecting"
        for number in range(1, 4):
            with Guest(path, listen=True) as guest:
                assert (backend.state, backend.connections) == ("running", number)
                assert guest.frontend.queue_num() == 2
            soon(lambda: backend.state == "connecting")
        assert all(not queue.started for queue in backend.device.queues)


def test_a_second_front_end_is_refused_and_the_first_goes_on(path: str) -> None:
    with serving(path=path) as backend, Guest(path) as first:
        for _ in range(3):
            with Frontend.connect(path) as second, pytest.raises((ConnectionClosed, BackendError)):
                second.negotiate(USUAL)
        assert first.frontend.queue_num() == 2
        assert (backend.state, backend.connections) == ("running", 1)


def test_a_front_end_that_waited_is_served_after_the_first(path: str) -> None:
    with serving(path=path) as backend:
        for number in range(1, 6):
            with Guest(path) as guest:
                guest.send(b"x")
            soon(lambda number=number: backend.state == "listening" and backend.connections == number)


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)  # and the process dies without a word
    with serving(path=path), Guest(path), pytest.raises(ResourceError, match="living process"):
        Backend(NetDevice("net", pairs=1), path=path)
    Path(path).write_text("precious")
    with pytest.raises(ResourceError, match="not a socket"):
        Backend(NetDevice("net", pairs=1), path=path)
    assert Path(path).read_text() == "precious"


def test_mode_of_the_socket_file(path: str) -> None:
    for mode in (0o600, 0o660, 0o666):
        with serving(path=path, mode=mode):
            assert stat.S_IMODE(os.lstat(path).st_mode) == mode


def test_somebody_elses_socket_is_not_removed(path: str) -> None:
    with serving(path=path):
        os.unlink(path)
        other = listen(path)
    assert os.path.exists(path)
    other.close()


def test_an_inherited_connection_is_served_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with serving(fd=ours.detach()) as backend:
        with Frontend.adopt(theirs) as front:
            front.set_features(front.negotiate(USUAL))
            assert backend.state == "connected"
        soon(lambda: backend.state == "closed")


def test_an_inherited_listener_is_not_unlinked(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        fd = os.dup(sock.fileno())
    with serving(fd=fd) as backend:
        for _ in range(2):
            with Guest(path):
                assert backend.state == "running"
            soon(lambda: backend.state == "listening")
    assert os.path.exists(path)


@pytest.mark.parametrize("options", [{}, {"path": "/a", "fd": 3}])
def test_a_path_or_a_descriptor(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="either"):
        Backend(NetDevice("net", pairs=1), **options)


def test_no_directory_no_socket(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot listen"):
        Backend(NetDevice("net", pairs=1), path=str(tmp_path / "nowhere" / "sock"))


def test_disconnect_and_close(path: str) -> None:
    backend = Backend(NetDevice("net", pairs=2), path=path)
    with Frontend.connect(path) as front:
        soon(lambda: backend.dispatch() or backend.state == "connected")
        backend.disconnect()
        assert front.wait_closed(5)
        assert backend.state == "listening"
    with Frontend.connect(path) as front:
        soon(lambda: backend.dispatch() or backend.state == "connected")
        backend.close()
        assert front.wait_closed(5)
    backend.close()
    assert backend.state == "closed"


def test_memory_features_and_rings_end_with_the_connection(path: str) -> None:
    gc.collect()
    with serving(path=path) as backend:
        before = mapped()
        with Guest(path) as guest:
            assert mapped() == before + 2  # the guest's own mapping, and that of the back-end
            assert [queue.started for queue in backend.device.queues] == [True, True, False, False]
            soon(lambda: backend.state == "running")
        soon(lambda: backend.state == "listening")
        assert not any(queue.started for queue in backend.device.queues)
        assert mapped() == before + 1  # what is left is the guest's own
        del guest
        gc.collect()
        assert mapped() == before


def test_200_connections_leave_nothing_behind(path: str) -> None:
    changes = []
    with serving(path=path, changed=lambda: changes.append(1)) as backend:

        def once(number: int) -> None:
            guest = Guest(path, pairs=2, size=8, memory_bytes=1 << 16, running=number % 3)
            assert guest.frontend.queue_num() == 2
            guest.close()

        once(0)
        soon(lambda: backend.state == "listening")
        time.sleep(0.2)  # it listens a moment before it has closed everything of the one that left
        fds, maps, threads = open_fds(), mapped("memfd"), threading.active_count()
        for number in range(200):
            once(number)
        soon(lambda: backend.state == "listening" and backend.connections == 201)
        soon(lambda: open_fds() == fds)
        assert (mapped("memfd"), threading.active_count()) == (maps, threads)
        with open("/proc/self/maps") as lines:
            assert not any("vq-guest-memory" in line for line in lines)
        assert len(changes) >= 402


def test_a_guest_that_posts_no_buffer_is_told_of_once(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vq.backend.UNPOSTED_S", 0.05)
    with serving(path=path) as backend, Guest(path) as _:
        soon(lambda: not backend.watch())
        backend.watch()
        said = [record.getMessage() for record in caplog.records if "posted no buffer" in record.getMessage()]
        assert len(said) == 1
        assert "share=on" in said[0]


def test_a_guest_that_posts_buffers_is_not_warned_of(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vq.backend.UNPOSTED_S", 0.0)
    with serving(path=path) as backend, Guest(path) as guest:
        guest.post(2000, 4)
        soon(lambda: not backend.watch())
    assert "posted no buffer" not in caplog.text


def test_the_same_mistake_again_and_again_is_told_once_in_a_while(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(path=path) as backend:
        for text in ("one", "one", "one", "another", "one"):
            backend.warn(text)
        monkeypatch.setattr("vq.throttle.REPEAT_S", 0.0)
        backend.warn("one")
    said = [record.getMessage().partition("error=")[2] for record in caplog.records]
    assert said == ["'one'", "'another' unsaid=2", "'one'", "'one'"]


def test_an_iommu_that_its_queues_would_not_heed_is_not_offered(path: str) -> None:
    """Before anything listens; a device of ours whose control queue the control thread serves does not offer it."""
    device = NetDevice("net")
    device.requests_fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        with pytest.raises(UsageError, match="device net: queues that no worker serves"):
            Backend(device, path=path)
        assert not os.path.exists(path)
    finally:
        os.close(device.requests_fd)
        device.close()
    controlled = ControlledNetDevice("controlled")
    assert not v.has(controlled.offer.features, v.VIRTIO_F_ACCESS_PLATFORM)
    Backend(controlled, path=path).close()
    controlled.close()
