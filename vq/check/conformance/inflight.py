"""The in-flight region."""

from __future__ import annotations

import os

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.message import Request
from vq.payload import Inflight

INFLIGHT = (v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,)
PROTOCOL = BASIC_PROTOCOL | v.mask(*INFLIGHT)
SECTION = "vhost-user, Inflight I/O tracking"


@check(SECTION, protocol=INFLIGHT)
def get_and_set(target: Target) -> str:
    """GET_INFLIGHT_FD brings a zeroed file as large as it says, and SET_INFLIGHT_FD takes it back before the start."""
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        rings, size = len(guest.queues), guest.queues[0].size
        reply, fd = guest.frontend.request_fd(Request.GET_INFLIGHT_FD, Inflight(0, 0, rings, size))
        if fd is None:
            raise Failed("no fd came")
        try:
            have, needed = os.fstat(fd).st_size, rings * (16 + 16 * size)
            if reply.mmap_size < needed or have < reply.mmap_offset + reply.mmap_size:
                raise Failed(f"{reply.mmap_size} bytes of a file of {have}; {needed} are needed")
            guest.frontend.request(
                Request.SET_INFLIGHT_FD, Inflight(reply.mmap_size, reply.mmap_offset, rings, size), [fd]
            )
        finally:
            os.close(fd)
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)
        return f"{reply.mmap_size} bytes"
