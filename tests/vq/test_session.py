"""The session: every message, every rule of replying, and whole lives of real front-ends."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from vhost_rig import (
    NET_FEATURES,
    NET_PROTOCOL_FEATURES,
    PACKED,
    PAGE,
    SPLIT,
    USER,
    Peer,
    addresses,
    make_message,
    memfd,
    net_offer,
    read_reply,
    region,
)
from vq import effects as e
from vq import virtio as v
from vq.errors import FrontendError, ResourceError, UsageError, VqError
from vq.message import FRONTEND_REQUESTS, Message, Request
from vq.payload import Config, Log, Region, VringAddr, VringState
from vq.session import SERVED_PROTOCOL_FEATURES, TRANSITIONS, Session

R = Request
LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)


def close_because(peer: Peer, request: int, payload: Any = None, fds: tuple[int, ...] = (), **how: bool) -> str:
    """Expect that a message ends the connection with everything released; returns the reason."""
    with pytest.raises(VqError) as caught:
        peer.say(request, payload, fds, **how)
    assert peer.session.closed
    assert not peer.plane.rings
    assert not peer.plane.regions
    return str(caught.value)


# --- Negotiation --------------------------------------------------------------------------------------------------


def test_offer_is_answered_as_given(peer: Peer) -> None:
    assert peer.say(R.GET_FEATURES) == NET_FEATURES
    assert peer.say(R.GET_PROTOCOL_FEATURES) == NET_PROTOCOL_FEATURES
    peer.say(R.SET_PROTOCOL_FEATURES, NET_PROTOCOL_FEATURES)
    assert peer.say(R.GET_QUEUE_NUM) == 2
    assert peer.say(R.GET_MAX_MEM_SLOTS) == 8


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


def test_protocol_features_that_were_not_offered(peer: Peer) -> None:
    peer.negotiate()
    wrong = NET_PROTOCOL_FEATURES | v.mask(v.VHOST_USER_PROTOCOL_F_PAGEFAULT)
    assert peer.acked(R.SET_PROTOCOL_FEATURES, wrong) == 1
    assert peer.session.protocol_features == NET_PROTOCOL_FEATURES
    assert "PAGEFAULT" in close_because(peer, R.SET_PROTOCOL_FEATURES, wrong)


def test_turning_reply_ack_on_is_acked(peer: Peer) -> None:
    assert peer.say(R.SET_PROTOCOL_FEATURES, v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK), ack=True) == 0


def test_inband_needs_its_companions(peer: Peer) -> None:
    peer.negotiate()
    alone = v.mask(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
    assert "INBAND" in close_because(peer, R.SET_PROTOCOL_FEATURES, alone, ack=True)


def test_protocol_features_need_the_offered_bit() -> None:
    peer = Peer(net_offer(features=v.mask(v.VIRTIO_F_VERSION_1), protocol_features=0))
    close_because(peer, R.GET_PROTOCOL_FEATURES)
    peer.close()


def test_set_owner_may_come_late_and_twice(peer: Peer) -> None:
    peer.negotiate()
    assert peer.acked(R.SET_OWNER) == 0
    assert peer.acked(R.SET_OWNER) == 0


def test_reset_owner_disables_and_keeps_the_rest(ready: Peer) -> None:
    ready.start(0)
    ready.say(R.SET_VRING_ENABLE, (0, 1))
    ready.plane.take()
    assert ready.acked(R.RESET_OWNER) == 0
    assert ready.plane.take() == [e.EnableRing(0, False)]
    assert ready.session.rings[0].started
    assert ready.session.regions
    assert ready.session.features == SPLIT


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


def test_only_logging_changes_while_a_ring_runs(ready: Peer) -> None:
    ready.start(0)
    ready.plane.take()
    assert ready.acked(R.SET_FEATURES, PACKED) == 1
    assert ready.acked(R.SET_FEATURES, SPLIT | LOG_ALL) == 0
    assert ready.acked(R.SET_FEATURES, SPLIT) == 0
    assert ready.plane.take() == [e.SetFeatures(SPLIT | LOG_ALL), e.SetFeatures(SPLIT)]
    ready.say(R.GET_VRING_BASE, (0, 0))
    assert ready.acked(R.SET_FEATURES, PACKED) == 0


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
        {"features": NET_FEATURES | v.mask(v.VIRTIO_F_ACCESS_PLATFORM)},
        {"protocol_features": v.mask(v.VHOST_USER_PROTOCOL_F_PAGEFAULT)},
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


# --- Rules of replying --------------------------------------------------------------------------------------------


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


# --- Memory and log -----------------------------------------------------------------------------------------------


def test_memory_table_reaches_the_data_plane(peer: Peer) -> None:
    other = memfd()
    table = (region(), region(1 << 32, PAGE, 1 << 40, PAGE))
    assert peer.say(R.SET_MEM_TABLE, table, [peer.memory_fd, other]) is None
    (effect,) = peer.plane.take()
    assert isinstance(effect, e.SetMemory)
    assert [(r.guest_addr, r.size, r.user_addr, r.mmap_offset) for r in effect.regions] == [tuple(r) for r in table]
    for known in effect.regions:  # the fds are closed: nobody but the mapping needs them
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(known.fd)
    os.close(other)


def test_same_table_again_is_nothing_new(ready: Peer) -> None:
    ready.share_memory()
    assert ready.plane.take() == []


def test_same_addresses_in_another_file_are_new(ready: Peer) -> None:
    other = memfd()
    ready.say(R.SET_MEM_TABLE, (region(),), [other])
    os.close(other)
    assert [type(effect) for effect in ready.plane.take()] == [e.SetMemory]


def test_table_replaced_while_rings_run(ready: Peer) -> None:
    ready.start(0)
    ready.plane.take()
    more = (region(), region(1 << 32, PAGE, 1 << 40))
    assert ready.acked(R.SET_MEM_TABLE, more, [ready.memory_fd, ready.memory_fd]) == 0
    assert [type(effect) for effect in ready.plane.take()] == [e.SetMemory]
    assert ready.session.rings[0].started


def test_failing_table_leaves_the_old_one(ready: Peer) -> None:
    ready.plane.fail = {e.SetMemory}
    held = ready.session.regions
    assert ready.acked(R.SET_MEM_TABLE, (region(size=PAGE),), [ready.memory_fd]) == 1
    assert ready.session.regions == held
    assert ready.plane.regions[0].size == 16 * PAGE


END = 1 << 64
WRONG_TABLES = {
    "empty region": (region(size=0),),
    "guest address passes 2^64": (region(END - PAGE, 2 * PAGE),),
    "user address passes 2^64": (region(user=END - 1, size=2),),
    "offset passes 2^64": (region(offset=END - PAGE, size=PAGE + 1),),
    "size passes 2^64": (region(2, END - 1, 0, 0),),
    "guest overlap by a byte": (region(0, PAGE + 1, USER), region(PAGE, PAGE, 0)),
    "user overlap by a byte": (region(0, PAGE, PAGE), region(1 << 20, PAGE + 1, 0)),
    "twice the same": (region(), region()),
    "one inside another": (region(0, 8 * PAGE, 0), region(PAGE, PAGE, 1 << 40)),
}


@pytest.mark.parametrize("table", WRONG_TABLES.values(), ids=WRONG_TABLES.keys())
def test_wrong_table_is_refused_whole(ready: Peer, table: tuple[Region, ...]) -> None:
    held = ready.session.regions
    assert ready.acked(R.SET_MEM_TABLE, table, [ready.memory_fd] * len(table)) == 1
    assert (ready.plane.take(), ready.session.regions) == ([], held)
    close_because(ready, R.SET_MEM_TABLE, table, (ready.memory_fd,) * len(table))


def test_region_up_to_the_last_byte(peer: Peer) -> None:
    peer.negotiate()
    table = (region(END - PAGE, PAGE, END - PAGE, 0), region(0, PAGE, 0, 0))
    assert peer.acked(R.SET_MEM_TABLE, table, [peer.memory_fd] * 2) == 0


def test_regions_come_and_go(ready: Peer) -> None:
    extra = region(1 << 32, PAGE, 1 << 40, PAGE)
    assert ready.acked(R.ADD_MEM_REG, extra, [ready.memory_fd]) == 0
    (added,) = ready.plane.take()
    assert isinstance(added, e.AddRegion) and added.region.guest_addr == 1 << 32
    assert ready.acked(R.ADD_MEM_REG, extra, [ready.memory_fd]) == 1  # there already
    assert ready.acked(R.REM_MEM_REG, extra._replace(size=2 * PAGE)) == 1
    assert ready.acked(R.REM_MEM_REG, extra._replace(user_addr=0)) == 1
    assert ready.plane.take() == []
    # the offset does not count, and an fd of an old front-end is closed unused
    assert ready.acked(R.REM_MEM_REG, extra._replace(mmap_offset=0), [ready.memory_fd]) == 0
    assert [type(effect) for effect in ready.plane.take()] == [e.RemoveRegion]
    assert ready.acked(R.REM_MEM_REG, extra) == 1
    assert len(ready.session.regions) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_added_region_takes_one_fd(ready: Peer, count: int) -> None:
    assert ready.acked(R.ADD_MEM_REG, region(1 << 32, PAGE, 1 << 40), [ready.memory_fd] * count) == 1


def test_slots_are_limited(ready: Peer) -> None:
    for n in range(1, 8):
        assert ready.acked(R.ADD_MEM_REG, region(n << 32, PAGE, n << 40), [ready.memory_fd]) == 0
    assert ready.acked(R.ADD_MEM_REG, region(8 << 32, PAGE, 8 << 40), [ready.memory_fd]) == 1
    assert ready.acked(R.REM_MEM_REG, region(3 << 32, PAGE, 3 << 40)) == 0
    assert ready.acked(R.ADD_MEM_REG, region(8 << 32, PAGE, 8 << 40), [ready.memory_fd]) == 0


def test_failing_region_changes_nothing(ready: Peer) -> None:
    ready.plane.fail = {e.AddRegion, e.RemoveRegion}
    held = ready.session.regions
    assert ready.acked(R.ADD_MEM_REG, region(1 << 32, PAGE, 1 << 40), [ready.memory_fd]) == 1
    assert ready.acked(R.REM_MEM_REG, region()) == 1
    assert ready.session.regions == held


def test_log_is_mapped_and_echoed(ready: Peer) -> None:
    assert ready.say(R.SET_LOG_BASE, Log(0x2000, 0), [ready.memory_fd], ack=True) == Log(0x2000, 0)
    (effect,) = ready.plane.take()
    assert isinstance(effect, e.SetLog) and (effect.size, effect.offset) == (0x2000, 0)
    assert ready.say(R.SET_LOG_BASE, Log(0x1000, 0x1000), [ready.memory_fd]) == Log(0x1000, 0x1000)


@pytest.mark.parametrize("area", [Log(0, 0), Log(PAGE, END - PAGE + 1), Log(END - 1, 2)])
def test_wrong_log_closes(ready: Peer, area: Log) -> None:
    close_because(ready, R.SET_LOG_BASE, area, (ready.memory_fd,), ack=True)


def test_log_that_cannot_be_mapped_closes(ready: Peer) -> None:
    ready.plane.fail = {e.SetLog}
    close_because(ready, R.SET_LOG_BASE, Log(PAGE, 0), (ready.memory_fd,))


def test_log_event_is_kept_and_replaced(ready: Peer) -> None:
    event = os.eventfd(0)
    assert ready.acked(R.SET_LOG_FD, None, [event]) == 0
    assert ready.acked(R.SET_LOG_FD, None, [event]) == 0
    os.close(event)
    assert ready.acked(R.SET_LOG_FD, None, [ready.memory_fd]) == 1
    assert ready.say(R.SET_LOG_FD, None, [ready.memory_fd]) is None


# --- Rings --------------------------------------------------------------------------------------------------------


def test_ring_starts_on_the_kick_message(ready: Peer) -> None:
    ready.start(1, num=512, base=0xABCD_0007)
    effects = ready.plane.take()
    assert [type(effect) for effect in effects] == [e.StartRing]
    ring = ready.plane.rings[1]
    where = addresses(1)
    assert (ring.desc, ring.avail, ring.used) == (where.desc, where.avail, where.used)
    assert (ring.num, ring.base, ring.packed, ring.enabled) == (512, 7, False, False)
    assert ring.log_guest_addr == where.log_guest_addr
    assert (ring.kick_fd, ring.call_fd, ring.err_fd) == (
        ready.session.rings[1].kick_fd,
        ready.session.rings[1].call_fd,
        ready.session.rings[1].err_fd,
    )


def test_parts_may_come_before_features_and_memory_and_in_any_order(peer: Peer) -> None:
    event = os.eventfd(0)
    peer.say(R.SET_VRING_ENABLE, (2, 1))
    peer.say(R.SET_VRING_CALL, 2, [event])
    peer.say(R.SET_VRING_ADDR, addresses(2))
    peer.say(R.SET_VRING_BASE, (2, 5))
    peer.say(R.SET_VRING_NUM, (2, 128))
    peer.negotiate()
    peer.share_memory()
    peer.say(R.SET_VRING_KICK, 2, [event])
    os.close(event)
    assert peer.plane.rings[2].enabled
    assert peer.plane.rings[2].base == 5


@pytest.mark.parametrize("missing", ["num", "addr", "memory"])
def test_ring_that_cannot_start(peer: Peer, missing: str) -> None:
    peer.negotiate()
    err, kick = os.eventfd(0), os.eventfd(0)
    if missing != "memory":
        peer.share_memory()
    if missing != "num":
        peer.say(R.SET_VRING_NUM, (0, 256))
    if missing != "addr":
        peer.say(R.SET_VRING_ADDR, addresses(0))
    peer.say(R.SET_VRING_ERR, 0, [err])
    peer.plane.take()
    assert peer.acked(R.SET_VRING_KICK, 0, [kick]) == 1
    assert peer.plane.take() == [e.SignalErr(0, peer.session.rings[0].err_fd or -1)]
    assert not peer.session.rings[0].started
    assert peer.session.rings[0].kick_fd is None
    close_because(peer, R.SET_VRING_KICK, 0, (kick,))
    os.close(err)
    os.close(kick)


def test_ring_that_the_data_plane_cannot_start(ready: Peer) -> None:
    ready.plane.fail = {e.StartRing}
    with pytest.raises(VqError, match="StartRing fails"):
        ready.start(0)
    assert [type(effect) for effect in ready.plane.take()] == [e.StartRing, e.SignalErr, e.SetMemory]
    assert ready.session.closed


def test_packed_ring_takes_both_halves_of_its_base_from_the_lower(peer: Peer) -> None:
    peer.negotiate(PACKED)
    peer.share_memory()
    peer.start(0, num=100, base=0x8000_8000)  # QEMU; any number of entries is fine
    peer.start(1, num=100, base=0x8000)  # virtio-user
    peer.start(2, num=100, base=0x1234_0063)
    assert [peer.plane.rings[n].base for n in range(3)] == [0x8000_8000, 0x8000_8000, 0x0063_0063]
    assert all(ring.packed for ring in peer.plane.rings.values())


def test_packed_position_must_lie_in_the_ring(peer: Peer) -> None:
    peer.negotiate(PACKED)
    peer.share_memory()
    event = os.eventfd(0)
    peer.say(R.SET_VRING_NUM, (0, 100))
    peer.say(R.SET_VRING_ADDR, addresses(0))
    peer.say(R.SET_VRING_BASE, (0, 0x8000 | 100))
    assert peer.acked(R.SET_VRING_KICK, 0, [event]) == 1
    peer.say(R.SET_VRING_BASE, (0, 0x8000 | 99))
    assert peer.acked(R.SET_VRING_KICK, 0, [event]) == 0
    os.close(event)


@pytest.mark.parametrize("num", [0, 3, 255, 32769, 65536, 1 << 31, 0xFFFFFFFF])
def test_wrong_number_of_entries(ready: Peer, num: int) -> None:
    assert ready.acked(R.SET_VRING_NUM, (0, num)) == 1
    assert ready.session.rings[0].num == 0
    close_because(ready, R.SET_VRING_NUM, (0, num))


@pytest.mark.parametrize("num", [1, 2, 32768])
def test_right_number_of_entries(ready: Peer, num: int) -> None:
    for _ in range(100):
        assert ready.acked(R.SET_VRING_NUM, (0, num)) == 0


def test_layout_known_late_is_checked_at_the_start(peer: Peer) -> None:
    event = os.eventfd(0)
    peer.say(R.SET_VRING_NUM, (0, 100))  # fine for a packed ring
    peer.say(R.SET_VRING_ADDR, addresses(0)._replace(avail=USER + 2))  # fine for a split ring
    peer.negotiate(SPLIT)
    peer.share_memory()
    assert peer.acked(R.SET_VRING_KICK, 0, [event]) == 1
    peer.say(R.SET_FEATURES, PACKED)
    assert peer.acked(R.SET_VRING_KICK, 0, [event]) == 1
    peer.say(R.SET_VRING_ADDR, addresses(0))
    assert peer.acked(R.SET_VRING_KICK, 0, [event]) == 0
    os.close(event)


@pytest.mark.parametrize(
    ("features", "part", "off"),
    [(SPLIT, "desc", 8), (SPLIT, "avail", 1), (SPLIT, "used", 2), (PACKED, "desc", 8), (PACKED, "avail", 2)],
)
def test_misaligned_part(peer: Peer, features: int, part: str, off: int) -> None:
    peer.negotiate(features)
    right = addresses(0)
    assert peer.acked(R.SET_VRING_ADDR, right._replace(**{part: getattr(right, part) + off})) == 1
    assert peer.session.rings[0].addr is None
    assert peer.acked(R.SET_VRING_ADDR, right) == 0


WITH_INDEX = [
    (R.SET_VRING_NUM, lambda n: (n, 256), False),
    (R.SET_VRING_BASE, lambda n: (n, 0), False),
    (R.SET_VRING_ADDR, lambda n: VringAddr(n, 0, 0, 0, 0, 0), False),
    (R.SET_VRING_ENABLE, lambda n: (n, 1), False),
    (R.VRING_KICK, lambda n: (n, 0), False),
    (R.SET_VRING_KICK, lambda n: n & 0xFF, True),
    (R.SET_VRING_CALL, lambda n: n & 0xFF, True),
    (R.SET_VRING_ERR, lambda n: n & 0xFF, True),
]


@pytest.mark.parametrize("index", [4, 255, 0x10004, 0xFFFFFFFF])
@pytest.mark.parametrize(("request_id", "payload", "with_fd"), WITH_INDEX)
def test_ring_index_out_of_range(ready: Peer, request_id: Request, payload: Any, with_fd: bool, index: int) -> None:
    event = os.eventfd(0)
    assert ready.acked(request_id, payload(index), [event] if with_fd else []) == 1
    os.close(event)
    assert ready.plane.take() == []


@pytest.mark.parametrize("index", [4, 256, 0x10000, 0xFFFFFFFF])
def test_base_of_a_ring_that_does_not_exist_closes(ready: Peer, index: int) -> None:
    close_because(ready, R.GET_VRING_BASE, (index, 0), ack=True)


def test_started_ring_refuses_num_base_and_addresses(ready: Peer) -> None:
    ready.start(0)
    ready.plane.take()
    assert ready.acked(R.SET_VRING_NUM, (0, 128)) == 1
    assert ready.acked(R.SET_VRING_BASE, (0, 1)) == 1
    assert ready.acked(R.SET_VRING_ADDR, addresses(0, start=USER + 16)) == 1
    assert ready.plane.take() == []
    assert ready.acked(R.SET_VRING_NUM, (1, 128)) == 0


def test_logging_of_a_started_ring_is_switched(ready: Peer) -> None:
    ready.start(0)
    ready.plane.take()
    assert ready.acked(R.SET_VRING_ADDR, addresses(0, flags=v.VHOST_VRING_F_LOG)) == 0
    assert ready.acked(R.SET_VRING_ADDR, addresses(0)) == 0
    log = addresses(0).log_guest_addr
    assert ready.plane.take() == [e.SetRingAddresses(0, 1, log), e.SetRingAddresses(0, 0, log)]


def test_stop_answers_the_base_keeps_enable_and_drops_kick_and_call(ready: Peer) -> None:
    ready.say(R.SET_VRING_ENABLE, (0, 1))
    ready.start(0)
    ready.plane.next_base[0] = 14132
    ring = ready.session.rings[0]
    dropped = [fd for fd in (ring.kick_fd, ring.call_fd) if fd is not None]
    assert len(dropped) == 2
    assert ready.say(R.GET_VRING_BASE, (0, 0)) == VringState(0, 14132)
    assert not ring.started and ring.enabled and ring.err_fd is not None
    for fd in dropped:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)
    ready.plane.take()
    assert ready.say(R.GET_VRING_BASE, (0, 0)) == VringState(0, 14132)  # again: it stands already
    assert ready.plane.take() == []
    ready.start(0, base=14132)
    assert ready.plane.rings[0].base == 14132


def test_ring_that_never_ran_answers_the_base_that_was_set(peer: Peer) -> None:
    assert peer.say(R.GET_VRING_BASE, (3, 0)) == VringState(3, 0)
    peer.say(R.SET_VRING_BASE, (3, 0x8000_8000))
    event = os.eventfd(0)
    peer.say(R.SET_VRING_CALL, 3, [event])
    os.close(event)
    assert peer.say(R.GET_VRING_BASE, (3, 0)) == VringState(3, 0x8000_8000)
    assert peer.session.rings[3].call_fd is None
    assert peer.plane.take() == []


def test_call_is_replaced_at_any_time(ready: Peer) -> None:
    event = os.eventfd(0)
    ready.say(R.SET_VRING_CALL, 0, [event])
    assert ready.plane.take() == []
    ready.start(0)
    ready.plane.take()
    old = ready.session.rings[0].call_fd
    ready.say(R.SET_VRING_CALL, 0, [event])
    (effect,) = ready.plane.take()
    assert effect == e.SetCall(0, ready.session.rings[0].call_fd)
    assert old != ready.session.rings[0].call_fd
    ready.say(R.SET_VRING_CALL, 0x100)
    ready.say(R.SET_VRING_ERR, 0x100)
    assert ready.plane.take() == [e.SetCall(0, None), e.SetErr(0, None)]
    assert ready.session.rings[0].call_fd is None
    os.close(event)


def test_call_that_the_data_plane_refuses_leaves_the_old(ready: Peer) -> None:
    ready.start(0)
    old = ready.session.rings[0].call_fd
    ready.plane.fail = {e.SetCall}
    event = os.eventfd(0)
    assert ready.acked(R.SET_VRING_CALL, 0, [event]) == 1
    os.close(event)
    assert ready.session.rings[0].call_fd == old
    os.fstat(old or -1)


def test_kick_of_a_started_ring_is_replaced(ready: Peer) -> None:
    ready.start(0)
    ready.plane.take()
    event = os.eventfd(0)
    ready.say(R.SET_VRING_KICK, 0, [event])
    os.close(event)
    assert ready.plane.take() == [e.SetKick(0, ready.session.rings[0].kick_fd)]
    ready.say(R.SET_VRING_KICK, 0x100)
    assert ready.plane.take() == [e.SetKick(0, None)]


def test_kick_without_fd_starts_a_polled_ring(ready: Peer) -> None:
    ready.say(R.SET_VRING_NUM, (0, 256))
    ready.say(R.SET_VRING_ADDR, addresses(0))
    assert ready.acked(R.SET_VRING_KICK, 0x100) == 0
    assert ready.plane.rings[0].kick_fd is None


def test_kick_by_message_starts_and_kicks(ready: Peer) -> None:
    ready.say(R.SET_VRING_NUM, (0, 256))
    assert ready.acked(R.VRING_KICK, (0, 0)) == 1  # no addresses yet
    ready.say(R.SET_VRING_ADDR, addresses(0))
    assert ready.acked(R.VRING_KICK, (0, 0)) == 0
    assert ready.acked(R.VRING_KICK, (0, 0)) == 0
    assert [type(effect) for effect in ready.plane.take()] == [e.StartRing, e.Kick]


def test_enable_is_remembered_and_told_once(ready: Peer) -> None:
    for _ in range(3):
        assert ready.acked(R.SET_VRING_ENABLE, (0, 1)) == 0
    assert ready.plane.take() == [e.EnableRing(0, True)]
    assert ready.acked(R.SET_VRING_ENABLE, (0, 2)) == 1
    assert ready.acked(R.SET_VRING_ENABLE, (0, 0)) == 0
    assert ready.plane.take() == [e.EnableRing(0, False)]


FD_MESSAGES = [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR]


@pytest.mark.parametrize("request_id", FD_MESSAGES)
@pytest.mark.parametrize("kind", ["file", "directory", "path", "memfd", "wrong end", "null"])
def test_fd_that_cannot_signal(
    ready: Peer, request_id: Request, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ready.say(R.SET_VRING_NUM, (0, 256))
    ready.say(R.SET_VRING_ADDR, addresses(0))
    folder = tmp_path_factory.mktemp("fds")
    read_end, write_end = os.pipe()
    make: dict[str, Callable[[], int]] = {
        "file": lambda: os.open(folder / "file", os.O_RDWR | os.O_CREAT),
        "directory": lambda: os.open(folder, os.O_RDONLY),
        "path": lambda: os.open(folder, os.O_PATH),
        "memfd": memfd,
        "wrong end": lambda: os.dup(write_end if request_id == R.SET_VRING_KICK else read_end),
        "null": lambda: os.open("/dev/null", os.O_RDWR),
    }
    fd = make[kind]()
    assert ready.acked(request_id, 0, [fd]) == 1
    for each in (fd, read_end, write_end):
        os.close(each)
    assert ready.plane.take() == []


@pytest.mark.parametrize("request_id", FD_MESSAGES)
@pytest.mark.parametrize("kind", ["eventfd", "pipe", "socket"])
def test_fd_that_can_signal_is_made_non_blocking(ready: Peer, request_id: Request, kind: str) -> None:
    ready.say(R.SET_VRING_NUM, (0, 256))
    ready.say(R.SET_VRING_ADDR, addresses(0))
    if kind == "eventfd":
        ends = [os.eventfd(0)]
        given = ends[0]
    elif kind == "pipe":
        ends = list(os.pipe())
        given = ends[0] if request_id == R.SET_VRING_KICK else ends[1]
    else:
        ends = [sock.detach() for sock in socket.socketpair()]
        given = ends[0]
    assert os.get_blocking(given)
    assert ready.acked(request_id, 0, [given]) == 0
    assert not os.get_blocking(given)  # the flag belongs to the file, so it shows in our fd as well
    for fd in ends:
        os.close(fd)


def test_full_counter_does_not_block(ready: Peer) -> None:
    event = os.eventfd(2**64 - 2 & 0xFFFFFFFF)
    ready.say(R.SET_VRING_CALL, 0, [event])
    os.eventfd_write(event, 2**64 - 2 - (2**64 - 2 & 0xFFFFFFFF))
    with pytest.raises(BlockingIOError):
        os.eventfd_write(ready.session.rings[0].call_fd or -1, 1)
    os.close(event)


# --- Device -------------------------------------------------------------------------------------------------------


def test_rarp_announces_unicast_addresses_only(ready: Peer) -> None:
    mac = bytes.fromhex("525400123456")
    ready.say(R.SEND_RARP, int.from_bytes(mac, "little"))
    ready.say(R.SEND_RARP, int.from_bytes(mac, "little") | 0xFFFF << 48)
    ready.say(R.SEND_RARP, 0)
    ready.say(R.SEND_RARP, int.from_bytes(bytes.fromhex("ffffffffffff"), "little"))
    ready.say(R.SEND_RARP, int.from_bytes(bytes.fromhex("01005e000001"), "little"))
    assert ready.plane.take() == [e.SendRarp(mac), e.SendRarp(mac)]


@pytest.mark.parametrize(("mtu", "answer"), [(67, 1), (68, 0), (65535, 0), (65536, 1), (0, 1), (2**64 - 1, 1)])
def test_mtu(ready: Peer, mtu: int, answer: int) -> None:
    assert ready.acked(R.NET_SET_MTU, mtu) == answer
    assert ready.plane.take() == ([] if answer else [e.SetMtu(mtu)])
    assert ready.say(R.NET_SET_MTU, mtu) is None  # a wrong one is ignored, the session goes on


def test_mtu_needs_an_offer_not_an_acknowledgement(peer: Peer) -> None:
    peer.say(R.SET_PROTOCOL_FEATURES, NET_PROTOCOL_FEATURES)
    assert peer.acked(R.NET_SET_MTU, 1500) == 0  # before SET_FEATURES, as QEMU does
    other = Peer(net_offer(features=NET_FEATURES & ~v.mask(v.VIRTIO_NET_F_MTU)))
    other.negotiate()
    assert other.acked(R.NET_SET_MTU, 1500) == 1
    other.close()


def test_backend_channel_is_a_socket_and_is_kept(ready: Peer) -> None:
    ours, theirs = socket.socketpair()
    assert ready.acked(R.SET_BACKEND_REQ_FD, None, [ours.fileno()]) == 0
    assert ready.session.backend_channel_fd is not None
    assert ready.acked(R.SET_BACKEND_REQ_FD, None, [ours.fileno()]) == 0
    assert ready.acked(R.SET_BACKEND_REQ_FD, None, [ready.memory_fd]) == 1
    assert ready.say(R.SET_BACKEND_REQ_FD, None, [ready.memory_fd]) is None
    ours.close()
    ready.session.close()
    assert theirs.recv(1) == b""
    theirs.close()


def test_config_is_read_and_filled_with_zeroes(ready: Peer) -> None:
    space = bytes(ready.plane.config)
    assert ready.say(R.GET_CONFIG, Config(0, 0, bytes(6))) == Config(0, 0, space[:6])
    assert ready.say(R.GET_CONFIG, Config(8, 1, bytes(4))) == Config(8, 1, space[8:12])
    assert ready.say(R.GET_CONFIG, Config(0, 0, bytes(256))).data == space + bytes(228)
    assert ready.say(R.GET_CONFIG, Config(27, 0, bytes(2))).data == space[27:] + b"\0"


@pytest.mark.parametrize(("offset", "size"), [(28, 1), (0, 257), (0, 0), (27, 230), (0xFFFFFFFF, 2), (0xFFFFFFF0, 16)])
def test_config_out_of_range_has_an_empty_answer(ready: Peer, offset: int, size: int) -> None:
    reply = ready.session.receive(make_message(R.GET_CONFIG, Config(offset, 0, bytes(size))))
    assert reply == struct.pack("=3I", 24, 5, 0)
    assert ready.plane.take() == []


def test_config_that_cannot_be_read_has_an_empty_answer(ready: Peer) -> None:
    ready.plane.fail = {e.ConfigRead}
    assert ready.session.receive(make_message(R.GET_CONFIG, Config(0, 0, bytes(4)))) == struct.pack("=3I", 24, 5, 0)


def test_config_is_written_inside_only(ready: Peer) -> None:
    assert ready.acked(R.SET_CONFIG, Config(0, 0, b"abcdef")) == 0
    assert ready.acked(R.SET_CONFIG, Config(27, 0, b"x")) == 0
    assert bytes(ready.plane.config[:6]) == b"abcdef"
    for wrong in (Config(27, 0, b"xy"), Config(28, 0, b"x"), Config(0xFFFFFFFF, 0, b"x"), Config(0, 0, b""),
                  Config(0, 3, b"x"), Config(0, 0, bytes(300))):  # fmt: skip
        assert ready.acked(R.SET_CONFIG, wrong) == 1
    assert len(ready.plane.config) == 28
    ready.plane.fail = {e.ConfigWrite}
    assert ready.acked(R.SET_CONFIG, Config(0, 0, b"x")) == 1


def test_migration_write_needs_a_device_that_stands(ready: Peer) -> None:
    ready.say(R.SET_CONFIG, Config(0, 1, b"a"))
    ready.start(0)
    ready.plane.take()
    ready.say(R.SET_CONFIG, Config(0, 1, b"a"))
    assert ready.plane.take() == [e.ConfigWrite(0, b"a", False)]


def test_reset_device_stops_and_disables_and_keeps_the_rest(ready: Peer) -> None:
    ready.start(0)
    ready.say(R.SET_VRING_ENABLE, (0, 1))
    ready.say(R.SET_VRING_ENABLE, (1, 1))
    ready.say(R.SET_STATUS, 0xF)
    ready.plane.take()
    assert ready.acked(R.RESET_DEVICE) == 0
    assert ready.plane.take() == [e.StopRing(0), e.EnableRing(0, False), e.EnableRing(1, False), e.ResetDevice()]
    assert ready.session.suspended
    assert ready.session.regions
    assert ready.session.features == SPLIT
    assert ready.say(R.GET_STATUS) == 0
    ready.start(0)
    assert 0 in ready.plane.rings


# --- Whole lives of real front-ends, after their message logs -----------------------------------------------------

# (request, payload, number of fds, NEED_REPLY, expected answer); None = no answer.
Step = tuple[Request, Any, int, bool, Any]
QEMU_FEATURES = NET_FEATURES & ~v.mask(v.VIRTIO_NET_F_MTU, v.VIRTIO_NET_F_MQ, v.VHOST_F_LOG_ALL, v.VIRTIO_F_RING_PACKED)


def qemu_realize() -> list[Step]:
    """Negotiation of a netdev with one queue pair, as QEMU 7.2 and 10 do it."""
    steps: list[Step] = [
        (R.GET_FEATURES, None, 0, False, NET_FEATURES),
        (R.GET_PROTOCOL_FEATURES, None, 0, False, NET_PROTOCOL_FEATURES),
        (R.SET_PROTOCOL_FEATURES, NET_PROTOCOL_FEATURES, 0, False, None),
        (R.GET_QUEUE_NUM, None, 0, False, 2),
        (R.SET_BACKEND_REQ_FD, None, 1, True, 0),
        (R.SET_OWNER, None, 0, False, None),
        (R.GET_FEATURES, None, 0, False, NET_FEATURES),
    ]
    for ring in (0, 1):
        steps += [(R.SET_VRING_CALL, ring, 1, False, None), (R.SET_VRING_ERR, ring, 1, False, None)]
    return steps


def qemu_enable(*, ack: bool) -> list[Step]:
    """Both rings, before anything else is known; QEMU 10 waits for the ack."""
    return [(R.SET_VRING_ENABLE, (ring, 1), 0, ack, 0 if ack else None) for ring in (0, 1)]


def qemu_start(features: int, bases: tuple[int, int], user: int = 0x7F66_5FFF_F000) -> list[Step]:
    """The driver is ready."""
    steps: list[Step] = [
        (R.SET_FEATURES, features, 0, False, None),
        (R.GET_STATUS, None, 0, False, 0),
        (R.SET_STATUS, 8, 0, False, None),
        (R.SET_MEM_TABLE, (Region(0, 16 * PAGE, user, 0),), 1, True, 0),
    ]
    for ring, base in enumerate(bases):
        steps += [
            (R.SET_VRING_NUM, (ring, 256), 0, False, None),
            (R.SET_VRING_BASE, (ring, base), 0, False, None),
            (R.SET_VRING_ADDR, addresses(ring, start=user), 0, False, None),
            (R.SET_VRING_KICK, ring, 1, False, None),
            (R.SET_VRING_CALL, ring, 1, False, None),
        ]
    return [*steps, (R.GET_STATUS, None, 0, False, 8), (R.SET_STATUS, 0xF, 0, False, None)]


def qemu_log(features: int, flags: int) -> list[Step]:
    """A migration begins or is called off, on running rings."""
    return [
        (R.SET_FEATURES, features, 0, True, 0),
        (R.GET_STATUS, None, 0, False, 0xF),
        *((R.SET_VRING_ADDR, addresses(ring, flags), 0, True, 0) for ring in (0, 1)),
    ]


def qemu_stop(bases: tuple[int, int], *, status_first: bool) -> list[Step]:
    """The driver goes: QEMU 7.2 says status 0 first, QEMU 10 last."""
    status: list[Step] = [(R.SET_STATUS, 0, 0, False, None)]
    stop: list[Step] = [
        (R.GET_VRING_BASE, (ring, 0), 0, False, VringState(ring, base)) for ring, base in enumerate(bases)
    ]
    return status + stop if status_first else stop + status


def virtio_user(features: int) -> list[Step]:
    """DPDK: calls before features, NEED_REPLY only for memory and status, packed base without upper half."""
    packed = v.has(features, v.VIRTIO_F_RING_PACKED)
    known = v.mask(
        v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_STATUS
    )
    steps: list[Step] = [
        (R.SET_OWNER, None, 0, False, None),
        (R.GET_FEATURES, None, 0, False, NET_FEATURES),
        (R.GET_PROTOCOL_FEATURES, None, 0, False, NET_PROTOCOL_FEATURES),
        (R.SET_PROTOCOL_FEATURES, known, 0, False, None),
        *((R.SET_VRING_CALL, ring, 1, False, None) for ring in (0, 1)),
        (R.SET_STATUS, 1, 0, True, 0),
        (R.SET_STATUS, 3, 0, True, 0),
        (R.SET_FEATURES, features, 0, False, None),
        (R.SET_STATUS, 0xB, 0, True, 0),
        (R.GET_STATUS, None, 0, False, 0xB),
        (R.SET_MEM_TABLE, (Region(USER, 16 * PAGE, USER, 0),), 1, True, 0),
    ]
    for ring in (0, 1):
        steps += [
            (R.SET_VRING_NUM, (ring, 256), 0, False, None),
            (R.SET_VRING_BASE, (ring, 0x8000 if packed else 0), 0, False, None),
            (R.SET_VRING_ADDR, addresses(ring), 0, False, None),
            (R.SET_VRING_KICK, ring, 1, False, None),
        ]
    return [
        *steps,
        *qemu_enable(ack=False),
        (R.SET_STATUS, 0xF, 0, True, 0),
        *((R.SET_VRING_ENABLE, (ring, 0), 0, False, None) for ring in (0, 1)),
        # the heap of the application has grown: a new table while the rings stand disabled but started
        (R.SET_MEM_TABLE, (Region(USER, 16 * PAGE, USER, 0), Region(1 << 40, PAGE, 1 << 40, 0)), 2, True, 0),
        *qemu_enable(ack=False),
        *((R.SET_VRING_ENABLE, (ring, 0), 0, False, None) for ring in (0, 1)),
        *((R.GET_VRING_BASE, (ring, 0), 0, False, VringState(ring, 0x8000_8000 if packed else 0)) for ring in (0, 1)),
    ]


def play(peer: Peer, steps: list[Step]) -> None:
    """Say every line and compare every answer."""
    for number, (request, payload, count, ack, expected) in enumerate(steps):
        if request == R.SET_BACKEND_REQ_FD:
            ends = [sock.detach() for sock in socket.socketpair()]
            fds = ends[:1]
        elif request in (R.SET_MEM_TABLE, R.SET_LOG_BASE):
            ends, fds = [], [peer.memory_fd] * count
        else:
            ends = fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        answer = peer.say(request, payload, fds, ack=ack)
        for fd in ends:
            os.close(fd)
        assert answer == expected, (number, request.name)


def test_life_of_a_qemu_7_guest(peer: Peer) -> None:
    peer.plane.next_base = {0: 6364, 1: 6331}
    play(peer, qemu_realize() + qemu_enable(ack=False) * 5 + qemu_start(QEMU_FEATURES, (0, 0)))
    started = [effect for effect in peer.plane.take() if isinstance(effect, e.StartRing)]
    assert [(effect.ring.index, effect.ring.enabled) for effect in started] == [(0, True), (1, True)]
    play(peer, qemu_stop((6364, 6331), status_first=True))
    assert peer.session.suspended


def test_guest_reboots_on_the_same_connection(peer: Peer) -> None:
    play(peer, qemu_realize())
    for turn in range(3):
        peer.plane.next_base = {0: 10 + turn, 1: 20 + turn}
        play(peer, qemu_enable(ack=True) + qemu_start(QEMU_FEATURES, (0, 0)))
        assert set(peer.plane.rings) == {0, 1}
        play(peer, qemu_stop((10 + turn, 20 + turn), status_first=False))
        assert not peer.plane.rings


def test_qemu_10_comes_back_to_a_restarted_backend_with_packed_rings() -> None:
    features = QEMU_FEATURES | v.mask(v.VIRTIO_F_RING_PACKED)
    for _ in range(2):  # the second connection repeats the whole set-up with the base of a fresh ring
        peer = Peer()
        play(peer, qemu_realize() + qemu_enable(ack=True) * 5)
        play(peer, qemu_start(features, (0x8000_8000, 0x8000_8000)))
        assert [ring.base for ring in peer.plane.rings.values()] == [0x8000_8000, 0x8000_8000]
        peer.close()
        assert not peer.plane.rings
        assert not peer.plane.regions


def test_migration_source_and_destination(peer: Peer) -> None:
    play(peer, qemu_realize() + qemu_enable(ack=True) + qemu_start(QEMU_FEATURES, (0, 0)))
    peer.plane.take()
    play(peer, [(R.SET_LOG_BASE, Log(0x2000, 0), 1, False, Log(0x2000, 0))])
    play(peer, qemu_log(QEMU_FEATURES | LOG_ALL, v.VHOST_VRING_F_LOG))
    assert [type(effect) for effect in peer.plane.take()] == [
        e.SetLog,
        e.SetFeatures,
        e.SetRingAddresses,
        e.SetRingAddresses,
    ]
    play(peer, qemu_log(QEMU_FEATURES, 0))  # called off
    play(peer, qemu_log(QEMU_FEATURES | LOG_ALL, v.VHOST_VRING_F_LOG))
    peer.plane.next_base = {0: 12291, 1: 974}
    play(peer, qemu_stop((12291, 974), status_first=False))
    destination = Peer()
    play(destination, qemu_realize() + qemu_enable(ack=True) * 4)
    play(destination, qemu_start(QEMU_FEATURES, (12291, 974), user=0x7FBA_1BFF_F000 - 0xC000))
    assert [ring.base for ring in destination.plane.rings.values()] == [12291, 974]
    destination.close()


def test_memory_is_plugged_while_the_rings_run(peer: Peer) -> None:
    play(peer, qemu_realize() + qemu_enable(ack=False) + qemu_start(QEMU_FEATURES, (0, 0)))
    peer.plane.take()
    both = (Region(0, 16 * PAGE, 0x7F66_5FFF_F000, 0), Region(1 << 32, 16 * PAGE, 0x7F1F_F9BF_F000, 0))
    play(peer, [(R.SET_MEM_TABLE, both, 2, True, 0)])
    assert [type(effect) for effect in peer.plane.take()] == [e.SetMemory]
    assert set(peer.plane.rings) == {0, 1}


@pytest.mark.parametrize("layout", [0, v.mask(v.VIRTIO_F_RING_PACKED)], ids=["split", "packed"])
def test_life_of_virtio_user(peer: Peer, layout: int) -> None:
    play(peer, virtio_user(SPLIT | layout | v.mask(v.VIRTIO_NET_F_MRG_RXBUF)))
    assert peer.session.suspended


def test_connections_that_end_anywhere_leak_nothing() -> None:
    steps = qemu_realize() + qemu_enable(ack=True) + qemu_start(QEMU_FEATURES, (0, 0))
    for number in range(200):
        peer = Peer()
        play(peer, steps[: number % len(steps) + 1])
        peer.close()
