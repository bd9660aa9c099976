"""The in-flight region."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from vq import virtio as v
from vq.check.devices import poll_ring, read_sector
from vq.check.guest import BASIC_PROTOCOL, Guest
from vq.check.inflight_region import leave_packed, leave_split, recorded
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.check.waiting import until
from vq.message import Request
from vq.payload import Inflight
from vq_core.driver import Buffer

INFLIGHT = (v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,)
SUSPEND = (
    *INFLIGHT, v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT, v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
)  # fmt: skip
PROTOCOL = BASIC_PROTOCOL | v.mask(*INFLIGHT)
PACKED = (v.VIRTIO_F_RING_PACKED,)
SECTION = "vhost-user, Inflight I/O tracking"
SLOTS = 3  # of a read: header, data, status


@contextmanager
def _with_region(target: Target, layout: str, protocol: int = PROTOCOL) -> Iterator[tuple[Guest, Inflight, int]]:
    """A guest that has got a region and has not given it back; its rings stand."""
    with target.guest(protocol=protocol, layout=layout, running=False) as guest:
        shape, fd = guest.frontend.get_inflight(len(guest.queues), guest.queues[0].size)
        try:
            yield guest, shape, fd
        finally:
            os.close(fd)


def _run(guest: Guest, shape: Inflight, fd: int) -> None:
    guest.frontend.set_inflight(shape, fd)
    guest.share()
    guest.start_all()


def _get_and_set(target: Target, layout: str) -> str:
    with _with_region(target, layout) as (guest, shape, fd):
        entry, head = (32, 32) if layout == "packed" else (16, 16)
        needed = shape.num_queues * (head + entry * shape.queue_size)
        if shape.mmap_size < needed:
            raise Failed(f"{shape.mmap_size} bytes; {needed} are needed")
        if layout == "split" and any(os.pread(fd, shape.mmap_size, shape.mmap_offset)):
            raise Failed("the region is not zeroed")
        _run(guest, shape, fd)
        target.driving.exchange(guest)
        return f"{shape.mmap_size} bytes"


@check(SECTION, protocol=INFLIGHT)
def get_and_set(target: Target) -> str:
    """GET_INFLIGHT_FD brings a zeroed file as large as it says, and SET_INFLIGHT_FD takes it back before the start."""
    return _get_and_set(target, "split")


@check(SECTION, protocol=INFLIGHT, features=PACKED)
def get_and_set_packed(target: Target) -> str:
    """GET_INFLIGHT_FD for packed rings brings a file with room for their descriptors."""
    return _get_and_set(target, "packed")


@check(SECTION, protocol=INFLIGHT)
def no_queues(target: Target) -> None:
    """GET_INFLIGHT_FD for no queues or no entries brings no file."""
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        for queues, size in ((0, 64), (1, 0)):
            reply, fd = guest.frontend.request_fd(Request.GET_INFLIGHT_FD, Inflight(0, 0, queues, size))
            if fd is not None:
                os.close(fd)
                raise Failed(f"{queues} queues of {size} entries: a file came, for {reply.mmap_size} bytes")


def _records(target: Target, layout: str) -> None:
    with _with_region(target, layout) as (guest, shape, fd):
        _run(guest, shape, fd)
        for _ in range(20):
            read_sector(guest, 0)
        guest.stop_all()
        found = recorded(fd, guest.queues[0])
        if found != (1, guest.queues[0].size, 0):
            raise Failed(f"version, entries and requests in flight are {found}; all requests were done")


@check(SECTION, device="blk", protocol=INFLIGHT)
def records(target: Target) -> None:
    """When all requests are done, the region has version 1, as many entries as were asked for, and none in flight."""
    _records(target, "split")


@check(SECTION, device="blk", protocol=INFLIGHT, features=PACKED)
def records_packed(target: Target) -> None:
    """The same with packed rings."""
    _records(target, "packed")


def _reads(guest: Guest, count: int) -> list[Buffer]:
    queue = guest.queues[0]
    buffers = [queue.add([struct.pack("<IIQ", 0, 0, sector % 2)], [512, 1]) for sector in range(count)]
    queue.publish()
    return buffers


def _all_once(guest: Guest, buffers: list[Buffer]) -> None:
    """Insist that these are used, each once, and nothing else: the driver refuses that."""
    used: list[Buffer] = []

    def all_came() -> bool:
        used.extend(buffer for buffer, _ in poll_ring(guest, 0))
        return len(used) >= len(buffers)

    guest.kick(0)
    if not until(all_came, guest.target.timeout):
        raise Failed(f"{len(used)} of {len(buffers)} requests are used")
    read_sector(guest, 0)


@check(SECTION, device="blk", protocol=INFLIGHT)
def goes_on(target: Target) -> str:
    """Requests in flight are done again, those given back are not; the available ring is read behind them all."""
    with _with_region(target, "split") as (guest, shape, fd):
        exposed, *taken = _reads(guest, 4)
        leave_split(fd, guest.queues[0], taken, exposed)
        more = _reads(guest, 2)
        _run(guest, shape, fd)
        _all_once(guest, [exposed, *taken, *more])
        return "3 requests again"


@check(SECTION, device="blk", protocol=INFLIGHT, features=PACKED)
def goes_on_packed(target: Target) -> str:
    """Requests in flight are done again from the copied descriptors; the ring is read behind them all."""
    with _with_region(target, "packed") as (guest, shape, fd):
        taken = _reads(guest, 3)
        leave_packed(fd, guest.queues[0], taken, SLOTS)
        more = _reads(guest, 2)
        _run(guest, shape, fd)
        _all_once(guest, [*taken, *more])
        return "3 requests again"


@check("vhost-user, VHOST_USER_GET_VRING_BASE_SKIP_DRAIN", device="blk", protocol=SUSPEND)
def skip_drain(target: Target) -> str:
    """A ring that is suspended with requests in flight goes on with its region, and each request is used once."""
    left = 0
    with _with_region(target, "split", PROTOCOL | v.mask(*SUSPEND)) as (guest, shape, fd):
        _run(guest, shape, fd)
        for _ in range(10):
            buffers = _reads(guest, 10)
            guest.kick(0)
            guest.frontend.get_vring_base_skip_drain(0)
            left += recorded(fd, guest.queues[0])[2]
            guest.start(0)
            _all_once(guest, buffers)
    return f"{left} requests were left"
