"""Waking an event loop from elsewhere."""

from __future__ import annotations

import os
import threading

from vq.closing import Closing

__all__ = ["Waker"]


class Waker(Closing):
    """A descriptor that any thread can make readable, even while the loop is about to close it.

    Raises
    ------
    OSError
        There is no room for another descriptor.

    Notes
    -----
    Threading: `wake` may come from any thread and from signal handlers; all else is for the loop.
    """

    def __init__(self) -> None:
        # Reentrant: a signal handler may come in the middle of anything here, in the same thread.
        self._lock = threading.RLock()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor to wait for, an eventfd; -1 when closed."""
        return self._fd

    def wake(self) -> None:
        """Make it readable; nothing happens when it is closed."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
