"""The session: negotiation, the rules of replying, the end."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest

from vhost_rig import (
    NET_FEATURES,
    NET_PROTOCOL_FEATURES,
    PACKED,
    PAGE,
    SPLIT,
    Peer,
    close_because,
    make_message,
    memfd,
    net_offer,
    read_reply,
    region,
)
from vq import effects as e
from vq import virtio as v
from vq.errors import FrontendError, ResourceError, UsageError
from vq.message import FRONTEND_REQUESTS, Message, Request
from vq.payload import Config, Log, VringState
from vq.session import SERVED_PROTOCOL_FEATURES, TRANSITIONS, Session

R = Request
LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)


# --- Negotiation ----------------------------------------------------------------------------------------------------


@pytest.mark.shows(
    "GET_FEATURES", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS", "VHOST_USER_PROTOCOL_F_MQ",
)  # fmt: skip
def test_offer_is_answered_as_given(peer: Peer) -> None:
    assert peer.say(R.GET_FEATURES) == NET_FEATURES
    assert peer.say(R.GET_PROTOCOL_FEATURES) == NET_PROTOCOL_FEATURES
    peer.say(R.SET_PROTOCOL_FEATURES, NET_PROTOCOL_FEATURES)
    assert peer.say(R.GET_QUEUE_NUM) == 2
    assert peer.say(R.GET_MAX_MEM_SLOTS) == 8


@pytest.mark.shows("SET_FEATURES")
def test_features_reach_the_data_plane_once(peer: Peer) -> None:
    peer.negotiate()
    peer.say(R.SET_FEATURES, SPLIT)  # QEMU says it again for each queue pair
    assert peer.plane.effects == [e.SetFeatures(SPLIT)]


def test_features_that_were_not_offered(peer: Peer) -> None:
    peer.negotiate()
    peer.say(R.SET_STATUS, 0xF)
    assert peer.acked(R.SET_FEATURES, SPLIT | v.mask(v.VIRTIO_F_IN_ORDER)) == 1
    assert peer.session.features == SPLIT
    assert peer.say(R.GET_STATUS) == 0x7  # FEATURES_OK is off
    assert peer.acked(R.SET_FEATURES, SPLIT) == 0
    assert peer.say(R.GET_STATUS) == 0xF


def test_features_that_were_not_offered_without_ack_close(peer: Peer) -> None:
    assert "IN_ORDER was not offered" in close_because(peer, R.SET_FEATURES, v.mask(v.VIRTIO_F_IN_ORDER))


@pytest.mark.shows("SET_PROTOCOL_FEATURES")
def test_protocol_features_that_were_not_offered(peer: Peer) -> None:
    peer.negotiate()
    wrong = NET_PROTOCOL_FEATURES | v.mask(v.VHOST_USER_PROTOCOL_F_PAGEFAULT)
    assert peer.acked(R.SET_PROTOCOL_FEATURES, wrong) == 1
    assert peer.session.protocol_features == NET_PROTOCOL_FEATURES
    assert "PAGEFAULT" in close_because(peer, R.SET_PROTOCOL_FEATURES, wrong)


@pytest.mark.shows("SET_PROTOCOL_FEATURES", "VHOST_USER_PROTOCOL_F_REPLY_ACK")
def test_turning_reply_ack_on_is_acked(peer: Peer) -> None:
    assert peer.say(R.SET_PROTOCOL_FEATURES, v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK), ack=True) == 0


@pytest.mark.shows("VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS")
def test_inband_needs_its_companions(peer: Peer) -> None:
    peer.negotiate()
    alone = v.mask(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
    assert "INBAND" in close_because(peer, R.SET_PROTOCOL_FEATURES, alone, ack=True)


@pytest.mark.shows("VHOST_USER_F_PROTOCOL_FEATURES")
def test_protocol_features_need_the_offered_bit() -> None:
    peer = Peer(net_offer(features=v.mask(v.VIRTIO_F_VERSION_1), protocol_features=0))
    close_because(peer, R.GET_PROTOCOL_FEATURES)
    peer.close()


@pytest.mark.shows("SET_OWNER")
def test_set_owner_may_come_late_and_twice(peer: Peer) -> None:
    peer.negotiate()
    assert peer.acked(R.SET_OWNER) == 0
    assert peer.acked(R.SET_OWNER) == 0


@pytest.mark.shows("RESET_OWNER")
def test_reset_owner_disables_and_keeps_the_rest(ready: Peer) -> None:
    ready.start(0)
    ready.say(R.SET_VRING_ENABLE, (0, 1))
    ready.plane.take()
    assert ready.acked(R.RESET_OWNER) == 0
    assert ready.plane.take() == [e.EnableRing(0, False)]
    assert ready.session.rings[0].started
    assert ready.session.regions
    assert ready.session.features == SPLIT


@pytest.mark.shows("VHOST_USER_F_PROTOCOL_FEATURES")
def test_rings_are_enabled_without_protocol_feature_bit(peer: Peer) -> None:
    peer.say(R.SET_FEATURES, v.mask(v.VIRTIO_F_VERSION_1))
    assert peer.plane.take() == [
        e.SetFeatures(v.mask(v.VIRTIO_F_VERSION_1)),
        *(e.EnableRing(index, True) for index in range(4)),
    ]


def test_set_features_disables_nothing(ready: Peer) -> None:
    ready.say(R.SET_VRING_ENABLE, (1, 1))
    ready.say(R.SET_FEATURES, PACKED)
    assert [ring.enabled for ring in ready.session.rings] == [False, True, False, False]


@pytest.mark.shows("SET_FEATURES", "VHOST_F_LOG_ALL")
def test_only_logging_changes_while_a_ring_runs(ready: Peer) -> None:
    ready.start(0)
    ready.plane.take()
    assert ready.acked(R.SET_FEATURES, PACKED) == 1
    assert ready.acked(R.SET_FEATURES, SPLIT | LOG_ALL) == 0
    assert ready.acked(R.SET_FEATURES, SPLIT) == 0
    assert ready.plane.take() == [e.SetFeatures(SPLIT | LOG_ALL), e.SetFeatures(SPLIT)]
    ready.say(R.GET_VRING_BASE, (0, 0))
    assert ready.acked(R.SET_FEATURES, PACKED) == 0


@pytest.mark.shows("SET_STATUS", "GET_STATUS", "VHOST_USER_PROTOCOL_F_STATUS")
def test_status_is_a_byte_and_stops_nothing(ready: Peer) -> None:
    ready.start(0)
    ready.plane.next_base[0] = 6364
    assert ready.acked(R.SET_STATUS, 256) == 1
    assert ready.say(R.SET_STATUS, 256) is None  # ignored: the session goes on
    ready.say(R.SET_STATUS, 0)
    assert ready.plane.effects[-1] == e.SetStatus(0)
    assert ready.say(R.GET_STATUS) == 0
    assert ready.say(R.GET_VRING_BASE, (0, 0)) == VringState(0, 6364)


@pytest.mark.parametrize(
    "change",
    [
        {"queue_count": 0},
        {"queue_count": 257},
        {"max_mem_slots": 510},
        {"config_size": 257},
        {"features": v.mask(v.VIRTIO_F_VERSION_1)},
        {"features": NET_FEATURES | v.mask(v.VIRTIO_F_NOTIFICATION_DATA)},
        {"features": NET_FEATURES | v.mask(v.VIRTIO_F_ACCESS_PLATFORM), "protocol_features": 0},
        {"protocol_features": v.mask(v.VHOST_USER_PROTOCOL_F_CRYPTO_SESSION)},
        {"protocol_features": v.mask(v.VHOST_USER_PROTOCOL_F_XEN_MMAP)},
    ],
)
def test_offer_that_cannot_be_kept(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="offer: "):
        net_offer(**change)


def test_every_offerable_protocol_feature_has_its_handlers() -> None:
    served = [
        request
        for request, rule in FRONTEND_REQUESTS.items()
        if rule.gate.protocol is not None and v.has(SERVED_PROTOCOL_FEATURES, rule.gate.protocol)
    ]
    assert len(served) > 10
    assert set(served) <= set(TRANSITIONS)


# --- Rules of replying ----------------------------------------------------------------------------------------------


@pytest.mark.shows("VHOST_USER_PROTOCOL_F_REPLY_ACK")
def test_no_ack_without_reply_ack(peer: Peer) -> None:
    assert peer.say(R.SET_OWNER, ack=True) is None


def test_no_ack_that_was_not_asked_for(ready: Peer) -> None:
    assert ready.say(R.SET_VRING_NUM, (0, 256)) is None


def test_own_reply_comes_once_and_carries_no_ack(ready: Peer) -> None:
    reply = ready.session.receive(make_message(R.GET_FEATURES, need_reply=True))
    assert reply == struct.pack("=3IQ", 1, 5, 8, NET_FEATURES)


def test_unknown_request_is_nacked_or_closes(ready: Peer) -> None:
    fd = memfd()
    assert read_reply(ready.session.receive(Message(77, 9, b"abc", [fd]))) == struct.pack("=Q", 1)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    with pytest.raises(FrontendError, match="request 77"):
        ready.session.receive(Message(77, 1, b"", []))
    assert ready.session.closed


def test_unknown_request_closes_without_reply_ack(peer: Peer) -> None:
    with pytest.raises(FrontendError):
        peer.session.receive(Message(0xFFFFFFFF, 9, b"", []))


@pytest.mark.shows("NONE")
def test_request_zero_always_closes(ready: Peer) -> None:
    with pytest.raises(FrontendError):
        ready.session.receive(Message(0, 9, b"", []))
    assert ready.session.closed


GATED = [
    (R.SET_VRING_ENDIAN, (0, 0), 0),
    (R.CLOSE_CRYPTO_SESSION, 1, 0),
    (R.SET_INFLIGHT_FD, (4096, 0, 1, 256), 1),
    (R.GPU_SET_SOCKET, None, 1),
    (R.IOTLB_MSG, (0, 4096, 0, 1, 3), 0),
]


@pytest.mark.parametrize(("request_id", "payload", "count"), GATED)
def test_request_without_its_feature_is_nacked(ready: Peer, request_id: Request, payload: Any, count: int) -> None:
    assert ready.acked(request_id, payload, [ready.memory_fd] * count) == 1
    close_because(ready, request_id, payload, (ready.memory_fd,) * count)


@pytest.mark.parametrize(
    ("request_id", "payload"),
    [
        (R.GET_INFLIGHT_FD, (0, 0, 1, 256)),
        (R.POSTCOPY_ADVISE, None),
        (R.POSTCOPY_LISTEN, None),
        (R.GET_SHARED_OBJECT, bytes(16)),
        (R.CHECK_DEVICE_STATE, None),
        (R.GET_SHMEM_CONFIG, None),
        (R.GET_VRING_BASE_SKIP_DRAIN, (0, 0)),
        (R.CREATE_CRYPTO_SESSION, b"x"),
    ],
)
def test_request_with_own_reply_without_its_feature_closes(ready: Peer, request_id: Request, payload: Any) -> None:
    close_because(ready, request_id, payload, ack=True)


@pytest.mark.parametrize(
    ("request_id", "payload"),
    [
        (R.SEND_RARP, 2),
        (R.NET_SET_MTU, 1500),
        (R.RESET_DEVICE, None),
        (R.SET_STATUS, 1),
        (R.REM_MEM_REG, region()),
        (R.VRING_KICK, (0, 0)),
        (R.SET_CONFIG, Config(0, 0, b"x")),
    ],
)
def test_served_request_needs_its_negotiated_feature(peer: Peer, request_id: Request, payload: Any) -> None:
    peer.negotiate(protocol_features=v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
    assert peer.acked(request_id, payload) == 1
    assert "not negotiated" in close_because(peer, request_id, payload)


def test_iotlb_is_answered_even_without_reply_ack(peer: Peer) -> None:
    assert peer.say(R.IOTLB_MSG, (0, 4096, 0, 1, 2), ack=True) == 1


@pytest.mark.shows("SET_LOG_BASE")
def test_log_base_in_its_old_form(peer: Peer) -> None:
    peer.negotiate(protocol_features=v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
    assert peer.acked(R.SET_LOG_BASE, 0x1000) == 1
    peer.say(R.SET_PROTOCOL_FEATURES, NET_PROTOCOL_FEATURES)
    close_because(peer, R.SET_LOG_BASE, 0x1000)


def test_data_plane_failure_is_a_nack(ready: Peer) -> None:
    ready.plane.fail = {e.SetMtu}
    assert ready.acked(R.NET_SET_MTU, 1500) == 1
    assert ready.say(R.NET_SET_MTU, 1500) is None


def test_os_error_of_the_data_plane_becomes_a_resource_error(peer: Peer) -> None:
    def no_memory(effect: e.Effect) -> None:
        raise OSError(12, "Cannot allocate memory")

    session = Session(net_offer(), no_memory)
    with pytest.raises(ResourceError, match="SetMemory failed: Cannot allocate memory"):
        session.receive(make_message(R.SET_MEM_TABLE, (region(),), [peer.memory_fd]))
    assert session.closed


@pytest.mark.parametrize(
    ("failing", "request_id", "payload"),
    [
        (e.EnableRing, R.SET_FEATURES, v.mask(v.VIRTIO_F_VERSION_1)),
        (e.EnableRing, R.RESET_OWNER, None),
        (e.EnableRing, R.RESET_DEVICE, None),
        (e.ResetDevice, R.RESET_DEVICE, None),
    ],
)
def test_change_that_stops_halfway_closes(ready: Peer, failing: type, request_id: Request, payload: Any) -> None:
    ready.say(R.SET_VRING_ENABLE, (1, 1))
    ready.plane.fail = {failing}
    assert "fails" in close_because(ready, request_id, payload, ack=True)


def test_bug_in_the_data_plane_releases_everything(ready: Peer) -> None:
    ready.start(0)

    def bug(effect: e.Effect) -> None:
        raise KeyError("bug")

    ready.session._apply = bug
    with pytest.raises(KeyError):
        ready.say(R.SET_VRING_ENABLE, (0, 1))
    assert ready.session.closed


def test_closed_session_takes_nothing(ready: Peer) -> None:
    ready.session.close()
    with pytest.raises(UsageError, match="closed"):
        ready.say(R.SET_VRING_CALL, 0, [ready.memory_fd])


def test_close_releases_in_order_and_once(ready: Peer) -> None:
    ready.say(R.SET_LOG_BASE, Log(PAGE, 0), [ready.memory_fd])
    ready.start(0)
    ready.start(3)
    ready.plane.take()
    ready.session.close()
    ready.session.close()
    assert ready.plane.take() == [e.StopRing(0), e.StopRing(3), e.SetMemory(()), e.ClearLog()]


def test_close_survives_a_failing_data_plane(ready: Peer) -> None:
    ready.start(0)
    ready.start(1)
    ready.plane.fail = {e.StopRing}
    ready.session.close()
    assert [type(effect) for effect in ready.plane.effects[-3:]] == [e.StopRing, e.StopRing, e.SetMemory]


def test_flood_of_refusals_is_not_a_flood_of_lines(ready: Peer, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2000):
        assert ready.acked(R.SET_VRING_NUM, (0, 0)) == 1
    assert ready.session.refused_count == 2000
    assert 16 <= len(caplog.records) <= 32
