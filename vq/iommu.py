"""The IOMMU of a front-end: which page of I/O virtual addresses lies where, and answers to a back-end that misses one.

Spec: vhost-user, "IOMMU support".
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from vq.errors import BackendError
from vq.frontend import Frontend
from vq.message import BackendRequest, Message, Request
from vq.payload import Iotlb

__all__ = ["ACCESS_FAIL", "INVALIDATE", "MISS", "PAGE", "READ", "UPDATE", "WRITE", "Iommu"]

MISS, UPDATE, INVALIDATE, ACCESS_FAIL = 1, 2, 3, 4  # types of an IOTLB message
READ, WRITE = 1, 2  # permissions, as a set
PAGE: Final = 4096


class Iommu:
    """A page table for the device behind a back-end.

    Parameters
    ----------
    frontend
        Its connection, with ACCESS_PLATFORM and BACKEND_REQ negotiated; the back-end gets a channel, where its misses
        are served whenever the front-end waits (`Frontend.serve`).

    Attributes
    ----------
    pages : dict
        Number of a page of IOVA -> (address in the front-end, permissions).
    answering : bool
        False: misses are counted and left unanswered.
    missed : list of (iova, perm)
        What was asked for.
    failed : int
        Accesses that the back-end reported as failed.
    """

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.pages: dict[int, tuple[int, int]] = {}
        self.answering = True
        self.missed: list[tuple[int, int]] = []
        self.failed = 0
        self._due: deque[Iotlb] = deque()
        self._answering = False
        frontend.open_channel({BackendRequest.IOTLB_MSG: self._serve})

    def map(self, iova: int, size: int, address: int, perm: int = READ | WRITE) -> None:
        """Let pages of IOVA lie at an address of the front-end; the back-end finds out when it misses them."""
        for offset in range(0, size, PAGE):
            self.pages[(iova + offset) // PAGE] = (address + offset, perm)

    def unmap(self, iova: int, size: int) -> None:
        """Take pages away; when this returns the back-end uses them no more."""
        for page in range(iova // PAGE, -(-(iova + size) // PAGE)):
            self.pages.pop(page, None)
        self.invalidate(iova, size)

    def invalidate(self, iova: int, size: int) -> None:
        """Make the back-end forget a range, whatever the table says; a size of 2^64 is written as 0."""
        self.frontend.request(Request.IOTLB_MSG, Iotlb(iova, size, 0, 0, INVALIDATE))

    def update(self, iova: int, size: int, address: int, perm: int) -> None:
        """Tell the back-end where a range lies, whatever the table says."""
        self.frontend.request(Request.IOTLB_MSG, Iotlb(iova, size, address, perm, UPDATE))

    def _serve(self, message: Message) -> None:
        entry: Iotlb = message.payload
        if entry.type == ACCESS_FAIL:
            self.failed += 1
            return
        if entry.type != MISS or entry.perm not in (READ, WRITE, READ | WRITE) or entry.size or entry.uaddr:
            limit = "a back-end says 1 (miss) with a permission and an address, or 4 (access failed)"
            raise BackendError(message.name, "IOTLB message", tuple(entry), limit)
        self.missed.append((entry.iova, entry.perm))
        self._due.append(entry)
        if self._answering:
            return  # we are called from below, where the back-end's answer to our own is awaited
        self._answering = True
        end = time.monotonic() + self.frontend.timeout
        try:
            while self._due:
                self._answer(self._due.popleft())
                if self._due and time.monotonic() > end:
                    limit = "answers are of no use: whoever asks without end is not answered without end"
                    raise BackendError(message.name, "misses", len(self.missed), limit)
        finally:
            self._answering = False

    def _answer(self, entry: Iotlb) -> None:
        page = entry.iova // PAGE
        address, perm = self.pages.get(page, (0, 0))
        # An IOMMU tells nothing of a page that may not be used in this way.
        if self.answering and not entry.perm & ~perm:
            self.update(page * PAGE, PAGE, address, perm)
