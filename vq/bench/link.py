"""Our driver on the socket of any vhost-user-net back-end: connect, negotiate, share memory, start the rings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, TypeVar

from vq import virtio as v
from vq.bench.dirty_log import DirtyLog
from vq.bench.settings import Settings
from vq.demo import PROTOCOL_FEATURES, RECEIVE_BYTES, STATUS_OK, start_device
from vq.errors import BackendError, UsageError
from vq.frontend import Frontend
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.traffic import traffic_memory_bytes

__all__ = ["Pairs", "open_link"]

Engine = TypeVar("Engine")
Pairs = Sequence[tuple[DriverQueue, DriverQueue]]  # (transmitq, receiveq)

SWITCHES: Final = {
    "event_idx": v.VIRTIO_F_EVENT_IDX,
    "mergeable": v.VIRTIO_NET_F_MRG_RXBUF,
    "in_order": v.VIRTIO_F_IN_ORDER,
    "log": v.VHOST_F_LOG_ALL,
}
DEFAULTS: Final = Settings()


@contextmanager
def open_link(
    path: str, settings: Settings, make: Callable[[Pairs, int], Engine], *, timeout: float = 5.0
) -> Iterator[Engine]:
    """Connect as a front-end and start the queue pairs; at the end the rings are stopped in order.

    Parameters
    ----------
    path
        The back-end's socket.
    settings
        Ring size, layout, queue pairs, descriptors, packet size, features, dirty log.
    make
        Makes what drives the pairs, before the back-end sees a ring, so that receive buffers can be posted. Its
        arguments are the pairs and the payload bytes of a receive buffer.
    timeout
        Seconds that any answer may take.

    Raises
    ------
    BackendError
        The back-end lacks what the settings need, or broke the protocol.
    ResourceError
        Nobody listens.
    UsageError
        The settings do not fit together, or our driver cannot do it.
    """
    with ExitStack() as stack:
        frontend = stack.enter_context(Frontend.connect(path, timeout=timeout))
        features = _negotiate(frontend, settings)
        mergeable = v.has(features, v.VIRTIO_NET_F_MRG_RXBUF)
        receive_bytes = min(settings.size, RECEIVE_BYTES) if mergeable else settings.size
        room = traffic_memory_bytes(settings.ring, settings.size, pairs=settings.queues)
        memory = stack.enter_context(GuestMemory(room))
        queues = {}
        try:
            for index in range(2 * settings.queues):
                queues[index] = DriverQueue(memory, settings.ring, features=features)
                stack.callback(queues[index].close)
            # VIRTIO 1.3, 5.1.2: receiveqs have the even numbers, transmitqs the odd ones.
            pairs = [(queues[index + 1], queues[index]) for index in range(0, len(queues), 2)]
            engine = make(pairs, receive_bytes)
        except ValueError as error:
            raise UsageError(f"{settings.words() or 'defaults'}: {error}") from error
        if settings.log == "on":
            stack.enter_context(DirtyLog(frontend, memory))
        start_device(frontend, memory, queues, logged=settings.log == "on")
        yield engine
        frontend.set_status(STATUS_OK)
        for index in reversed(queues):
            frontend.stop_ring(index)


def _negotiate(frontend: Frontend, settings: Settings) -> int:
    """Agree on features; refuse a back-end that would measure something else than was asked for."""
    needed = {"VERSION_1": v.VIRTIO_F_VERSION_1}
    if settings.layout == "packed":
        needed["RING_PACKED (layout=packed)"] = v.VIRTIO_F_RING_PACKED
    if settings.descriptors == "indirect":
        needed["INDIRECT_DESC (descriptors=indirect)"] = v.VIRTIO_F_INDIRECT_DESC
    optional = v.mask(v.VIRTIO_F_VERSION_1)
    for name, bit in SWITCHES.items():
        if getattr(settings, name) == "on":
            if getattr(DEFAULTS, name) == "on":
                optional |= v.mask(bit)
            else:
                needed[f"{name}=on"] = bit
    if settings.size > RECEIVE_BYTES and settings.mergeable == "on":
        needed[f"MRG_RXBUF (size={settings.size})"] = v.VIRTIO_NET_F_MRG_RXBUF
    if settings.queues > 1:
        needed[f"MQ (queues={settings.queues})"] = v.VIRTIO_NET_F_MQ
    protocol = PROTOCOL_FEATURES
    if settings.log == "on":
        protocol |= v.mask(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD)
    features = frontend.negotiate(optional | v.mask(*needed.values()), protocol)
    for name, bit in needed.items():
        if not v.has(features, bit):
            raise BackendError("GET_FEATURES", "features", hex(frontend.offered_features), f"this needs {name}")
    # Network back-ends answer in queue pairs, and one without MQ cannot be asked.
    pairs = frontend.queue_num()
    if settings.queues > pairs:
        raise BackendError("GET_QUEUE_NUM", "queue pairs", pairs, f"queues={settings.queues} needs as many")
    frontend.set_features(features)
    return features
