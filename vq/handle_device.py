"""Handlers of the session: the device behind the rings.

Spec: vhost-user, "Front-end message types"; VIRTIO 1.3, 5.1.
"""

from __future__ import annotations

import sys
from typing import Final

from vq import effects as e
from vq.errors import FrontendError, VqError
from vq.handle_inflight import forget_inflight
from vq.handle_rings import enable, stop
from vq.message import Message
from vq.payload import CONFIG_MAX, Config
from vq.session_state import SessionState

MTU_MIN: Final = 68
MTU_MAX: Final = 65535


def send_rarp(session: SessionState, message: Message) -> None:
    """Announce the guest's address to the network side."""
    mac = message.payload.to_bytes(8, sys.byteorder)[:6]
    if any(mac) and not mac[0] & 1:  # a zero or multicast source address announces nobody
        session.apply(e.SendRarp(mac))


def net_set_mtu(session: SessionState, message: Message) -> None:
    """Take over the guest's MTU."""
    if not MTU_MIN <= message.payload <= MTU_MAX:
        raise FrontendError(message.name, "mtu", message.payload, f"it must be {MTU_MIN} to {MTU_MAX} bytes")
    session.apply(e.SetMtu(message.payload))


def get_config(session: SessionState, message: Message) -> Config | None:
    """Answer with as many bytes as were asked for; a failure has no other sign than an empty reply."""
    asked: Config = message.payload
    space = session.offer.config_size
    if asked.offset >= space or not 1 <= len(asked.data) <= CONFIG_MAX - asked.offset:
        session.warn(f"{message.name}: {len(asked.data)} bytes at {asked.offset}; the configuration space has {space}")
        return None
    size = min(len(asked.data), space - asked.offset)
    try:
        data: bytes = session.apply(e.ConfigRead(asked.offset, size))
    except VqError as failure:
        session.warn(f"{message.name}: {failure}")
        return None
    # QEMU may know a longer layout than ours: the rest reads as zero.
    return Config(asked.offset, asked.flags, data.ljust(len(asked.data), b"\0"))


def set_config(session: SessionState, message: Message) -> None:
    """Write into the configuration space; whether a field can be written is up to the device."""
    part: Config = message.payload
    space = session.offer.config_size
    if not part.data or part.offset + len(part.data) > space:
        value = f"{len(part.data)} bytes at {part.offset}"
        raise FrontendError(message.name, "range", value, f"the configuration space has {space} bytes")
    if part.flags not in (0, 1, 2):
        raise FrontendError(message.name, "flags", f"{part.flags:#x}", "0 is a write, 1 and 2 are a migration")
    # The specification's 1 and rust-vmm's 2 mean a migration, rust-vmm's 1 a plain write: only a device that stands
    # still can be the target of a migration.
    migration = part.flags != 0 and session.suspended
    session.apply(e.ConfigWrite(part.offset, part.data, migration))


def reset_device(session: SessionState, _: Message) -> None:
    """Stop and disable all rings and reset the device; negotiation, memory and connection stay."""
    with session.all_or_close():
        for ring in session.rings:
            stop(session, ring)
            enable(session, ring, False)
            ring.forget_layout()
        forget_inflight(session)  # it speaks of a driver that has gone
        session.apply(e.ResetDevice())
    session.status = 0
