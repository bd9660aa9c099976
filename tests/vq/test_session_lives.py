"""Whole lives of real front-ends, message by message as their logs show them."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from vhost_rig import (
    NET_FEATURES,
    NET_PROTOCOL_FEATURES,
    PAGE,
    SPLIT,
    USER,
    Peer,
    addresses,
)
from vq import effects as e
from vq import virtio as v
from vq.message import Request
from vq.payload import Log, Region, VringState

R = Request
LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)


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


@pytest.mark.shows("SET_LOG_BASE", "VHOST_F_LOG_ALL", "VHOST_USER_PROTOCOL_F_LOG_SHMFD")
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


@pytest.mark.shows("SET_MEM_TABLE")
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
