"""The socket device, by a driver that says packet by packet what it wants, and by one that means harm."""

from __future__ import annotations

import gc
import os
import random
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import vq
from driver_rig import every_layout
from vhost_rig import open_fds
from vq.devices.vsock import ANSWERS_MAX, BUFFER, PACKETS_MAX, STREAMS_MAX, VsockDevice
from vq.devices.vsock_callers import CALLERS_MAX
from vq.devices.vsock_stream import HEADER, HOST, NO_RECEIVE, NO_SEND, Op, Packet
from vq.testing import Guest, serving
from vq_core.timer import Timer
from waiting import wait_for

CID, PORT, MINE = 7, 1234, 50_000
ROOM = 4096
Said = tuple[Op, bytes]


class Peer:
    """A guest's end: one stream by default, any packet on request."""

    def __init__(self, folder: Path, layout: str = "split", buffers: int = 16) -> None:
        self.path = str(folder / "v")
        self.device = VsockDevice(CID, self.path)
        self._serving = serving(self.device, folder / "s")
        self._serving.__enter__()
        self.guest = Guest(folder / "s", queues=3, size=256, layout=layout)
        self.taken = 0
        self.offer(buffers)

    def offer(self, buffers: int) -> None:
        for _ in range(buffers):
            self.guest.send(room=[30, ROOM - 30])

    def say(
        self, op: int, data: bytes = b"", *, flags: int = 0, buf: int = 1 << 20, port: int = MINE, **more: int
    ) -> None:
        packet = Packet(CID, HOST, port, PORT, len(data), 1, op, flags, buf, self.taken)._replace(**more)
        whole = HEADER.pack(*packet) + data
        self.guest.ask([whole[:20], whole[20:50], whole[50:]], queue=1)

    def packets(self, count: int = 1) -> list[tuple[Packet, bytes]]:
        """What the guest is told next; each buffer is offered again."""
        found = []
        for _ in range(count):
            ((_, answer),) = self.guest.used()
            packet = Packet(*HEADER.unpack(answer[: HEADER.size]))
            assert (packet.src_cid, packet.dst_cid, packet.type, packet.buf_alloc) == (HOST, CID, 1, BUFFER)
            assert packet.len == len(answer) - HEADER.size
            found.append((packet, answer[HEADER.size :]))
            self.offer(1)
        return found

    def heard(self, count: int = 1) -> list[Said]:
        return [(Op(packet.op), data) for packet, data in self.packets(count)]

    def silent(self) -> bool:
        """Nothing more is said: the answer to a packet for nobody is the next one."""
        self.say(Op.CREDIT_REQUEST, port=1)
        return self.heard() == [(Op.RST, b"")]

    def close(self) -> None:
        self.guest.close()
        self._serving.__exit__(None, None, None)


@pytest.fixture
def peer(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Peer]:
    made = Peer(tmp_path, getattr(request, "param", "split"))
    yield made
    made.close()


@pytest.fixture
def server(peer: Peer) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{peer.path}_{PORT}")
        sock.listen(STREAMS_MAX)
        sock.settimeout(60)
        yield sock


def connect(peer: Peer, server: socket.socket, **more: int) -> socket.socket:
    """A stream that the guest has asked for."""
    peer.say(Op.REQUEST, **more)
    assert peer.heard() == [(Op.RESPONSE, b"")]
    stream, _ = server.accept()
    stream.settimeout(60)
    return stream


def read(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = sock.recv(size - len(found))
        assert part
        found += part
    return found


def dial(peer: Peer, words: bytes = b"CONNECT 1234\n") -> tuple[socket.socket, Packet]:
    """A program of the host calls; and what the guest is told."""
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(60)
    caller.connect(peer.path)
    caller.sendall(words)
    ((packet, _),) = peer.packets()
    return caller, packet


@pytest.mark.parametrize("peer", ["split", "packed"], indirect=True)
def test_a_stream_from_its_first_byte_to_its_last(peer: Peer, server: socket.socket) -> None:
    assert peer.guest.config(8) == CID.to_bytes(8, "little")
    with connect(peer, server) as stream:
        peer.say(Op.RW, b"from the guest")
        assert stream.recv(100) == b"from the guest"
        stream.sendall(b"from the host")
        assert peer.heard() == [(Op.RW, b"from the host")]
        peer.say(Op.SHUTDOWN, flags=NO_SEND)
        assert stream.recv(100) == b""
        stream.sendall(b"still there")
        assert peer.heard() == [(Op.RW, b"still there")]
        stream.shutdown(socket.SHUT_WR)
        assert peer.heard(2) == [(Op.SHUTDOWN, b""), (Op.RST, b"")]
    assert peer.silent()


def test_the_host_ends_first(peer: Peer, server: socket.socket) -> None:
    stream = connect(peer, server)
    stream.sendall(b"last words")
    stream.close()
    (_, data), (packet, _) = peer.packets(2)
    assert (data, packet.op, packet.flags) == (b"last words", Op.SHUTDOWN, NO_SEND | NO_RECEIVE)
    peer.say(Op.RST)
    assert peer.silent()


def test_a_guest_that_closes_is_confirmed(peer: Peer, server: socket.socket) -> None:
    with connect(peer, server) as stream:
        peer.say(Op.RW, b"bye")
        peer.say(Op.SHUTDOWN, flags=NO_SEND | NO_RECEIVE)
        assert peer.heard() == [(Op.RST, b"")]
        assert (stream.recv(100), stream.recv(100)) == (b"bye", b"")


def test_a_program_of_the_host_calls_the_guest(peer: Peer) -> None:
    caller, packet = dial(peer, b"CONNECT 1234\nearly")
    with caller:
        assert (packet.op, packet.dst_port) == (Op.REQUEST, 1234)
        peer.say(Op.RESPONSE, port=1234, dst_port=packet.src_port)
        assert caller.recv(100) == b"OK %d\n" % packet.src_port
        assert peer.heard() == [(Op.RW, b"early")]
        for _ in range(BUFFER >> 15):  # the line above is no part of what the guest may send
            peer.say(Op.RW, bytes(1 << 15), port=1234, dst_port=packet.src_port)
        assert read(caller, BUFFER) == bytes(BUFFER)


def test_a_guest_that_refuses_and_callers_that_make_no_sense(peer: Peer) -> None:
    caller, packet = dial(peer)
    peer.say(Op.RST, port=1234, dst_port=packet.src_port)
    assert caller.recv(100) == b""
    for words in (b"GET / HTTP/1.1\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 4294967296\n", b"1" * 32, b"\n"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(peer.path)
            sock.sendall(words)
            with suppress(ConnectionResetError):
                assert sock.recv(100) == b""
    assert peer.silent()


def test_a_caller_that_gives_up_is_forgotten(peer: Peer) -> None:
    caller, packet = dial(peer)
    caller.close()
    assert peer.heard() == [(Op.RST, b"")]
    peer.say(Op.RESPONSE, port=1234, dst_port=packet.src_port)
    assert peer.heard() == [(Op.RST, b"")]


def test_callers_who_say_nothing_keep_nobody_out(peer: Peer) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(CALLERS_MAX)]
    for sock in silent:
        sock.connect(peer.path)  # waits while too many are to be accepted
        sock.settimeout(60)
    wait_for(lambda: len(callers_of(peer)) == CALLERS_MAX)
    caller, packet = dial(peer)
    assert (packet.op, packet.dst_port) == (Op.REQUEST, 1234)
    assert silent[0].recv(100) == b""  # it has waited longest
    for sock in (caller, *silent):
        sock.close()


def callers_of(peer: Peer) -> dict[int, object]:
    assert peer.device._callers is not None
    return dict(peer.device._callers._callers)


def test_callers_who_say_nothing_are_sent_away(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vq.devices.vsock_callers.PATIENCE_S", 0.05)
    for words in (b"", b"CONNECT 12"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(peer.path)
            sock.sendall(words)
            assert sock.recv(100) == b""


def test_half_a_line_wakes_nobody_for_ever(tmp_path: Path) -> None:
    """What a caller has said is taken even if the rest is missing, byte by byte too; nothing is ready after that."""
    device = VsockDevice(CID, str(tmp_path / "v"))
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "v"))
        for byte in b"CONNECT 77":
            caller.sendall(bytes([byte]))
            device.serve_requests()
            assert not select.select([device.requests_fd], [], [], 0)[0]
        caller.sendall(b"\nmore")
        device.serve_requests()
        ((port, _),) = device._streams
        assert port == 77
    device.close()


def test_streams_end_when_another_driver_takes_over(peer: Peer, server: socket.socket) -> None:
    """As after a reboot of the guest, of which not every front-end tells; who calls goes on calling."""
    stream = connect(peer, server)
    guest = peer.guest
    for index in (0, 1):
        guest.stop(index)
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(60)
    caller.connect(peer.path)
    caller.sendall(b"CONNECT 1234\n")
    for index in (0, 1):
        guest.drivers[index].reset()
        guest.start(index)
    peer.offer(4)
    ((packet, _),) = peer.packets()
    assert packet.op == Op.REQUEST
    peer.say(Op.RESPONSE, port=1234, dst_port=packet.src_port)
    assert caller.recv(100).startswith(b"OK ")
    assert stream.recv(100) == b""
    assert peer.silent()
    caller.close()


def test_streams_live_on_when_a_ring_goes_on_where_it_stood(peer: Peer, server: socket.socket) -> None:
    stream = connect(peer, server)
    for index in (0, 1):
        peer.guest.start(index, peer.guest.stop(index))
    peer.say(Op.RW, b"still there")
    assert stream.recv(100) == b"still there"


# -- credit --


def test_no_more_goes_to_the_guest_than_it_has_room_for(peer: Peer, server: socket.socket) -> None:
    with connect(peer, server, buf_alloc=1000) as stream:
        stream.sendall(bytes(2500))
        assert [(op, len(data)) for op, data in peer.heard(2)] == [(Op.RW, 1000), (Op.CREDIT_REQUEST, 0)]
        peer.taken = 400
        peer.say(Op.CREDIT_UPDATE, buf=1000)
        assert [(op, len(data)) for op, data in peer.heard(2)] == [(Op.RW, 400), (Op.CREDIT_REQUEST, 0)]
        peer.taken = 1400
        peer.say(Op.CREDIT_UPDATE, buf=5000)
        assert peer.heard() == [(Op.RW, bytes(1100))]
        peer.taken = 0xFFFFFFFF  # more than it was sent: it has no room by its own account
        peer.say(Op.CREDIT_UPDATE, buf=10)
        stream.sendall(b"x")
        assert peer.heard() == [(Op.CREDIT_REQUEST, b"")]


def test_a_guest_that_will_receive_nothing_gets_nothing_with_new_credit(peer: Peer, server: socket.socket) -> None:
    with connect(peer, server, buf_alloc=10) as stream:
        stream.sendall(bytes(20))
        assert peer.heard(2) == [(Op.RW, bytes(10)), (Op.CREDIT_REQUEST, b"")]
        peer.say(Op.SHUTDOWN, flags=NO_RECEIVE, buf=10)
        peer.say(Op.CREDIT_UPDATE)
        assert peer.silent()


def test_what_the_host_does_not_read_is_bounded(peer: Peer, server: socket.socket) -> None:
    """The guest has its credit and no more; with what is read it gets it back."""
    size = 1 << 15
    with connect(peer, server) as sock:
        (stream,) = peer.device._streams.values()
        sent = 0
        while stream.received - stream.forwarded + size <= BUFFER:
            peer.say(Op.RW, bytes(size))
            sent += size
        assert peer.device._streams and self_out(peer) <= BUFFER
        assert read(sock, sent) == bytes(sent)
        wait_for(lambda: not self_out(peer))
        peer.say(Op.RW, b"more")
        assert read(sock, 4) == b"more"
        peer.say(Op.CREDIT_REQUEST)
        while (found := peer.packets()[0][0]).fwd_cnt != sent + 4:
            assert found.op == Op.CREDIT_UPDATE


def self_out(peer: Peer) -> int:
    return sum(len(stream.out) for stream in peer.device._streams.values())


def test_a_guest_that_sends_more_than_its_credit_is_reset(peer: Peer, server: socket.socket) -> None:
    with connect(peer, server):
        kept = 0
        for _ in range(4 * BUFFER >> 15):
            peer.say(Op.RW, bytes(1 << 15))
            kept = max(kept, self_out(peer))
        ops = []
        while Op.RST not in ops:
            ops += [op for op, _ in peer.heard()]
        assert kept <= BUFFER
        assert not peer.device._streams


def test_many_streams_take_turns(peer: Peer, server: socket.socket) -> None:
    streams = [connect(peer, server, port=port) for port in range(8)]
    for stream in streams:
        stream.sendall(bytes(100_000))
    peer.packets(16)  # what went into the buffers that were there before all had something to say
    ports = [packet.dst_port for packet, _ in peer.packets(24)]
    assert all(2 <= ports.count(port) <= 4 for port in range(8))
    for stream in streams:
        stream.close()


def test_data_without_end_is_passed_on_in_turns(peer: Peer, server: socket.socket) -> None:
    """However much room the guest has, and however fast the host writes; and nothing of it stays behind."""
    turns, small = [0], 56
    device = peer.device
    flush, send = device._flush, device._send

    def counted_flush() -> None:
        turns.append(0)
        flush()

    def counted_send(*packet: Any) -> None:
        turns[-1] += 1
        send(*packet)

    with connect(peer, server, buf_alloc=0) as stream:
        device._flush, device._send = counted_flush, counted_send  # type: ignore[method-assign]
        length = 20 * ROOM + 100 * small
        stream.sendall(bytes(length))
        stream.shutdown(socket.SHUT_WR)
        assert peer.heard() == [(Op.CREDIT_REQUEST, b"")]
        for _ in range(100):
            peer.guest.send(room=HEADER.size + small)
        peer.say(Op.CREDIT_UPDATE)
        op, size = Op.RW, 0
        while op == Op.RW:
            ((op, data),) = peer.heard()
            size += len(data)
        assert (op, size) == (Op.SHUTDOWN, length)
    assert max(turns) == PACKETS_MAX


# -- what makes no sense --


def test_packets_without_sense_are_reset_or_passed_over(peer: Peer, server: socket.socket) -> None:
    for op in (Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST, 0, 8, 65535):
        peer.say(op)
        assert peer.heard() == [(Op.RST, b"")]
    for more in ({"src_cid": 8}, {"dst_cid": 3}, {"src_cid": 1 << 63}):
        peer.say(Op.REQUEST, **more)
    peer.say(Op.RST)
    peer.say(Op.REQUEST, type=2)
    assert peer.heard() == [(Op.RST, b"")]
    peer.say(Op.REQUEST, dst_port=99)  # nobody is there
    assert peer.heard() == [(Op.RST, b"")]
    for op, more in ((0, {}), (Op.REQUEST, {}), (Op.RESPONSE, {}), (Op.RW, {"len": 99}), (Op.RW, {"type": 2})):
        stream = connect(peer, server)
        peer.say(op, b"12", **more)
        assert peer.heard() == [(Op.RST, b"")]
        assert stream.recv(100) == b""
    stream = connect(peer, server)
    peer.say(Op.SHUTDOWN, flags=NO_SEND)
    peer.say(Op.RW, b"after the end")
    assert peer.heard() == [(Op.RST, b"")]
    assert not peer.device._streams


@every_layout
def test_chains_too_short_break_their_queue_alone(tmp_path: Path, layout: str) -> None:
    peer = Peer(tmp_path, layout, buffers=0)
    peer.guest.send(b"short", queue=1)
    wait_for(lambda: peer.device.queues[1].broken)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(peer.path)
        caller.sendall(b"CONNECT 5\n")
        peer.guest.send(room=HEADER.size)
        wait_for(lambda: peer.device.queues[0].broken)
    peer.guest.frontend.barrier()
    peer.close()


def test_a_guest_without_buffers_is_not_listened_to(tmp_path: Path) -> None:
    """What is to be answered is bounded; with buffers it goes on."""
    peer = Peer(tmp_path, buffers=0)
    for _ in range(ANSWERS_MAX):
        peer.say(Op.RW)
    packet = HEADER.pack(CID, HOST, MINE, PORT, 0, 1, Op.RW, 0, 0, 0)
    peer.guest.send(packet, queue=1)
    peer.guest.frontend.barrier()
    peer.guest.frontend.barrier()
    assert len(peer.device._answers) == ANSWERS_MAX
    peer.offer(8)
    assert peer.heard(ANSWERS_MAX) == [(Op.RST, b"")] * ANSWERS_MAX
    peer.guest.used(queue=1)
    assert peer.heard() == [(Op.RST, b"")]
    peer.close()


def test_streams_are_so_many_and_end_with_the_connection(tmp_path: Path) -> None:
    before = open_fds()
    peer = Peer(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{peer.path}_{PORT}")
        server.listen(4096)
        for port in range(STREAMS_MAX + 3):
            peer.say(Op.REQUEST, port=port)
            assert peer.heard() == [(Op.RESPONSE if port < STREAMS_MAX else Op.RST, b"")]
        peer.guest.close()
        wait_for(lambda: not peer.device._streams)
    peer.close()
    gc.collect()
    assert open_fds() == before


class Noting:
    """A timer that notes when it is set."""

    def __init__(self, timer: Timer, times: list[float]) -> None:
        self._timer, self._times = timer, times
        self.fileno, self.clear, self.close = timer.fileno, timer.clear, timer.close

    def set(self, seconds: float) -> None:
        self._times.append(seconds)
        self._timer.set(seconds)


def test_callers_wait_while_there_are_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    peer = Peer(tmp_path)
    callers = peer.device._callers
    assert callers is not None
    monkeypatch.setattr(callers, "_pause", Noting(callers._pause, pauses))
    gc.collect()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(60)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        last = os.dup(0)
        os.close(last)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last, hard))  # every file up to here is open
        try:
            caller.connect(peer.path)
            wait_for(lambda: pauses)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        caller.sendall(b"CONNECT 5\n")
        assert peer.heard() == [(Op.REQUEST, b"")]
        assert len(pauses) < 600  # ten a second
    peer.close()


@pytest.mark.parametrize("seed", range(6))
def test_any_packets_do_no_harm(peer: Peer, server: socket.socket, seed: int) -> None:
    """Random ones, on a few ports, while host programs come and go: the device lives, and its books are right."""
    dice = random.Random(seed)
    socks: list[socket.socket] = []
    for _ in range(400):
        peer.say(
            dice.choice([*Op, 0, 9]), dice.randbytes(dice.choice([0, 1, 3000])), flags=dice.randrange(4),
            buf=dice.choice([0, 5, 1 << 16, 0xFFFFFFFF]), port=dice.randrange(3),
            fwd_cnt=dice.choice([0, 1, 0xFFFFFFFF]),
        )  # fmt: skip
        for _ in peer.guest.drivers[0].poll():
            peer.offer(1)
        server.setblocking(False)
        with suppress(BlockingIOError):
            socks.append(server.accept()[0])
        if socks and dice.random() < 0.3:
            sock = dice.choice(socks)
            with suppress(OSError):
                match dice.randrange(3):
                    case 0:
                        sock.close()
                    case 1:
                        sock.send(b"x" * 5000, socket.MSG_DONTWAIT)
                    case 2:
                        sock.recv(9000, socket.MSG_DONTWAIT)
    assert not any(queue.broken for queue in peer.device.queues)
    assert len(peer.device._streams) <= 3
    assert all(len(stream.out) <= BUFFER for stream in peer.device._streams.values())
    for sock in socks:
        sock.close()
    peer.guest.frontend.barrier()


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 0xFFFFFFFF, 1 << 32])
def test_a_cid_that_no_guest_has_is_refused(tmp_path: Path, cid: int) -> None:
    with pytest.raises(vq.UsageError, match="a guest's CID is 3 to 4294967294"):
        VsockDevice(cid, str(tmp_path / "v"))
    assert not any(tmp_path.iterdir())


def test_a_path_without_room_for_a_port_is_refused() -> None:
    with pytest.raises(vq.ResourceError, match="with the longest port"):
        VsockDevice(CID, "/nowhere/" + "x" * 88)


def test_a_path_that_is_taken_is_an_error(tmp_path: Path) -> None:
    first = VsockDevice(3, str(tmp_path / "v"))
    with pytest.raises(vq.ResourceError, match="living process uses this socket"):
        VsockDevice(4, str(tmp_path / "v"))
    first.close()
    VsockDevice(4, str(tmp_path / "v")).close()
