"""A guest behind the front-end role: memory that is shared with the back-end, and a driver for each of its queues.

`Frontend.driver` makes both. The rings are those of `vq_core.driver`; here is what a driver does around them:
negotiate, share the memory, start, kick, wait, stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vq import virtio as v
from vq.closing import Closing
from vq.errors import BackendError, UsageError
from vq.frontend_messages import FrontendMessages, RingSetup
from vq.payload import Region
from vq.ring_fault import RingFault
from vq_core.driver import Buffer, DriverQueue
from vq_core.guest_memory import Block, GuestMemory
from vq_core.notify import signal

__all__ = ["DriverGuest", "RingDriver"]

MEMORY_BYTES: Final = 16 << 20
STATUS_OK: Final = 0xF  # ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK (VIRTIO 1.3, 2.1)
LAYOUTS: Final = ("split", "packed")
# What our rings can do, whatever the device.
RING_FEATURES: Final = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_F_INDIRECT_DESC)
PROTOCOL_FEATURES: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    v.VHOST_USER_PROTOCOL_F_STATUS,
    v.VHOST_USER_PROTOCOL_F_CONFIG,
)

Readable = bytes | bytearray | memoryview | Block | tuple[int, int]
Writable = int | Block | tuple[int, int]


class DriverGuest(Closing):
    """What the drivers of one front-end share: the negotiated features and the guest's memory.

    Parameters
    ----------
    frontend
        A connection. What was negotiated on it stays; otherwise that is done here.
    layout
        "split" or "packed"; None: packed if the back-end offers it.
    features
        Features of the device that are wanted, besides those of the rings.
    memory_bytes
        Size of the guest's memory, in one region.

    Raises
    ------
    UsageError
        No such layout.
    BackendError
        The back-end does not offer the layout, or broke the protocol.
    """

    def __init__(
        self, frontend: FrontendMessages, layout: str | None = None, features: int = 0, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        check_layout(layout)
        self.frontend = frontend
        self.drivers: dict[int, RingDriver] = {}
        if not frontend.features:
            packed = 0 if layout == "split" else v.mask(v.VIRTIO_F_RING_PACKED)
            frontend.set_features(frontend.negotiate(RING_FEATURES | packed | features, PROTOCOL_FEATURES))
        self.layout = LAYOUTS[v.has(frontend.features, v.VIRTIO_F_RING_PACKED)]
        self.check(layout)
        self.memory = GuestMemory(memory_bytes)
        try:
            rows = self.memory.regions
            frontend.set_mem_table([Region(*row[:4]) for row in rows], [row[4] for row in rows])
        except BaseException:
            self.close()
            raise

    def check(self, layout: str | None) -> None:
        """Refuse a layout that was not negotiated: it is the same for all queues."""
        check_layout(layout)
        if layout not in (None, self.layout):
            limit = f"layout={layout} needs RING_PACKED {'in' if layout == 'packed' else 'not in'} what was negotiated"
            raise BackendError("SET_FEATURES", "features", hex(self.frontend.features), limit)

    def close(self) -> None:
        """Let go of rings and memory, after the connection has ended."""
        for driver in self.drivers.values():
            driver.release()
        self.memory.close()


def check_layout(layout: str | None) -> None:
    """Refuse what is no layout."""
    if layout not in (None, *LAYOUTS):
        raise UsageError(f"layout is {layout!r}; split and packed are possible")


class RingDriver(Closing):
    """The driver of one queue; made, and started, by `Frontend.driver`.

    Attributes
    ----------
    index : int
        The queue.
    ring : vq_core.driver.DriverQueue
        Its ring, for those who need to look closely or to break it.

    Notes
    -----
    Threading: as the front-end, one thread at a time. The end of a ``with`` block stops the ring.
    """

    def __init__(self, guest: DriverGuest, index: int, size: int) -> None:
        self.index = index
        self._frontend = guest.frontend
        self._done: list[tuple[Buffer, int]] = []  # used, and not asked for yet
        self._runs = False
        try:
            self.ring = DriverQueue(guest.memory, size, features=guest.frontend.features)
        except ValueError as error:
            raise UsageError(f"queue {index}: {error}") from error
        self._fault = RingFault(index)

    def start(self) -> None:
        """Start the ring where it stands, unless it runs."""
        if self._runs:
            return
        ring = self.ring
        position = ring.used_idx
        base = position << 16 | position if ring.layout == "packed" else position
        self._fault.forget()
        fds = (ring.kick_fd, ring.call_fd, self._fault.fileno())
        self._frontend.start_ring(RingSetup(self.index, ring.size, *ring.addresses, base, *fds))
        self._runs = True
        self._frontend.set_status(STATUS_OK)
        signal(ring.kick_fd)  # old back-ends start only then

    def stop(self) -> None:
        """Stop the ring; `start` goes on where it stopped. What the device has used until then `wait` still gives."""
        if self._runs:
            self._runs = False
            self._frontend.stop_ring(self.index)

    def close(self) -> None:
        """Stop the ring; the memory and the descriptors go with the front-end."""
        if self._frontend.fileno() >= 0:
            self.stop()

    def release(self) -> None:
        """Close the descriptors, after the connection has ended."""
        self.ring.close()
        self._fault.close()

    def add(
        self, readable: Sequence[Readable] = (), writable: Sequence[Writable] = (), *, indirect: bool = False
    ) -> Buffer:
        """Add a descriptor chain; the device sees it after `kick`.

        Parameters
        ----------
        readable
            Device-readable parts, a descriptor each: bytes, or a block of `vq_core.guest_memory`, or a pair of guest
            address and length that goes to the ring as it is, right or wrong.
        writable
            Device-writable parts: a number of bytes, a block, or such a pair.
        indirect
            Put the descriptors into an indirect table.

        Returns
        -------
        Buffer
            What `wait` gives back.

        Raises
        ------
        BufferError
            The ring is full.
        ValueError
            There is no part at all.
        """
        return self.ring.add(readable, writable, indirect=indirect)

    def kick(self) -> bool:
        """Show the device what was added, and kick it if it wants that; whether it did."""
        return self.ring.kick()

    def wait(self, timeout: float | None = None) -> list[tuple[Buffer, int]]:
        """Wait until the device has used something, and take all that it has.

        Parameters
        ----------
        timeout
            Seconds; None: that of the front-end.

        Returns
        -------
        list of (Buffer, int)
            Each with the bytes that the device says it has written; ``buffer.written(length)`` are these bytes.

        Raises
        ------
        BackendError
            Nothing came in time, or the back-end has stopped the ring for an error.
        vq_core.driver.BrokenRingError
            The device broke the rules of the ring.
        """
        if not self._done:
            seconds = self._frontend.timeout if timeout is None else timeout
            if not self.ring.wait(seconds, self._fault.fileno()):
                self._fault.check()
                limit = f"nothing was used within {seconds:g} s of {self.ring.outstanding} buffers"
                limit += "; does the device complete what it takes? The log of the back-end may say more"
                raise BackendError("queue", "index", self.index, limit)
            self._done = self.ring.poll()
        done, self._done = self._done, []
        return done

    def ask(
        self,
        *readable: Readable,
        room: int | Sequence[Writable] = 0,
        indirect: bool = False,
        timeout: float | None = None,
    ) -> bytes:
        """Send one request, and wait for its answer.

        Parameters
        ----------
        readable
            As for `add`.
        room
            Bytes for the answer, or parts as for `add`.
        indirect, timeout
            As for `add` and `wait`.

        Returns
        -------
        bytes
            What the device has written; other buffers that come meanwhile are kept for `wait`.
        """
        writable = ([room] if room else []) if isinstance(room, int) else room
        wanted = self.add(readable, writable, indirect=indirect)
        self.kick()
        others: list[tuple[Buffer, int]] = []
        while True:
            came = self.wait(timeout)
            found = [length for buffer, length in came if buffer is wanted]
            others += [each for each in came if each[0] is not wanted]
            if found:
                self._done = others
                return wanted.written(found[0])
