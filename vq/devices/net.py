"""The network device (VIRTIO 1.3, 5.1): what it offers, and its port into the pump."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from vq import virtio as v
from vq.device import Device
from vq.device_state import pack_state, unpack_state
from vq.errors import FrontendError
from vq.offer import Offer, with_postcopy
from vq_core.ports.vhost import VhostPort

__all__ = ["NetDevice"]

FEATURES: Final = v.mask(
    v.VIRTIO_NET_F_CSUM, v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_MTU,
    v.VIRTIO_NET_F_GUEST_TSO4, v.VIRTIO_NET_F_GUEST_TSO6, v.VIRTIO_NET_F_GUEST_ECN, v.VIRTIO_NET_F_GUEST_UFO,
    v.VIRTIO_NET_F_HOST_TSO4, v.VIRTIO_NET_F_HOST_TSO6, v.VIRTIO_NET_F_HOST_ECN, v.VIRTIO_NET_F_HOST_UFO,
    v.VIRTIO_NET_F_GUEST_USO4, v.VIRTIO_NET_F_GUEST_USO6, v.VIRTIO_NET_F_HOST_USO,
    v.VIRTIO_NET_F_MRG_RXBUF, v.VIRTIO_NET_F_GUEST_ANNOUNCE, v.VIRTIO_NET_F_MQ,
    v.VIRTIO_F_ANY_LAYOUT, v.VIRTIO_F_INDIRECT_DESC, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_F_VERSION_1, v.VIRTIO_F_IN_ORDER,
    v.VIRTIO_F_RING_PACKED, v.VHOST_F_LOG_ALL, v.VHOST_USER_F_PROTOCOL_FEATURES,
)  # fmt: skip

PROTOCOL_FEATURES: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_LOG_SHMFD, v.VHOST_USER_PROTOCOL_F_RARP,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_MTU, v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, v.VHOST_USER_PROTOCOL_F_STATUS,
    v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    v.VHOST_USER_PROTOCOL_F_DEVICE_STATE,
)  # fmt: skip


class NetState(msgspec.Struct, frozen=True):
    """What a network device takes along (`vq.device_state`)."""

    features: Annotated[int, msgspec.Meta(ge=0)]  # acknowledged by the driver
    pairs: Annotated[int, msgspec.Meta(ge=1, le=128)]  # offered to it
    mtu: Annotated[int, msgspec.Meta(ge=68, le=65535)] | None = None  # towards the guest


class NetDevice(Device):
    """A vhost-user-net device whose packets go through a `VhostPort`.

    Parameters
    ----------
    name
        For people, and in the pump's counters.
    pairs
        Queue pairs that are offered, 1 to 128.
    report_fd
        Eventfd that is signalled when a guest breaks a queue.
    mtu
        Longest packet towards the guest in bytes, without the Ethernet header, until the front-end says otherwise.
    packed
        Offer the packed ring layout beside the split one.
    slots
        Offer memory slots; without them a front-end sends the whole memory table for each change.
    postcopy
        Offer to be the destination of a postcopy migration, which memory slots cannot be offered with.
    single_queues
        Answer GET_QUEUE_NUM with the number of virtqueues, as cloud-hypervisor expects, in place of pairs.

    Notes
    -----
    The control queue stays with the front-end (QEMU, virtio-user and cloud-hypervisor keep it), so CTRL_VQ is not
    offered. CONFIG is not offered either: these front-ends make the configuration space themselves.
    """

    in_order = True

    def __init__(
        self,
        name: str,
        *,
        pairs: int = 8,
        report_fd: int | None = None,
        mtu: int | None = None,
        packed: bool = True,
        slots: bool = True,
        postcopy: bool = False,
        single_queues: bool = False,
    ) -> None:
        self.name = name
        self.port = VhostPort(name, pairs, report_fd)
        self.queues = self.port.queues
        self.posted_queues = self.queues[::2]
        features = FEATURES if packed else FEATURES & ~v.mask(v.VIRTIO_F_RING_PACKED)
        protocol = PROTOCOL_FEATURES
        if not slots:
            protocol &= ~v.mask(v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
        if postcopy:
            protocol = with_postcopy(protocol)
        answer = 2 * pairs if single_queues else pairs
        self.offer = Offer(features, protocol, queue_count=2 * pairs, queue_num_answer=answer)
        self._default_mtu = self._mtu = mtu
        self._features = 0

    def set_features(self, features: int) -> None:
        self._features = features
        self.port.configure(features, self._mtu)

    def set_mtu(self, mtu: int) -> None:
        self._mtu = mtu
        self.port.configure(self._features, mtu)

    def send_rarp(self, mac: bytes) -> None:
        self.port.announce(mac)

    def save_state(self) -> bytes:
        return pack_state(v.VIRTIO_ID_NET, NetState(self._features, len(self.queues) // 2, self._mtu))

    def load_state(self, state: bytes) -> None:
        came = unpack_state(state, v.VIRTIO_ID_NET, NetState)
        unoffered = came.features & ~self.offer.features
        if unoffered:
            names = ", ".join(v.feature_names(unoffered))
            raise FrontendError("device state", "features", f"{came.features:#x}", f"{names} is not offered here")
        if came.pairs > len(self.queues) // 2:
            limit = f"there are {len(self.queues) // 2} here; give the port as many (queues=)"
            raise FrontendError("device state", "queue pairs", came.pairs, limit)
        self._mtu = came.mtu
        self.port.configure(self._features, self._mtu)

    def reset(self) -> None:
        self._features = 0
        self._mtu = self._default_mtu
        self.port.configure(0, self._mtu)
