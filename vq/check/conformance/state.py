"""Device state: saved and loaded through a pipe."""

from __future__ import annotations

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.errors import BackendError
from vq.frontend import Frontend
from vq.message import Request

STATE = (v.VHOST_USER_PROTOCOL_F_DEVICE_STATE,)
PROTOCOL = BASIC_PROTOCOL | v.mask(*STATE)
SECTION = "vhost-user, Migrating back-end state"


@check(SECTION, protocol=STATE)
def save_and_load(target: Target) -> str:
    """What a device saves it loads again, and then it works."""
    with target.negotiate(protocol=PROTOCOL) as frontend:
        state = frontend.save_state()
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        guest.frontend.load_state(state)
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)
    return f"{len(state)} bytes"


@check(SECTION, protocol=STATE)
def garbage(target: Target) -> None:
    """What is no state is refused, and the device works as before."""
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        if not _refused(guest.frontend, b"this is no state of any device" * 100):
            raise Failed("garbage was loaded")
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)


@check(SECTION, protocol=STATE)
def running(target: Target) -> None:
    """A device whose rings run neither saves nor loads."""
    with target.guest(protocol=PROTOCOL) as guest:
        try:
            guest.frontend.save_state()
        except BackendError:
            target.driving.exchange(guest)
            return
        raise Failed("a running device saved its state")


@check(SECTION + ": CHECK_DEVICE_STATE", protocol=STATE)
def check_without_transfer(target: Target) -> None:
    """CHECK_DEVICE_STATE without a transfer is an error."""
    with target.negotiate(protocol=PROTOCOL) as frontend:
        if frontend.request(Request.CHECK_DEVICE_STATE) == 0:
            raise Failed("it was answered with success")


def _refused(frontend: Frontend, state: bytes) -> bool:
    try:
        frontend.load_state(state)
    except BackendError:
        return True
    return False
