"""What a device makes of a descriptor chain, in plain Python, written from section 8.2 and 9 for reading.

Nothing here is shared with the code under test. Memory is a function from an address to its byte, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

NEXT, WRITE, INDIRECT = 1, 2, 4
TABLE_LIMIT = 1024
PACKET_MAX = 65553

Descriptor = tuple[int, int, int, int]
Byte = Callable[[int], int | None]


class BrokenError(Exception):
    """The ring breaks for this cause."""


@dataclass(frozen=True)
class Part:
    """One descriptor of length > 0."""

    addr: int
    length: int
    writable: bool


def read_table(byte: Byte, addr: int, index: int, packed: bool) -> Descriptor:
    """Read one entry of an indirect table; one of a packed table has a buffer id in front of its flags."""
    raw = [byte(addr + 16 * index + at) for at in range(16)]
    if None in raw:
        raise BrokenError("address outside the guest's memory")
    data = bytes(raw)  # type: ignore[arg-type]
    words = [int.from_bytes(data[a:b], "little") for a, b in ((0, 8), (8, 12), (12, 14), (14, 16))]
    return words[0], words[1], words[3 if packed else 2], words[2 if packed else 3]


def walk(ring: Sequence[Descriptor], byte: Byte, head: int, packed: bool = False) -> Iterator[Part]:
    """Go along a chain, a descriptor at a time, and raise where it breaks.

    A packed chain is given as a split one whose descriptors name their neighbours.
    """
    num = len(ring)
    if head >= num:
        raise BrokenError("head outside queue_size")
    index, left, size, table_addr = head, num, num, None
    seen_writable = False
    total = 0
    while True:
        if left == 0:
            raise BrokenError("more descriptors than a chain may have")
        left -= 1
        addr, length, flags, after = ring[index] if table_addr is None else read_table(byte, table_addr, index, packed)
        if table_addr is not None and packed:  # from end to end, whatever NEXT says
            flags, after = flags & ~NEXT | (NEXT if index + 1 < size else 0), index + 1
        if flags & INDIRECT:
            entries, rest = divmod(length, 16)
            if packed and index != head:
                raise BrokenError("malformed indirect descriptor")
            if table_addr is not None or flags & NEXT or length == 0 or rest or entries > max(TABLE_LIMIT, num):
                raise BrokenError("malformed indirect descriptor")
            if addr + length >= 1 << 64:
                raise BrokenError("address outside the guest's memory")
            table_addr, index, left, size = addr, 0, entries, entries
            continue
        if flags & NEXT and after >= size:
            raise BrokenError("next outside the descriptor table")
        if flags & WRITE:
            seen_writable = True
        elif seen_writable:
            raise BrokenError("device-readable descriptor after a device-writable one")
        total += length
        if total >= 1 << 32:
            raise BrokenError("descriptor chain of 2^32 bytes or more")
        if length:
            yield Part(addr, length, bool(flags & WRITE))
        if not flags & NEXT:
            return
        index = after


def present(byte: Byte, addr: int, length: int) -> bool:
    """Whether all of a range is in memory: its edges and every page, since regions are made of pages."""
    if addr + length > 1 << 64:
        return False
    spots = {addr, addr + length - 1, *range((addr | 4095) + 1, addr + length, 4096)} if length < 1 << 24 else {1 << 65}
    return all(byte(spot) is not None for spot in spots)


def send(ring: Sequence[Descriptor], byte: Byte, head: int, header_bytes: int, packed: bool = False) -> bytes | str:
    """What becomes of a chain on a transmitq: the packet, or why it is dropped. No offload was negotiated."""
    data = bytearray()
    length = 0
    for part in walk(ring, byte, head, packed):
        if part.writable:
            continue
        if not present(byte, part.addr, part.length):
            raise BrokenError("address outside the guest's memory")
        length += part.length
        if length <= header_bytes + PACKET_MAX:
            data += bytes(byte(addr) or 0 for addr in range(part.addr, part.addr + part.length))
    if length <= header_bytes:
        return "too_short"
    if length > header_bytes + PACKET_MAX:
        return "too_long"
    flags, gso_type = data[0], data[1]
    if flags & 1:
        return "bad_csum"
    if gso_type:
        return "bad_gso"
    return bytes(data[header_bytes:])


@dataclass
class Received:
    """What becomes of a packet on a receiveq: the used elements, and the bytes that are written."""

    used: list[tuple[int, int]]
    written: dict[int, int]


def receive(
    ring: Sequence[Descriptor],
    byte: Byte,
    heads: Sequence[int],
    packet: bytes,
    header_bytes: int,
    mergeable: bool,
    packed: bool = False,
    full: bool = False,
) -> Received | str:
    """Place a packet behind a header of zeroes into the chains at `heads`: as few as it takes, or why it is dropped.

    `full`: no other chain could be waiting behind these.
    """
    data = bytes(header_bytes) + packet
    places: list[int] = []
    used: list[tuple[int, int]] = []
    for head in heads:
        if used and not mergeable:
            return "too_long"
        writable = False
        before = len(places)
        for part in walk(ring, byte, head, packed):
            if len(places) == len(data):  # packed: the rest is walked all the same, as the end of a chain has its id
                continue
            if part.writable:
                writable = True
                need = min(part.length, len(data) - len(places))
                if part.addr + part.length > 1 << 64 or not present(byte, part.addr, need):
                    raise BrokenError("address outside the guest's memory")
                places += range(part.addr, part.addr + need)
            if len(places) == len(data) and not packed:
                break
        if not writable:
            raise BrokenError("descriptor chain without a buffer in the direction of the queue")
        used.append((head, len(places) - before))
        if len(places) == len(data):
            break
    else:
        if used and not mergeable:
            return "too_long"
        return "too_long" if full else "no_descriptors"
    if header_bytes == 12:
        data = data[:10] + len(used).to_bytes(2, "little") + data[12:]
    return Received(used, dict(zip(places, data, strict=True)))
