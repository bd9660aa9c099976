"""Requests to a block device; nothing is ever written."""

from __future__ import annotations

import struct
from typing import Any

from vq import virtio as v
from vq.check.devices import read_sector
from vq.check.guest import BASIC_PROTOCOL
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 5.2.6"
VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID = 0, 4, 8
UNKNOWN = 0x4242
VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP = 0, 1, 2
VIRTIO_BLK_F_FLUSH = 9
CONFIG = (v.VHOST_USER_PROTOCOL_F_CONFIG,)


def _reads(target: Target, **options: Any) -> str:
    with target.guest(**options) as guest:
        found = set()
        for _ in range(100):
            status, data = read_sector(guest, 0)
            if status != VIRTIO_BLK_S_OK or len(data) != 512:
                raise Failed(f"status {status}, {len(data)} bytes of 512")
            found.add(data)
    if len(found) > 1:
        raise Failed("the same sector reads differently")
    return "100 reads"


@check(SECTION, device="blk")
def split(target: Target) -> str:
    """The first sector is read over split rings, always the same."""
    return _reads(target)


@check(SECTION, device="blk", features=(v.VIRTIO_F_RING_PACKED,))
def packed(target: Target) -> str:
    """The first sector is read over packed rings, always the same."""
    return _reads(target, layout="packed")


@check("VIRTIO 1.3, 2.7.10", device="blk", features=(v.VIRTIO_F_EVENT_IDX,))
def event_idx(target: Target) -> str:
    """The first sector is read with the event index."""
    return _reads(target, features=v.mask(v.VIRTIO_F_EVENT_IDX))


@check(SECTION, device="blk")
def identity(target: Target) -> str:
    """GET_ID gives 20 bytes, or is unsupported."""
    with target.guest() as guest:
        status, data = read_sector(guest, 0, VIRTIO_BLK_T_GET_ID, 20)
        if status not in (VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP):
            raise Failed(f"status {status}")
        return repr(data.rstrip(b"\0").decode(errors="replace")) if status == VIRTIO_BLK_S_OK else "unsupported"


@check(SECTION, device="blk", features=(VIRTIO_BLK_F_FLUSH,))
def flush(target: Target) -> None:
    """A FLUSH request succeeds."""
    with target.guest(features=v.mask(VIRTIO_BLK_F_FLUSH)) as guest:
        status, _ = read_sector(guest, 0, VIRTIO_BLK_T_FLUSH, 0)
        if status != VIRTIO_BLK_S_OK:
            raise Failed(f"status {status}")


@check(SECTION, device="blk")
def unknown_type(target: Target) -> None:
    """A request of unknown type is unsupported."""
    with target.guest() as guest:
        status, _ = read_sector(guest, 0, UNKNOWN, 512)
        if status != VIRTIO_BLK_S_UNSUPP:
            raise Failed(f"status {status}, not {VIRTIO_BLK_S_UNSUPP}")


@check(SECTION, device="blk", protocol=CONFIG)
def last_sector(target: Target) -> None:
    """The last sector of the capacity is read, the one behind it is not."""
    with target.guest(protocol=BASIC_PROTOCOL | v.mask(*CONFIG)) as guest:
        (capacity,) = struct.unpack("<Q", guest.frontend.get_config(0, 8))
        for sector, expected in ((capacity - 1, VIRTIO_BLK_S_OK), (capacity, VIRTIO_BLK_S_IOERR)):
            status, _ = read_sector(guest, sector)
            if status != expected:
                raise Failed(f"sector {sector} of {capacity}: status {status}, not {expected}")
