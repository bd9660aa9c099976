"""The configuration space."""

from __future__ import annotations

import struct

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target

CONFIG = (v.VHOST_USER_PROTOCOL_F_CONFIG,)
PROTOCOL = BASIC_PROTOCOL | v.mask(*CONFIG)
SECTION = "vhost-user, Front-end message types: GET_CONFIG"
BLK_BYTES = 60  # that QEMU asks for
NET_BYTES = 12


def _size(target: Target) -> int:
    return BLK_BYTES if target.device == "blk" else NET_BYTES if target.device == "net" else 8


@check(SECTION, protocol=CONFIG)
def same_again(target: Target) -> None:
    """GET_CONFIG answers as many bytes as were asked for, the same each time."""
    with target.negotiate(protocol=PROTOCOL) as frontend:
        first, second = (frontend.get_config(0, _size(target)) for _ in range(2))
        if first != second:
            raise Failed(f"{first.hex()}, then {second.hex()}")


@check(SECTION, protocol=CONFIG)
def parts(target: Target) -> None:
    """A part of the space is that part of the whole."""
    with target.negotiate(protocol=PROTOCOL) as frontend:
        whole = frontend.get_config(0, _size(target))
        for offset, size in ((0, 4), (4, 4), (2, 6)):
            part = frontend.get_config(offset, size)
            if part != whole[offset : offset + size]:
                raise Failed(f"{size} bytes at {offset}: {part.hex()}, in the whole {whole.hex()}")


@check("VIRTIO 1.3, 5.2.4", device="blk", protocol=CONFIG)
def blk_capacity(target: Target) -> str:
    """The configuration space tells a capacity, in sectors of 512 bytes."""
    with target.negotiate(protocol=PROTOCOL) as frontend:
        space = frontend.get_config(0, BLK_BYTES)
        (capacity,) = struct.unpack_from("<Q", space)
        if capacity == 0:
            raise Failed("it is 0")
        return f"{capacity} sectors"
