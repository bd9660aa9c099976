"""A dirty log as a live migration has it: given before the rings start, and taken empty again and again."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Final, Self

from vq.frontend import Frontend
from vq_core.guest_memory import GuestMemory

__all__ = ["DirtyLog"]

PAGE: Final = 4096  # guest memory that a bit stands for (vhost-user, "Migration")
TAKE_S: Final = 0.1  # between two passes of a migration over the log


class DirtyLog:
    """The log of a front-end's memory, emptied every 0.1 s, so that writers find their bits unset each time.

    Parameters
    ----------
    frontend
        A connection that negotiated LOG_SHMFD and has not started its rings yet.
    memory
        What the log covers.

    Attributes
    ----------
    pages
        Pages found marked so far, each as often as it was.

    Raises
    ------
    BackendError
        The back-end does not take it.
    """

    def __init__(self, frontend: Frontend, memory: GuestMemory) -> None:
        end = max(guest_addr + size for guest_addr, size, *_ in memory.regions)
        pages = -(-end // PAGE)
        self._size = -(-pages // (8 * PAGE)) * PAGE
        self._fd = os.memfd_create("vq-bench-log", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, self._size)
            frontend.set_log_base(self._fd, self._size)
        except BaseException:
            os.close(self._fd)
            raise
        self.pages = 0
        self._ended = threading.Event()
        self._taker = threading.Thread(target=self._take, name="vq-dirty-log")

    def __enter__(self) -> Self:
        """Begin to empty it."""
        self._taker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End that, and give the memory back."""
        self._ended.set()
        self._taker.join()
        os.close(self._fd)

    def _take(self) -> None:
        clean = bytes(self._size)
        while not self._ended.wait(TAKE_S):
            self.pages += int.from_bytes(os.pread(self._fd, self._size, 0), "little").bit_count()
            os.pwrite(self._fd, clean, 0)
