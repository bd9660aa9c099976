"""The front-end role: drives a back-end, ours or any other, for tests, demo, bench and check.

`Frontend` has a method for each message (`vq.frontend_messages`), and believes no answer (`vq.dialogue` waits for them
and checks their form). It knows sockets and messages, not guest memory: the caller makes the memory, places the rings
in it (`vq_core.driver`) and passes fds and addresses; or leaves all that to `Frontend.driver` (`vq.ring_driver`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vq.errors import UsageError
from vq.frontend_messages import FrontendMessages, RingSetup

if TYPE_CHECKING:
    from vq.ring_driver import DriverGuest, RingDriver

__all__ = ["Frontend", "RingSetup"]


class Frontend(FrontendMessages):
    """A connection to a back-end and what can be asked of it; made by `connect`, `listen` or `adopt`."""

    _guest: DriverGuest | None = None

    def close(self) -> None:
        """Close the connection, and then let go of what the drivers had; may be called twice."""
        super().close()
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.close()

    @property
    def drivers(self) -> Mapping[int, RingDriver]:
        """The drivers that there are, by queue."""
        return {} if self._guest is None else self._guest.drivers

    def driver(
        self,
        queue: int,
        size: int = 256,
        layout: str | None = None,
        *,
        features: int = 0,
        memory_bytes: int = 16 << 20,
    ) -> RingDriver:
        """Give a driver for a queue, its ring started.

        The first one negotiates, unless that was done, and shares a memory of its own with the back-end; who wants to
        say more about that negotiates first, or uses `vq_core.driver` and `start_ring`.

        Parameters
        ----------
        queue
            Index of the queue.
        size
            Entries of its ring: 1 to 32768, a power of two where the layout is split.
        layout
            "split" or "packed", the same for all queues; None: packed if the back-end offers it.
        features
            Features of the device that are wanted, as a mask; only the first driver can say so.
        memory_bytes
            Size of the guest's memory; likewise.

        Raises
        ------
        UsageError
            The size or the layout is not possible, or the queue has a driver.
        BackendError
            The back-end does not offer the layout, or broke the protocol.
        """
        from vq.ring_driver import DriverGuest, RingDriver  # numpy is slow to import

        if not isinstance(queue, int):
            raise UsageError(f"queue is {queue!r}; give its index, 0 for the first")
        if self._guest is None:
            self._guest = DriverGuest(self, layout, features, memory_bytes)
        guest = self._guest
        guest.check(layout)
        if queue in guest.drivers:
            raise UsageError(f"queue {queue} has a driver already; use that one")
        driver = RingDriver(guest, queue, size)
        guest.drivers[queue] = driver
        driver.start()
        return driver
