"""The saved state of a device as bytes: a head that tells what it is, and checked fields.

What is loaded comes from another host and is believed no more than any message: magic, version, kind of device, length
and checksum must be right, and each field must lie in its range, which the device's type says (`msgspec.Meta`).

Layout, little-endian: magic (8 bytes), version u16, virtio device id u16, length of the body u32, CRC-32 of the body
u32; then the body, a msgpack map by field name. Unknown fields are ignored and new ones have defaults, so that versions
that are neighbours understand each other.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, TypeVar

import msgspec

from vq.errors import FrontendError

__all__ = ["STATE_VERSION", "pack_state", "unpack_state"]

MAGIC: Final = b"vq-state"
STATE_VERSION: Final = 1
HEAD: Final = struct.Struct("<8sHHII")

State = TypeVar("State", bound=msgspec.Struct)


def pack_state(device_id: int, state: msgspec.Struct) -> bytes:
    """Lay a state out.

    Parameters
    ----------
    device_id
        Kind of the device (VIRTIO 1.3, 5).
    state
        Its fields.
    """
    body = msgspec.msgpack.encode(state)
    return HEAD.pack(MAGIC, STATE_VERSION, device_id, len(body), zlib.crc32(body)) + body


def unpack_state(data: bytes, device_id: int, kind: type[State]) -> State:
    """Read a state.

    Parameters
    ----------
    data
        All that came.
    device_id
        Kind of the device that it must be of.
    kind
        Type of the fields.

    Raises
    ------
    FrontendError
        Anything about it is wrong.
    """

    def wrong(field: str, value: object, limit: str) -> FrontendError:
        return FrontendError("device state", field, value, limit)

    if len(data) < HEAD.size:
        raise wrong("length", len(data), f"it has {HEAD.size} bytes at least")
    magic, version, found_id, length, checksum = HEAD.unpack_from(data)
    body = data[HEAD.size :]
    if magic != MAGIC:
        raise wrong("magic", magic, "this is no state of vq")
    if version != STATE_VERSION:
        raise wrong("version", version, f"this vq reads {STATE_VERSION}")
    if found_id != device_id:
        raise wrong("device id", found_id, f"this device is {device_id}")
    if length != len(body) or checksum != zlib.crc32(body):
        raise wrong("body", f"{len(body)} bytes", f"{length} bytes with the checksum {checksum:#x} were written")
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise wrong("body", "inconsistent", str(error)) from error
