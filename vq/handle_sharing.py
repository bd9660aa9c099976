"""Handlers of the session: device state, shared objects, and the shared memory regions of a device.

Spec: vhost-user, "Migrating back-end state", VHOST_USER_GET_SHARED_OBJECT, VHOST_USER_GET_SHMEM_CONFIG.
"""

from __future__ import annotations

import os
from typing import Any, Final

from vq import effects as e
from vq.errors import FrontendError, VqError
from vq.message import Message
from vq.payload import SHMEM_REGIONS_MAX, Transfer
from vq.session_state import SessionState

STATE_NO_FD: Final = 1 << 8  # the front-end's own pipe is used
STATE_FAILED: Final = 1
SAVE: Final = 0
LOAD: Final = 1
STOPPED: Final = 0  # the only phase that there is


def set_device_state_fd(session: SessionState, message: Message) -> int:
    """Begin to save or load the device's state, while it stands still."""
    transfer: Transfer = message.payload
    try:
        if not session.suspended:
            raise FrontendError(message.name, "device", "running", "stop all rings first")
        if transfer.phase != STOPPED:
            raise FrontendError(message.name, "phase", transfer.phase, "0 (stopped) is the only one")
        if transfer.direction not in (SAVE, LOAD):
            raise FrontendError(message.name, "direction", transfer.direction, "0 saves, 1 loads")
        effect = e.SaveState if transfer.direction == SAVE else e.LoadState
        session.apply(effect(message.fds[0]))
    except VqError as failure:
        session.warn(str(failure))
        return STATE_NO_FD | STATE_FAILED
    return STATE_NO_FD


def check_device_state(session: SessionState, _: Message) -> Any:
    """Tell how the transfer has ended; the answer waits for its end."""
    try:
        ok = session.apply(e.CheckState())
    except VqError as failure:
        session.warn(str(failure))
        ok = False
    return session.LATER if ok is None else int(not ok)


def get_shared_object(session: SessionState, message: Message) -> None:
    """Answer with the descriptor of an object that this device shares, or with none."""
    fd = session.apply(e.GetSharedObject(message.payload))
    if fd is not None:
        session.reply_fds.append(os.dup(fd))


def get_shmem_config(session: SessionState, _: Message) -> tuple[int, ...]:
    """Tell which shared memory regions the device has, always the same."""
    sizes = dict(session.offer.shmem)
    return (len(sizes), *(sizes.get(shmid, 0) for shmid in range(SHMEM_REGIONS_MAX)))
