"""Line 49: our front-end and our driver believe no back-end."""

from __future__ import annotations

import gc
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vq import virtio as v
from vq.errors import BackendError, ConnectionClosed, VqError
from vq.frontend import Frontend
from vq.message import HEADER, NEED_REPLY, REPLY, VERSION, Request, encode
from vq_core.driver import BrokenRingError, DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.traffic import Exchange

R = Request
NUM = 8


@pytest.fixture
def queue() -> DriverQueue:
    """A queue with three buffers outstanding, ids 0 to 2: 10 bytes readable, 100 writable, 10 and 20 writable."""
    queue = DriverQueue(GuestMemory(1 << 20), NUM)
    queue.add([bytes(10)])
    queue.add(writable=[100])
    queue.add([bytes(5)], [10, 20])
    queue.publish()
    return queue


def use(queue: DriverQueue, *elements: tuple[int, int]) -> None:
    """Write used elements as a device does."""
    position = int(queue.used_head[1])
    for number, element in enumerate(elements):
        queue.used[(position + number) % NUM] = element
    queue.used_head[1] = (position + len(elements)) % 65536


@pytest.mark.checklist(49)
@pytest.mark.parametrize("ahead", [4, 8, 9, 255, 32768, 65535])
def test_used_index_jumps(queue: DriverQueue, ahead: int) -> None:
    """Line 49: further ahead than what was made available, or backwards."""
    queue.used_head[1] = ahead
    for _ in range(2):
        with pytest.raises(BrokenRingError) as caught:
            queue.poll()
        assert (caught.value.cause, caught.value.value) == (1, ahead)
    queue.reset()
    assert queue.poll() == []


@pytest.mark.checklist(49)
@pytest.mark.parametrize("wrong", [8, 9, 255, 65536, 65537, 0x80000000, 0xFFFFFFFF])
def test_used_id_outside_the_ring(queue: DriverQueue, wrong: int) -> None:
    """Line 49: compared whole; what stands before it is delivered."""
    use(queue, (1, 100), (wrong, 0))
    assert [(token.id, length) for token, length in queue.poll()] == [(1, 100)]
    with pytest.raises(BrokenRingError) as caught:
        queue.poll()
    assert (caught.value.cause, caught.value.value) == (2, wrong)


def take_all(queue: DriverQueue) -> None:
    """Poll until it fails: what stands before a wrong element is delivered."""
    for _ in range(NUM):
        queue.poll()


@pytest.mark.checklist(49)
@pytest.mark.parametrize(("elements", "value"), [([(3, 0)], 3), ([(4, 0)], 4), ([(7, 0)], 7), ([(0, 0), (0, 0)], 0)])
def test_used_id_that_is_not_out(queue: DriverQueue, elements: list[tuple[int, int]], value: int) -> None:
    """Line 49: never made available, a descriptor in the middle of a chain, or used twice."""
    use(queue, *elements)
    with pytest.raises(BrokenRingError) as caught:
        take_all(queue)
    assert (caught.value.cause, caught.value.value) == (3, value)


@pytest.mark.checklist(49)
@pytest.mark.parametrize(("element", "room"), [((0, 1), 0), ((1, 101), 100), ((2, 31), 30), ((1, 0xFFFFFFFF), 100)])
def test_used_length_above_what_was_given(queue: DriverQueue, element: tuple[int, int], room: int) -> None:
    """Line 49: no reader is told of more bytes than the device could write."""
    use(queue, element)
    with pytest.raises(BrokenRingError) as caught:
        queue.poll()
    assert (caught.value.cause, caught.value.value) == (4, element[1])
    assert room < element[1]


@pytest.mark.checklist(49)
def test_device_scribbles_over_the_whole_ring(queue: DriverQueue) -> None:
    """Line 49: descriptors and available ring are the driver's by its own record, not by what stands in memory."""
    queue.desc["addr"] = 0xFFFF_FFFF_FFFF_FFFF
    queue.desc["len"] = 0xFFFFFFFF
    queue.desc["flags"] = 0xFFFF
    queue.desc["next"] = 0xFFFF
    queue.avail[:] = 0xFFFF
    use(queue, (2, 30), (0, 0), (1, 7))
    assert [(token.id, length) for token, length in queue.poll()] == [(2, 30), (0, 0), (1, 7)]
    assert queue.free == NUM
    for _ in range(NUM):
        queue.add([b"x"])
    queue.publish()


@pytest.mark.checklist(49)
def test_traffic_ends_with_an_error(queue: DriverQueue) -> None:
    """Line 49: the traffic engine, which runs without the interpreter, stops at a wrong element."""
    memory = GuestMemory(4 << 20)
    transmitq, receiveq = DriverQueue(memory, 64), DriverQueue(memory, 64)
    exchange = Exchange([(transmitq, receiveq)], 64, poll="sleep")
    timer = threading.Timer(0.1, lambda: receiveq_used(receiveq))
    timer.start()
    with pytest.raises(BrokenRingError):
        exchange.run(duration=10)
    timer.join()


def receiveq_used(queue: DriverQueue) -> None:
    queue.used[0] = (99, 10)
    queue.used_head[1] = 1


# -- the front-end --


@pytest.fixture
def answer() -> Iterator[Callable[..., Frontend]]:
    """Make a front-end whose back-end answers the first message with these bytes and fds, and nothing ever after."""
    sockets: list[socket.socket] = []
    frontends: list[Frontend] = []

    def make(data: bytes, fds: tuple[int, ...] = (), *, protocol: int = 0, close: bool = False) -> Frontend:
        ours, theirs = socket.socketpair()
        socket.send_fds(theirs, [data], list(fds)) if fds else theirs.sendall(data)
        if close:
            theirs.close()
        sockets.append(theirs)
        frontend = Frontend.adopt(ours, timeout=0.3)
        frontend.protocol_features = protocol
        frontends.append(frontend)
        return frontend

    yield make
    for frontend in frontends:
        frontend.close()
    for sock in sockets:
        sock.close()


WORD = struct.pack("=Q", 0)
WRONG_REPLIES = [
    pytest.param(encode(R.GET_FEATURES, WORD, VERSION), id="no reply bit"),
    pytest.param(encode(R.GET_FEATURES, WORD, VERSION | REPLY | NEED_REPLY), id="need-reply bit"),
    pytest.param(encode(R.GET_FEATURES, WORD, 2 | REPLY), id="version 2"),
    pytest.param(encode(R.GET_FEATURES, WORD, VERSION | REPLY | 1 << 31), id="reserved bit"),
    pytest.param(encode(R.GET_QUEUE_NUM, WORD, VERSION | REPLY), id="another request"),
    pytest.param(encode(0, WORD, VERSION | REPLY), id="request 0"),
    pytest.param(encode(0xFFFFFFFF, WORD, VERSION | REPLY), id="unknown request"),
    pytest.param(encode(R.GET_FEATURES, WORD[:7], VERSION | REPLY), id="7 bytes"),
    pytest.param(encode(R.GET_FEATURES, WORD + b"\0", VERSION | REPLY), id="9 bytes"),
    pytest.param(encode(R.GET_FEATURES, b"", VERSION | REPLY), id="0 bytes"),
    pytest.param(HEADER.pack(R.GET_FEATURES, VERSION | REPLY, 0xFFFFFFFF), id="4 GiB"),
    pytest.param(HEADER.pack(R.GET_FEATURES, VERSION | REPLY, 8) + WORD[:3], id="half a word"),
    pytest.param(b"\1", id="half a header"),
    pytest.param(b"", id="nothing"),
]


@pytest.mark.checklist(49)
@pytest.mark.parametrize("data", WRONG_REPLIES)
@pytest.mark.parametrize("close", [False, True])
def test_wrong_reply(answer: Callable[..., Frontend], data: bytes, close: bool) -> None:
    """Line 49: an error in time, never a value and never a wait without end."""
    frontend = answer(data, close=close)
    begin = time.monotonic()
    with pytest.raises((BackendError, ConnectionClosed)):
        frontend.request(R.GET_FEATURES)
    assert time.monotonic() - begin < 60


@pytest.mark.checklist(49)
@pytest.mark.parametrize("count", [1, 2, 32, 33, 253])
def test_reply_with_fds(answer: Callable[..., Frontend], count: int) -> None:
    """Line 49: fds that no reply brings are closed."""
    gc.collect()  # what earlier tests left to the collector is not to be closed in between
    before = len(os.listdir("/proc/self/fd"))
    fds = tuple(os.eventfd(0, os.EFD_CLOEXEC) for _ in range(count))
    frontend = answer(encode(R.GET_FEATURES, WORD, VERSION | REPLY), fds)
    for fd in fds:
        os.close(fd)
    with pytest.raises(BackendError):
        frontend.request(R.GET_FEATURES)
    assert len(os.listdir("/proc/self/fd")) == before + 2  # the two ends of the connection


@pytest.mark.checklist(49)
@pytest.mark.parametrize("value", [1, 2, 0x100, 0xFFFF_FFFF_FFFF_FFFF])
def test_nack_of_any_kind(answer: Callable[..., Frontend], value: int) -> None:
    """Line 49: only 0 is an ack."""
    frontend = answer(
        encode(R.SET_OWNER, struct.pack("=Q", value), VERSION | REPLY),
        protocol=v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK),
    )
    with pytest.raises(BackendError, match="refused"):
        frontend.request(R.SET_OWNER)


@pytest.mark.checklist(49)
@pytest.mark.parametrize("index", [1, 255, 65536, 0xFFFFFFFF])
def test_base_of_another_ring(answer: Callable[..., Frontend], index: int) -> None:
    """Line 49: the answer must be about the ring that was asked for."""
    frontend = answer(encode(R.GET_VRING_BASE, struct.pack("=II", index, 7), VERSION | REPLY))
    with pytest.raises(BackendError, match="ring index"):
        frontend.get_vring_base(0)


@pytest.mark.checklist(49)
@pytest.mark.parametrize(
    "body",
    [
        struct.pack("=III", 0, 4, 0),
        struct.pack("=III", 0, 3, 0) + bytes(4),
        struct.pack("=III", 1, 4, 0) + bytes(4),
        struct.pack("=III", 0, 8, 0) + bytes(8),
        b"",
    ],
)
def test_configuration_of_the_wrong_size(answer: Callable[..., Frontend], body: bytes) -> None:
    """Line 49: another size or place than was asked for, or a size that lies."""
    frontend = answer(encode(R.GET_CONFIG, body, VERSION | REPLY))
    with pytest.raises(BackendError):
        frontend.get_config(0, 4)


@pytest.mark.checklist(49)
def test_offer_of_everything(answer: Callable[..., Frontend]) -> None:
    """Line 49: bits that nobody knows are never acknowledged."""
    everything = struct.pack("=Q", 0xFFFF_FFFF_FFFF_FFFF)
    acks = b"".join(encode(request, WORD, VERSION | REPLY) for request in (R.SET_PROTOCOL_FEATURES, R.SET_OWNER))
    frontend = answer(
        encode(R.GET_FEATURES, everything, VERSION | REPLY)
        + encode(R.GET_PROTOCOL_FEATURES, everything, VERSION | REPLY)
        + acks
    )
    wanted = v.mask(v.VIRTIO_F_VERSION_1)
    assert frontend.negotiate(wanted, v.mask(v.VHOST_USER_PROTOCOL_F_MQ)) == wanted | v.mask(
        v.VHOST_USER_F_PROTOCOL_FEATURES
    )
    assert frontend.protocol_features == v.mask(v.VHOST_USER_PROTOCOL_F_MQ)


def fill(frontend: Frontend) -> None:
    for _ in range(100000):
        frontend.send(R.SET_CONFIG, struct.pack("=III", 0, 4000, 0) + bytes(4000))


@pytest.mark.checklist(49)
def test_back_end_that_does_not_read() -> None:
    """Line 49: a front-end does not wait without end until its messages are read."""
    ours, theirs = socket.socketpair()
    frontend = Frontend.adopt(ours, timeout=0.3)
    try:
        begin = time.monotonic()
        with pytest.raises(VqError):
            fill(frontend)
        assert time.monotonic() - begin < 60
    finally:
        frontend.close()
        theirs.close()
