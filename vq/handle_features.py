"""Handlers of the session: features, ownership, status, the back-end channel.

Spec: vhost-user, "Feature bits", "Protocol features".
"""

from __future__ import annotations

import os
from typing import Final

from vq import effects as e
from vq import virtio as v
from vq.errors import FrontendError
from vq.handle_rings import enable_all
from vq.message import Message
from vq.ring_state import replace_fd
from vq.session_state import SessionState

LOG_ALL: Final = v.mask(v.VHOST_F_LOG_ALL)


def get_features(session: SessionState, _: Message) -> int:
    """Tell what we offer, always the same."""
    return session.offer.features


def set_features(session: SessionState, message: Message) -> None:
    """Take over the features; logging may be switched while rings run, nothing else."""
    features: int = message.payload
    changed = features ^ session.features
    unoffered = features & ~session.offer.features
    if unoffered:
        session.features_refused = True
        names = ", ".join(v.feature_names(unoffered))
        raise FrontendError(message.name, "features", f"{features:#x}", f"{names} was not offered")
    if changed & ~LOG_ALL and not session.suspended:
        names = ", ".join(v.feature_names(changed & ~LOG_ALL))
        raise FrontendError(message.name, "features", f"{features:#x}", f"{names} cannot change while a ring runs")
    # QEMU repeats the same set for each queue pair while the pairs before it run already.
    if changed or not session.features_known:
        session.apply(e.SetFeatures(features))
    session.features = features
    session.features_known = True
    session.features_refused = False
    if not v.has(features, v.VHOST_USER_F_PROTOCOL_FEATURES):
        enable_all(session, True)


def set_owner(_session: SessionState, _: Message) -> None:
    """Do nothing: it only marks the beginning, may be repeated, and may come after the protocol features."""


def reset_owner(session: SessionState, _: Message) -> None:
    """Disable all rings (old front-ends reset a device so); memory and features stay."""
    enable_all(session, False)


def get_protocol_features(session: SessionState, _: Message) -> int:
    """Tell which protocol features we offer, always the same."""
    return session.offer.protocol_features


def set_protocol_features(session: SessionState, message: Message) -> None:
    """Take over the protocol features."""
    features: int = message.payload
    unoffered = features & ~session.offer.protocol_features
    if unoffered:
        names = ", ".join(v.protocol_feature_names(unoffered))
        raise FrontendError(message.name, "features", f"{features:#x}", f"{names} was not offered")
    needs = v.mask(v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    if v.has(features, v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS) and features & needs != needs:
        limit = "INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK"
        raise FrontendError(message.name, "features", f"{features:#x}", limit, fatal=True)
    session.protocol_features = features


def get_queue_num(session: SessionState, _: Message) -> int:
    """Tell how many queues there are, in the unit that the front-end expects."""
    return session.offer.queue_num_answer


def set_status(session: SessionState, message: Message) -> None:
    """Keep the status byte. Status 0 stops nothing: QEMU 7.2 sends it before it asks for the bases."""
    if message.payload > 0xFF:
        raise FrontendError(message.name, "status", f"{message.payload:#x}", "it has 8 bits")
    session.apply(e.SetStatus(message.payload))
    session.status = message.payload


def get_status(session: SessionState, _: Message) -> int:
    """Give the status byte back, without FEATURES_OK if we have refused the features."""
    return session.status & ~v.VIRTIO_CONFIG_S_FEATURES_OK if session.features_refused else session.status


def set_backend_req_fd(session: SessionState, message: Message) -> None:
    """Keep the socket for our own requests."""
    if not os.readlink(f"/proc/self/fd/{message.fds[0]}").startswith("socket:["):
        raise FrontendError(message.name, "fd", "not a socket", "the back-end channel is a Unix socket")
    session.apply(e.SetBackendChannel(message.fds[0]))
    session.backend_channel_fd = replace_fd(session.backend_channel_fd, message.take_fd())
