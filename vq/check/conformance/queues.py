"""How many queues there are."""

from __future__ import annotations

from vq import virtio as v
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.message import Request
from vq.payload import VRING_NOFD_MASK, VringState

MQ = (v.VHOST_USER_PROTOCOL_F_MQ,)
MOST = 32768  # pairs of a network device; nobody has more (VIRTIO 1.3, 5.1.5)


@check("vhost-user, Multiple queue support", protocol=MQ)
def number(target: Target) -> str:
    """GET_QUEUE_NUM tells a number from 1 on, the same on each connection."""
    found = set()
    for _ in range(2):
        with target.negotiate() as frontend:
            found.add(frontend.queue_num())
    (count, *others) = sorted(found)
    if others or not 1 <= count <= MOST:
        raise Failed(f"{' and '.join(map(str, sorted(found)))}; it must be one number from 1 to {MOST}")
    return str(count)


@check("vhost-user, Multiple queue support", protocol=MQ)
def each_can_be_set_up(target: Target) -> str:
    """As many rings as were told take a size and an fd before anything else is known."""
    with target.negotiate() as frontend:
        # A network device tells queue pairs.
        rings = min(frontend.queue_num() * (2 if target.device == "net" else 1), 256)
        for index in range(rings):
            frontend.request(Request.SET_VRING_CALL, index | VRING_NOFD_MASK)
            frontend.request(Request.SET_VRING_NUM, VringState(index, 64))
        frontend.barrier()
        return f"{rings} rings"
