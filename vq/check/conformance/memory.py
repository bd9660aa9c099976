"""The memory table: guest addresses, user addresses, offsets, replacement."""

from __future__ import annotations

from vq import virtio as v
from vq.check.devices import frame, header_bytes, net
from vq.check.guest import B
from vq.check.registry import check
from vq.check.target import Target
from vq.message import Request

SECTION = "vhost-user, Memory regions description"


@check(SECTION)
def translation(target: Target) -> None:
    """Rings are found by user addresses and buffers by guest addresses, in several regions."""
    with target.guest() as guest:
        target.driving.exchange(guest)


@check(SECTION)
def offsets(target: Target) -> None:
    """A region may begin inside its file."""
    with target.guest(running=False) as guest:
        guest.memory.add_region(1 << 20, mmap_offset=0x5000)
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)


@check(SECTION)
def eight_regions(target: Target) -> None:
    """A table of eight regions, which every front-end may send, is taken."""
    with target.guest(running=False) as guest:
        for _ in range(6):
            guest.memory.add_region(1 << 16)
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)


@check("vhost-user, Front-end message types: SET_MEM_TABLE")
def again_while_running(target: Target) -> None:
    """The same table again, and one with a region more, change nothing for running rings (memory hot-plug)."""
    with target.guest() as guest:
        target.driving.exchange(guest)
        guest.share()
        guest.memory.add_region(1 << 20)
        guest.share()
        if target.device == "any":
            return
        target.driving.exchange(guest)


@check("vhost-user, Front-end message types: SET_MEM_TABLE", device="net")
def buffers_across_regions(target: Target) -> None:
    """A buffer over the border of two regions that are neighbours for the guest only is read right."""
    with target.guest() as guest:
        packet = frame(7, 200)
        data = bytes(header_bytes(guest)) + packet
        guest.memory.view(B - 100, 100)[:] = data[:100]
        guest.memory.view(B, len(data) - 100)[:] = data[100:]
        net(target).send_parts(guest, [(B - 100, len(data))], packet)


@check("vhost-user, Front-end message types: SET_MEM_TABLE", protocol=(v.VHOST_USER_PROTOCOL_F_REPLY_ACK,))
def shrinks_and_grows(target: Target) -> None:
    """A table replaces the one before as a whole."""
    with target.guest(running=False) as guest:
        regions, fds = guest.regions
        for count in (2, 1, 2):
            guest.frontend.request(Request.SET_MEM_TABLE, tuple(regions[:count]), fds[:count])
        guest.start_all()
        target.driving.exchange(guest)


@check(SECTION)
def same_addresses(target: Target) -> None:
    """Guest and user addresses may be the same, as virtio-user and libblkio have them."""
    with target.guest(identical=True) as guest:
        target.driving.exchange(guest)
