"""Lines 21, 22, 42 and 46: too much of everything."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import vq
from hostile.conftest import Connect, every_layout
from hostile.guest import A_BYTES, A_USER, KICK, PLAIN, WRITE, A, B, Guest
from hostile.process import Host, Neighbour, wait_until
from vq import backend
from vq import virtio as v
from vq.devices.net import NetDevice
from vq.errors import BackendError, ConnectionClosed
from vq.frontend import Frontend
from vq.message import NEED_REPLY, VERSION, Request, encode, encode_request
from vq.payload import Config, Region, VringAddr, VringState

R = Request
GET_FEATURES = encode(R.GET_FEATURES)


# -- line 21 --


@pytest.mark.checklist(21)
def test_hundred_thousand_messages(host: Host, neighbour: Neighbour, guest: Guest) -> None:
    """Line 21: as many messages as the socket takes; the neighbour's messages and packets are served in between."""
    sock = socket.socket(fileno=os.dup(guest.frontend.fileno()))
    sock.setblocking(True)
    before = host.private_kilobytes()
    block = encode(R.SET_OWNER) * 1000
    slowest = 0.0
    try:
        for _ in range(50):
            sock.sendall(block)
            begin = time.monotonic()
            assert neighbour.frontend.request(R.GET_FEATURES)
            slowest = max(slowest, time.monotonic() - begin)
    finally:
        sock.close()
    assert guest.frontend.request(R.GET_FEATURES)
    neighbour.check()
    assert slowest < 1
    assert host.private_kilobytes() - before < 512
    guest.exchange(b"after the flood" * 6)


@pytest.mark.checklist(21)
@pytest.mark.parametrize(
    "message", [GET_FEATURES, encode(R.SET_OWNER, flags=VERSION | NEED_REPLY), encode(1000, flags=VERSION | NEED_REPLY)]
)
def test_answers_that_nobody_reads(host: Host, neighbour: Neighbour, guest: Guest, message: bytes) -> None:
    """Line 21: a front-end that asks and does not read is left alone once its buffers are full, with bounded memory."""
    before = host.private_kilobytes()
    sock = socket.socket(fileno=os.dup(guest.frontend.fileno()))
    sock.settimeout(60)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sent = 0
    try:
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(200):
                sock.sendall(message * 1000)
                sent += 1000
        assert sent < 200000, "the flood was answered without end"
    finally:
        sock.close()
    host.wait_free()
    neighbour.check()
    assert host.private_kilobytes() - before < 4096  # 64 KiB of replies, in pieces of 20 bytes with their records
    assert "unread" in host.messages


@pytest.mark.checklist(21, 2)
def test_many_slow_connections(host: Host, neighbour: Neighbour, unharmed: None) -> None:
    """Lines 2, 21: half a message each; they wait in nobody's way, and the next guest is served when they leave."""
    slow = []
    for number in range(30):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(host.path)
        with suppress(BrokenPipeError):
            sock.send(GET_FEATURES[: 1 + number % 11])
        slow.append(sock)
    neighbour.check()
    begin = time.monotonic()
    assert neighbour.frontend.request(R.GET_FEATURES)
    assert time.monotonic() - begin < 10
    for sock in slow:
        sock.close()
    host.wait_free()
    with Frontend.connect(host.path) as frontend:
        assert frontend.request(R.GET_FEATURES)


# -- line 22 --


@pytest.mark.checklist(22)
def test_second_connection(host: Host, neighbour: Neighbour, guest: Guest) -> None:
    """Line 22: it is closed, and the first one notices nothing."""
    for _ in range(20):
        with Frontend.connect(host.path) as second:
            assert second.wait_closed(5)
    guest.exchange(b"the first one" * 6)


@pytest.mark.checklist(22, 46)
def test_storm_of_connections(host: Host, unharmed: None) -> None:
    """Lines 22, 46: hundreds that come and go, with and without a word, with fds and memory on the way."""
    fd = os.memfd_create("storm", os.MFD_CLOEXEC)
    os.ftruncate(fd, A_BYTES)
    table = encode_request(R.SET_MEM_TABLE, (Region(A, A_BYTES, A_USER, 0),))
    try:
        for number in range(400):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(host.path)
                with suppress(BrokenPipeError, ConnectionResetError):
                    match number % 4:
                        case 1:
                            sock.send(GET_FEATURES)
                        case 2:
                            socket.send_fds(sock, [table], [fd])
                        case 3:
                            socket.send_fds(sock, [table[:20]], [fd])
    finally:
        os.close(fd)
    host.wait_free()


@pytest.mark.checklist(22)
def test_the_next_one_comes_at_once(host: Host, unharmed: None) -> None:
    """Line 22: a front-end that leaves with words unread and returns at once is not taken for a second one."""
    refused = 0
    for _ in range(100):
        first = socket.socket(socket.AF_UNIX)
        first.connect(host.path)
        first.settimeout(60)
        first.sendall(GET_FEATURES)
        first.recv(20)
        first.sendall(encode(R.SET_OWNER) * 300)
        first.close()
        second = Frontend.connect(host.path)
        try:
            second.request(R.GET_FEATURES)
        except ConnectionClosed:
            refused += 1
        second.close()
        host.wait_free()
    assert refused == 0


@every_layout
@pytest.mark.checklist(22, 46)
def test_guests_that_come_and_go(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Lines 22, 46: whole lives, one after the other, leave no memory behind."""

    def live() -> None:
        guest = connect()
        guest.exchange(b"a short life" * 6)
        guest.close()

    for _ in range(20):
        live()
    before = host.private_kilobytes()
    for _ in range(60):
        live()
    assert host.private_kilobytes() - before < 512


def pump(*ports: str) -> subprocess.Popen[bytes]:
    """Start the program as a user does."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(vq.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    return subprocess.Popen(
        [sys.executable, "-m", "vq", "pump", *ports, "--duration", "20"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.checklist(22)
@pytest.mark.parametrize("kind", ["file", "directory", "link to a file", "pipe", "living socket"])
def test_a_path_that_is_taken(tmp_path: Path, host: Host, unharmed: None, kind: str) -> None:
    """Line 22: only a socket that nobody uses is replaced; anything else stays, and the program says so and ends."""
    path = tmp_path / "taken"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "link to a file":
        (tmp_path / "precious").write_text("precious")
        path.symlink_to(tmp_path / "precious")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path(host.path)
    before = path.lstat()
    with pump(f"vhost:{path}", "null:") as child:
        _, errors = child.communicate(timeout=120)
    assert child.returncode not in (0, -11)
    assert b"Traceback" not in errors
    assert str(path).encode() in errors
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)


@pytest.mark.checklist(22)
def test_stale_socket_and_permissions(tmp_path: Path) -> None:
    """Line 22: a socket whose owner is dead is replaced; the new one has the permissions that were asked for."""
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    path.chmod(0o777)
    child = pump(f"vhost:{path},mode=600", "null:")
    try:
        wait_until("it listens", lambda: path.exists() and stat.S_IMODE(path.lstat().st_mode) == 0o600)
        with Frontend.connect(str(path)) as frontend:
            assert frontend.request(R.GET_FEATURES)
    finally:
        child.terminate()
        assert child.stderr is not None
        child.stderr.close()
        assert child.wait(60) == 0
    assert not path.exists()


# -- line 42 --


@every_layout
@pytest.mark.checklist(42)
def test_no_length_makes_us_allocate(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Line 42: descriptor lengths, ring sizes and table lengths of gigabytes; our own memory stays as it is."""
    guest = connect(PLAIN, num=256)
    before = host.private_kilobytes()
    for length in (0xFFFFFFFF, 0x7FFFFFFF, 0x10000000, A_BYTES - 0x200000):
        for flags in (0, 4, WRITE):
            guest.transmit.put(0, A + 0x200000, length, flags)
            guest.transmit.offer(0)
            guest.kick(1)
            guest.frontend.barrier()
            guest.restart(1)
            guest.errors(1)
    assert host.private_kilobytes() - before < 512
    assert guest.say(R.SET_VRING_NUM, VringState(2, 32768)) == "done"
    assert host.private_kilobytes() - before < 512


# -- line 46 --

FAILING = [
    (R.SET_VRING_NUM, VringState(0, 3), 0),
    (R.SET_VRING_ADDR, VringAddr(0, 0, 1, 1, 1, 0), 0),
    (R.SET_FEATURES, 1 << 63, 0),
    (R.SET_PROTOCOL_FEATURES, 1 << 63, 0),
    (R.SET_MEM_TABLE, (Region(0, 4096, 0, 0), Region(B, 4096, A_USER, 0), Region(4096, 1 << 40, 4096, 0)), 3),
    (R.ADD_MEM_REG, Region(0x8000_0000, 1 << 40, 0x8000_0000, 0), 1),
    (R.REM_MEM_REG, Region(0x8000_0000, 4096, 0, 0), 1),
    (KICK, 3, 1),
    (R.SET_STATUS, 256, 0),
    (R.NET_SET_MTU, 1, 0),
    (R.SET_LOG_FD, None, 1),
    (R.SET_CONFIG, Config(0, 0, bytes(4)), 0),
]


@pytest.mark.checklist(46)
@pytest.mark.parametrize(("request_id", "payload", "count"), FAILING)
def test_failing_messages_leave_nothing_and_do_not_fill_the_log(
    host: Host, guest: Guest, request_id: Request, payload: object, count: int
) -> None:
    """Line 46: three hundred failures: descriptors, mappings and memory as before; the log grows by a few lines."""
    fds = [row[4] for row in guest.memory.regions]
    if request_id in (R.ADD_MEM_REG, R.SET_MEM_TABLE, R.REM_MEM_REG, R.SET_LOG_FD):
        given = fds[:count]
    else:
        given = guest.err_fds[:count]

    def fail() -> None:
        assert guest.say(request_id, payload, given) == "refused"

    for _ in range(20):
        fail()
    before, lines, memory = host.holdings(), host.messages.count("\n"), host.private_kilobytes()
    for _ in range(300):
        fail()
    now = host.holdings()
    assert (now.fds, now.shared_maps) == (before.fds, before.shared_maps)
    assert host.private_kilobytes() - memory < 256
    assert host.messages.count("\n") - lines < 40
    guest.exchange(b"as before" * 8)


@pytest.mark.checklist(46)
def test_failing_connections_do_not_fill_the_log(host: Host, connect: Connect) -> None:
    """Line 46: a peer that breaks the protocol as often as it can connect; a few lines tell about all of them."""
    lines = host.messages.count("level=warning")

    def fail() -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(host.path)
            with suppress(BrokenPipeError):
                sock.send(encode(0))
            with suppress(ConnectionResetError):
                sock.recv(1)
        host.wait_free()
        return host.messages.count("level=warning") > lines

    for _ in range(300):
        fail()
    wait_until("a line about them, when others have used up what may be said at a time", fail)
    assert host.messages.count("level=warning") - lines < 60
    connect().exchange(b"as before" * 8)


@pytest.mark.checklist(46)
def test_a_guest_cannot_fill_the_log(host: Host, guest: Guest) -> None:
    """Line 46: a ring that is broken again and again, at the guest's will; a few lines tell about all of them."""
    lines = host.messages.count("level=warning")

    def misbehave() -> bool:
        guest.transmit.avail[1] = (guest.transmit.avail_idx + 999) % 65536
        guest.kick(1)
        wait_until("it is broken", lambda: guest.errors(1))
        guest.restart(1)
        return host.messages.count("level=warning") > lines

    for _ in range(300):
        misbehave()
    wait_until("a line about them, when others have used up what may be said at a time", misbehave)
    assert host.messages.count("level=warning") - lines < 60


@pytest.mark.checklist(21, 46)
def test_refusals_of_many_connections_are_few_lines(host: Host, neighbour: Neighbour) -> None:
    """Lines 21 and 46: what one connection may have logged it could have again by coming again."""
    before = len(host.messages)
    for _ in range(100):
        frontend = Frontend.connect(host.path, timeout=60)
        frontend.negotiate(PLAIN, v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
        for size in range(40000, 40016):
            with pytest.raises(BackendError):
                frontend.request(R.SET_VRING_NUM, VringState(0, size))
        frontend.close()
        host.wait_free()
    neighbour.check()
    refusals = host.messages[before:].count("SET_VRING_NUM")
    assert 0 < refusals < 100


@pytest.mark.checklist(21)
def test_a_flood_of_slow_messages_is_served_in_small_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line 21: messages that take their time are not served 64 at once; here each takes too long."""
    monkeypatch.setattr(backend, "SERVE_S", -1.0)
    with backend.Backend(NetDevice("net", pairs=1), path=str(tmp_path / "s")) as hosted:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "s"))
        sock.setblocking(False)
        hosted.dispatch()
        sock.sendall(GET_FEATURES * 3)
        for _ in range(3):
            hosted.dispatch()
            assert len(sock.recv(1000)) == len(GET_FEATURES) + 8
        sock.close()
