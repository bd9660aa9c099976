"""Memory slots: regions that come and go one by one."""

from __future__ import annotations

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import refusal
from vq.message import Request
from vq.payload import Region

SLOTS = (v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,)
PROTOCOL = BASIC_PROTOCOL | v.mask(*SLOTS)
SECTION = "vhost-user, Front-end message types: "


@check(SECTION + "GET_MAX_MEM_SLOTS", protocol=SLOTS)
def number(target: Target) -> str:
    """GET_MAX_MEM_SLOTS tells a number from 1 on, the same on each connection."""
    found = set()
    for _ in range(2):
        with target.negotiate(protocol=PROTOCOL) as frontend:
            found.add(frontend.request(Request.GET_MAX_MEM_SLOTS))
    if len(found) > 1 or min(found) < 1:
        raise Failed(f"{' and '.join(map(str, sorted(found)))}; it must be one number from 1 on")
    return str(found.pop())


@check(SECTION + "ADD_MEM_REG", protocol=SLOTS)
def add(target: Target) -> None:
    """Memory that is given region by region serves as a table does."""
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        for region, fd in zip(*guest.regions, strict=True):
            guest.frontend.add_region(region, fd)
        guest.start_all()
        target.driving.exchange(guest)


@check(SECTION + "REM_MEM_REG", protocol=SLOTS)
def remove(target: Target) -> None:
    """Regions without rings come and go while the rings run."""
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        (first, second), (fd, second_fd) = guest.regions
        guest.frontend.add_region(first, fd)
        guest.start_all()
        for _ in range(3):
            guest.frontend.add_region(second, second_fd)
            guest.frontend.remove_region(second)
        target.driving.exchange(guest)


@check(SECTION + "REM_MEM_REG", protocol=(*SLOTS, v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
def remove_unknown(target: Target) -> str:
    """A region that was never added cannot be removed."""
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        (first, _), (fd, _) = guest.regions
        guest.frontend.add_region(first, fd)
        unknown = Region(first.guest_addr + (1 << 36), first.size, first.user_addr + (1 << 36), 0)
        return refusal(guest.frontend, Request.REM_MEM_REG, unknown)
