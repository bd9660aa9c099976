"""Packets whose header lies."""

from __future__ import annotations

import struct

from vq import virtio as v
from vq.check.cases import each
from vq.check.devices import frame
from vq.check.guest import DATA
from vq.check.raw_ring import WRITE, RawRing, Row
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 5.1.6.2"
NEEDS_CSUM = 1
TCPV4, UDP, TCPV6, UDP_L4, ECN = 1, 3, 4, 5, 0x80
OFFLOADS = v.mask(
    v.VIRTIO_NET_F_CSUM, v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_HOST_TSO4, v.VIRTIO_NET_F_HOST_TSO6,
    v.VIRTIO_NET_F_HOST_ECN, v.VIRTIO_NET_F_HOST_UFO, v.VIRTIO_NET_F_HOST_USO,
)  # fmt: skip


def _header(
    flags: int = 0, gso_type: int = 0, hdr_len: int = 0, gso_size: int = 0, csum_start: int = 0, csum_offset: int = 0
) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, 0)


@check(SECTION, device="net")
def headers(target: Target) -> str:
    """Checksums behind the packet, segments of no bytes, unknown types."""
    cases = {
        "csum_start behind the packet": _header(NEEDS_CSUM, csum_start=0xFFFF),
        "csum_offset wraps": _header(NEEDS_CSUM, csum_start=34, csum_offset=0xFFFF),
        "both wrap": _header(NEEDS_CSUM, csum_start=0xFFFF, csum_offset=0xFFFF),
        "checksum over the last byte": _header(NEEDS_CSUM, csum_start=90, csum_offset=5),
        "gso_size 0": _header(NEEDS_CSUM, TCPV4, 54, 0, 34, 16),
        "gso_size 1": _header(NEEDS_CSUM, TCPV4, 54, 1, 34, 16),
        "hdr_len 65535": _header(NEEDS_CSUM, TCPV6, 0xFFFF, 1000, 54, 16),
        "unknown gso_type": _header(NEEDS_CSUM, 0x7F, 54, 1000, 34, 16),
        "UFO": _header(NEEDS_CSUM, UDP, 42, 100, 34, 6),
        "USO and ECN": _header(NEEDS_CSUM, UDP_L4 | ECN, 42, 100, 34, 6),
        "all ones": b"\xff" * 12,
    }

    def act(header: bytes) -> str:
        with target.guest(features=OFFLOADS) as guest:
            data = guest.block(header + frame(5, 96))
            ring = guest.raw()
            ring.chain([(data.guest_addr, data.size, 0)])
            return guest.aftermath(ring)

    return each(target, cases, act)


@check(SECTION, device="net")
def sizes(target: Target) -> str:
    """Packets shorter than the header, only the header, of one byte, larger than any packet."""
    cases: dict[str, list[Row]] = {
        "1 byte": [(DATA, 1, 0)], "11 bytes": [(DATA, 11, 0)], "only the header": [(DATA, 12, 0)],
        "13 bytes": [(DATA, 13, 0)],
        "header in pieces of a byte": [(DATA + at, 1, 0) for at in range(30)],
        "1 MiB": [(DATA, 1 << 20, 0)], "64 times 64 KiB": [(DATA, 0x10000, 0)] * 64,
    }  # fmt: skip

    def act(rows: list[Row]) -> str:
        with target.guest(num=64) as guest:
            ring = guest.raw()
            ring.chain(rows)
            return guest.aftermath(ring)

    return each(target, cases, act)


@check("VIRTIO 1.3, 5.1.6.3", device="net")
def receive_buffers(target: Target) -> str:
    """Receive buffers that are tiny, not writable, outside memory, or have no end."""
    cases: dict[str, list[Row]] = {
        "1 byte": [(DATA, 1, WRITE)], "header only": [(DATA, 12, WRITE)], "not writable": [(DATA, 2048, 0)],
        "outside": [(0, 2048, WRITE)], "overflow": [((1 << 64) - 16, 2048, WRITE)], "2^32 - 1 bytes":
        [(DATA, 0xFFFFFFFF, WRITE)], "63 of a byte": [(DATA + at, 1, WRITE) for at in range(63)],
    }  # fmt: skip

    def act(case: tuple[list[Row], int]) -> str:
        rows, features = case
        with target.guest(num=64, features=features) as guest:
            receive = RawRing(guest.queues[0])
            receive.chain(rows)
            guest.kick(0)
            ring = guest.raw()
            data = guest.block(bytes(12) + frame(6, 600))
            ring.chain([(data.guest_addr, data.size, 0)])
            return guest.aftermath(ring)

    mergeable = v.mask(v.VIRTIO_NET_F_MRG_RXBUF)
    ways = {"": 0, ", mergeable": mergeable}
    every = {f"{name}{way}": (rows, bits) for name, rows in cases.items() for way, bits in ways.items()}
    return each(target, every, act)
