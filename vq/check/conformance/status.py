"""The device status byte."""

from __future__ import annotations

from vq import virtio as v
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target

STATUS = (v.VHOST_USER_PROTOCOL_F_STATUS,)
ACKNOWLEDGE, DRIVER, FEATURES_OK = (
    v.VIRTIO_CONFIG_S_ACKNOWLEDGE, v.VIRTIO_CONFIG_S_DRIVER, v.VIRTIO_CONFIG_S_FEATURES_OK,
)  # fmt: skip


@check("vhost-user, Front-end message types: SET_STATUS; VIRTIO 1.3, 2.1", protocol=STATUS)
def round_trip(target: Target) -> None:
    """GET_STATUS gives back what SET_STATUS has set, as long as the device is content."""
    with target.negotiate() as frontend:
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK):
            frontend.set_status(status)
            found = frontend.get_status()
            if found != status:
                raise Failed(f"{found:#x} instead of {status:#x}")


@check("vhost-user, Front-end message types: SET_STATUS", protocol=STATUS)
def base_survives_status_0(target: Target) -> None:
    """GET_VRING_BASE after status 0 still tells where the ring stood: QEMU before 10 asks in this order."""
    with target.guest() as guest:
        if target.device != "any":
            target.driving.exchange(guest)
        for index in range(len(guest.queues)):
            guest.frontend.enable_ring(index, False)
        guest.frontend.set_status(0)
        victim = guest.victim
        base = guest.frontend.get_vring_base(victim)
        if base != guest.queues[victim].avail_idx:
            raise Failed(f"ring {victim}: {base} instead of {guest.queues[victim].avail_idx}")
