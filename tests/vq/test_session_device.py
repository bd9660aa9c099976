"""The session: messages for the device behind the rings."""

from __future__ import annotations

import socket
import struct
import sys

import pytest

from vhost_rig import (
    NET_FEATURES,
    NET_PROTOCOL_FEATURES,
    SPLIT,
    Peer,
    make_message,
    net_offer,
)
from vq import effects as e
from vq import virtio as v
from vq.message import Request
from vq.payload import Config

R = Request


@pytest.mark.shows("SEND_RARP", "VHOST_USER_PROTOCOL_F_RARP")
def test_rarp_announces_unicast_addresses_only(ready: Peer) -> None:
    mac = bytes.fromhex("525400123456")
    ready.say(R.SEND_RARP, int.from_bytes(mac, "little"))
    ready.say(R.SEND_RARP, int.from_bytes(mac, "little") | 0xFFFF << 48)
    ready.say(R.SEND_RARP, 0)
    ready.say(R.SEND_RARP, int.from_bytes(bytes.fromhex("ffffffffffff"), "little"))
    ready.say(R.SEND_RARP, int.from_bytes(bytes.fromhex("01005e000001"), "little"))
    assert ready.plane.take() == [e.SendRarp(mac), e.SendRarp(mac)]


@pytest.mark.shows("NET_SET_MTU", "VHOST_USER_PROTOCOL_F_MTU")
@pytest.mark.parametrize(("mtu", "answer"), [(67, 1), (68, 0), (65535, 0), (65536, 1), (0, 1), (2**64 - 1, 1)])
def test_mtu(ready: Peer, mtu: int, answer: int) -> None:
    assert ready.acked(R.NET_SET_MTU, mtu) == answer
    assert ready.plane.take() == ([] if answer else [e.SetMtu(mtu)])
    assert ready.say(R.NET_SET_MTU, mtu) is None  # a wrong one is ignored, the session goes on


@pytest.mark.shows("VIRTIO_NET_F_MTU")
def test_mtu_needs_an_offer_not_an_acknowledgement(peer: Peer) -> None:
    peer.say(R.SET_PROTOCOL_FEATURES, NET_PROTOCOL_FEATURES)
    assert peer.acked(R.NET_SET_MTU, 1500) == 0  # before SET_FEATURES, as QEMU does
    other = Peer(net_offer(features=NET_FEATURES & ~v.mask(v.VIRTIO_NET_F_MTU)))
    other.negotiate()
    assert other.acked(R.NET_SET_MTU, 1500) == 1
    other.close()


@pytest.mark.shows("SET_BACKEND_REQ_FD", "VHOST_USER_PROTOCOL_F_BACKEND_REQ")
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


@pytest.mark.shows("GET_CONFIG", "VHOST_USER_PROTOCOL_F_CONFIG")
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


@pytest.mark.shows("SET_CONFIG", "VHOST_USER_PROTOCOL_F_CONFIG")
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


@pytest.mark.shows("RESET_DEVICE", "VHOST_USER_PROTOCOL_F_RESET_DEVICE")
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


ENDIAN = NET_PROTOCOL_FEATURES | v.mask(v.VHOST_USER_PROTOCOL_F_CROSS_ENDIAN)


@pytest.mark.shows("SET_VRING_ENDIAN", "VHOST_USER_PROTOCOL_F_CROSS_ENDIAN")
@pytest.mark.parametrize(
    ("features", "order", "answer"),
    [
        (SPLIT, 0, 0),
        (SPLIT, 1, 1),
        (v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES), int(sys.byteorder == "big"), 0),
        (v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES), int(sys.byteorder != "big"), 1),
        (SPLIT, 2, 1),
        (SPLIT, 0xFFFFFFFF, 1),
    ],
)
def test_only_our_own_byte_order_is_served(features: int, order: int, answer: int) -> None:
    peer = Peer(net_offer(protocol_features=ENDIAN))
    peer.negotiate(features, ENDIAN)
    peer.share_memory()
    assert peer.acked(R.SET_VRING_ENDIAN, (0, order)) == answer
    assert peer.acked(R.SET_VRING_ENDIAN, (4, 0)) == 1
    peer.start(0)
    assert peer.acked(R.SET_VRING_ENDIAN, (0, 0)) == 1  # only while the ring stands
    assert peer.acked(R.SET_VRING_ENDIAN, (1, 0)) == 0
    peer.close()


def test_what_must_not_shrink_is_the_same_in_each_connection() -> None:
    offer = net_offer(queue_num_answer=4)
    answers = set()
    for number in range(3):
        peer = Peer(offer)
        peer.negotiate()
        peer.share_memory()
        if number:
            peer.start(0)
            peer.say(R.RESET_DEVICE)
        asked = (R.GET_FEATURES, R.GET_PROTOCOL_FEATURES, R.GET_QUEUE_NUM, R.GET_MAX_MEM_SLOTS)
        answers.add(tuple(peer.say(request) for request in asked))
        peer.close()
    assert answers == {(NET_FEATURES, NET_PROTOCOL_FEATURES, 4, 8)}
