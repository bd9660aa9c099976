"""A front-end with a driver behind it: memory of two regions, and rings in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vq import virtio as v
from vq.check.outcome import Failed
from vq.check.raw_ring import RawRing
from vq.check.verdict import settled
from vq.check.waiting import until
from vq.closing import Closing
from vq.errors import ConnectionClosed
from vq.frontend import Frontend, RingSetup
from vq.payload import Region
from vq_core.driver import DriverQueue
from vq_core.guest_memory import Block, GuestMemory
from vq_core.notify import signal

if TYPE_CHECKING:
    from vq.check.target import Target

__all__ = [
    "A_BYTES", "A_USER", "BASIC_PROTOCOL", "B_BYTES", "B_USER", "DATA", "GAP", "LAYOUTS", "PAGE", "A", "B", "Guest",
]  # fmt: skip

PAGE: Final = 4096
# Region B follows A in guest addresses, but nowhere else; behind B there is nothing.
A, A_BYTES, A_USER = 0x4000_0000, 1024 * PAGE, 0x7E12_0000_0000
B, B_BYTES, B_USER = A + A_BYTES, 16 * PAGE, 0x7E13_0000_0000
GAP: Final = B + B_BYTES
DATA: Final = A + A_BYTES // 2  # free memory: rings and blocks are given out from the beginning of A

BASIC_PROTOCOL: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_STATUS
)
LAYOUTS: Final = {"split": 0, "packed": v.mask(v.VIRTIO_F_RING_PACKED)}
STATUS_OK: Final = 0xF  # ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK (VIRTIO 1.3, 2.1)
CANARY: Final = b"\xa5\x5a" * (PAGE // 2)
GLANCE_S: Final = 0.03  # for a back-end to look at a ring, where nothing tells that it has


class Guest(Closing):
    """A connection with memory and rings; the rings run unless told otherwise.

    Parameters
    ----------
    target
        The back-end.
    features
        Virtio features wanted besides those that its driver always wants.
    protocol
        Protocol features wanted.
    layout
        "split" or "packed".
    num
        Entries of each ring.
    base
        Where the rings begin, in the form of `DriverQueue`; None: fresh.
    running
        Share the memory and start the rings; otherwise that is left to the check.
    identical
        Make user addresses the same as guest addresses.

    Attributes
    ----------
    frontend, memory, queues
        The connection, the guest's memory, the driver's rings by index.
    """

    def __init__(
        self,
        target: Target,
        *,
        features: int = 0,
        protocol: int = BASIC_PROTOCOL,
        layout: str = "split",
        num: int = 64,
        base: int | None = None,
        running: bool = True,
        identical: bool = False,
    ) -> None:
        self.target = target
        self.frontend: Frontend = target.negotiate(features | LAYOUTS[layout], protocol)
        self.queues: list[DriverQueue] = []
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.memory = GuestMemory(A_BYTES, guest_addr=A, user_addr=A if identical else A_USER)
        self.memory.add_region(B_BYTES, guest_addr=B, user_addr=B if identical else B_USER)
        try:
            agreed = self.frontend.features
            self._canary = self.memory.alloc(PAGE, PAGE)
            memoryview(self._canary)[:] = CANARY
            for _ in range(target.driving.rings):
                self.queues.append(DriverQueue(self.memory, num, features=agreed, base=base))
            if running:
                self.share()
                self.start_all()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave: the connection, the rings, the memory."""
        self.frontend.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()
        os.close(self.err_fd)

    # --- Memory and rings --------------------------------------------------------------------------------------------

    @property
    def regions(self) -> tuple[list[Region], list[int]]:
        """The memory table and its fds."""
        rows = self.memory.regions
        return [Region(*row[:4]) for row in rows], [row[4] for row in rows]

    def share(self) -> None:
        """Send the memory table."""
        self.frontend.set_mem_table(*self.regions)

    def setup(self, index: int, base: int | None = None) -> RingSetup:
        """Describe a ring as `Frontend.start_ring` takes it; by default it goes on where the driver stands."""
        queue = self.queues[index]
        if base is None:
            base = queue.used_idx
            base = base << 16 | base if queue.layout == "packed" else base
        desc, avail, used = queue.addresses
        return RingSetup(index, queue.size, desc, avail, used, base, queue.kick_fd, queue.call_fd, self.err_fd)

    def start(self, index: int, *, enable: bool = True) -> None:
        """Start a ring, and kick it once: old back-ends start only then."""
        self.frontend.start_ring(self.setup(index), enable=enable)
        self.kick(index)

    def start_all(self) -> None:
        """Start all rings, and tell that the driver is ready."""
        for index in range(len(self.queues)):
            self.start(index)
        self.frontend.set_status(STATUS_OK)

    def stop_all(self) -> list[int]:
        """Stop all rings; gives their bases."""
        return [self.frontend.stop_ring(index) for index in range(len(self.queues))]

    def attend(self) -> None:
        """Serve what the back-end asks, whenever its work is awaited; without a channel there is nothing."""

    def kick(self, index: int) -> None:
        """Kick, whether or not the device asks for it."""
        signal(self.queues[index].kick_fd)

    def block(self, data: bytes, align: int = 64) -> Block:
        """Put bytes into guest memory."""
        block = self.memory.alloc(len(data), align)
        memoryview(block)[:] = data
        return block

    # --- After hostile input -----------------------------------------------------------------------------------------

    @property
    def victim(self) -> int:
        """The ring that hostile input goes to: the one from which the device reads by itself."""
        return self.target.driving.victim

    def raw(self) -> RawRing:
        """The victim by its bytes."""
        return RawRing(self.queues[self.victim])

    def aftermath(self, ring: RawRing) -> str:
        """Kick the victim, let the back-end look, and insist that it answers or has left, and wrote nowhere else.

        Returns
        -------
        str
            What became of the ring or the connection.
        """
        self.kick(self.victim)
        until(lambda: self._broken() or ring.used, GLANCE_S)
        broken, used = self._broken(), ring.used
        end = settled(self.frontend)
        if end == "connection kept":
            try:
                self.frontend.get_vring_base(self.victim)
            except ConnectionClosed:
                end = "connection closed"
        if bytes(memoryview(self._canary)) != CANARY:
            raise Failed("the back-end wrote to memory that no descriptor names")
        if end != "connection kept":
            return end
        return "ring stopped" if broken else "dropped" if used else "left alone"

    def _broken(self) -> bool:
        try:
            # The counter stays, so that asking twice tells the same.
            count = os.eventfd_read(self.err_fd)
        except BlockingIOError:
            return False
        os.eventfd_write(self.err_fd, count)
        return True
