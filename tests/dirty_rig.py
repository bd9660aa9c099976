"""What tests of the dirty log share: the log itself, which pages changed, and a copy that a log keeps up to date.

None of it asks how guest memory is addressed: an IOMMU makes no difference, as a log speaks of guest addresses.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy
from numpy.typing import NDArray

from engine_rig import PAGE
from vq_core.dirty import DirtyLog
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory


class LogFile:
    """A log in a memfd, and its pages as numbers.

    Parameters
    ----------
    pages
        How many it covers, from guest address 0; a multiple of 32.
    offset
        Where it begins in its file, with bytes of no meaning around it.
    """

    def __init__(self, pages: int = 512, offset: int = 0) -> None:
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        self.size, self.offset = pages // 8, offset
        os.ftruncate(self.fd, offset + self.size + 100)
        self.log = DirtyLog(self.fd, self.size, offset)

    def marked(self) -> set[int]:
        """Take the marked pages, while nobody marks any."""
        bits = os.pread(self.fd, self.size, self.offset)
        os.pwrite(self.fd, bytes(self.size), self.offset)
        pages = numpy.flatnonzero(numpy.unpackbits(numpy.frombuffer(bits, numpy.uint8), bitorder="little"))
        return {int(page) for page in pages}

    def close(self) -> None:
        os.close(self.fd)


def _pages(start: int, differs: NDArray[numpy.bool_]) -> set[int]:
    """The pages of what differs in a region that begins at `start`."""
    return {int(page) for page in numpy.unique((start + numpy.flatnonzero(differs)) // PAGE)}


class Watch:
    """All guest memory as it is now, to be compared with what becomes of it."""

    def __init__(self, memory: GuestMemory) -> None:
        self.regions = [(addr, memoryview(memory.view(addr, size))) for addr, size, *_ in memory.regions]
        self.before = self.bytes()

    def bytes(self) -> list[bytes]:
        return [bytes(view) for _, view in self.regions]

    def changed(self, ignored: Iterable[tuple[int, int]] = ()) -> set[int]:
        """The pages that are not as they were; `ignored` are (guest address, length) of bytes that do not count."""
        pages: set[int] = set()
        for (start, _), before, after in zip(self.regions, self.before, self.bytes(), strict=True):
            if before == after:
                continue
            differs = numpy.frombuffer(before, numpy.uint8) != numpy.frombuffer(after, numpy.uint8)
            for addr, length in ignored:
                if start <= addr < start + len(before):
                    differs[addr - start : addr - start + length] = False
            pages.update(_pages(start, differs))
        return pages


class Mirror:
    """A copy of guest memory that a thread makes and keeps up to date, as the source of a migration does.

    At first everything counts as dirty, from then on what the log says; the log is on when the context is entered.

    Parameters
    ----------
    harvest
        The compiled harvest.pyx.
    """

    def __init__(self, harvest: ModuleType, memory: GuestMemory, log: LogFile) -> None:
        assert log.offset == 0
        self._bits = mmap.mmap(log.fd, log.size)
        self.areas = [(addr, memoryview(memory.view(addr, size))) for addr, size, *_ in memory.regions]
        self.copies = [bytearray(len(view)) for _, view in self.areas]
        regions = [(addr, view, copy) for (addr, view), copy in zip(self.areas, self.copies, strict=True)]
        self.harvester = harvest.Harvester(self._bits, regions)
        self.rounds = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.rounds = self.harvester.run()

    def __enter__(self) -> Mirror:
        self._bits[:] = b"\xff" * len(self._bits)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.harvester.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def stale(self) -> set[int]:
        """After the last look at the log, while nobody writes: pages of the copy that are not as in memory."""
        self.harvester.once()
        pages: set[int] = set()
        for (addr, view), copy in zip(self.areas, self.copies, strict=True):
            if copy != view:
                pages.update(_pages(addr, numpy.frombuffer(copy, numpy.uint8) != numpy.frombuffer(view, numpy.uint8)))
        return pages


def ring_pages(driver: DriverQueue, first: int = 0, count: int | None = None) -> set[int]:
    """The pages of what the device writes when it uses slots `first` and so on: used elements or descriptors."""
    count = driver.size if count is None else count
    desc, _, used = driver.guest_addresses
    start, size = (desc, 16) if driver.layout == "packed" else (used + 4, 8)
    pages = range((start + size * first) // PAGE, (start + size * (first + count) - 1) // PAGE + 1)
    return set(pages) | (set() if driver.layout == "packed" else {used // PAGE})


def log_queue(queue: Any, driver: DriverQueue, log: LogFile | None, *, ring: bool = True) -> None:
    """Switch a queue's logging, as a front-end does: with VRING_F_LOG or without."""
    queue.set_log(log.log if log else None, driver.guest_addresses[2] if log and ring else None)
