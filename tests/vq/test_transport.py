"""Framing and fd passing over real sockets."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from vhost_rig import memfd, open_fds, raw
from vq.errors import BackendError, ConnectionClosed, FrontendError, VqError
from vq.message import FDS_MAX, HEADER, Message, Request, encode_ack, encode_request
from vq.transport import SEND_BUFFER_MAX, SEND_FDS_MAX, Connection

SET_FEATURES = encode_request(Request.SET_FEATURES, 0x1234)
GET_FEATURES = encode_request(Request.GET_FEATURES)
CALL = encode_request(Request.SET_VRING_CALL, 1)


@pytest.fixture
def pair(no_fd_is_left: None) -> Iterator[tuple[Connection, socket.socket]]:
    """Connect our end with the plain socket of a peer."""
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    yield connection, theirs
    connection.close()
    theirs.close()


Pair = tuple[Connection, socket.socket]


def pass_fds(sock: socket.socket, data: bytes, *groups: int) -> None:
    """Send bytes with a control message for each group, of so many fds."""
    fd = memfd()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * count)) for count in groups]
    sock.sendmsg([data], rights)
    os.close(fd)


def test_whole_message(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.receive() is None
    theirs.send(SET_FEATURES)
    message = ours.receive()
    assert message is not None
    assert (message.request, message.flags, message.payload, message.fds) == (2, 1, 0x1234, ())
    assert ours.receive() is None


def test_byte_by_byte(pair: Pair) -> None:
    ours, theirs = pair
    for byte in SET_FEATURES[:-1]:
        theirs.send(bytes([byte]))
        assert ours.receive() is None
    theirs.send(SET_FEATURES[-1:])
    message = ours.receive()
    assert message is not None and message.payload == 0x1234


@pytest.mark.parametrize("cut", range(1, len(SET_FEATURES)))
def test_cut_anywhere(pair: Pair, cut: int) -> None:
    ours, theirs = pair
    theirs.send(SET_FEATURES[:cut])
    assert ours.receive() is None
    theirs.send(SET_FEATURES[cut:] + GET_FEATURES)
    first, second = ours.receive(), ours.receive()
    assert first is not None and first.payload == 0x1234
    assert second is not None and second.request == Request.GET_FEATURES


def test_many_messages_in_one_write_are_taken_one_at_a_time(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(b"".join(encode_request(Request.SET_FEATURES, n) for n in range(100)))
    values = []
    while (message := ours.receive()) is not None:
        values.append(message.payload)
    assert values == list(range(100))


def test_fds_stay_with_their_message(pair: Pair) -> None:
    # A generous read would return the first message together with the fds of the second.
    ours, theirs = pair
    theirs.send(GET_FEATURES)
    pass_fds(theirs, CALL, 1)
    theirs.send(SET_FEATURES)
    pass_fds(theirs, CALL, 1)
    got = []
    while (message := ours.receive()) is not None:
        got.append((message.request, len(message.fds)))
        message.close()
    assert got == [(1, 0), (13, 1), (2, 0), (13, 1)]


def test_fds_come_with_the_first_byte(pair: Pair) -> None:
    ours, theirs = pair
    pass_fds(theirs, CALL[:1], 1)
    assert ours.receive() is None
    theirs.send(CALL[1:])
    message = ours.receive()
    assert message is not None and len(message.fds) == 1
    message.close()


def test_received_fds_are_close_on_exec(pair: Pair) -> None:
    ours, theirs = pair
    pass_fds(theirs, CALL, 1)
    message = ours.receive()
    assert message is not None
    assert fcntl.fcntl(message.fds[0], fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    message.close()


@pytest.mark.parametrize("cut", [1, 5, 12, 15])
def test_fds_inside_a_message_break_the_stream(pair: Pair, cut: int) -> None:
    ours, theirs = pair
    theirs.send(CALL[:cut])
    assert ours.receive() is None
    pass_fds(theirs, CALL[cut:], 1)
    with pytest.raises(FrontendError, match="number of fds") as caught:
        ours.receive()
    assert caught.value.fatal


def test_fds_of_an_unfinished_message_are_closed(pair: Pair) -> None:
    ours, theirs = pair
    before = open_fds()
    pass_fds(theirs, CALL[:12], 1)
    assert ours.receive() is None
    assert len(open_fds()) == len(before) + 1
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(FrontendError, match="only 12 of 20 bytes"):
        ours.receive()
    assert open_fds() == before


def test_close_gives_back_waiting_fds(pair: Pair) -> None:
    ours, theirs = pair
    pass_fds(theirs, CALL[:3], 1)
    assert ours.receive() is None
    ours.close()
    ours.close()
    assert ours.fileno() == -1


def test_several_control_messages_are_summed(pair: Pair) -> None:
    ours, theirs = pair
    body = struct.pack("=2I", 3, 0) + b"".join(struct.pack("=4Q", n << 20, 4096, n << 20, 0) for n in range(3))
    pass_fds(theirs, raw(Request.SET_MEM_TABLE, body), 2, 1)
    message = ours.receive()
    assert message is not None and len(message.fds) == 3
    message.close()


def test_as_many_fds_as_allowed(pair: Pair) -> None:
    ours, theirs = pair
    pass_fds(theirs, raw(99, b""), FDS_MAX)
    message = ours.receive()
    assert message is not None and len(message.fds) == FDS_MAX
    message.close()


@pytest.mark.parametrize("count", [FDS_MAX + 1, 253])
def test_too_many_fds_break_the_stream_and_are_closed(pair: Pair, count: int) -> None:
    ours, theirs = pair
    before = open_fds()
    pass_fds(theirs, raw(99, b""), count)
    with pytest.raises(FrontendError, match="too high"):
        ours.receive()
    assert open_fds() == before


def test_our_own_limit_of_files_leaks_nothing(pair: Pair) -> None:
    ours, theirs = pair
    before = open_fds()
    pass_fds(theirs, raw(99, b""), 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 5, hard))
    try:
        with pytest.raises(FrontendError, match="limit of open files"):
            ours.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before


@pytest.mark.parametrize(
    ("request_id", "count"), [(Request.GET_FEATURES, 1), (Request.SET_VRING_CALL, 0), (Request.SET_VRING_CALL, 2)]
)
def test_thousand_wrong_fd_counts_leak_nothing(no_fd_is_left: None, request_id: Request, count: int) -> None:
    before = open_fds()
    for _ in range(1000):
        ours, theirs = socket.socketpair()
        connection = Connection(ours)
        pass_fds(theirs, encode_request(request_id, 0), *([count] if count else []))
        with pytest.raises(FrontendError, match="number of fds"):
            connection.receive()
        connection.close()
        theirs.close()
    assert open_fds() == before


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 19])
def test_end_inside_a_message(pair: Pair, cut: int) -> None:
    ours, theirs = pair
    theirs.send(SET_FEATURES[:cut])
    theirs.close()
    with pytest.raises(FrontendError, match="at its end") as caught:
        ours.receive()
    assert caught.value.fatal


def test_end_between_messages_is_orderly(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(GET_FEATURES)
    theirs.close()
    assert ours.receive() is not None
    with pytest.raises(ConnectionClosed):
        ours.receive()


def test_peer_that_dies_with_unread_replies_is_orderly(pair: Pair) -> None:
    ours, theirs = pair
    ours.send(encode_ack(Request.SET_FEATURES, failed=False))
    theirs.close()  # the kernel says ECONNRESET for that
    with pytest.raises(ConnectionClosed):
        ours.receive()
    with pytest.raises(ConnectionClosed):
        ours.send(encode_ack(Request.SET_FEATURES, failed=False))


@pytest.mark.parametrize("size", [0xFFFFFFFF, 4097, 9, 7])
def test_wrong_size_is_refused_before_its_bytes_come(pair: Pair, size: int) -> None:
    ours, theirs = pair
    theirs.send(HEADER.pack(Request.SET_FEATURES, 1, size))
    with pytest.raises(FrontendError, match="size"):
        ours.receive()


def test_unknown_request_is_read_to_its_end(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(raw(200, bytes(4096)) + GET_FEATURES)
    first, second = ours.receive(), ours.receive()
    assert first is not None and len(first.payload) == 4096
    assert second is not None and second.request == Request.GET_FEATURES


def test_silent_peer_costs_no_time(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(SET_FEATURES[:13])
    begin = time.monotonic()
    for _ in range(100):
        assert ours.receive() is None
    assert time.monotonic() - begin < 10


def test_credentials_on_an_inherited_socket_do_no_harm(no_fd_is_left: None) -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    connection = Connection(ours)
    theirs.send(SET_FEATURES)
    message = connection.receive()
    assert message is not None and message.payload == 0x1234
    connection.close()
    theirs.close()


# --- Sending ------------------------------------------------------------------------------------------------------


def test_replies_arrive_in_order(pair: Pair) -> None:
    ours, theirs = pair
    replies = [encode_ack(request, failed=False) for request in (2, 5, 8)]
    for reply in replies:
        ours.send(reply)
    assert not ours.wants_write
    assert theirs.recv(1000) == b"".join(replies)


def fill(ours: Connection) -> int:
    """Send until the socket takes no more; returns how many acks went out or into the buffer."""
    count = 0
    while not ours.wants_write:
        ours.send(encode_ack(Request.SET_FEATURES, failed=False))
        count += 1
    return count


def test_peer_that_does_not_read_is_given_up(pair: Pair) -> None:
    ours, _ = pair
    fill(ours)
    ack = encode_ack(Request.SET_FEATURES, failed=False)
    for _ in range(SEND_BUFFER_MAX // len(ack) - 1):
        ours.send(ack)
    with pytest.raises(FrontendError, match="unread") as caught:
        ours.send(ack * 2)
    assert caught.value.fatal


def test_no_copy_is_left_of_fds_that_cannot_wait(pair: Pair) -> None:
    ours, _ = pair
    fill(ours)
    fd = memfd()
    before = open_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.dup(fd)
    os.close(last)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, hard))  # room for one and not for eight
    try:
        with pytest.raises(OSError, match="Too many open files"):
            ours.send(encode_ack(Request.GET_INFLIGHT_FD, failed=False), [fd] * 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before
    os.close(fd)


def test_few_fds_wait_for_a_peer_that_does_not_read(pair: Pair) -> None:
    """Each takes one of those that all connections share."""
    ours, _ = pair
    fill(ours)
    before = open_fds()
    fd = memfd()
    for _ in range(SEND_FDS_MAX):
        ours.send(encode_ack(Request.GET_INFLIGHT_FD, failed=False), [fd])
        ours.send(encode_ack(Request.SET_FEATURES, failed=False))
    with pytest.raises(FrontendError, match="unread descriptors") as caught:
        ours.send(encode_ack(Request.GET_INFLIGHT_FD, failed=False), [fd])
    assert caught.value.fatal
    os.close(fd)
    assert len(open_fds()) == len(before) + SEND_FDS_MAX


def test_rest_is_sent_when_the_peer_reads(pair: Pair) -> None:
    ours, theirs = pair
    count = fill(ours)
    for _ in range(10):
        ours.send(encode_ack(Request.SET_VRING_NUM, failed=True))
    theirs.setblocking(False)
    got = b""
    while len(got) < 20 * (count + 10):
        ours.flush()
        got += theirs.recv(1 << 20)
    assert not ours.wants_write
    assert got == encode_ack(2, failed=False) * count + encode_ack(8, failed=True) * 10


def test_fds_wait_with_their_message(pair: Pair) -> None:
    ours, theirs = pair
    count = fill(ours)
    fd = memfd()
    ours.send(encode_ack(Request.SET_VRING_NUM, failed=False), [fd])
    os.close(fd)  # the caller's; the connection has one of its own
    theirs.setblocking(False)
    fds: list[int] = []
    got = b""
    while len(got) < 20 * (count + 1):
        ours.flush()
        data, more, _, _ = socket.recv_fds(theirs, 1 << 20, 8)
        got += data
        fds += more
    assert len(fds) == 1
    os.fstat(fds[0])
    os.close(fds[0])


def test_close_drops_fds_that_wait(pair: Pair) -> None:
    ours, _ = pair
    fill(ours)
    fd = memfd()
    ours.send(encode_ack(Request.SET_VRING_NUM, failed=False), [fd])
    os.close(fd)
    ours.close()
    assert not ours.wants_write


def test_broken_pipe_while_flushing(pair: Pair) -> None:
    ours, theirs = pair
    fill(ours)
    theirs.close()
    with pytest.raises(ConnectionClosed):
        ours.flush()


# --- Replies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [encode_request(Request.GET_FEATURES), raw(1, bytes(8), flags=0xD), raw(1, bytes(4), flags=5)]
)
def test_wrong_reply_is_the_fault_of_the_backend(no_fd_is_left: None, data: bytes) -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, replies=True)
    theirs.send(data)
    with pytest.raises(BackendError):
        connection.receive()
    connection.close()
    theirs.close()


def test_reply_may_bring_fds(no_fd_is_left: None) -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, replies=True)
    pass_fds(theirs, raw(Request.GET_INFLIGHT_FD, bytes(24), flags=5), 1)
    message = connection.receive()
    assert isinstance(message, Message) and len(message.fds) == 1
    message.close()
    connection.close()
    theirs.close()


def test_broken_stream_stays_broken(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(HEADER.pack(1, 0, 0) + GET_FEATURES)
    for _ in range(3):
        with pytest.raises(VqError):
            ours.receive()
