"""Block requests that lie; nothing is ever written."""

from __future__ import annotations

import struct

from vq.check.cases import each
from vq.check.devices import read_sector
from vq.check.guest import DATA, Guest
from vq.check.outcome import Failed
from vq.check.raw_ring import WRITE, Row
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 5.2.6"
SECTORS = (1 << 55, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) // 512, (1 << 64) // 512 - 1)


@check(SECTION, device="blk")
def sectors(target: Target) -> str:
    """Sectors beyond any disk, also such that overflow as bytes, are not read."""

    def act(sector: int) -> str:
        with target.guest() as guest:
            status, _ = read_sector(guest, sector)
            if status == 0:
                raise Failed("it is read")
            return f"status {status}"

    return each(target, {f"sector {sector:#x}": sector for sector in SECTORS}, act)


@check(SECTION, device="blk")
def shapes(target: Target) -> str:
    """Requests without a header, with half of one, without a status, with data of odd length."""

    def header(guest: Guest) -> int:
        return int(guest.block(struct.pack("<IIQ", 0, 0, 0)).guest_addr)

    def act(case: list[Row]) -> str:
        with target.guest(num=64) as guest:
            head = header(guest)
            ring = guest.raw()
            ring.chain([(head if addr == 0 else addr, length, flags) for addr, length, flags in case])
            return guest.aftermath(ring)

    data, status = DATA, DATA + (1 << 20)
    cases: dict[str, list[Row]] = {
        "nothing writable": [(0, 16, 0)],
        "nothing readable": [(data, 512, WRITE), (status, 1, WRITE)],
        "half a header": [(0, 8, 0), (data, 512, WRITE), (status, 1, WRITE)],
        "no data": [(0, 16, 0), (status, 1, WRITE)],
        "odd length": [(0, 16, 0), (data, 511, WRITE), (status, 1, WRITE)],
        "1 byte of data": [(0, 16, 0), (data, 1, WRITE), (status, 1, WRITE)],
        "empty status": [(0, 16, 0), (data, 512, WRITE), (status, 0, WRITE)],
        "status in the data": [(0, 16, 0), (data, 513, WRITE)],
        "62 pieces": [(0, 16, 0), *[(data, 512, WRITE)] * 61, (status, 1, WRITE)],
    }
    return each(target, cases, act)


@check("VIRTIO 1.3, 5.2.6.1", device="blk")
def small_identity(target: Target) -> str:
    """GET_ID into a single byte does not write behind it."""
    with target.guest() as guest:
        status, data = read_sector(guest, 0, 8, 1)
        if len(data) > 1:
            raise Failed(f"{len(data)} bytes")
        return f"status {status}"
