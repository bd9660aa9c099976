"""Descriptor chains that have no end, leave memory, or go the wrong way."""

from __future__ import annotations

from typing import Any

from vq import virtio as v
from vq.check.cases import each
from vq.check.guest import A_BYTES, B_BYTES, DATA, GAP, PAGE, A, B
from vq.check.raw_ring import NEXT, WRITE, Row
from vq.check.registry import check
from vq.check.target import Target

DESCRIPTORS = "VIRTIO 1.3, 2.7.5"
NUM = 64
END = 1 << 64
PACKED = (v.VIRTIO_F_RING_PACKED,)

# Where a buffer of 4096 bytes may not lie.
BAD_PLACES = {
    "at 0": (0, PAGE),
    "in a gap": (GAP + PAGE, PAGE),
    "over the end of memory": (GAP - 16, PAGE),
    "one byte too long": (B, B_BYTES + 1),
    "in front of memory": (A - 16, PAGE),
    "end overflows": (END - 16, PAGE),
    "at the last address": (END - 1, 1),
    "of 2^32 - 1 bytes": (DATA, 0xFFFFFFFF),
    "of 2^31 bytes": (DATA, 0x80000000),
    "a user address": (0x7E12_0000_0000, PAGE),
}


def offered(target: Target, rows: list[Row], **options: Any) -> str:
    """Offer a chain on a running ring; tells what became of it."""
    with target.guest(num=NUM, **options) as guest:
        ring = guest.raw()
        ring.chain(rows)
        return guest.aftermath(ring)


def _replaced(target: Target, place: tuple[int, int], at: int, layout: str) -> str:
    """Offer a valid request of which one descriptor lies elsewhere."""
    with target.guest(num=NUM, layout=layout) as guest:
        rows = target.driving.request(guest)
        at %= len(rows)
        rows[at] = (*place, rows[at][2])
        ring = guest.raw()
        ring.chain(rows)
        return guest.aftermath(ring)


def _places(target: Target, layout: str) -> str:
    parts = {"first": 0} | ({"data": 1, "status": 2} if target.device == "blk" else {})
    cases = {
        f"{part} descriptor {place}": (where, at) for part, at in parts.items() for place, where in BAD_PLACES.items()
    }
    return each(target, cases, lambda case: _replaced(target, case[0], case[1], layout))


@check(DESCRIPTORS)
def addresses(target: Target) -> str:
    """Descriptors that point outside memory, or leave it (split)."""
    return _places(target, "split")


@check("VIRTIO 1.3, 2.8.5", features=PACKED)
def packed_addresses(target: Target) -> str:
    """Descriptors that point outside memory, or leave it (packed)."""
    return _places(target, "packed")


@check(DESCRIPTORS)
def loops(target: Target) -> str:
    """Chains without an end: a descriptor that follows itself, two that follow each other, empty ones."""

    def act(case: tuple[list[int], int]) -> str:
        cycle, length = case
        with target.guest(num=NUM) as guest:
            ring = guest.raw()
            for slot, after in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
                ring.put(slot, (DATA, length, NEXT), after)
            ring.offer(0)
            return guest.aftermath(ring)

    cases = {
        f"over {len(cycle)} of {length} bytes": (cycle, length)
        for cycle in ([0], [0, 1], list(range(NUM)))
        for length in (0, 1, PAGE)
    }
    return each(target, cases, act)


@check(DESCRIPTORS)
def next_outside(target: Target) -> str:
    """A next outside the descriptor table."""

    def act(after: int) -> str:
        with target.guest(num=NUM) as guest:
            ring = guest.raw()
            ring.put(0, (DATA, 16, NEXT), after)
            ring.offer(0)
            return guest.aftermath(ring)

    return each(target, {f"{after}": after for after in (NUM, NUM + 1, 0x7FFF, 0xFFFF)}, act)


@check("VIRTIO 1.3, 2.7.4.2")
def directions(target: Target) -> str:
    """Readable descriptors behind writable ones, only writable ones, only readable ones."""
    readable, writable = (DATA, 64, 0), (DATA + PAGE, 64, WRITE)
    cases = {
        "readable behind writable": [writable, readable],
        "in turns": [readable, writable, readable, writable],
        "only writable": [writable],
        "only readable": [readable],
    }
    return each(target, cases, lambda rows: offered(target, rows))


@check(DESCRIPTORS)
def lengths(target: Target) -> str:
    """Empty descriptors, and lengths whose sum has more than 32 bits."""
    cases = {
        "one of no bytes": [(DATA, 0, 0)],
        "many of no bytes": [(DATA, 0, 0)] * (NUM - 1),
        "sum of 2^32": [(DATA, 0x80000000, 0), (DATA, 0x80000000, 0)],
        "writable sum of 2^32": [(DATA, 0x80000000, WRITE), (DATA, 0x80000000, WRITE)],
        "sum of 2^33": [(DATA, 0xFFFFFFFF, 0)] * 3,
        "all of memory": [(A, A_BYTES, 0)],
    }
    return each(target, cases, lambda rows: offered(target, rows))


@check(DESCRIPTORS)
def over_the_ring(target: Target) -> str:
    """Buffers in the ring itself."""

    def act(part: int) -> str:
        with target.guest(num=NUM) as guest:
            where = guest.queues[guest.victim].guest_addresses[part]
            rows = [(where, 64, flags) for _, _, flags in target.driving.request(guest)]
            ring = guest.raw()
            ring.chain(rows)
            return guest.aftermath(ring)

    return each(target, {"descriptor table": 0, "available ring": 1, "used ring": 2}, act)
