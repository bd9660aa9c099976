"""The session: the life cycle of one ring, and the fds that come with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from vhost_rig import (
    PACKED,
    SPLIT,
    USER,
    Peer,
    addresses,
    close_because,
    memfd,
)
from vq import effects as e
from vq import virtio as v
from vq.errors import VqError
from vq.message import Request
from vq.payload import VringAddr, VringState

R = Request


@pytest.mark.shows("SET_VRING_KICK")
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


@pytest.mark.shows("SET_VRING_KICK", "SET_VRING_ERR")
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


@pytest.mark.shows("SET_VRING_BASE")
def test_packed_ring_takes_both_halves_of_its_base_from_the_lower(peer: Peer) -> None:
    peer.negotiate(PACKED)
    peer.share_memory()
    peer.start(0, num=100, base=0x8000_8000)  # QEMU; any number of entries is fine
    peer.start(1, num=100, base=0x8000)  # virtio-user
    peer.start(2, num=100, base=0x1234_0063)
    assert [peer.plane.rings[n].base for n in range(3)] == [0x8000_8000, 0x8000_8000, 0x0063_0063]
    assert all(ring.packed for ring in peer.plane.rings.values())


@pytest.mark.shows("SET_VRING_BASE")
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


@pytest.mark.shows("SET_VRING_NUM")
@pytest.mark.parametrize("num", [0, 3, 255, 32769, 65536, 1 << 31, 0xFFFFFFFF])
def test_wrong_number_of_entries(ready: Peer, num: int) -> None:
    assert ready.acked(R.SET_VRING_NUM, (0, num)) == 1
    assert ready.session.rings[0].num == 0
    close_because(ready, R.SET_VRING_NUM, (0, num))


@pytest.mark.shows("SET_VRING_NUM")
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


@pytest.mark.shows("SET_VRING_ADDR")
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


@pytest.mark.shows("SET_VRING_ADDR")
def test_logging_of_a_started_ring_is_switched(ready: Peer) -> None:
    ready.start(0)
    ready.plane.take()
    assert ready.acked(R.SET_VRING_ADDR, addresses(0, flags=v.VHOST_VRING_F_LOG)) == 0
    assert ready.acked(R.SET_VRING_ADDR, addresses(0)) == 0
    log = addresses(0).log_guest_addr
    assert ready.plane.take() == [e.SetRingAddresses(0, 1, log), e.SetRingAddresses(0, 0, log)]


@pytest.mark.shows("GET_VRING_BASE")
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


@pytest.mark.shows("SET_VRING_CALL")
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


@pytest.mark.shows("VRING_KICK", "VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS")
def test_kick_by_message_starts_and_kicks(ready: Peer) -> None:
    ready.say(R.SET_VRING_NUM, (0, 256))
    assert ready.acked(R.VRING_KICK, (0, 0)) == 1  # no addresses yet
    ready.say(R.SET_VRING_ADDR, addresses(0))
    assert ready.acked(R.VRING_KICK, (0, 0)) == 0
    assert ready.acked(R.VRING_KICK, (0, 0)) == 0
    assert [type(effect) for effect in ready.plane.take()] == [e.StartRing, e.Kick]


@pytest.mark.shows("SET_VRING_ENABLE")
def test_enable_is_remembered_and_told_once(ready: Peer) -> None:
    for _ in range(3):
        assert ready.acked(R.SET_VRING_ENABLE, (0, 1)) == 0
    assert ready.plane.take() == [e.EnableRing(0, True)]
    assert ready.acked(R.SET_VRING_ENABLE, (0, 2)) == 1
    assert ready.acked(R.SET_VRING_ENABLE, (0, 0)) == 0
    assert ready.plane.take() == [e.EnableRing(0, False)]


FD_MESSAGES = [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR]


@pytest.mark.shows("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR")
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
def test_fd_that_can_signal_never_holds_us_up(ready: Peer, request_id: Request, kind: str) -> None:
    ready.say(R.SET_VRING_NUM, (0, 256))
    ready.say(R.SET_VRING_ADDR, addresses(0))
    kick = request_id == R.SET_VRING_KICK
    if kind == "eventfd":
        ends = [os.eventfd(0)]
        given = ends[0]
    elif kind == "pipe":
        ends = list(os.pipe())
        given = ends[0] if kick else ends[1]
    else:
        ends = [sock.detach() for sock in socket.socketpair()]
        given = ends[0]
    assert os.get_blocking(given)
    assert ready.acked(request_id, 0, [given]) == 0
    ring = ready.session.rings[0]
    ours = {R.SET_VRING_KICK: ring.kick_fd, R.SET_VRING_CALL: ring.call_fd, R.SET_VRING_ERR: ring.err_fd}[request_id]
    assert ours is not None
    assert not os.get_blocking(ours)
    if kind == "pipe" and not kick:
        assert ours is not None
        assert os.get_blocking(given), "the front-end's end is its own affair"
        os.set_blocking(given, True)
        full = False
        while not full:
            try:
                os.write(ours, bytes(4096))
            except BlockingIOError:
                full = True
    for fd in ends:
        os.close(fd)


def test_full_counter_does_not_block(ready: Peer) -> None:
    event = os.eventfd(2**64 - 2 & 0xFFFFFFFF)
    ready.say(R.SET_VRING_CALL, 0, [event])
    os.eventfd_write(event, 2**64 - 2 - (2**64 - 2 & 0xFFFFFFFF))
    with pytest.raises(BlockingIOError):
        os.eventfd_write(ready.session.rings[0].call_fd or -1, 1)
    os.close(event)
