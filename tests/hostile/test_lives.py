"""Line 22: thousands of front-ends come and go, and the process is as it was before.

Half of them leave in the middle of the handshake, at any byte of it. The others start their rings and have some
traffic; some of these stop their rings before they go, some leave with packets or requests under way.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blk_rig import IN, header
from hostile.process import Host, Program
from hostile.test_blk_memory import BlkProgram
from vq import virtio as v
from vq.message import FRONTEND_REQUESTS, HEADER, Request, encode_request
from vq.payload import Config, Log, Region, VringAddr, VringState
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

R = Request
LIVES = int(os.environ.get("VQ_TEST_LIVES", "5000"))  # of each device: ten thousand take 40 s of a test run
WARM_UP = 500  # what is made once and kept is made by then: caches, memory of the interpreter
GROWTH_KB = 256 + LIVES * 32 // 1024  # less than any object of Python for each life
PROTOCOL = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ,
    v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    v.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    v.VHOST_USER_PROTOCOL_F_CONFIG,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    v.VHOST_USER_PROTOCOL_F_STATUS,
)
FEATURES = v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES, v.VIRTIO_F_VERSION_1, v.VHOST_F_LOG_ALL)
PACKED = v.mask(v.VIRTIO_F_RING_PACKED)
LOG_BYTES = 1 << 17  # enough for the regions' addresses: a bit a page


class Said(NamedTuple):
    """A message of the handshake, and how many bytes its reply has."""

    data: bytes
    fds: tuple[int, ...] = ()
    reply_bytes: int = 0


class FrontEnds:
    """One guest's memory and rings, which one short-lived front-end after the other shares with the process.

    Parameters
    ----------
    path
        The back-end's socket.
    protocol
        Protocol features to negotiate.
    rings
        How many a front-end starts.
    use
        Moves something over the running rings, given as a list of `DriverQueue`; with False without waiting for it.
    """

    def __init__(self, path: str, protocol: int, rings: int, use: Callable[[list[DriverQueue], bool], None]) -> None:
        self.path, self.protocol, self.use = path, protocol, use
        self.dice = random.Random(22)
        self.memory = GuestMemory(1 << 20, guest_addr=0x10_0000)
        self.extra = self.memory.add_region(1 << 16, guest_addr=0x800_0000)
        self.log = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.log, LOG_BYTES)
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.ours, self.theirs = socket.socketpair()
        self.queues = {
            layout: [DriverQueue(self.memory, 16, features=FEATURES | layout) for _ in range(rings)]
            for layout in (0, PACKED)
        }
        self.handshakes = {layout: list(self._handshake(layout)) for layout in self.queues}

    def close(self) -> None:
        for queues in self.queues.values():
            for queue in queues:
                queue.close()
        self.memory.close()
        self.ours.close()
        self.theirs.close()
        os.close(self.log)
        os.close(self.event)

    def _handshake(self, layout: int) -> Iterator[Said]:
        def say(request: Request, payload: Any = None, *fds: int, reply: int = 0) -> Said:
            own = FRONTEND_REQUESTS[request].reply is not None
            return Said(encode_request(request, payload), fds, HEADER.size + (reply or 8) if own else 0)

        rows = [(Region(*one[:4]), one[4]) for one in self.memory.regions]
        yield say(R.GET_PROTOCOL_FEATURES)
        yield say(R.SET_PROTOCOL_FEATURES, self.protocol)
        yield say(R.GET_QUEUE_NUM)
        if self.protocol >> v.VHOST_USER_PROTOCOL_F_BACKEND_REQ & 1:
            yield say(R.SET_BACKEND_REQ_FD, None, self.theirs.fileno())
        if self.protocol >> v.VHOST_USER_PROTOCOL_F_CONFIG & 1:
            yield say(R.GET_CONFIG, Config(0, 0, bytes(60)), reply=72)
        yield say(R.SET_OWNER)
        yield say(R.SET_FEATURES, FEATURES | layout)
        yield say(R.SET_STATUS, 8)
        yield say(R.SET_MEM_TABLE, tuple(row for row, _ in rows[:1]), rows[0][1])
        yield say(R.SET_LOG_BASE, Log(LOG_BYTES, 0), self.log, reply=16)
        yield say(R.SET_LOG_FD, None, self.event)
        for index, queue in enumerate(self.queues[layout]):
            desc, avail, used = queue.addresses
            yield say(R.SET_VRING_NUM, VringState(index, queue.size))
            yield say(R.SET_VRING_BASE, VringState(index, 0x8000 if layout else 0))
            yield say(R.SET_VRING_ADDR, VringAddr(index, 1, desc, used, avail, queue.guest_addresses[2]))
            yield say(R.SET_VRING_CALL, index, queue.call_fd)
            yield say(R.SET_VRING_ERR, index, self.event)
            yield say(R.SET_VRING_KICK, index, queue.kick_fd)
            yield say(R.SET_VRING_ENABLE, VringState(index, 1))
        yield say(R.ADD_MEM_REG, rows[1][0], rows[1][1])
        yield say(R.SET_STATUS, 0xF)
        yield say(R.GET_STATUS)

    def live(self, *, whole: bool) -> None:
        """One life: the handshake with what follows, or a part of it."""
        layout = self.dice.choice((0, PACKED))
        handshake = self.handshakes[layout]
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(self.path)
            if not whole:
                self._begin(sock, handshake)
                return
            # The answer says that the front-end of before is gone: its rings are nobody's now.
            self._say(sock, [Said(encode_request(R.GET_FEATURES), (), HEADER.size + 8)])
            for queue in self.queues[layout]:
                queue.reset()
            self._say(sock, handshake)
            self.use(self.queues[layout], True)
            way = self.dice.randrange(3)
            if way == 1:
                self.use(self.queues[layout], False)
            elif way == 2:
                stops = [encode_request(R.GET_VRING_BASE, VringState(i, 0)) for i in range(len(self.queues[layout]))]
                self._say(sock, [Said(stop, (), HEADER.size + 8) for stop in stops])

    @staticmethod
    def _say(sock: socket.socket, handshake: Sequence[Said]) -> None:
        for said in handshake:
            socket.send_fds(sock, [said.data], said.fds)
        wanted = sum(said.reply_bytes for said in handshake)
        while wanted:
            came = sock.recv(wanted)
            assert came, f"the connection was ended {wanted} bytes before the last reply"
            wanted -= len(came)

    def _begin(self, sock: socket.socket, handshake: Sequence[Said]) -> None:
        """Say some of it, and a part of the next message, with its descriptors; read nothing."""
        count = self.dice.randrange(len(handshake))
        part = handshake[count]
        with suppress(BrokenPipeError, ConnectionResetError):
            for said in handshake[:count]:
                socket.send_fds(sock, [said.data], said.fds)
            cut = self.dice.randrange(len(part.data))
            if cut:
                socket.send_fds(sock, [part.data[:cut]], part.fds)


def spin(poll: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not poll():
        assert time.monotonic() < end, "nothing came back"


def packet(queues: list[DriverQueue], wait: bool) -> None:
    receiveq, transmitq = queues
    receiveq.add(writable=[200])
    receiveq.kick()
    transmitq.add([bytes(12 + 60)])
    transmitq.kick()
    if wait:
        spin(receiveq.poll)
        spin(transmitq.poll)


def disk_request(queues: list[DriverQueue], wait: bool) -> None:
    queues[0].add([header(IN, 8)], [4096, 1])
    queues[0].add([header(IN, 8)], [200704, 1])  # goes another way than the small one
    queues[0].publish()
    queues[0].kick()
    done: list[Any] = []
    while wait and len(done) < 2:
        spin(lambda: done.extend(queues[0].poll()) or done)


class Held(NamedTuple):
    """What a process holds: its descriptors by name, the mappings that have one, and its private memory in kB."""

    fds: list[str]
    maps: list[str]
    private_kb: int

    @classmethod
    def by(cls, program: Program) -> Held:
        proc = Path(f"/proc/{program.process.pid}")
        fds = sorted(str(entry.readlink()) for entry in (proc / "fd").iterdir())
        maps = sorted(line.split(maxsplit=5)[5] for line in (proc / "maps").read_text().splitlines() if "/" in line)
        return cls(fds, maps, program.private_kilobytes())


def survives(program: Program, front_ends: FrontEnds) -> None:
    """Insist that the process holds after so many lives what it held before."""

    def run(count: int) -> Held:
        for number in range(count):
            front_ends.live(whole=number % 2 == 0)
        front_ends.live(whole=True)  # whoever came before is gone when this one is answered
        program.settled()
        return Held.by(program)

    before = run(WARM_UP)
    begin = time.monotonic()
    after = run(LIVES)
    seconds, growth = time.monotonic() - begin, after.private_kb - before.private_kb
    print(f"{LIVES} lives in {seconds:.1f} s: {len(after.fds)} descriptors, {len(after.maps)} mappings, {growth:+} kB")
    assert after.fds == before.fds
    assert after.maps == before.maps
    assert growth < GROWTH_KB
    assert "Traceback" not in program.messages


@pytest.mark.checklist(22, 46)
def test_guests_of_a_pump_come_and_go(tmp_path: Path) -> None:
    """Lines 22, 46: network devices, every second one whole."""
    host = Host(tmp_path)
    front_ends = FrontEnds(
        host.path, PROTOCOL & ~v.mask(v.VHOST_USER_PROTOCOL_F_CONFIG, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ), 2, packet
    )
    try:
        survives(host, front_ends)
    finally:
        front_ends.close()
        assert host.close() == 0


@pytest.mark.checklist(22, 46)
def test_guests_of_a_disk_come_and_go(tmp_path: Path) -> None:
    """Lines 22, 46: the same of a block device, with a back-end channel."""
    program = BlkProgram(tmp_path)
    front_ends = FrontEnds(program.path, PROTOCOL, 1, disk_request)
    try:
        survives(program, front_ends)
    finally:
        front_ends.close()
        program.process.terminate()
        program.close()
