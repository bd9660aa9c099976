"""Kicks and calls: which fd is used, and what holds without one."""

from __future__ import annotations

import os
import select
from dataclasses import replace

from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target

SECTION = "vhost-user, Front-end message types: "


def _called(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@check("VIRTIO 1.3, 2.7.7", device="net")
def call(target: Target) -> None:
    """Used buffers are called for on the call fd."""
    with target.guest() as guest:
        target.driving.exchange(guest)
        if not _called(guest.queues[1].call_fd, target.timeout):
            raise Failed("the transmitq's call fd is never signalled")


@check(SECTION + "SET_VRING_CALL", device="net")
def call_is_replaced(target: Target) -> None:
    """A new call fd takes the place of the old one while the ring runs (QEMU: masked interrupts)."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with target.guest() as guest:
            target.driving.exchange(guest)
            guest.frontend.set_call(1, fd)
            guest.frontend.barrier()
            target.driving.exchange(guest)
            if not _called(fd, target.timeout):
                raise Failed("the new call fd is never signalled")
    finally:
        os.close(fd)


@check(SECTION + "SET_VRING_CALL")
def call_without_fd(target: Target) -> None:
    """Without a call fd the front-end polls, and the ring works."""
    with target.guest() as guest:
        for index in range(len(guest.queues)):
            guest.frontend.set_call(index, None)
        target.driving.exchange(guest)


@check(SECTION + "SET_VRING_KICK")
def kick_without_fd(target: Target) -> None:
    """Without a kick fd the back-end polls, and the ring works."""
    with target.guest(running=False) as guest:
        guest.share()
        for index in range(len(guest.queues)):
            guest.frontend.start_ring(replace(guest.setup(index), kick_fd=None))
        guest.frontend.set_status(0xF)
        target.driving.exchange(guest)
