"""Postcopy as the data plane sees it: memory that is still on its way, and the watch over who waits for it.

Workers wait in the kernel for a page that has not come. That is the front-end's to end, and one that does not would
hold its worker, and with it all other guests of that worker, for ever. So a thread watches: when a worker that waits
has not come to a burst boundary for PATIENCE_S, the memory is taken out of the front-end's hands (`Userfault.forsake`),
the worker goes on, and the connection ends. It is a thread since the control thread itself may be waiting for that
worker then (vq_core/handover.pyx).
"""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from vq import effects as e
from vq.errors import ResourceError
from vq_core.memory import MemoryMap
from vq_core.queue import Queue
from vq_core.userfault import Userfault

__all__ = ["PATIENCE_S", "PostcopyMemory", "check_userfault"]

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 5.0  # well below what handover.pyx gives a worker
LOOK_S: Final = 0.25
REMEDY: Final = (
    "run with CAP_SYS_PTRACE, give access to /dev/userfaultfd (Linux 6.1), or set sysctl vm.unprivileged_userfaultfd=1"
)


def open_userfault() -> Userfault:
    """Open a userfaultfd.

    Raises
    ------
    ResourceError
        There is no permission, or the kernel has none; with a remedy.
    """
    try:
        return Userfault()
    except OSError as error:
        raise ResourceError("cannot open a userfaultfd", errno=error.errno or 0, remedy=REMEDY) from error


def check_userfault() -> None:
    """Find out before anything is offered whether postcopy can be served; raises as `open_userfault`."""
    open_userfault().close()


class PostcopyMemory:
    """What a connection needs for a postcopy migration to it.

    Parameters
    ----------
    queues
        Those whose workers may wait for a page.
    gave_up
        Called by the watching thread after it has taken the memory away; it must only wake the control thread.

    Attributes
    ----------
    hopeless : bool
        The front-end has let a worker wait for too long, and the memory was taken away.

    Notes
    -----
    Threading: control thread.
    """

    def __init__(self, queues: Sequence[Queue], gave_up: Callable[[], None]) -> None:
        self.hopeless = False
        self._queues = queues
        self._gave_up = gave_up
        self._userfault: Userfault | None = None
        self._prepared: MemoryMap | None = None
        self._watcher: threading.Thread | None = None
        self._over = threading.Event()

    def advise(self) -> int:
        """Open a userfaultfd in place of the one before; a copy of it is given, which the caller owns."""
        fresh = open_userfault()
        copy = fcntl.fcntl(fresh.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
        self._close()
        self._userfault = fresh
        return copy

    def prepare(self, regions: Sequence[e.MemoryRegion]) -> tuple[int, ...]:
        """Map a table that nobody can touch yet; where its regions lie in this process, for the front-end's use."""
        assert self._userfault is not None
        rows = [(r.guest_addr, r.size, r.user_addr, r.mmap_offset, r.fd) for r in regions]
        self._prepared = MemoryMap(rows, self._userfault)
        places = self._prepared.host_addrs
        return tuple(places[region.guest_addr] for region in regions)

    def adopt(self) -> MemoryMap:
        """Open the table that was prepared; from here on whoever touches it may wait."""
        assert self._userfault is not None and self._prepared is not None
        memory, self._prepared = self._prepared, None
        memory.open()
        if self._watcher is None:
            self._over.clear()
            self._watcher = threading.Thread(
                target=self._watch, args=(self._userfault,), name="vq-postcopy", daemon=True
            )
            self._watcher.start()
        return memory

    def end(self) -> None:
        """All pages have come."""
        if self._userfault is not None:
            self._userfault.settle()
        self._close()

    def abandon(self) -> None:
        """The connection ends in the middle: nobody serves faults any more, so that nobody may wait for one."""
        if self._userfault is not None:
            self._userfault.forsake()
        self._close()

    def _close(self) -> None:
        self._prepared = None
        if self._watcher is not None:
            self._over.set()
            self._watcher.join()
            self._watcher = None
        if self._userfault is not None:
            self._userfault.close()
            self._userfault = None

    def _watch(self, userfault: Userfault) -> None:
        """Look again and again whether a worker that waits for a page has come on since the last look."""
        stood: dict[int, tuple[int, int]] = {}
        while not self._over.wait(LOOK_S):
            stood = self._look(stood) if userfault.waiting else {}
            # Counted in looks, not by the clock: a process that was stopped has not waited.
            if any(looks * LOOK_S >= PATIENCE_S for _, looks in stood.values()):
                try:
                    userfault.forsake()
                except OSError as error:
                    logger.error("memory that does not come cannot be taken away yet: %s", error)
                    continue
                self.hopeless = True
                self._gave_up()
                return

    def _look(self, before: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
        """By queue: rounds of its worker, and looks since these have changed; nothing for one that sleeps."""
        now = {}
        for queue in self._queues:
            rounds = queue.heartbeat
            if rounds is not None:
                then, looks = before.get(queue.index, (-1, 0))
                now[queue.index] = (rounds, looks + 1 if rounds == then else 0)
        return now
