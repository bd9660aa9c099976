"""The attacker: a front-end with a driver behind it that knows the rules, and breaks the one that a test is about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy

from hostile.process import Host, share, start, wait_until
from hostile.rings import LAYOUTS, packed_table, ring_of
from reference_device import DESCRIPTOR
from vq import virtio as v
from vq.errors import BackendError, ConnectionClosed
from vq.frontend import Frontend
from vq.message import FRONTEND_REQUESTS, NEED_REPLY, VERSION, Request
from vq.payload import Region
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
PAGE = 4096
MEBIBYTE = 1 << 20

PROTOCOL = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ,
    v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    v.VHOST_USER_PROTOCOL_F_RARP,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    v.VHOST_USER_PROTOCOL_F_MTU,
    v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    v.VHOST_USER_PROTOCOL_F_STATUS,
)
PLAIN = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_F_INDIRECT_DESC)
ERR, KICK, CALL = Request.SET_VRING_ERR, Request.SET_VRING_KICK, Request.SET_VRING_CALL

# Where the memory of a guest lies. B follows A in guest addresses, but nowhere else; behind B there is nothing, then C.
A, A_BYTES = 0x4000_0000, 4 * MEBIBYTE
B, B_BYTES = A + A_BYTES, 16 * PAGE
C, C_BYTES = B + B_BYTES + 16 * PAGE, 16 * PAGE
GAP = B + B_BYTES
A_USER, B_USER, C_USER = 0x7E12_0000_0000, 0x7E13_0000_0000, 0x7E14_0000_0000


class Guest:
    """A connected front-end with memory of three regions and a queue pair.

    Parameters
    ----------
    host : Host
    features : int
        Virtio features that are wanted.
    num : int
        Entries of each ring.
    running : bool
        Start both rings; otherwise only the connection and its memory stand.
    protocol : int
        Protocol features that are wanted.
    layout : str
        Of the rings: split or packed.
    """

    def __init__(
        self,
        host: Host,
        features: int = PLAIN,
        *,
        num: int = 16,
        running: bool = True,
        protocol: int = PROTOCOL,
        layout: str = "split",
    ) -> None:
        self.host = host
        self.frontend = Frontend.connect(host.path, timeout=60.0)
        self.err_fds: list[int] = []
        self.queues: list[DriverQueue] = []
        try:
            self._set_up(features | LAYOUTS[layout], num, running, protocol)
        except BaseException:
            self.frontend.close()
            raise

    def _set_up(self, features: int, num: int, running: bool, protocol: int) -> None:
        agreed = self.frontend.negotiate(features, protocol)
        self.frontend.set_features(agreed)
        self.memory = GuestMemory(A_BYTES, guest_addr=A, user_addr=A_USER)
        self.memory.add_region(B_BYTES, guest_addr=B, user_addr=B_USER)
        self.memory.add_region(C_BYTES, guest_addr=C, user_addr=C_USER)
        share(self.frontend, self.memory)
        self.queues = [DriverQueue(self.memory, num, features=agreed) for _ in range(2)]
        self.receiveq, self.transmitq = self.queues
        self.receive, self.transmit = self.rings = [ring_of(queue) for queue in self.queues]
        self.header_bytes = 12 if v.has(agreed, v.VIRTIO_F_VERSION_1) or v.has(agreed, v.VIRTIO_NET_F_MRG_RXBUF) else 10
        self.err_fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        if running:
            for index in (0, 1):
                self.start(index)

    def close(self) -> None:
        """Leave, and wait until the pump has seen it."""
        self.frontend.close()
        for queue in self.queues:
            queue.close()
        for fd in self.err_fds:
            os.close(fd)
        self.memory.close()
        self.err_fds = []
        self.host.wait_free()

    # -- rings --

    def start(self, index: int, *, base: int | None = None) -> None:
        """Start a ring, by default at its very beginning."""
        queue = self.queues[index]
        if base is None:
            base = 0x8000 if queue.layout == "packed" else 0
        start(self.frontend, index, queue, err_fd=self.err_fds[index], base=base)

    def stop(self, index: int) -> int:
        """Stop a ring; gives the base to go on at."""
        return self.frontend.stop_ring(index) & 0xFFFF

    def restart(self, index: int, base: int | None = None) -> None:
        """Stop a ring, clear it, and start it anew."""
        stopped = self.stop(index)
        base = stopped if base is None else base
        self.queues[index].reset(base)
        self.rings[index].restart(base)
        self.start(index, base=base)

    def kick(self, index: int) -> None:
        os.eventfd_write(self.queues[index].kick_fd, 1)

    def errors(self, index: int) -> int:
        """How often the err fd was signalled since the last call."""
        try:
            return os.eventfd_read(self.err_fds[index])
        except BlockingIOError:
            return 0

    def told(self, index: int) -> int:
        """Wait until the err fd was signalled: how often. A worker signals it a moment after its ring is broken."""
        count = 0

        def look() -> int:
            nonlocal count
            count += self.errors(index)
            return count

        wait_until(f"{self.name(index)}: the err fd tells", look)
        return count

    def name(self, index: int) -> str:
        return ("receiveq0", "transmitq0")[index]

    def bytes_at(self, addr: int, length: int) -> memoryview:
        return self.memory.view(addr, length)

    def table(self, rows: Any) -> bytes:
        """Lay out an indirect table of (addr, length, flags, next); a packed one has ids in the place of next."""
        entries = numpy.array(rows, DESCRIPTOR)
        return bytes((packed_table(entries) if self.transmitq.layout == "packed" else entries).tobytes())

    def write(self, addr: int, data: bytes) -> int:
        """Write guest memory; gives the address back."""
        self.bytes_at(addr, len(data))[:] = data
        return addr

    # -- what must hold --

    def broken(self, index: int, cause: str) -> None:
        """Insist: the ring is broken for this cause, told once by its err fd; connection and other ring go on."""
        wait_until(
            f"{self.name(index)} is broken: {cause}",
            lambda: self.host.queue(self.name(index)).get("broken") is not None,
        )
        queue = self.host.queue(self.name(index))
        assert queue["broken"] == cause
        assert queue["started"]
        assert self.told(index) == 1
        self.kick(index)  # a broken ring stays broken, and says it no second time
        assert self.frontend.request(Request.GET_FEATURES)
        assert self.errors(index) == 0
        other = self.host.queue(self.name(1 - index))
        assert other["broken"] is None
        assert other["started"]

    def well(self) -> None:
        """Insist: neither ring is broken."""
        assert self.frontend.request(Request.GET_FEATURES)
        for index in (0, 1):
            assert self.host.queue(self.name(index)).get("broken") is None
            assert self.errors(index) == 0

    def works(self, payload: bytes = b"the ring works again" * 4) -> None:
        """Insist that a packet goes out and comes back; both rings are started anew for it."""
        for index in (0, 1):
            self.restart(index)
            self.errors(index)
        self.exchange(payload)

    def exchange(self, payload: bytes) -> None:
        """Send a packet with the driver's own means, and insist on having it back."""
        expected = self.receiveq.add(writable=[self.header_bytes + len(payload)])
        self.receiveq.kick()
        sent = self.transmitq.add([bytes(self.header_bytes), payload])
        self.transmitq.kick()
        # A call of before may still stand in the eventfd, so one wait does not tell.
        wait_until("the packet comes back", lambda: self.receiveq.wait(0.2))
        ((came, length),) = self.receiveq.poll()
        assert came is expected
        assert came.written(length)[self.header_bytes :] == payload
        wait_until("its buffer comes back", lambda: self.transmitq.wait(0.2))
        assert [token for token, _ in self.transmitq.poll()] == [sent]

    def exchange_kicking(self, payload: bytes) -> None:
        """The same, with a kick for each packet, whether or not the device asks for one."""
        self.receiveq.add(writable=[self.header_bytes + len(payload)])
        self.receiveq.publish()
        self.transmitq.add([bytes(self.header_bytes), payload])
        self.transmitq.publish()
        self.kick(1)
        came: list[bytes] = []

        def poll() -> bool:
            came.extend(token.written(length) for token, length in self.receiveq.poll())
            return bool(came)

        wait_until("the packet comes back", poll)
        assert came[0][self.header_bytes :] == payload
        wait_until("its buffer comes back", lambda: self.transmitq.poll())

    # -- messages --

    def say(
        self, request: int, payload: Any = b"", fds: Sequence[int] = (), *, flags: int = VERSION | NEED_REPLY
    ) -> str:
        """Send a message and tell what becomes of it: "done", "refused", "closed", or "answered" for an own reply."""
        if not isinstance(payload, bytes):
            payload = FRONTEND_REQUESTS[request].payload.encode(payload)
        return verdict(self.frontend, request, payload, fds, flags)

    def ring_word(self, request: int, index: int, fd: int) -> str:
        """Send a ring's fd."""
        return self.say(request, index, [fd])


def verdict(
    frontend: Frontend, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION | NEED_REPLY
) -> str:
    """Send any message with NEED_REPLY, and tell what becomes of it."""
    try:
        frontend.send(request, payload, fds, flags)
        message = frontend.receive(5)
    except ConnectionClosed:
        return "closed"
    except BackendError as problem:
        if problem.field == "stream":
            return "closed"
        raise
    try:
        rule = FRONTEND_REQUESTS.get(request)
        assert message.request == request
        if rule is not None and rule.reply is not None:
            return "answered"
        return "done" if message.payload == 0 else "refused"
    finally:
        message.close()


def region_rows(memory: GuestMemory) -> tuple[tuple[Region, ...], list[int]]:
    """The memory table and its fds."""
    return tuple(Region(*row[:4]) for row in memory.regions), [row[4] for row in memory.regions]
