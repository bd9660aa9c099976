"""Indirect tables."""

from __future__ import annotations

from collections.abc import Callable

from vq import virtio as v
from vq.check.cases import each
from vq.check.guest import DATA, GAP, PAGE, B, Guest
from vq.check.raw_ring import INDIRECT, NEXT, WRITE, Row, table
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 2.7.5.3"
FEATURE = (v.VIRTIO_F_INDIRECT_DESC,)
NUM = 64
END = 1 << 64


def _tabled(target: Target, make: Callable[[Guest], list[Row]], layout: str = "split") -> str:
    """Offer what is made in a fresh guest."""
    with target.guest(num=NUM, layout=layout, features=v.mask(*FEATURE)) as guest:
        rows = make(guest)
        ring = guest.raw()
        if ring.packed:
            ring.slots(rows)
        else:
            for number, row in enumerate(rows):
                ring.put(number, row, number + 1)
            ring.offer(0)
        return guest.aftermath(ring)


def _valid(guest: Guest) -> bytes:
    return table(guest.target.driving.request(guest), guest.queues[0].layout == "packed")


def _lengths(target: Target, layout: str) -> str:
    def act(length: int) -> str:
        return _tabled(target, lambda guest: [(guest.block(_valid(guest)).guest_addr, length, INDIRECT)], layout)

    sizes = (0, 1, 8, 15, 17, 0xFFFFFFF0, 0xFFFFFFFF, 16 * 40000)
    return each(target, {f"{size:#x} bytes": size for size in sizes}, act)


@check(SECTION, features=FEATURE)
def lengths(target: Target) -> str:
    """Tables of no entry, half an entry, more entries than memory has (split)."""
    return _lengths(target, "split")


@check("VIRTIO 1.3, 2.8.7", features=(*FEATURE, v.VIRTIO_F_RING_PACKED))
def packed_lengths(target: Target) -> str:
    """Tables of no entry, half an entry, more entries than memory has (packed)."""
    return _lengths(target, "packed")


@check(SECTION, features=FEATURE)
def places(target: Target) -> str:
    """Tables outside memory, half outside, over two regions."""

    def act(at: int) -> str:
        def make(guest: Guest) -> list[Row]:
            data = table([(DATA, 16, 0)] * 4, False)
            if at == B - 24:
                guest.memory.view(at, 24)[:] = data[:24]
                guest.memory.view(B, len(data) - 24)[:] = data[24:]
            return [(at, len(data), INDIRECT)]

        return _tabled(target, make)

    cases = {
        "at 0": 0, "in a gap": GAP + PAGE, "half outside": GAP - 24, "over two regions": B - 24,
        "at the end of all addresses": END - 32,
    }  # fmt: skip
    return each(target, cases, act)


@check(SECTION, features=FEATURE)
def nesting(target: Target) -> str:
    """A table inside a table, one that is its own entry, one that goes on in the ring."""

    def nested(guest: Guest) -> list[Row]:
        inner = guest.block(_valid(guest))
        outer = guest.block(table([(inner.guest_addr, inner.size, INDIRECT)], False))
        return [(outer.guest_addr, outer.size, INDIRECT)]

    def itself(guest: Guest) -> list[Row]:
        block = guest.block(bytes(16))
        memoryview(block)[:] = table([(block.guest_addr, 16, INDIRECT)], False)
        return [(block.guest_addr, 16, INDIRECT)]

    def goes_on(guest: Guest) -> list[Row]:
        block = guest.block(_valid(guest))
        return [(block.guest_addr, block.size, INDIRECT | NEXT), (DATA, 16, WRITE)]

    def the_ring(guest: Guest) -> list[Row]:
        return [(guest.queues[guest.victim].guest_addresses[0], 16 * NUM, INDIRECT)]

    cases = {"nested": nested, "itself": itself, "with next": goes_on, "the ring": the_ring}
    return each(target, cases, lambda make: _tabled(target, make))


@check(SECTION, features=FEATURE)
def loops(target: Target) -> str:
    """Entries that follow themselves or lie outside the table."""

    def act(after: int) -> str:
        def make(guest: Guest) -> list[Row]:
            first = bytearray(table([(DATA, 16, 0), (DATA, 16, 0)], False))
            first[14:16] = after.to_bytes(2, "little")
            return [(guest.block(bytes(first)).guest_addr, 32, INDIRECT)]

        return _tabled(target, make)

    return each(target, {f"next is {after}": after for after in (0, 2, 1000, 65535)}, act)


@check(SECTION, features=FEATURE)
def longest(target: Target) -> str:
    """A table of many more entries than the ring has, all of one byte."""

    def make(guest: Guest) -> list[Row]:
        block = guest.block(table([(DATA, 1, 0)] * 4000, False))
        return [(block.guest_addr, block.size, INDIRECT)]

    return _tabled(target, make)


@check(SECTION)
def not_negotiated(target: Target) -> str:
    """A table although INDIRECT_DESC was not negotiated."""
    with target.guest(num=NUM) as guest:
        block = guest.block(_valid(guest))
        ring = guest.raw()
        ring.put(0, (block.guest_addr, block.size, INDIRECT))
        ring.offer(0)
        return guest.aftermath(ring)
