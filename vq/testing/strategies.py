"""Hypothesis strategies: Ethernet frames, right and cut short, and the shapes of descriptor chains."""

from __future__ import annotations

import struct
from itertools import pairwise

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("vq.testing.strategies needs Hypothesis: pip install hypothesis") from error

__all__ = ["addresses", "chains", "frames", "splits"]

FRAME_MIN = 14  # bytes: two addresses and a type
FRAME_MAX = 1514  # bytes of Ethernet without a checksum
ARP, IPV4, IPV6, VLAN = 0x0806, 0x0800, 0x86DD, 0x8100
TCP, UDP = 6, 17


def addresses() -> st.SearchStrategy[bytes]:
    """MAC addresses: unicast, multicast and broadcast."""
    return st.one_of(
        st.binary(min_size=5, max_size=5).map(lambda rest: b"\x02" + rest),
        st.binary(min_size=5, max_size=5).map(lambda rest: b"\x03" + rest),
        st.just(b"\xff" * 6),
    )


def checksum(data: bytes) -> int:
    """The checksum of the Internet protocols (RFC 1071)."""
    words: tuple[int, ...] = struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@st.composite
def _transport(draw: st.DrawFn, room: int) -> tuple[int, bytes]:
    """Protocol number, and header with payload; TCP and UDP without a checksum, or a number for neither."""
    kind = draw(st.sampled_from([TCP, UDP, None]))
    source, target = draw(st.integers(0, 65535)), draw(st.integers(0, 65535))
    header = {TCP: 20, UDP: 8, None: 0}[kind]
    payload = draw(st.binary(max_size=max(0, room - header)))
    if kind == TCP:
        flags = draw(st.integers(0, 511))
        return TCP, struct.pack(">HHIIHHHH", source, target, 1, 0, 5 << 12 | flags, 65535, 0, 0) + payload
    if kind == UDP:
        return UDP, struct.pack(">HHHH", source, target, 8 + len(payload), 0) + payload
    return draw(st.sampled_from([1, 47, 89, 132])), payload


@st.composite
def _ipv4(draw: st.DrawFn, room: int) -> bytes:
    protocol, body = draw(_transport(room - 20))
    ends = draw(st.binary(min_size=8, max_size=8))
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0) + ends
    return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + body


@st.composite
def _ipv6(draw: st.DrawFn, room: int) -> bytes:
    protocol, body = draw(_transport(room - 40))
    ends = draw(st.binary(min_size=32, max_size=32))
    return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + ends + body


@st.composite
def frames(draw: st.DrawFn, *, max_size: int = FRAME_MAX, cut: bool = False) -> bytes:
    """Ethernet frames: IPv4 and IPv6 with TCP, UDP or something else, ARP, or any bytes; with or without a VLAN tag.

    Parameters
    ----------
    draw
        Given by Hypothesis.
    max_size
        Bytes; at least 64, so that every kind has room.
    cut
        Also give frames that end early, down to nothing: what a hostile sender may send.

    Returns
    -------
    SearchStrategy of bytes
        Lengths and checksums of IPv4 headers are right, unless the frame was cut; those of TCP and UDP are left out.
    """
    if max_size < 64:
        raise ValueError(f"max_size is {max_size}; a frame of every kind needs 64 bytes")
    tag = draw(st.one_of(st.just(b""), st.integers(0, 65535).map(lambda tci: struct.pack(">HH", VLAN, tci))))
    head = draw(addresses()) + draw(addresses()) + tag
    room = max_size - len(head) - 2
    kind = draw(st.sampled_from([IPV4, IPV6, ARP, 0x88B5]))  # the last one is for experiments
    if kind == IPV4:
        body = draw(_ipv4(room))
    elif kind == IPV6:
        body = draw(_ipv6(room))
    elif kind == ARP:
        body = struct.pack(">HHBBH", 1, IPV4, 6, 4, draw(st.integers(1, 2))) + draw(st.binary(min_size=20, max_size=20))
    else:
        body = draw(st.binary(max_size=room))
    frame = head + struct.pack(">H", kind) + body
    return frame[: draw(st.integers(0, len(frame)))] if cut else frame


@st.composite
def splits(draw: st.DrawFn, data: bytes, *, most: int = 8) -> list[bytes]:
    """Ways to spread bytes, at least one, over up to `most` descriptors, none of them empty."""
    cuts = draw(st.sets(st.sampled_from(range(1, len(data))), max_size=most - 1)) if len(data) > 1 else set()
    ends = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in pairwise(ends)]


@st.composite
def chains(draw: st.DrawFn, *, max_bytes: int = 4096, most: int = 8) -> tuple[list[bytes], list[int]]:
    """Descriptor chains for `RingDriver.add`: readable parts, and the lengths of writable ones; never both empty."""
    readable = draw(st.lists(st.binary(min_size=1, max_size=max(1, max_bytes // most)), max_size=most))
    writable = draw(st.lists(st.integers(1, max(1, max_bytes // most)), min_size=0 if readable else 1, max_size=most))
    return readable, writable
