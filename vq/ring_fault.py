"""How a driver hears at once that its ring was given up, instead of waiting until its time is over."""

from __future__ import annotations

import os
import select
from contextlib import suppress

from vq.closing import Closing
from vq.errors import BackendError

__all__ = ["RingFault"]


class RingFault(Closing):
    """The descriptor that a back-end signals when it stops a ring for an error (SET_VRING_ERR).

    Parameters
    ----------
    index
        Which ring; for people.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor, for `DriverQueue.wait` and the back-end; it stays ours."""
        return self._fd

    def forget(self) -> None:
        """The ring starts anew, and what was before counts no more."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def check(self) -> None:
        """Raise BackendError if the ring was given up since it was started."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        if poller.poll(0):
            limit = "its log says why: what serves it has failed or refused a request, or the driver broke the ring"
            raise BackendError("queue", f"queue {self.index}", "stopped by the back-end", limit)

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
