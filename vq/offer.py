"""What a back-end offers, and the features for which the session has handlers."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Final

from vq import virtio as v
from vq.errors import UsageError
from vq.payload import CONFIG_MAX, SHMEM_REGIONS_MAX

PAGE_BYTES: Final = resource.getpagesize()
QUEUES_MAX: Final = 256  # the fd messages carry the ring index in 8 bits
MEM_SLOTS_MAX: Final = 509

# What the handlers of the session serve. A feature that is not here must not be offered: its messages would be refused.
SERVED_PROTOCOL_FEATURES: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ,
    v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    v.VHOST_USER_PROTOCOL_F_RARP,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    v.VHOST_USER_PROTOCOL_F_MTU,
    v.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    v.VHOST_USER_PROTOCOL_F_PAGEFAULT,
    v.VHOST_USER_PROTOCOL_F_CONFIG,
    v.VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD,
    v.VHOST_USER_PROTOCOL_F_HOST_NOTIFIER,
    v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    v.VHOST_USER_PROTOCOL_F_CROSS_ENDIAN,
    v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_SHARED_OBJECT,
    v.VHOST_USER_PROTOCOL_F_DEVICE_STATE,
    v.VHOST_USER_PROTOCOL_F_SHMEM,
    v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    v.VHOST_USER_PROTOCOL_F_STATUS,
    v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT,
    v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
    v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES,
)
# NOTIFICATION_DATA: an eventfd carries none. ORDER_PLATFORM is for devices whose accesses the platform orders in other
# ways than those of its processors. We are a program on these processors: the barriers that a driver needs between them
# suffice for us, and with this bit it would pay for stronger ones.
UNSERVED_FEATURES: Final = v.mask(v.VIRTIO_F_NOTIFICATION_DATA, v.VIRTIO_F_ORDER_PLATFORM)
# What QEMU insists on for ACCESS_PLATFORM, and what answers and questions about translations travel by.
IOMMU_NEEDS: Final = v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ)


POSTCOPY: Final = v.mask(v.VHOST_USER_PROTOCOL_F_PAGEFAULT)


def with_postcopy(protocol_features: int) -> int:
    """Put postcopy in the place of what does not go with it.

    The specification excludes memory slots. An in-flight region is read together with its ring when the ring starts, by
    the control thread, which must not wait for a page.
    """
    without = (
        v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
        v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT, v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
    )  # fmt: skip
    return protocol_features & ~v.mask(*without) | POSTCOPY


@dataclass(frozen=True, slots=True)
class Offer:
    """What a back-end offers to every front-end that connects; it must not shrink between connections.

    Parameters
    ----------
    features
        virtio feature bits, complete: with VHOST_USER_F_PROTOCOL_FEATURES, and VHOST_F_LOG_ALL if logging works.
    protocol_features
        vhost-user protocol feature bits, out of SERVED_PROTOCOL_FEATURES.
    queue_count
        Virtqueues, 1..256; every ring index is checked against it.
    queue_num_answer
        Answer to GET_QUEUE_NUM: queue pairs for net (QEMU), virtqueues for the others.
    max_mem_slots
        Most regions that ADD_MEM_REG can make, 1..509.
    config_size
        Bytes of the device's configuration space, 0..256.
    shmem
        Shared memory regions of the device: id 0..255 and size in bytes, a multiple of the page size, of each.
    """

    features: int
    protocol_features: int
    queue_count: int
    queue_num_answer: int
    max_mem_slots: int = MEM_SLOTS_MAX
    config_size: int = 0
    shmem: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Refuse an offer that could not be kept."""
        unserved = v.protocol_feature_names(self.protocol_features & ~SERVED_PROTOCOL_FEATURES)
        unserved += v.feature_names(self.features & UNSERVED_FEATURES)
        if unserved:
            raise UsageError(f"offer: {', '.join(unserved)} cannot be served; leave it out")
        if self.protocol_features and not v.has(self.features, v.VHOST_USER_F_PROTOCOL_FEATURES):
            raise UsageError("offer: protocol features need the feature bit VHOST_USER_F_PROTOCOL_FEATURES (30)")
        if self.protocol_features & POSTCOPY:
            apart = v.protocol_feature_names(self.protocol_features & ~with_postcopy(self.protocol_features))
            apart += v.feature_names(self.features & v.mask(v.VIRTIO_F_ACCESS_PLATFORM))
            if apart:
                raise UsageError(f"offer: postcopy (PAGEFAULT) and {', '.join(apart)} exclude each other")
        lacking = IOMMU_NEEDS & ~self.protocol_features
        if v.has(self.features, v.VIRTIO_F_ACCESS_PLATFORM) and lacking:
            raise UsageError(f"offer: ACCESS_PLATFORM needs {', '.join(v.protocol_feature_names(lacking))}")
        for name, value, low, high in (
            ("queue_count", self.queue_count, 1, QUEUES_MAX),
            ("max_mem_slots", self.max_mem_slots, 1, MEM_SLOTS_MAX),
            ("config_size", self.config_size, 0, CONFIG_MAX),
        ):
            if not low <= value <= high:
                raise UsageError(f"offer: {name} is {value}; it must be {low} to {high}")
        ids = [shmid for shmid, _ in self.shmem]
        if len(set(ids)) < len(ids) or not all(0 <= shmid < SHMEM_REGIONS_MAX for shmid in ids):
            raise UsageError(f"offer: shmem ids are {ids}; each must be 0 to {SHMEM_REGIONS_MAX - 1}, and there once")
        if any(size <= 0 or size % PAGE_BYTES or size >= 1 << 63 for _, size in self.shmem):
            raise UsageError(f"offer: the size of a shmem region must be a multiple of {PAGE_BYTES} bytes")
