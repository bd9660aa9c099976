"""The dirty log: what it shows after a packet, and what not."""

from __future__ import annotations

import os
from dataclasses import replace

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL, GAP, PAGE, Guest
from vq.check.outcome import Failed, Skipped
from vq.check.registry import check
from vq.check.target import Target
from vq.message import Request
from vq_core.guest_memory import Region

LOG = (v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,)
PROTOCOL = BASIC_PROTOCOL | v.mask(*LOG)
LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)
SECTION = "vhost-user, Migration"
ASIDE = PAGE  # where used rings are said to lie: below all memory, so that nothing else is marked there
LOG_BYTES = -(-GAP // (8 * PAGE) // PAGE) * PAGE  # a bit for each page below the end of memory


@check("vhost-user, Front-end message types: SET_LOG_BASE", protocol=LOG)
def base_is_answered(target: Target) -> None:
    """SET_LOG_BASE is answered, which front-ends wait for."""
    with target.guest(protocol=PROTOCOL) as guest:
        log = Region(LOG_BYTES, 0, 0)
        for _ in range(2):
            guest.frontend.set_log_base(log.fd, LOG_BYTES)


def _marked(log: Region) -> int:
    return sum(byte.bit_count() for byte in memoryview(log))


@check(SECTION, device="net", protocol=LOG, features=(v.VHOST_F_LOG_ALL,))
def net_marks_what_it_writes(target: Target) -> str:
    """While LOG_ALL is set, switched on and off with rings running, pages of received packets are marked."""
    with target.guest(protocol=PROTOCOL) as guest:
        target.driving.exchange(guest)
        log = Region(LOG_BYTES, 0, 0)
        guest.frontend.set_log_base(log.fd, LOG_BYTES)
        target.driving.exchange(guest)
        if _marked(log):
            raise Failed("pages are marked before LOG_ALL is set")
        guest.frontend.set_features(guest.frontend.features | LOG_ALL)
        guest.frontend.barrier()
        target.driving.exchange(guest)
        marked = _marked(log)
        if target.echoes and not marked:
            raise Failed("a packet came and no page is marked")
        guest.frontend.set_features(guest.frontend.features & ~LOG_ALL)
        guest.frontend.barrier()
        memoryview(log)[:] = bytes(LOG_BYTES)
        target.driving.exchange(guest)
        if _marked(log):
            raise Failed("pages are marked after LOG_ALL is cleared")
        return f"{marked} pages"


@check(SECTION, device="blk", protocol=LOG, features=(v.VHOST_F_LOG_ALL,))
def blk_marks_what_it_writes(target: Target) -> str:
    """While LOG_ALL is set the pages that a read fills are marked."""
    with target.guest(protocol=PROTOCOL, features=LOG_ALL, running=False) as guest:
        log = Region(LOG_BYTES, 0, 0)
        guest.frontend.set_log_base(log.fd, LOG_BYTES)
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)
        marked = _marked(log)
        if not marked:
            raise Failed("a sector was read and no page is marked")
        return f"{marked} pages"


def _log_rings(guest: Guest, flags: int, *, aside: bool) -> None:
    """Switch the logging of running rings: of ring n at `ASIDE` + n pages, or where it lies."""
    for index, queue in enumerate(guest.queues):
        at = ASIDE + index * PAGE if aside else queue.guest_addresses[2]
        guest.frontend.set_ring_addresses(replace(guest.setup(index), flags=flags, log_guest_addr=at))
    guest.frontend.barrier()


def _is_marked(log: Region, addr: int) -> bool:
    return bool(memoryview(log)[addr // PAGE // 8] >> addr // PAGE % 8 & 1)


@check(f"{SECTION}: VHOST_VRING_F_LOG", protocol=LOG, features=(v.VHOST_F_LOG_ALL,))
def used_ring_is_marked_where_it_is_said_to_lie(target: Target) -> str | None:
    """VHOST_VRING_F_LOG, switched with rings running: stores to the used ring are marked at log_guest_addr."""
    if target.device == "any":
        raise Skipped("for --type net and blk")
    marked_without = False
    with target.guest(protocol=PROTOCOL, features=LOG_ALL) as guest:
        log = Region(LOG_BYTES, 0, 0)
        guest.frontend.set_log_base(log.fd, LOG_BYTES)
        at = ASIDE + guest.victim * PAGE
        for flags in (v.VHOST_VRING_F_LOG, 0, v.VHOST_VRING_F_LOG):
            _log_rings(guest, flags, aside=True)
            memoryview(log)[:] = bytes(LOG_BYTES)
            target.driving.exchange(guest)
            if flags and not _is_marked(log, at):
                raise Failed(f"ring {guest.victim} was used, and its page at log_guest_addr {at:#x} is not marked")
            marked_without |= not flags and _is_marked(log, at)
    return "marked without the flag as well" if marked_without else None  # a page too many does no harm


@check(f"{SECTION}: VHOST_VRING_F_LOG", protocol=LOG, features=(v.VHOST_F_LOG_ALL, v.VIRTIO_F_RING_PACKED))
def packed_descriptors_are_marked(target: Target) -> None:
    """In a packed ring used descriptors are marked where they lie: log_guest_addr is that of the event structure."""
    if target.device == "any":
        raise Skipped("for --type net and blk")
    # So long that no descriptor shares its page with the event structure, even by an offset from there.
    with target.guest(protocol=PROTOCOL, features=LOG_ALL, layout="packed", num=1024) as guest:
        log = Region(LOG_BYTES, 0, 0)
        guest.frontend.set_log_base(log.fd, LOG_BYTES)
        _log_rings(guest, v.VHOST_VRING_F_LOG, aside=False)
        target.driving.exchange(guest)
        at = guest.queues[guest.victim].guest_addresses[0]
        if not _is_marked(log, at):
            raise Failed(f"ring {guest.victim} was used, and the page of its first descriptor {at:#x} is not marked")


@check("vhost-user, Front-end message types: SET_LOG_FD", protocol=LOG)
def fd_is_taken(target: Target) -> None:
    """SET_LOG_FD is taken with rings running, and a second one replaces the first."""
    with target.guest(protocol=PROTOCOL) as guest:
        for _ in range(2):
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            try:
                guest.frontend.request(Request.SET_LOG_FD, None, [fd])
            finally:
                os.close(fd)
        guest.frontend.barrier()
        target.driving.exchange(guest)
