"""RESET_OWNER and RESET_DEVICE."""

from __future__ import annotations

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL
from vq.check.registry import check
from vq.check.target import Target
from vq.message import Request

RESET = (v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,)


@check("vhost-user, Front-end message types: RESET_DEVICE", protocol=RESET)
def device(target: Target) -> None:
    """After RESET_DEVICE the same connection sets the device up again."""
    with target.guest(protocol=BASIC_PROTOCOL | v.mask(*RESET)) as guest:
        target.driving.exchange(guest)
        guest.frontend.request(Request.RESET_DEVICE)
        guest.frontend.set_features(guest.frontend.features)
        for queue in guest.queues:
            queue.reset()
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)


@check("vhost-user, Front-end message types: RESET_OWNER (deprecated)")
def owner(target: Target) -> None:
    """RESET_OWNER, which old front-ends send at a device reset, leaves a connection that can be set up again."""
    with target.guest() as guest:
        guest.stop_all()
        guest.frontend.send(Request.RESET_OWNER)
        guest.frontend.request(Request.SET_OWNER)
        guest.frontend.set_features(guest.frontend.features)
        for queue in guest.queues:
            queue.reset()
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)
