"""The dirty log: what it shows after a packet, and what not."""

from __future__ import annotations

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL, GAP, PAGE
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq_core.guest_memory import Region

LOG = (v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,)
PROTOCOL = BASIC_PROTOCOL | v.mask(*LOG)
LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)
SECTION = "vhost-user, Migration"
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
