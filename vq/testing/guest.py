"""A guest that is a test: shared memory, a driver for each queue, and the front-end that connects them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vq import virtio as v
from vq.closing import Closing
from vq.errors import BackendError, UsageError
from vq.frontend import Frontend, RingSetup
from vq.message import BackendRequest, Message
from vq.payload import Region
from vq.ring_fault import RingFault
from vq_core.driver import Buffer, DriverQueue
from vq_core.guest_memory import GuestMemory

__all__ = ["Guest"]

LAYOUTS: Final = {"split": 0, "packed": v.mask(v.VIRTIO_F_RING_PACKED)}
PROTOCOL: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_CONFIG,
    v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_DEVICE_STATE, v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
)  # fmt: skip
Bytes = bytes | bytearray | memoryview
Data = Bytes | Sequence[Bytes]


class Guest(Closing):
    """Connects to a back-end as QEMU does, and drives its queues as the driver in a guest does.

    Parameters
    ----------
    path
        The back-end's socket.
    queues
        How many of its virtqueues are started, from the first one on.
    size
        Entries of each ring; a power of two in the split layout.
    layout
        "split" or "packed".
    features
        Feature bits to accept besides VERSION_1, EVENT_IDX and INDIRECT_DESC, out of those that are offered.
    memory_bytes
        Guest memory, shared with the back-end.
    timeout
        Seconds that an answer of the back-end may take.

    Attributes
    ----------
    frontend : vq.Frontend
        For what goes by messages, as `set_config` and `reset_device` do.
    features : int
        Negotiated feature bits.
    memory : GuestMemory
    drivers : tuple of DriverQueue
        By queue.
    config_changes : int
        CONFIG_CHANGE_MSG that came, as far as they were waited for.

    Raises
    ------
    UsageError, BackendError, ResourceError
        The layout has no such name or is not offered, or the back-end breaks the protocol, or is not there.

    Notes
    -----
    Threading: one thread.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        queues: int = 1,
        size: int = 64,
        layout: str = "split",
        features: int = 0,
        memory_bytes: int = 4 << 20,
        timeout: float = 30.0,
    ) -> None:
        if layout not in LAYOUTS:
            raise UsageError(f"layout {layout!r}; it must be one of {', '.join(LAYOUTS)}")
        self.timeout = timeout
        self.config_changes = 0
        self.drivers: tuple[DriverQueue, ...] = ()
        self._faults: tuple[RingFault, ...] = ()
        self.memory = GuestMemory(memory_bytes)
        wanted = features | LAYOUTS[layout] | v.mask(
            v.VIRTIO_F_VERSION_1, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_F_INDIRECT_DESC, v.VHOST_USER_F_PROTOCOL_FEATURES
        )  # fmt: skip
        try:
            self.frontend = Frontend.connect(str(path), timeout=timeout)
        except BaseException:
            self.memory.close()
            raise
        try:
            self._begin(wanted, layout, queues, size)
        except BaseException:
            self.close()
            raise

    def _begin(self, wanted: int, layout: str, queues: int, size: int) -> None:
        frontend = self.frontend
        self.features = frontend.negotiate(wanted, PROTOCOL)
        if LAYOUTS[layout] & ~self.features:
            raise BackendError("GET_FEATURES", "features", "without RING_PACKED", "the layout packed needs it")
        if v.has(frontend.protocol_features, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ):
            frontend.open_channel({BackendRequest.CONFIG_CHANGE_MSG: self._config_changed})
        frontend.set_features(self.features)
        regions = self.memory.regions
        frontend.set_mem_table([Region(*row[:4]) for row in regions], [row[4] for row in regions])
        self._faults = tuple(RingFault(index) for index in range(queues))
        self.drivers = tuple(DriverQueue(self.memory, size, features=self.features) for _ in range(queues))
        for index in range(queues):
            self.start(index)
        frontend.barrier()

    def start(self, index: int, base: int | None = None) -> None:
        """Start a ring where its driver stands, or from a base that `stop` has answered."""
        driver = self._driver(index)
        place = driver.used_idx if base is None else base
        self._faults[index].forget()
        fds = (driver.kick_fd, driver.call_fd, self._faults[index].fileno())
        self.frontend.start_ring(RingSetup(index, driver.size, *driver.addresses, place, *fds))

    def stop(self, index: int) -> int:
        """Stop a ring; where the device stands in it."""
        return self.frontend.stop_ring(index)

    def send(self, data: Data = b"", room: int | Sequence[int] = 0, *, queue: int = 0) -> Buffer:
        """Make one chain available, and kick.

        Parameters
        ----------
        data
            Device-readable bytes; several for as many descriptors.
        room
            Device-writable bytes, likewise.
        queue
            Which virtqueue.
        """
        parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        readable = [bytes(memoryview(part)) for part in parts if len(part)]
        writable = [part for part in ([room] if isinstance(room, int) else room) if part]
        driver = self._driver(queue)
        buffer = driver.add(readable, writable)
        driver.publish()
        driver.kick()
        return buffer

    def used(self, count: int = 1, *, queue: int = 0) -> list[tuple[Buffer, bytes]]:
        """Wait until `count` chains have come back: each, and what was written into it.

        Raises
        ------
        BackendError
            They did not come in time, or the back-end has stopped the queue for an error.
        """
        driver = self._driver(queue)
        end = time.monotonic() + self.timeout
        found = driver.poll(count)
        while len(found) < count:
            left = end - time.monotonic()
            if left <= 0:
                limit = f"{count} are expected within {self.timeout:g} s"
                limit += "; does the device complete what it takes? The log of the back-end may say more"
                raise BackendError("queue", f"chains used in queue {queue}", len(found), limit)
            if not driver.wait(left, self._faults[queue].fileno()):
                self._faults[queue].check()
            found += driver.poll(count - len(found))
        return [(buffer, buffer.written(length)) for buffer, length in found]

    def ask(self, data: Data = b"", room: int | Sequence[int] = 0, *, queue: int = 0) -> bytes:
        """Send one chain and wait for its answer: the bytes that the device has written."""
        self.send(data, room, queue=queue)
        ((_, answer),) = self.used(queue=queue)
        return answer

    def _driver(self, queue: int) -> DriverQueue:
        if queue in range(len(self.drivers)):
            return self.drivers[queue]
        limit = f"this guest has started {len(self.drivers)} of them, from 0 on; give it as many by queues="
        raise UsageError(f"queue is {queue!r}; {limit}")

    def config(self, size: int, offset: int = 0) -> bytes:
        """Read the configuration space.

        Raises
        ------
        UsageError
            The back-end offers none.
        """
        if not self.frontend.has_protocol(v.VHOST_USER_PROTOCOL_F_CONFIG):
            raise UsageError("the back-end has no configuration space; a vq.Device has one if it has a class Config")
        return self.frontend.get_config(offset, size)

    def wait_config_change(self) -> None:
        """Serve the back-end channel until another CONFIG_CHANGE_MSG has come.

        Raises
        ------
        BackendError
            None came in time.
        """
        before = self.config_changes
        if not self.frontend.serve(lambda: self.config_changes > before, self.timeout):
            limit = f"one more is expected within {self.timeout:g} s"
            raise BackendError("CONFIG_CHANGE_MSG", "number of messages", before, limit)

    def _config_changed(self, message: Message) -> Any:
        self.config_changes += 1

    def close(self) -> None:
        """End the connection, and release memory and descriptors; may be called twice."""
        self.frontend.close()
        for driver in self.drivers:
            driver.close()
        for fault in self._faults:
            fault.close()
        self.memory.close()
