"""Our driver on the socket of any vhost-user-blk back-end."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from vq import virtio as v
from vq.bench.blk_settings import BlkSettings
from vq.demo import PATIENCE_S, STATUS_OK, start_device
from vq.errors import BackendError, UsageError
from vq.frontend import Frontend
from vq_core.blk_load import BlkLoad, blk_load_memory_bytes
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

__all__ = ["open_blk_link"]

PROTOCOL_FEATURES: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_STATUS,
    v.VHOST_USER_PROTOCOL_F_CONFIG,
)  # fmt: skip
SPAN: Final = 256 << 20  # bytes of the disk that requests go to
BLOCKS_MAX: Final = (1 << 32) - 1


@contextmanager
def open_blk_link(path: str, settings: BlkSettings, cpu: int | None, *, timeout: float = 10.0) -> Iterator[BlkLoad]:
    """Connect as a front-end and start the request queues; at the end they are stopped in order.

    Parameters
    ----------
    path
        The back-end's socket.
    settings
        The point.
    cpu
        Processor of the driver.
    timeout
        Seconds that any answer may take.

    Raises
    ------
    BackendError
        The back-end lacks what the settings need, or broke the protocol.
    ResourceError
        Nobody listens.
    UsageError
        The disk is too small for the settings.
    """
    with ExitStack() as stack:
        frontend = stack.enter_context(Frontend.connect(path, timeout=timeout))
        features = _negotiate(frontend, settings)
        (sectors,) = struct.unpack("<Q", frontend.get_config(0, 8))
        room = blk_load_memory_bytes(settings.ring, settings.depth, settings.block, queues=settings.queues)
        memory = stack.enter_context(GuestMemory(room))
        queues = {}
        try:
            for index in range(settings.queues):
                queues[index] = DriverQueue(memory, settings.ring, features=features)
                stack.callback(queues[index].close)
            load = BlkLoad(
                list(queues.values()),
                min(sectors * v.VIRTIO_BLK_SECTOR_BYTES, SPAN) // settings.block,
                settings.block,
                depth=settings.depth,
                writes=settings.writes,
                indirect=settings.descriptors == "indirect",
                verify=settings.verify == "on",
                poll=settings.driver,
                cpu=cpu,
                patience=PATIENCE_S,
            )
        except ValueError as error:
            raise UsageError(f"{settings.words() or 'defaults'}: {error}") from error
        start_device(frontend, memory, queues)
        yield load
        frontend.set_status(STATUS_OK)
        for index in reversed(queues):
            frontend.stop_ring(index)


def _negotiate(frontend: Frontend, settings: BlkSettings) -> int:
    """Agree on features; refuse a back-end that would measure something else than was asked for."""
    needed = {"VERSION_1": v.VIRTIO_F_VERSION_1}
    if settings.layout == "packed":
        needed["RING_PACKED (layout=packed)"] = v.VIRTIO_F_RING_PACKED
    if settings.descriptors == "indirect":
        needed["INDIRECT_DESC (descriptors=indirect)"] = v.VIRTIO_F_INDIRECT_DESC
    if settings.queues > 1:
        needed[f"MQ (queues={settings.queues})"] = v.VIRTIO_BLK_F_MQ
    # As Linux does: the driver knows of a write cache, so that a write need not wait for the medium.
    optional = v.mask(v.VIRTIO_BLK_F_FLUSH)
    if settings.event_idx == "on":
        optional |= v.mask(v.VIRTIO_F_EVENT_IDX)
    features = frontend.negotiate(optional | v.mask(*needed.values()), PROTOCOL_FEATURES)
    for name, bit in needed.items():
        if not v.has(features, bit):
            raise BackendError("GET_FEATURES", "features", hex(frontend.offered_features), f"this needs {name}")
    if settings.writes and v.has(frontend.offered_features, v.VIRTIO_BLK_F_RO):
        raise UsageError(f"writes={settings.writes}: the disk is read-only")
    if not frontend.has_protocol(v.VHOST_USER_PROTOCOL_F_CONFIG):
        raise BackendError("GET_PROTOCOL_FEATURES", "features", hex(frontend.protocol_features), "this needs CONFIG")
    if settings.queues > 1 and frontend.queue_num() < settings.queues:
        raise BackendError("GET_QUEUE_NUM", "queues", frontend.queue_num(), f"queues={settings.queues} needs as many")
    frontend.set_features(features)
    return features
