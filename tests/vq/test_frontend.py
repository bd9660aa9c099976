"""The front-end role against a whole back-end, and against back-ends that lie."""

from __future__ import annotations

import os
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from vhost_rig import NET_FEATURES, NET_PROTOCOL_FEATURES, PAGE, SPLIT, BackendThread, addresses, memfd, raw, region
from vq import effects as e
from vq import virtio as v
from vq.check.verdict import settled
from vq.endpoint import Connector, listen
from vq.errors import BackendError, ConnectionClosed, FrontendError, ResourceError, UsageError, VqError
from vq.frontend import Frontend, RingSetup
from vq.iommu import MISS, READ, Iommu
from vq.message import HEADER, NEED_REPLY, VERSION, BackendRequest, Request
from vq.payload import Inflight, VringState

LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)


@pytest.fixture
def both(no_fd_is_left: None) -> Iterator[tuple[Frontend, BackendThread]]:
    """Connect a front-end with a back-end."""
    ours, theirs = socket.socketpair()
    backend = BackendThread(theirs)
    frontend = Frontend.adopt(ours)
    yield frontend, backend
    frontend.close()
    backend.join()


Both = tuple[Frontend, BackendThread]


def setup(index: int, kick: int | None = None, call: int | None = None, err: int | None = None) -> RingSetup:
    where = addresses(index)
    return RingSetup(index, 256, where.desc, where.avail, where.used, 0, kick, call, err, where.log_guest_addr)


@pytest.mark.parametrize("wanted", [NET_PROTOCOL_FEATURES, 0, v.mask(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD)])
def test_life_of_a_device(both: Both, wanted: int) -> None:
    frontend, backend = both
    features = frontend.negotiate(SPLIT | v.mask(v.VIRTIO_F_IN_ORDER), wanted)
    assert features == SPLIT
    assert frontend.offered_features == NET_FEATURES
    assert frontend.protocol_features == wanted
    frontend.set_features(features)
    fd, kick, call, err = memfd(), os.eventfd(0), os.eventfd(0), os.eventfd(0)
    frontend.set_mem_table([region()], [fd])
    assert len(backend.plane.regions) == 1  # the call came back, so the back-end has it
    frontend.start_ring(setup(0, kick, call, err))
    frontend.start_ring(setup(1, kick), enable=False)
    frontend.barrier()
    assert sorted(backend.plane.rings) == [0, 1]
    assert backend.plane.enabled == {0}
    assert backend.plane.rings[1].call_fd is None
    frontend.set_call(0, None)
    backend.plane.next_base[0] = 77
    assert frontend.stop_ring(0) == 77
    assert frontend.get_vring_base(1) == 0
    assert not backend.plane.rings
    for each in (fd, kick, call, err):
        os.close(each)
    frontend.close()
    backend.join()
    assert backend.failure is None
    assert not backend.plane.regions


def test_log_status_config_and_regions(both: Both) -> None:
    frontend, backend = both
    features = frontend.negotiate(SPLIT, NET_PROTOCOL_FEATURES)
    frontend.set_features(features)
    frontend.set_status(0xB)
    assert frontend.get_status() == 0xB
    assert frontend.queue_num() == 2
    assert frontend.get_config(0, 6) == bytes(range(1, 7))
    with pytest.raises(BackendError, match="empty"):
        frontend.get_config(28, 1)
    fd = memfd()
    frontend.set_mem_table([region()], [fd])
    extra = region(1 << 32, PAGE, 1 << 40)
    frontend.add_region(extra, fd)
    frontend.remove_region(extra)
    frontend.start_ring(setup(0))
    frontend.set_log_base(fd, PAGE)
    frontend.set_features(features | LOG_ALL)
    frontend.set_ring_addresses(replace(setup(0), flags=v.VHOST_VRING_F_LOG))
    os.close(fd)
    effects = [type(effect) for effect in backend.plane.take()]
    for expected in (e.AddRegion, e.RemoveRegion, e.SetLog, e.SetRingAddresses):
        assert expected in effects
    assert backend.plane.features == SPLIT | LOG_ALL


def test_refusal_is_an_error_and_the_connection_goes_on(both: Both) -> None:
    frontend, _ = both
    frontend.set_features(frontend.negotiate(SPLIT, NET_PROTOCOL_FEATURES))
    with pytest.raises(BackendError, match="SET_VRING_NUM: ack is 1"):
        frontend.request(Request.SET_VRING_NUM, VringState(0, 3))
    assert frontend.queue_num() == 2


def test_refusal_without_ack_closes(both: Both) -> None:
    frontend, backend = both
    frontend.set_features(frontend.negotiate(SPLIT))
    frontend.request(Request.SET_VRING_NUM, VringState(0, 3))
    with pytest.raises(ConnectionClosed):
        frontend.barrier()
    backend.join()
    assert isinstance(backend.failure, FrontendError)


def test_any_bytes_can_be_sent(both: Both) -> None:
    frontend, backend = both
    frontend.send(Request.GET_FEATURES, flags=VERSION | NEED_REPLY)
    assert frontend.receive().payload == NET_FEATURES
    frontend.send(0, b"", [], 0)
    assert frontend.wait_closed()
    backend.join()
    assert isinstance(backend.failure, FrontendError)


def test_open_connection_is_not_closed(both: Both) -> None:
    assert not both[0].wait_closed(0.05)


def test_caller_keeps_its_fds(both: Both) -> None:
    frontend, _ = both
    frontend.set_features(frontend.negotiate(SPLIT))
    fd = memfd()
    frontend.set_mem_table([region()], [fd])
    os.fstat(fd)
    os.close(fd)


def test_misuse(both: Both) -> None:
    frontend, _ = both
    with pytest.raises(UsageError, match="1 regions with 0 fds"):
        frontend.set_mem_table([region()], [])
    with pytest.raises(UsageError, match="LOG_SHMFD"):
        frontend.set_log_base(0, PAGE)


# --- Back-ends that lie -------------------------------------------------------------------------------------------


def lie(
    answer: Callable[[socket.socket, bytes], object], timeout: float = 60
) -> tuple[Frontend, threading.Thread]:
    """Make a back-end that reads one request and then does something wrong."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs:
            answer(theirs, theirs.recv(4096))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return Frontend.adopt(ours, timeout=timeout), thread


LIES = {
    "request instead of reply": lambda s, r: s.send(raw(1, bytes(8))),
    "need reply in a reply": lambda s, r: s.send(raw(1, bytes(8), flags=0xD)),
    "version": lambda s, r: s.send(raw(1, bytes(8), flags=6)),
    "another request": lambda s, r: s.send(raw(15, bytes(8), flags=5)),
    "unknown request": lambda s, r: s.send(raw(99, bytes(8), flags=5)),
    "too short": lambda s, r: s.send(raw(1, bytes(4), flags=5)),
    "too long": lambda s, r: s.send(raw(1, bytes(16), flags=5)),
    "huge": lambda s, r: s.send(HEADER.pack(1, 5, 0xFFFFFFFF)),
    "cut off": lambda s, r: s.send(raw(1, bytes(8), flags=5)[:15]),
    "an fd": lambda s, r: socket.send_fds(s, [raw(1, bytes(8), flags=5)], [0]),
    "many fds": lambda s, r: socket.send_fds(s, [raw(1, bytes(8), flags=5)], [0] * 200),
}


@pytest.mark.parametrize("answer", LIES.values(), ids=LIES.keys())
def test_wrong_reply(no_fd_is_left: None, answer: Callable[[socket.socket, bytes], object]) -> None:
    frontend, thread = lie(answer)
    with frontend, pytest.raises(BackendError):
        frontend.request(Request.GET_FEATURES)
    thread.join(60)


def test_silence_ends_in_time(no_fd_is_left: None) -> None:
    done = threading.Event()
    frontend, thread = lie(lambda s, r: bool(done.wait(60)) and None, 0.3)
    with frontend, pytest.raises(BackendError, match=r"nothing came within 0\.3 s"):
        frontend.request(Request.GET_FEATURES)
    done.set()
    thread.join(60)


def gush(peer: socket.socket, _: bytes) -> None:
    """Answer the same again and again, until nobody listens any more."""
    with suppress(OSError):
        while True:
            peer.sendall(raw(Request.SET_OWNER, bytes(8), flags=5))
            time.sleep(0.001)


@pytest.mark.parametrize("wait", [Frontend.wait_closed, settled], ids=["wait_closed", "settled"])
def test_answers_without_end_end_in_time(no_fd_is_left: None, wait: Callable[[Frontend], object]) -> None:
    frontend, thread = lie(gush, 0.3)

    def run() -> None:
        with suppress(VqError):
            wait(frontend)

    frontend.send(Request.GET_FEATURES)
    waiter = threading.Thread(target=run, daemon=True)
    waiter.start()
    waiter.join(60)
    assert not waiter.is_alive()
    frontend.close()
    thread.join(60)


def test_questions_without_end_are_not_answered_without_end(no_fd_is_left: None) -> None:
    """For each answer of the IOMMU the back-end asks twice."""
    ours, theirs = socket.socketpair()
    channel: list[int] = []

    def run() -> None:
        ask = HEADER.pack(BackendRequest.IOTLB_MSG, VERSION, 32) + struct.pack("=3QBB6x", PAGE, 0, 0, READ, MISS)
        with theirs, suppress(OSError):
            while request := socket.recv_fds(theirs, 4096, 1):
                if not request[0]:
                    break
                channel.extend(request[1])
                os.write(channel[0], ask + ask)
                theirs.sendall(raw(struct.unpack_from("=I", request[0])[0], bytes(8), flags=5))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with Frontend.adopt(ours, timeout=0.2) as frontend:
        frontend.protocol_features = v.mask(v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        frontend.features = v.mask(v.VIRTIO_F_ACCESS_PLATFORM)
        iommu = Iommu(frontend)
        iommu.map(PAGE, PAGE, PAGE)
        asker = threading.Thread(target=frontend.serve, args=(lambda: False, 0.2), daemon=True)
        asker.start()
        asker.join(60)
        assert not asker.is_alive()
        assert iommu.missed
    thread.join(60)
    os.close(channel[0])


def test_backend_that_reads_nothing_ends_in_time(no_fd_is_left: None) -> None:
    ours, theirs = socket.socketpair()

    def flood(frontend: Frontend) -> None:
        for _ in range(100_000):
            frontend.send(Request.SET_VRING_NUM, bytes(8))

    with theirs, Frontend.adopt(ours, timeout=0.2) as frontend, pytest.raises(BackendError, match="read nothing"):
        flood(frontend)


def test_wrong_ring_in_the_base_reply(no_fd_is_left: None) -> None:
    frontend, thread = lie(lambda s, r: s.send(raw(11, struct.pack("=2I", 1, 0), flags=5)))
    with frontend, pytest.raises(BackendError, match="ring index is 1; 0 was asked"):
        frontend.get_vring_base(0)
    thread.join(60)


def test_config_reply_of_another_part(no_fd_is_left: None) -> None:
    frontend, thread = lie(lambda s, r: s.send(raw(24, struct.pack("=3I", 0, 2, 0) + b"ab", flags=5)))
    with frontend, pytest.raises(BackendError, match="2 bytes at 0"):
        frontend.get_config(0, 6)
    thread.join(60)


@pytest.mark.parametrize("size", [0, 8, 16])
def test_every_kind_of_log_reply_passes(no_fd_is_left: None, size: int) -> None:
    frontend, thread = lie(lambda s, r: s.send(raw(6, bytes(size), flags=5)))
    frontend.protocol_features = v.mask(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD)
    with frontend:
        frontend.set_log_base(0, PAGE)
    thread.join(60)


def test_reply_with_its_fd(no_fd_is_left: None) -> None:
    fd = memfd()
    body = struct.pack("=2Q2H4x", PAGE, 0, 1, 256)
    frontend, thread = lie(lambda s, r: socket.send_fds(s, [raw(31, body, flags=5)], [fd]))
    with frontend:
        payload, got = frontend.request_fd(Request.GET_INFLIGHT_FD, Inflight(0, 0, 1, 256))
    assert payload == Inflight(PAGE, 0, 1, 256)
    assert got is not None and os.path.sameopenfile(got, fd)
    os.close(got)
    os.close(fd)
    thread.join(60)


def test_acks_are_asked_for_only_after_reply_ack(no_fd_is_left: None) -> None:
    ours, theirs = socket.socketpair()
    with theirs, Frontend.adopt(ours, timeout=0.2) as frontend:
        frontend.request(Request.SET_OWNER)
        assert theirs.recv(100) == raw(3)
        frontend.protocol_features = v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        theirs.send(raw(3, bytes(8), flags=5))
        frontend.request(Request.SET_OWNER)
        assert theirs.recv(100) == raw(3, flags=VERSION | NEED_REPLY)


# --- Socket roles -------------------------------------------------------------------------------------------------


@pytest.fixture
def path(no_fd_is_left: None) -> Iterator[str]:
    """Give a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="vq-") as folder:
        yield str(Path(folder) / "sock")


def test_frontend_connects_when_the_backend_comes(path: str) -> None:
    made: list[BackendThread] = []

    def come_late() -> None:
        listener = listen(path)
        select.select([listener], [], [], 60)
        connection = listener.accept()
        assert connection is not None
        made.append(BackendThread(socket.socket(fileno=os.dup(connection.fileno()))))
        connection.close()
        listener.close()

    timer = threading.Timer(0.1, come_late)
    timer.start()
    with Frontend.connect(path) as frontend:
        assert frontend.request(Request.GET_FEATURES) == NET_FEATURES
    timer.join()
    made[0].join()


def test_frontend_connects_to_nobody(path: str) -> None:
    with pytest.raises(ResourceError, match="cannot connect"):
        Frontend.connect(path, timeout=0.1)


def test_frontend_listens(path: str) -> None:
    made: list[BackendThread] = []

    def client() -> None:
        connector = Connector(path)
        while (connection := connector.attempt()) is None:
            threading.Event().wait(connector.next_attempt_in())
        made.append(BackendThread(socket.socket(fileno=os.dup(connection.fileno()))))
        connection.close()

    thread = threading.Thread(target=client)
    thread.start()
    with Frontend.listen(path) as frontend:
        assert frontend.request(Request.GET_FEATURES) == NET_FEATURES
    thread.join()
    made[0].join()
    assert not os.path.exists(path)


def test_frontend_listens_in_vain(path: str) -> None:
    with pytest.raises(ResourceError, match="no back-end connected"):
        Frontend.listen(path, timeout=0.1)
    assert not os.path.exists(path)
