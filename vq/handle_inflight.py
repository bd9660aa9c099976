"""Handlers of the session: the in-flight region, by which the next back-end knows what this one had under way.

Spec: vhost-user, "Inflight I/O tracking".
"""

from __future__ import annotations

from vq import effects as e
from vq import virtio as v
from vq.errors import FrontendError
from vq.message import Message
from vq.payload import Inflight
from vq.session_state import SessionState
from vq.shared_file import check_memory_file


def get_inflight_fd(session: SessionState, message: Message) -> Inflight:
    """Make a region and hand it out; it counts when it comes back. A size of 0 says that we make none of this shape."""
    asked: Inflight = message.payload
    problem = shape_problem(session, message.name, asked)
    if problem is not None:
        session.warn(str(problem))
        return Inflight(0, 0, asked.num_queues, asked.queue_size)
    packed = session.packed
    if packed is None:  # one that suits both
        packed = v.has(session.offer.features, v.VIRTIO_F_RING_PACKED)
    fd, size = session.apply(e.MakeInflight(asked.num_queues, asked.queue_size, packed))
    session.reply_fds.append(fd)
    return Inflight(size, 0, asked.num_queues, asked.queue_size)


def set_inflight_fd(session: SessionState, message: Message) -> None:
    """Take a region for the rings that start from now on; what it holds is looked at when they do."""
    region: Inflight = message.payload
    problem = shape_problem(session, message.name, region)
    if problem is not None:
        raise problem
    if not session.suspended:
        limit = "a started ring keeps its region; stop all rings with GET_VRING_BASE first"
        raise FrontendError(message.name, "rings", "started", limit)
    check_memory_file(message.name, message.fds[0])
    session.apply(e.SetInflight(message.fds[0], *region, packed=bool(session.packed)))
    session.has_inflight = True


def forget_inflight(session: SessionState) -> None:
    """Let go of the region, which stays the front-end's."""
    if session.has_inflight:
        session.apply(e.ClearInflight())
        session.has_inflight = False


def shape_problem(session: SessionState, name: str, region: Inflight) -> FrontendError | None:
    """Tell what is wrong with number and size of a region's queues."""
    for field, value, most in (
        ("num_queues", region.num_queues, len(session.rings)),
        ("queue_size", region.queue_size, v.VIRTQ_SIZE_MAX),
    ):
        if not 1 <= value <= most:
            return FrontendError(name, field, value, f"it must be 1 to {most}")
    return None
