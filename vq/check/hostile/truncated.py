"""Memory that its owner takes away. Last of all: many back-ends die of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from vq import virtio as v
from vq.check.guest import GAP, PAGE, Guest
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import say
from vq.message import Request
from vq.payload import Region

SECTION = "vhost-user, Memory regions description"
SIZE = 64 * PAGE
WHERE = Region(GAP + (1 << 30), SIZE, 0x7E20_0000_0000, 0)


@contextmanager
def _losable() -> Iterator[int]:
    """A file of memory that is not sealed against shrinking."""
    fd = os.memfd_create("vq-check-truncated", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE)
        yield fd
    finally:
        os.close(fd)


def _shared(target: Target, fd: int) -> Guest:
    """A guest that has shared the file as a third region; no ring runs."""
    guest = target.guest(running=False)
    try:
        regions, fds = guest.regions
        guest.frontend.set_mem_table([*regions, WHERE], [*fds, fd])
    except BaseException:
        guest.close()
        raise
    return guest


@check(SECTION)
def buffers(target: Target) -> str:
    """The file under a buffer is truncated before the buffer is used."""
    with _losable() as fd, _shared(target, fd) as guest:
        guest.start_all()
        rows = target.driving.request(guest)
        # The longest part, be it read or written, lies where nothing is any more.
        longest = max(range(len(rows)), key=lambda row: rows[row][1])
        rows[longest] = (WHERE.guest_addr + PAGE, *rows[longest][1:])
        os.ftruncate(fd, 0)
        ring = guest.raw()
        ring.chain(rows)
        return guest.aftermath(ring)


@check(SECTION)
def rings(target: Target) -> str:
    """The file under a ring that runs is truncated."""
    with _losable() as fd, _shared(target, fd) as guest:
        start = WHERE.user_addr
        for index in range(len(guest.queues)):
            setup = guest.setup(index)
            if index == guest.victim:
                setup = replace(setup, desc=start, avail=start + 4 * PAGE, used=start + 8 * PAGE)
            guest.frontend.start_ring(setup)
        guest.frontend.set_status(0xF)
        os.ftruncate(fd, 0)
        return guest.aftermath(guest.raw())


@check("vhost-user, Memory regions description", protocol=(v.VHOST_USER_PROTOCOL_F_REPLY_ACK,))
def holes(target: Target) -> str:
    """A region whose file has no bytes behind its first page is refused, or does no harm."""
    with _losable() as fd:
        os.ftruncate(fd, PAGE)
        with target.guest(running=False) as guest:
            regions, fds = guest.regions
            return say(guest.frontend, Request.SET_MEM_TABLE, (*regions, WHERE), [*fds, fd])
