"""Closing what came from a peer, without waiting for the peer.

close() can take as long as the peer likes: a TCP socket lingers over what it has not sent, a file of FUSE waits for its
server, and a Unix socket takes everything along that waits in it. So only descriptors that are known not to wait are
closed in place; all others are closed in a thread of the back-end that they came to. A back-end whose thread hangs
takes no new front-end (`Reaper.busy`), so that a hostile peer blocks itself, and what it leaves behind is bounded.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Final

__all__ = ["Reaper", "close_fd", "close_socket"]

GRACE_S: Final = 0.05  # a closing that takes longer is one that hangs; until then it is waited for
# No path: those begin with a slash, and can be anything.
AT_ONCE: Final = ("anon_inode:[eventfd]", "anon_inode:[userfaultfd]", "pipe:[")


class Reaper:
    """Closes the descriptors of one back-end.

    Notes
    -----
    Threading: `close`, `busy` and `active` are for the control thread.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[int | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given = 0
        self._closed = 0
        self._progress = threading.Condition()

    @property
    def busy(self) -> int:
        """Number of descriptors that are not closed yet."""
        return self._given - self._closed

    def close(self, fd: int) -> None:
        """Close a descriptor, in place if that cannot take long; waits a moment for the thread if it is not stuck."""
        # An interpreter that ends begins no thread any more; Python 3.11 would wait for it for ever.
        if _never_waits(fd) or sys.is_finalizing():
            with suppress(OSError):
                os.close(fd)
            return
        stuck = self.busy > 0
        self._given += 1
        self._work.put(fd)
        if self._begin() and not stuck:
            with self._progress:
                self._progress.wait_for(lambda: not self.busy, GRACE_S)

    def _begin(self) -> bool:
        """Start the thread, unless it runs; False: there is no room for one now, and `active` tries again."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="vq-reaper", daemon=True)
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread
        return self._thread is not None

    def stop(self) -> None:
        """End the thread when it has closed everything; it is not waited for."""
        if self._thread is not None:
            self._work.put(None)
            self._thread = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make `close_fd` use this reaper, in this thread."""
        if self.busy:
            self._begin()
        before, _active.reaper = _active.reaper, self
        try:
            yield
        finally:
            _active.reaper = before

    def _run(self) -> None:
        while (fd := self._work.get()) is not None:
            with suppress(OSError):
                os.close(fd)
            with self._progress:
                self._closed += 1
                self._progress.notify_all()


def _never_waits(fd: int) -> bool:
    """Whether closing a descriptor is known not to wait, found without asking its file system.

    A path tells nothing: seen from here, a file system that is mounted in another mount namespace has any.
    """
    try:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(AT_ONCE):
            return True
    except OSError:
        return True  # not open, or no /proc: then there is nothing better than to close it
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True  # only files that live in memory have seals: memfd, tmpfs, hugetlbfs


class _Active(threading.local):
    """The reaper of the back-end that a thread serves: several threads may each serve one."""

    reaper: Reaper | None = None


_active = _Active()


def close_fd(fd: int) -> None:
    """Close a descriptor that came from a peer: by the reaper of the back-end that is being served, else in place."""
    if _active.reaper is not None:
        _active.reaper.close(fd)
    else:
        with suppress(OSError):
            os.close(fd)


def close_socket(sock: socket.socket) -> None:
    """Close a connection to a peer as `close_fd` does; the peer sees its end now, however long closing takes."""
    if _active.reaper is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    close_fd(sock.detach())
