"""A device that uses the back-end channel, hosted by a thread, and the front-end at its other end."""

from __future__ import annotations

import mmap
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from vq import virtio as v
from vq.errors import FrontendError
from vq.frontend import Frontend, RingSetup
from vq.hosted_device import HostedDevice
from vq.message import BackendRequest, Request
from vq.offer import SERVED_PROTOCOL_FEATURES, Offer
from vq.payload import Region
from vq.request_server import RequestServer
from vq.server import Server
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.queue import Queue

FEATURES = v.mask(
    v.VIRTIO_F_VERSION_1, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_F_RING_PACKED, v.VHOST_USER_F_PROTOCOL_FEATURES,
)  # fmt: skip
# Postcopy excludes memory slots; and its front-end says user addresses, as all do that we know.
ALL = SERVED_PROTOCOL_FEATURES & ~v.mask(v.VHOST_USER_PROTOCOL_F_PAGEFAULT, v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES)
SHMEM = {0: 16 * mmap.PAGESIZE, 7: 1 << 40}


class ChannelDevice(HostedDevice):
    """Two queues that nobody serves, and everything that a device can offer."""

    def __init__(self, protocol_features: int = ALL) -> None:
        self.name = "channel"
        self.queues = [Queue(index, f"queue{index}") for index in range(2)]
        self.offer = Offer(
            FEATURES, protocol_features, queue_count=2, queue_num_answer=2, config_size=8, shmem=tuple(SHMEM.items())
        )
        self.state = b"as it was made"
        self.refuses_state = False

    def save_state(self) -> bytes:
        return self.state

    def load_state(self, state: bytes) -> None:
        if self.refuses_state:
            raise FrontendError("device state", "taste", state[:10], "something better")
        self.state = state


class Outcome:
    """A callback that remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, int | None]] = []

    def __call__(self, failure: Any, fd: int | None) -> None:
        self.calls.append((failure, fd))

    @property
    def failure(self) -> Any:
        (call,) = self.calls
        return call[0]


class Hosted:
    """A device behind a socket, served by a thread; `call` runs something in that thread and gives what came of it."""

    def __init__(self, device: HostedDevice, path: str) -> None:
        self.device = device
        self.path = path
        self.server = Server(device, path=path)
        assert self.server.backend is not None
        self.backend = self.server.backend
        self.channel = self.backend.channel
        self._thread = threading.Thread(target=self.server.run, daemon=True)  # a test that fails ends all the same
        self._thread.start()

    def call(self, action: Callable[..., Any], *args: Any, **options: Any) -> Any:
        done = threading.Event()
        result: list[Any] = []

        def run() -> None:
            try:
                result.append((action(*args, **options), None))
            except Exception as error:
                result.append((None, error))
            done.set()

        self.server.call(run)
        assert done.wait(60), "the control thread does not answer"
        value, error = result[0]
        if error is not None:
            raise error
        return value

    def send(self, *args: Any, **options: Any) -> None:
        self.call(self.channel.send, *args, **options)

    def close(self) -> None:
        self.server.request_stop()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.server.close()


class Peer:
    """A front-end that has agreed on everything and shares memory; its rings stand."""

    def __init__(
        self, path: str, *, features: int = FEATURES, protocol: int = ALL, queues: int = 2, timeout: float = 60
    ) -> None:
        self.frontend = Frontend.connect(path, timeout=timeout)
        self.features = self.frontend.negotiate(features, protocol)
        self.frontend.set_features(self.features)
        self.memory = GuestMemory(1 << 20)
        regions = self.memory.regions
        self.frontend.set_mem_table([Region(*row[:4]) for row in regions], [row[4] for row in regions])
        self.drivers = [DriverQueue(self.memory, 16, features=self.features) for _ in range(queues)]

    def ring(self, index: int, **changes: Any) -> RingSetup:
        driver = self.drivers[index]
        base = 0x80008000 if driver.layout == "packed" else 0
        options: dict[str, Any] = {"kick_fd": driver.kick_fd, "call_fd": driver.call_fd} | changes
        return RingSetup(index, driver.size, *driver.addresses, base, **options)

    def start(self, index: int = 0, **changes: Any) -> None:
        self.frontend.start_ring(self.ring(index, **changes))

    def close(self) -> None:
        self.frontend.close()
        for driver in self.drivers:
            driver.close()
        self.memory.close()


class RawChannel:
    """The front-end's end of the channel, read and written byte by byte."""

    def __init__(self, peer: Peer) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(60)
        with theirs:
            peer.frontend.request(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])

    def take(self) -> tuple[int, int, bytes]:
        header = self.ours.recv(12, socket.MSG_WAITALL)
        request, flags, size = struct.unpack("=III", header)
        return request, flags, self.ours.recv(size, socket.MSG_WAITALL) if size else b""

    def answer(self, request: int, value: int = 0, flags: int = 5, size: int = 8, fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.ours, [struct.pack("=IIIQ", request, flags, size, value)], fds)

    def silent(self) -> bool:
        self.ours.settimeout(0.05)
        try:
            self.ours.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.ours.settimeout(60)
        return False

    def ended(self) -> bool:
        return self.ours.recv(1) == b""

    def close(self) -> None:
        self.ours.close()


class RawBackend:
    """The back-end's end of a channel, written and read byte by byte; the other end is a front-end's."""

    def __init__(self, frontend: Frontend, **handlers: Any) -> None:
        ours, self.sock = socket.socketpair()
        by_request = {BackendRequest[name]: handler for name, handler in handlers.items()}
        self.server = frontend.channel = RequestServer(ours, frontend.may_ask, by_request)
        self.sock.settimeout(60)

    def say(self, request: int, payload: bytes = b"", flags: int = 9, fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.sock, [struct.pack("=III", request, flags, len(payload)) + payload], fds)
        self.server.dispatch()

    def answer(self) -> tuple[int, ...]:
        return struct.unpack("=IIIQ", self.sock.recv(20))
