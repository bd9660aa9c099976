"""What the back-end offers, and that it stays with it."""

from __future__ import annotations

from typing import Final

from vq import virtio as v
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.message import Request

# A feature and those of which one at least must be offered with it. What needs CTRL_VQ is left out: front-ends keep the
# control queue to themselves, so many back-ends do not offer it.
NET_NEEDS: Final = {
    v.VIRTIO_NET_F_GUEST_TSO4: (v.VIRTIO_NET_F_GUEST_CSUM,),
    v.VIRTIO_NET_F_GUEST_TSO6: (v.VIRTIO_NET_F_GUEST_CSUM,),
    v.VIRTIO_NET_F_GUEST_UFO: (v.VIRTIO_NET_F_GUEST_CSUM,),
    v.VIRTIO_NET_F_GUEST_USO4: (v.VIRTIO_NET_F_GUEST_CSUM,),
    v.VIRTIO_NET_F_GUEST_USO6: (v.VIRTIO_NET_F_GUEST_CSUM,),
    v.VIRTIO_NET_F_GUEST_ECN: (v.VIRTIO_NET_F_GUEST_TSO4, v.VIRTIO_NET_F_GUEST_TSO6),
    v.VIRTIO_NET_F_HOST_TSO4: (v.VIRTIO_NET_F_CSUM,),
    v.VIRTIO_NET_F_HOST_TSO6: (v.VIRTIO_NET_F_CSUM,),
    v.VIRTIO_NET_F_HOST_UFO: (v.VIRTIO_NET_F_CSUM,),
    v.VIRTIO_NET_F_HOST_USO: (v.VIRTIO_NET_F_CSUM,),
    v.VIRTIO_NET_F_HOST_ECN: (v.VIRTIO_NET_F_HOST_TSO4, v.VIRTIO_NET_F_HOST_TSO6),
}
# All of these must be offered with the first.
PROTOCOL_NEEDS: Final = {
    v.VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD: (v.VHOST_USER_PROTOCOL_F_BACKEND_REQ,),
    v.VHOST_USER_PROTOCOL_F_HOST_NOTIFIER: (v.VHOST_USER_PROTOCOL_F_BACKEND_REQ,),
    v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS: (
        v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    ),
    v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN: (v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,),
}  # fmt: skip


@check("vhost-user, Feature bits")
def constant(target: Target) -> str:
    """The offer is the same each time, also on the next connection (migration and reconnection rely on it)."""
    with target.open() as frontend:
        found = {frontend.request(Request.GET_FEATURES) for _ in range(3)}
    with target.open() as frontend:
        found.add(frontend.request(Request.GET_FEATURES))
    if found != {target.features}:
        raise Failed("offers differ: " + ", ".join(f"{features:#x}" for features in sorted(found | {target.features})))
    return f"{target.features:#x}"


@check("VIRTIO 1.3, 6.1")
def version_1(target: Target) -> None:
    """VERSION_1 is offered: a device without it is a legacy device."""
    if not v.has(target.features, v.VIRTIO_F_VERSION_1):
        raise Failed(f"{target.features:#x} lacks bit {v.VIRTIO_F_VERSION_1}")


@check("vhost-user, Feature bits", features=(v.VHOST_USER_F_PROTOCOL_FEATURES,))
def protocol_before_features(target: Target) -> str:
    """Protocol features are told before SET_FEATURES, as every front-end asks, and stay the same."""
    found = set()
    for _ in range(2):
        with target.open() as frontend:
            found.add(frontend.request(Request.GET_PROTOCOL_FEATURES))
    if found != {target.protocol_features}:
        raise Failed("offers differ: " + ", ".join(f"{features:#x}" for features in sorted(found)))
    return ", ".join(v.protocol_feature_names(target.protocol_features))


@check("vhost-user, Protocol features", features=(v.VHOST_USER_F_PROTOCOL_FEATURES,))
def protocol_dependencies(target: Target) -> None:
    """A protocol feature is offered only together with those that it needs."""
    offered = target.protocol_features
    for bit, needed in PROTOCOL_NEEDS.items():
        missing = v.mask(*needed) & ~offered
        if v.has(offered, bit) and missing:
            names = v.protocol_feature_names(v.mask(bit)) + v.protocol_feature_names(missing)
            raise Failed(f"{names[0]} is offered without {', '.join(names[1:])}")


@check("VIRTIO 1.3, 2.2.1 and 5.1.3.1", device="net")
def net_dependencies(target: Target) -> None:
    """A feature is offered only together with those that it needs."""
    for bit, needed in NET_NEEDS.items():
        if v.has(target.features, bit) and not target.features & v.mask(*needed):
            names = v.feature_names(v.mask(bit), v.DeviceId.NET) + v.feature_names(v.mask(*needed), v.DeviceId.NET)
            raise Failed(f"{names[0]} is offered without {' or '.join(names[1:])}")


@check("vhost-user, Communication")
def repeated(target: Target) -> None:
    """SET_FEATURES and SET_OWNER may come again: QEMU says them for each queue pair."""
    with target.guest() as guest:
        for _ in range(2):
            guest.frontend.set_features(guest.frontend.features)
            guest.frontend.request(Request.SET_OWNER)
        target.driving.exchange(guest)
