"""Lines 1 to 5: the stream of messages and the fds that come with it."""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from hostile.conftest import Connect
from hostile.guest import A_BYTES, A_USER, CALL, ERR, KICK, PROTOCOL, A, Guest, region_rows
from hostile.process import Host, Neighbour, wait_until
from vq.message import HEADER, NEED_REPLY, REPLY, VERSION, Request, encode
from vq.payload import Log, Region

GET_FEATURES, SET_FEATURES = Request.GET_FEATURES, Request.SET_FEATURES
NOFD = 1 << 8


class RawSocket:
    """A connection on which any bytes can be sent."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(path)

    def send(self, data: bytes, *bundles: list[int]) -> None:
        """Send bytes, each bundle of fds in a control message of its own; a peer that has closed is no failure."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)) for fds in bundles]
        with suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendmsg([data], rights)

    def closed(self) -> bool:
        """Whether the peer has closed (and said nothing before)."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def reply(self) -> tuple[int, int, bytes]:
        """Read a whole reply: request, flags, payload."""
        request, flags, size = HEADER.unpack(self.sock.recv(HEADER.size, socket.MSG_WAITALL))
        return request, flags, self.sock.recv(size, socket.MSG_WAITALL) if size else b""


@pytest.fixture
def dial(host: Host, unharmed: None) -> Iterator[Callable[[], RawSocket]]:
    """Connect without saying anything; the connection of before is gone by then."""
    made: list[RawSocket] = []

    def connect() -> RawSocket:
        for old in made:
            old.sock.close()
        host.wait_free()
        made.append(RawSocket(host.path))
        return made[-1]

    yield connect
    for old in made:
        old.sock.close()


def is_served(raw: RawSocket) -> None:
    """Insist that the connection still answers."""
    raw.send(encode(GET_FEATURES))
    request, flags, body = raw.reply()
    assert (request, flags, len(body)) == (GET_FEATURES, VERSION | REPLY, 8)


# -- line 1 --


@pytest.mark.checklist(1)
@pytest.mark.parametrize(
    ("request_id", "size"),
    [
        (GET_FEATURES, 8),
        (SET_FEATURES, 0),
        (SET_FEATURES, 7),
        (SET_FEATURES, 9),
        (SET_FEATURES, 0xFFFFFFFF),
        (Request.SET_VRING_ADDR, 39),
        (Request.SET_VRING_ADDR, 41),
        (Request.SET_MEM_TABLE, 7),  # 8 bytes are the go-ahead of postcopy, which the session refuses
        (Request.SET_MEM_TABLE, 39),
        (Request.SET_MEM_TABLE, 8 + 33 * 32),
        (Request.GET_CONFIG, 11),
        (Request.GET_CONFIG, 4097),
        (Request.SET_LOG_BASE, 12),
        (1000, 4097),
        (1000, 0x7FFFFFFF),
    ],
)
def test_wrong_size_closes_before_a_byte_of_it_came(
    host: Host, dial: Callable[[], RawSocket], request_id: int, size: int
) -> None:
    """Line 1: a size that does not suit the request ends the connection at the header, and allocates nothing."""
    before = host.private_kilobytes()
    raw = dial()
    raw.send(HEADER.pack(request_id, VERSION, size))
    assert raw.closed()
    assert host.private_kilobytes() - before < 1024


@pytest.mark.checklist(1, 2, 21)
def test_payload_that_never_comes_costs_nobody_anything(
    host: Host, neighbour: Neighbour, dial: Callable[[], RawSocket]
) -> None:
    """Lines 1, 2, 21: the right size without its bytes only waits; the neighbour's messages and packets go on."""
    raw = dial()
    raw.send(HEADER.pack(SET_FEATURES, VERSION, 8))
    begin = time.monotonic()
    assert neighbour.frontend.request(GET_FEATURES)
    assert time.monotonic() - begin < 10
    neighbour.check()
    raw.send(bytes(8))
    is_served(raw)


# -- line 2 --


@pytest.mark.checklist(2)
def test_bytes_one_by_one(dial: Callable[[], RawSocket]) -> None:
    """Line 2: header and payload in the smallest pieces are one message."""
    raw = dial()
    for byte in encode(SET_FEATURES, struct.pack("=Q", 1 << 30)) + encode(GET_FEATURES):
        raw.send(bytes([byte]))
    request, flags, _ = raw.reply()
    assert (request, flags) == (GET_FEATURES, VERSION | REPLY)


@pytest.mark.checklist(2)
def test_many_messages_in_one_write(dial: Callable[[], RawSocket]) -> None:
    """Line 2: messages that come together are served one after the other."""
    raw = dial()
    raw.send(
        encode(GET_FEATURES) + encode(Request.SET_OWNER) + encode(Request.GET_PROTOCOL_FEATURES) + encode(GET_FEATURES)
    )
    assert [raw.reply()[0] for _ in range(3)] == [GET_FEATURES, Request.GET_PROTOCOL_FEATURES, GET_FEATURES]


@pytest.mark.checklist(2, 46)
@pytest.mark.parametrize("cut", [1, 11, 12, 13, 51, 8 + 12 + 31])
def test_end_inside_a_message_uses_nothing_of_it(dial: Callable[[], RawSocket], cut: int) -> None:
    """Lines 2, 46: the end inside a memory table closes its fd and maps nothing (`unharmed` counts)."""
    raw = dial()
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 20)
        body = struct.pack("=I4xQQQQ", 1, A, 1 << 20, A_USER, 0)
        raw.send(encode(Request.SET_MEM_TABLE, body)[:cut], [file.fileno()])
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.closed()


# -- line 3 --


@pytest.mark.checklist(3)
@pytest.mark.parametrize("flags", [0, 2, 3, VERSION | REPLY, *(VERSION | 1 << bit for bit in range(4, 32))])
def test_wrong_flags_close(dial: Callable[[], RawSocket], flags: int) -> None:
    """Line 3: another version, a reserved bit, or the reply bit in a request."""
    raw = dial()
    raw.send(encode(GET_FEATURES, flags=flags))
    assert raw.closed()


@pytest.mark.checklist(3)
@pytest.mark.parametrize("request_id", [0, 46, 47, 255, 256, 65535, 65537, 0x7FFFFFFF, 0x80000001, 0xFFFFFFFF])
def test_unknown_request(connect: Connect, request_id: int) -> None:
    """Line 3: nacked where an ack can be given, otherwise closed; 0 always closes."""
    silent = connect(running=False, protocol=0)
    assert silent.say(request_id) == "closed"
    silent.close()
    guest = connect(running=False)
    assert guest.say(request_id, bytes(24)) == ("closed" if request_id == 0 else "refused")
    if request_id:
        assert guest.say(Request.SET_OWNER) == "done"


# -- line 4 --


def dummies(count: int) -> list[int]:
    return [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(count)]


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def word(index: int) -> bytes:
    return struct.pack("=Q", index)


MEM_TABLE = struct.pack("=I4xQQQQ", 1, A, A_BYTES, A_USER, 0)
SINGLE = struct.pack("=8xQQQQ", A, A_BYTES, A_USER, 0)
WRONG_COUNTS = [
    (GET_FEATURES, b"", 1),
    (GET_FEATURES, b"", 32),
    (SET_FEATURES, word(0), 1),
    (Request.SET_OWNER, b"", 2),
    (Request.SET_VRING_NUM, bytes(8), 1),
    (Request.GET_VRING_BASE, bytes(8), 1),
    (KICK, word(0), 0),
    (KICK, word(0), 2),
    (KICK, word(NOFD), 1),
    (CALL, word(0), 0),
    (CALL, word(1), 2),
    (CALL, word(1 | NOFD), 1),
    (ERR, word(0), 0),
    (ERR, word(NOFD), 32),
    (Request.SET_MEM_TABLE, MEM_TABLE, 0),
    (Request.SET_MEM_TABLE, MEM_TABLE, 2),
    (Request.SET_LOG_BASE, struct.pack("=QQ", 4096, 0), 0),
    (Request.SET_LOG_BASE, struct.pack("=QQ", 4096, 0), 2),
    (Request.SET_LOG_FD, b"", 0),
    (Request.REM_MEM_REG, SINGLE, 2),
    (Request.SET_INFLIGHT_FD, bytes(24), 0),
    (Request.GET_INFLIGHT_FD, bytes(24), 1),
    (Request.SET_BACKEND_REQ_FD, b"", 0),
]


@pytest.mark.checklist(4, 46)
@pytest.mark.parametrize(("request_id", "body", "count"), WRONG_COUNTS)
def test_wrong_number_of_fds_closes(mute: Guest, request_id: int, body: bytes, count: int) -> None:
    """Line 4: too few or too many fds; all of them are closed (`unharmed` counts)."""
    fds = dummies(count)
    try:
        assert mute.say(request_id, body, fds) == "closed"
    finally:
        close_all(fds)


@pytest.mark.checklist(4, 10, 46)
@pytest.mark.parametrize("count", [0, 2, 32])
def test_wrong_number_of_fds_of_a_new_region_is_refused(mute: Guest, count: int) -> None:
    """Lines 4, 10: ADD_MEM_REG is nacked for its fds, and the connection goes on."""
    fds = dummies(count)
    try:
        assert mute.say(Request.ADD_MEM_REG, SINGLE, fds) == "refused"
    finally:
        close_all(fds)
    assert mute.say(Request.SET_OWNER) == "done"


@pytest.mark.checklist(4)
@pytest.mark.parametrize("count", [33, 253])
def test_more_fds_than_any_message_has(dial: Callable[[], RawSocket], count: int) -> None:
    """Line 4: what the kernel cut off or let through of 253 fds is closed, and so is the connection."""
    raw = dial()
    fds = dummies(count)
    try:
        raw.send(encode(GET_FEATURES), fds)
        assert raw.closed()
    finally:
        close_all(fds)


@pytest.mark.checklist(4)
@pytest.mark.parametrize("at", [1, 11, 12, 19])
def test_fds_in_the_middle_of_a_message(dial: Callable[[], RawSocket], at: int) -> None:
    """Line 4: fds belong to the first byte."""
    raw = dial()
    fds = dummies(2)
    message = encode(KICK, word(0))
    try:
        raw.send(message[:at])
        raw.send(message[at:], fds)
        assert raw.closed()
    finally:
        close_all(fds)


@pytest.mark.checklist(4)
def test_fds_in_several_control_messages(dial: Callable[[], RawSocket]) -> None:
    """Line 4: the fds of all control messages count."""
    fds = dummies(2)
    try:
        raw = dial()
        raw.send(encode(ERR, word(0)), fds[:1], fds[1:])
        assert raw.closed()
        raw = dial()
        raw.send(encode(Request.ADD_MEM_REG, SINGLE), fds[:1], fds[1:])
        assert raw.closed()  # two fds, and no REPLY_ACK by which this could be said
    finally:
        close_all(fds)


@pytest.mark.checklist(4, 46)
def test_a_thousand_rounds_leave_nothing(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Line 4 (CVE-2019-14818, CVE-2022-0669): unexpected fds, again and again."""
    fds = dummies(32)
    guest = connect(running=False)
    before = host.holdings().fds
    try:
        for _ in range(1000):
            assert guest.say(Request.ADD_MEM_REG, SINGLE, fds[:3]) == "refused"
            assert guest.say(1000, b"", fds) == "refused"
        assert host.holdings().fds == before
        guest.close()
        for _ in range(200):
            raw = RawSocket(host.path)
            raw.send(encode(GET_FEATURES, flags=VERSION | NEED_REPLY), fds)
            assert raw.closed()
            raw.sock.close()
            host.wait_free()
    finally:
        close_all(fds)


# -- line 5 --


def path_fd() -> int:
    return os.open(tempfile.gettempdir(), os.O_PATH | os.O_CLOEXEC)


def directory_fd() -> int:
    return os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_CLOEXEC)


def file_fd(flags: int = os.O_RDWR, size: int = A_BYTES) -> int:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(size)
        return os.open(file.name, flags | os.O_CLOEXEC)


def memory_fd(flags: int = os.O_RDWR, size: int = A_BYTES) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    again = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    os.close(fd)
    return again


def pipe_fd(end: int, *, closed: bool = False) -> int:
    """One end of a pipe; `closed` shuts the other."""
    ends = os.pipe2(os.O_CLOEXEC)
    if closed:
        os.close(ends[1 - end])
    else:
        _KEPT.append(ends[1 - end])
    return ends[end]


def socket_fd(*, closed: bool = False) -> int:
    one, other = socket.socketpair()
    if closed:
        other.close()
    else:
        _KEPT.append(other.detach())
    return one.detach()


def epoll_fd() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


def full_eventfd() -> int:
    """An eventfd to which nothing can be added without waiting."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(fd, 0xFFFF_FFFF_FFFF_FFFE)
    return fd


_KEPT: list[int] = []


@pytest.fixture(autouse=True)
def close_other_ends() -> Iterator[None]:
    yield
    close_all(_KEPT)
    _KEPT.clear()


FD_KINDS: dict[str, Callable[[], int]] = {
    "path": path_fd,
    "directory": directory_fd,
    "file": file_fd,
    "memory": memory_fd,
    "socket": socket_fd,
    "closed socket": lambda: socket_fd(closed=True),
    "pipe, reading end": lambda: pipe_fd(0),
    "pipe, writing end": lambda: pipe_fd(1),
    "closed pipe, reading end": lambda: pipe_fd(0, closed=True),
    "closed pipe, writing end": lambda: pipe_fd(1, closed=True),
    "epoll": epoll_fd,
    "null": lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    "zero": lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
    "blocking eventfd": lambda: os.eventfd(0, os.EFD_CLOEXEC),
    "full blocking eventfd": full_eventfd,
}
NO_SIGNAL = {"path", "directory", "file", "memory", "null", "zero", "epoll"}
ONLY_KICK = {"pipe, reading end", "closed pipe, reading end"}
ONLY_SIGNAL = {"pipe, writing end", "closed pipe, writing end"}


@pytest.mark.checklist(5)
@pytest.mark.parametrize("kind", FD_KINDS)
@pytest.mark.parametrize("request_id", [KICK, CALL, ERR])
def test_signal_fd_of_any_kind(guest: Guest, neighbour: Neighbour, request_id: Request, kind: str) -> None:
    """Line 5: what cannot signal is refused; what can be used never blocks the data plane, whatever it does."""
    fd = FD_KINDS[kind]()
    unfit = NO_SIGNAL | (ONLY_SIGNAL if request_id is KICK else ONLY_KICK)
    try:
        expected = "refused" if kind in unfit else "done"
        assert guest.ring_word(request_id, 1, fd) == expected
        if request_id is KICK and expected == "done":
            guest.ring_word(KICK, 1, guest.transmitq.kick_fd)
        guest.exchange(b"whatever the fd is " * 5)
        if request_id is not KICK:
            guest.transmit.avail[1] += 20  # breaks the ring: the err fd is used
            guest.kick(1)
            wait_until("the ring is broken", lambda: guest.host.queue("transmitq0")["broken"])
        neighbour.check()
    finally:
        os.close(fd)


GOOD_MEMORY = {"file", "memory", "zero"}


@pytest.mark.checklist(5, 9, 46)
@pytest.mark.parametrize("kind", [*FD_KINDS, "read-only memory", "write-only memory", "read-only file"])
def test_memory_fd_of_any_kind(guest: Guest, kind: str) -> None:
    """Lines 5, 9: only what can be mapped for reading and writing is memory; else the old table stays and works."""
    odd = {
        "read-only memory": lambda: memory_fd(os.O_RDONLY),
        "write-only memory": lambda: memory_fd(os.O_WRONLY),
        "read-only file": lambda: file_fd(os.O_RDONLY),
    }
    fd = (FD_KINDS | odd)[kind]()
    try:
        regions, fds = region_rows(guest.memory)
        added = Region(0x9000_0000, A_BYTES, 0x9000_0000, 0)
        expected = "done" if kind in GOOD_MEMORY else "refused"
        assert guest.say(Request.SET_MEM_TABLE, (*regions, added), [*fds, fd]) == expected
        assert (
            guest.say(Request.ADD_MEM_REG, added._replace(guest_addr=0xA000_0000, user_addr=0xA000_0000), [fd])
            == expected
        )
        guest.exchange(b"the memory of before" * 4)
    finally:
        os.close(fd)


@pytest.mark.checklist(5, 12)
@pytest.mark.parametrize("kind", [*FD_KINDS, "read-only memory", "write-only memory"])
def test_log_fd_of_any_kind(connect: Connect, kind: str) -> None:
    """Lines 5, 12: a log that cannot be written ends the connection, since its reply cannot say no."""
    guest = connect()
    odd = {"read-only memory": lambda: memory_fd(os.O_RDONLY), "write-only memory": lambda: memory_fd(os.O_WRONLY)}
    fd = (FD_KINDS | odd)[kind]()
    try:
        expected = "answered" if kind in ("file", "memory") else "closed"
        assert guest.say(Request.SET_LOG_BASE, Log(A_BYTES, 0), [fd]) == expected
    finally:
        os.close(fd)


@pytest.mark.checklist(5)
def test_pipe_as_kick(guest: Guest) -> None:
    """Line 5: QEMU may kick by a pipe; its bytes are never read, and its end does no harm."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    assert guest.ring_word(KICK, 1, reading) == "done"
    os.close(reading)
    for number in range(20):
        guest.transmit.put(number % 16, A + 0x80000, 64)
        guest.transmit.offer(number % 16)
        os.write(writing, b"12345678")
        wait_until("the pipe's kick is seen", lambda number=number: guest.transmit.used_idx == number + 1)
    os.close(writing)
    guest.well()


@pytest.mark.checklist(5, 4)
def test_protocol_features_survive_it_all(mute: Guest) -> None:
    """Lines 4, 5: the flags of an fd that is refused are left as they were."""
    assert mute.frontend.protocol_features == PROTOCOL
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        assert mute.ring_word(CALL, 0, reading) == "refused"
        assert not fcntl.fcntl(reading, fcntl.F_GETFL) & os.O_NONBLOCK
    finally:
        os.close(reading)
        os.close(writing)
