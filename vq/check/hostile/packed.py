"""Packed rings whose descriptors contradict each other."""

from __future__ import annotations

from vq import virtio as v
from vq.check.cases import each
from vq.check.guest import DATA
from vq.check.raw_ring import NEXT, joined
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 2.8"
PACKED = (v.VIRTIO_F_RING_PACKED,)
NUM = 64


@check(SECTION, features=PACKED)
def buffer_ids(target: Target) -> str:
    """Buffer ids that no driver would give."""

    def act(number: int) -> str:
        with target.guest(num=NUM, layout="packed") as guest:
            ring = guest.raw()
            ring.slots(joined(target.driving.request(guest)), number)
            return guest.aftermath(ring)

    return each(target, {f"{number}": number for number in (NUM, 0x7FFF, 0xFFFF)}, act)


@check(SECTION, features=PACKED)
def endless_chain(target: Target) -> str:
    """Every descriptor of the ring says that the chain goes on."""

    def act(length: int) -> str:
        with target.guest(num=NUM, layout="packed") as guest:
            ring = guest.raw()
            ring.slots([(DATA, length, NEXT)] * NUM)
            return guest.aftermath(ring)

    return each(target, {f"of {length} bytes": length for length in (0, 1, 64)}, act)


@check(SECTION, features=PACKED)
def events(target: Target) -> str:
    """A driver event structure with reserved flags and a slot outside the ring."""

    def act(case: tuple[int, int]) -> str:
        with target.guest(num=NUM, layout="packed", features=v.mask(v.VIRTIO_F_EVENT_IDX)) as guest:
            guest.queues[guest.victim].driver_event[:] = case
            ring = guest.raw()
            ring.chain(target.driving.request(guest))
            return guest.aftermath(ring)

    cases = {"reserved flags": (0, 3), "all ones": (0xFFFF, 0xFFFF), "slot outside": (0x7FFF, 2)}
    return each(target, cases, act)
