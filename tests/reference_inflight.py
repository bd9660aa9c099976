"""What an in-flight region says after a crash, in plain Python, written from the specification for reading.

It knows region and ring by their bytes only: no line of it is shared with the code under test, and it changes nothing.
Spec: vhost-user, "Inflight I/O tracking".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

SPLIT, SPLIT_ENTRY = struct.Struct("<QHHHH"), struct.Struct("<B5xHQ")
PACKED, PACKED_ENTRY = struct.Struct("<QHHHHHHBB10x"), struct.Struct("<BxHHHQHHIQ")
NEXT, AVAIL, USED = 1, 1 << 7, 1 << 15


class ContradictionError(Exception):
    """The region cannot have been written by a back-end that keeps the rules, or does not belong to this ring."""


class Request(NamedTuple):
    """A request that was taken and not given back."""

    counter: int
    id: int
    slots: int
    descriptors: tuple[tuple[int, int, int], ...]  # packed: address, length, flags with NEXT alone made right


class Found(NamedTuple):
    """Where the ring goes on, and what is to be done once more, oldest first."""

    used: int  # split: index; packed: slot, and the wrap counter in bit 15
    avail: int
    requests: list[Request]


def check(holds: bool, what: str) -> None:
    """Raise if it does not hold."""
    if not holds:
        raise ContradictionError(what)


def in_order(requests: list[Request]) -> list[Request]:
    """By ascending counter, of which each stands once."""
    check(len({request.counter for request in requests}) == len(requests), "counters equal")
    check(all(request.counter < 2**64 - 1 for request in requests), "counter at its end")
    return sorted(requests)


def split_size(entries: int) -> int:
    return (SPLIT.size + entries * SPLIT_ENTRY.size + 63) // 64 * 64


def packed_size(entries: int) -> int:
    return (PACKED.size + entries * PACKED_ENTRY.size + 63) // 64 * 64


def split(region: bytes, entries: int, num: int, used_idx: int) -> Found | None:
    """Read a split region, given `used->idx`; None if it is fresh."""
    _, version, _, head, recorded = SPLIT.unpack_from(region)
    if version == 0:
        return None
    check(version == 1, "version")
    rows = list(SPLIT_ENTRY.iter_unpack(region[SPLIT.size :][: entries * SPLIT_ENTRY.size]))
    marks = [row[0] for row in rows]
    check(set(marks) <= {0, 1}, "mark")
    exposed = (used_idx - recorded) % 65536
    if any(marks):
        check(exposed <= num, "used index far ahead")
        for _ in range(exposed):  # these were given back, and the crash came before that was noted
            check(head < entries, "last batch")
            marks[head] = 0
            head = rows[head][1]
    check(not any(marks[num:]), "head")
    requests = in_order([Request(rows[i][2], i, 1, ()) for i in range(num) if marks[i]])
    return Found(used_idx, (used_idx + len(requests)) % 65536, requests)


def place(slot: int, wrap: int, more: int, num: int) -> int:
    """Return the place `more` slots on."""
    slot += more
    return slot - num | (1 - wrap) << 15 if slot >= num else slot | wrap << 15


def packed(region: bytes, entries: int, num: int, flags: list[int]) -> Found | None:
    """Read a packed region, given the flags of all descriptors of the ring; None if it is fresh."""
    _, version, _, free, old_free, slot, old_slot, wrap, old_wrap = PACKED.unpack_from(region)
    if version == 0:
        return None
    check(version == 1, "version")
    rows = list(PACKED_ENTRY.iter_unpack(region[PACKED.size :][: entries * PACKED_ENTRY.size]))
    check(slot < num and old_slot < num and wrap < 2 and old_wrap < 2, "used place")
    check(free <= entries and old_free <= entries, "free list")
    if (slot, wrap) != (old_slot, old_wrap) and flags[old_slot] & (AVAIL | USED) != (AVAIL if old_wrap else USED):
        old_slot, old_wrap, old_free = slot, wrap, free  # the batch was exposed: what was to follow is done now
    seen = set()
    index = old_free
    while index < entries:
        check(index not in seen, "free list in a loop")
        seen.add(index)
        index = rows[index][1]
    marks = [0 if i in seen else row[0] for i, row in enumerate(rows)]
    check(set(marks) <= {0, 1}, "mark")
    requests = []
    ids: set[int] = set()
    for head in [i for i, mark in enumerate(marks) if mark]:
        index, descriptors = head, []
        _, _, last, count, counter, *_ = rows[head]
        check(1 <= count <= num - sum(request.slots for request in requests), "number of descriptors")
        for i in range(count):
            check(index < entries and index not in seen and not (i and marks[index]), "chain")
            seen.add(index)
            _, after, _, _, _, buffer_id, flag, length, addr = rows[index]
            descriptors.append((addr, length, flag & ~NEXT | (NEXT if i + 1 < count else 0)))
            ended, index = index, after
        check(ended == last, "end of a chain")
        check(buffer_id < num and buffer_id not in ids, "buffer id")
        ids.add(buffer_id)
        requests.append(Request(counter, buffer_id, count, tuple(descriptors)))
    check(len(seen) == entries, "entries lost")
    taken = sum(request.slots for request in requests)
    return Found(old_slot | old_wrap << 15, place(old_slot, old_wrap, taken, num), in_order(requests))
