"""Packets through a network device, in all the forms that drivers give them."""

from __future__ import annotations

import struct
from typing import Any

from vq import virtio as v
from vq.check.cases import each
from vq.check.devices import frame, net
from vq.check.guest import BASIC_PROTOCOL
from vq.check.outcome import Failed, Skipped
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import asked
from vq.message import Request

SIZES = (60, 64, 65, 127, 256, 1000, 1514)
MERGEABLE = (v.VIRTIO_NET_F_MRG_RXBUF,)
PACKED = (v.VIRTIO_F_RING_PACKED,)
TRAFFIC = "VIRTIO 1.3, 5.1.6"
ROUNDS = 200  # more packets than the ring has entries


def _traffic(target: Target, **options: Any) -> str:
    with target.guest(**options) as guest:
        for number in range(ROUNDS):
            net(target).send(guest, frame(number, SIZES[number % len(SIZES)]))
    return f"{ROUNDS} packets {'out and back' if target.echoes else 'out; none came back, so only sending is checked'}"


@check(TRAFFIC, device="net")
def split(target: Target) -> str:
    """Packets over split rings."""
    return _traffic(target)


@check(TRAFFIC, device="net", features=PACKED)
def packed(target: Target) -> str:
    """Packets over packed rings."""
    return _traffic(target, layout="packed")


@check(TRAFFIC, device="net", features=MERGEABLE)
def mergeable(target: Target) -> str:
    """Packets with mergeable receive buffers."""
    return _traffic(target, features=v.mask(*MERGEABLE))


@check("VIRTIO 1.3, 2.7.10", device="net", features=(v.VIRTIO_F_EVENT_IDX,))
def event_idx(target: Target) -> str:
    """Packets with the event index."""
    return _traffic(target, features=v.mask(v.VIRTIO_F_EVENT_IDX))


@check("VIRTIO 1.3, 2.8.14", device="net", features=(v.VIRTIO_F_EVENT_IDX, *PACKED))
def packed_event_idx(target: Target) -> str:
    """Packets with descriptor events."""
    return _traffic(target, features=v.mask(v.VIRTIO_F_EVENT_IDX), layout="packed")


@check("VIRTIO 1.3, 2.7.9", device="net", features=(v.VIRTIO_F_IN_ORDER,))
def in_order(target: Target) -> str:
    """Packets in the order in which they were made available."""
    return _traffic(target, features=v.mask(v.VIRTIO_F_IN_ORDER))


@check("VIRTIO 1.3, 2.7.4", device="net")
def any_layout(target: Target) -> str:
    """A packet lies in any number of descriptors, the header in one of its own."""
    layouts = ["split", "packed"] if v.has(target.features, v.VIRTIO_F_RING_PACKED) else ["split"]

    def act(case: tuple[str, int]) -> str:
        layout, parts = case
        with target.guest(layout=layout) as guest:
            net(target).send(guest, frame(parts, 600), parts=parts)
        return "whole"

    cases = {f"{layout}, {parts + 1} descriptors": (layout, parts) for layout in layouts for parts in (2, 3, 17)}
    return each(target, cases, act)


@check("VIRTIO 1.3, 2.7.5.3", device="net", features=(v.VIRTIO_F_INDIRECT_DESC,))
def indirect(target: Target) -> None:
    """A packet's descriptors stand in an indirect table."""
    with target.guest(features=v.mask(v.VIRTIO_F_INDIRECT_DESC)) as guest:
        for parts in (1, 2, 16):
            net(target).send(guest, frame(parts, 600), parts=parts, indirect=True)


@check("vhost-user, Front-end message types: SEND_RARP", device="net", protocol=(v.VHOST_USER_PROTOCOL_F_RARP,))
def rarp(target: Target) -> None:
    """SEND_RARP is taken, before and while rings run."""
    wanted = BASIC_PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_RARP)
    mac = int.from_bytes(b"\x02\x00\x00\x00\x00\x01\x00\x00", "little")
    with target.guest(protocol=wanted) as guest:
        guest.frontend.request(Request.SEND_RARP, mac)
        target.driving.exchange(guest)


@check(
    "vhost-user, Front-end message types: NET_SET_MTU",
    device="net",
    features=(v.VIRTIO_NET_F_MTU,),
    protocol=(v.VHOST_USER_PROTOCOL_F_MTU, v.VHOST_USER_PROTOCOL_F_REPLY_ACK),
)
def mtu(target: Target) -> None:
    """NET_SET_MTU takes 1500 before the start."""
    wanted = BASIC_PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_MTU)
    with target.guest(protocol=wanted, features=v.mask(v.VIRTIO_NET_F_MTU), running=False) as guest:
        asked(guest.frontend, Request.NET_SET_MTU, 1500)
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)


@check("VIRTIO 1.3, 5.1.6.4.1", device="net", features=(v.VIRTIO_F_VERSION_1,))
def num_buffers(target: Target) -> str:
    """The header of a packet in one receive buffer says so, with and without mergeable buffers."""

    def act(features: int) -> str:
        with target.guest(features=features) as guest:
            net(target).send(guest, frame(1))
            if not target.echoes:
                raise Skipped("the back-end does not echo, so no header can be seen")
            (count,) = struct.unpack_from("<H", net(target).header, 10)
            if count != 1:
                raise Failed(f"num_buffers is {count}")
            return "1"

    cases = {"not mergeable": 0}
    if v.has(target.features, v.VIRTIO_NET_F_MRG_RXBUF):
        cases["mergeable"] = v.mask(*MERGEABLE)
    return each(target, cases, act)


@check("vhost-user, Multiple queue support", device="net", protocol=(v.VHOST_USER_PROTOCOL_F_MQ,))
def pairs(target: Target) -> str:
    """The last queue pair starts and stops like the first."""
    with target.negotiate() as frontend:
        pairs = frontend.queue_num()
    if pairs < 2:
        return "one pair"
    with target.guest() as guest:
        for index in (2 * pairs - 2, 2 * pairs - 1):
            base = guest.frontend.get_vring_base(index)
            if base & 0x7FFF:
                raise Failed(f"ring {index} never ran and stands at {base}")
        return f"{pairs} pairs"
