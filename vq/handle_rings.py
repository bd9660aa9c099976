"""Handlers of the session: everything about one virtqueue.

Spec: vhost-user, "Ring states".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from vq import effects as e
from vq import virtio as v
from vq.errors import FrontendError, VqError
from vq.message import Message
from vq.payload import VringAddr, VringState
from vq.ring_state import FdKind, RingState, check_alignment, check_num, prepare_signal_fd
from vq.session_state import SessionState


def set_vring_num(session: SessionState, message: Message, ring: RingState) -> None:
    """Set the number of entries."""
    state: VringState = message.payload
    check_num(message.name, ring.index, state.num, session.packed)
    ring.num = state.num


def set_vring_addr(session: SessionState, message: Message, ring: RingState) -> None:
    """Keep the addresses; they are looked up at the start. On a started ring only logging can be switched."""
    addr: VringAddr = message.payload
    check_alignment(message.name, addr, session.packed)
    if ring.started and ring.addr is not None:
        if (addr.desc, addr.avail, addr.used) != (ring.addr.desc, ring.addr.avail, ring.addr.used):
            limit = "the addresses of a started ring cannot change; stop it with GET_VRING_BASE first"
            raise FrontendError(message.name, f"ring {ring.index}", "started", limit)
        flags = addr.flags & v.VHOST_VRING_F_LOG
        session.apply(e.SetRingAddresses(ring.index, flags, addr.log_guest_addr))
    ring.addr = addr


def set_vring_base(_session: SessionState, message: Message, ring: RingState) -> None:
    """Set where the ring is to go on."""
    ring.base = message.payload.num


def get_vring_base(session: SessionState, _: Message, ring: RingState) -> VringState:
    """Stop the ring and tell where; a ring that never ran answers the base that was set."""
    stop(session, ring)
    return VringState(ring.index, ring.base)


def get_vring_base_skip_drain(session: SessionState, _: Message, ring: RingState) -> VringState:
    """Stop the ring with requests in flight, which the in-flight region tells of; without one they are done first."""
    stop(session, ring, suspend=True)
    return VringState(ring.index, ring.base)


def set_vring_kick(session: SessionState, message: Message, ring: RingState) -> None:
    """Replace the kick fd, and start the ring if it stands."""
    fd = signal_fd(message, write=False)
    if ring.started:
        session.apply(e.SetKick(ring.index, fd))
    else:
        start(session, message.name, ring, fd)
    message.take_fd()
    ring.replace_fd("kick_fd", fd)


def set_vring_call(session: SessionState, message: Message, ring: RingState) -> None:
    """Replace the call fd, at any time: QEMU does so whenever the guest masks its interrupt."""
    replace_output(session, message, ring, "call_fd", e.SetCall)
    ring.by_message = False


def set_vring_err(session: SessionState, message: Message, ring: RingState) -> None:
    """Replace the err fd."""
    replace_output(session, message, ring, "err_fd", e.SetErr)


def set_vring_enable(session: SessionState, message: Message, ring: RingState) -> None:
    """Set the enable flag; front-ends do it long before features, memory or a kick."""
    if message.payload.num not in (0, 1):
        raise FrontendError(message.name, f"ring {ring.index}: num", message.payload.num, "0 disables, 1 enables")
    enable(session, ring, message.payload.num == 1)


def set_vring_endian(session: SessionState, message: Message, ring: RingState) -> None:
    """Take note of the byte order of a ring of a legacy driver: only our own can be served.

    A ring of VERSION_1 is little-endian, whatever this says; one of a legacy driver has the order of the guest. Serving
    the other order would cost each access to a ring, for guests that hardly anybody runs.
    """
    order: VringState = message.payload
    if order.num not in (0, 1):
        raise FrontendError(message.name, f"ring {ring.index}: order", order.num, "0 is little-endian, 1 big-endian")
    legacy = session.features_known and not v.has(session.features, v.VIRTIO_F_VERSION_1)
    if order.num != (sys.byteorder == "big" and legacy):
        limit = f"only {sys.byteorder}-endian rings are served" if legacy else "rings of VERSION_1 are little-endian"
        raise FrontendError(message.name, f"ring {ring.index}: order", order.num, limit)


def vring_kick(session: SessionState, message: Message, ring: RingState) -> None:
    """Kick by message; it starts a stopped ring as a kick fd does."""
    if ring.started:
        session.apply(e.Kick(ring.index))
    else:
        start(session, message.name, ring, e.INBAND if ring.kick_fd is None else ring.kick_fd)


def start(session: SessionState, request: str, ring: RingState, kick_fd: int | None) -> None:
    """Start a ring on the message, without waiting for a kick: newer front-ends send none."""
    inband = session.negotiated(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
    try:
        if not session.regions:
            limit = "the front-end has shared no memory; give the guest memory with share=on, as vq pump prints it"
            raise FrontendError(request, f"ring {ring.index}", "without memory", limit)
        config = ring.config(request, session.features, kick_fd, inband=inband)
        if session.negotiated(v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES):
            config = replace(config, guest_addresses=True)
        session.apply(e.StartRing(config))
    except VqError:
        if ring.err_fd is not None:
            with suppress(VqError):
                session.apply(e.SignalErr(ring.index, ring.err_fd))
        raise
    ring.started = True


def stop(session: SessionState, ring: RingState, *, suspend: bool = False) -> None:
    """Stop a ring if it runs, remember where it stopped, and let go of kick and call fd; enable flag stays."""
    if ring.started:
        ring.base = session.apply(e.StopRing(ring.index, suspend))
        ring.started = False
    ring.replace_fd("kick_fd", None)
    ring.replace_fd("call_fd", None)


def enable(session: SessionState, ring: RingState, enabled: bool) -> None:
    """Set the enable flag if it differs."""
    if ring.enabled != enabled:
        session.apply(e.EnableRing(ring.index, enabled))
        ring.enabled = enabled


def enable_all(session: SessionState, enabled: bool) -> None:
    """Set the enable flag of all rings."""
    with session.all_or_close():
        for ring in session.rings:
            enable(session, ring, enabled)


def replace_output(
    session: SessionState,
    message: Message,
    ring: RingState,
    kind: FdKind,
    effect: Callable[[int, int | None], e.Effect],
) -> None:
    """Take over a new call or err fd; the data plane, if it uses the old one, changes over first."""
    fd = signal_fd(message, write=True)
    if ring.started:
        session.apply(effect(ring.index, fd))
    message.take_fd()
    ring.replace_fd(kind, fd)


def signal_fd(message: Message, *, write: bool) -> int | None:
    """Look at the fd of a ring message; the message keeps owning it until the effect has succeeded."""
    if not message.fds:
        return None
    prepare_signal_fd(message.name, message.fds[0], write=write)
    return message.fds[0]
