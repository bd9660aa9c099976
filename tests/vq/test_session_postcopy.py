"""The session: the order of a postcopy migration, and what becomes of messages out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vhost_rig import (
    NET_PROTOCOL_FEATURES,
    PAGE,
    PLACE,
    SPLIT,
    Peer,
    close_because,
    make_message,
    memfd,
    net_offer,
    region,
)
from vq import effects as e
from vq import virtio as v
from vq.errors import UsageError
from vq.message import HEADER, REPLY_FLAGS, Request
from vq.offer import with_postcopy

R = Request
SLOTS = v.mask(v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
POSTCOPY = with_postcopy(NET_PROTOCOL_FEATURES)


@pytest.fixture
def moving(no_fd_is_left: None) -> Iterator[Peer]:
    """Talk to a session that offers postcopy, with features."""
    peer = Peer(net_offer(protocol_features=POSTCOPY))
    peer.negotiate(SPLIT, POSTCOPY)
    peer.plane.take()
    yield peer
    peer.close()


def listen(peer: Peer) -> None:
    peer.say(R.POSTCOPY_ADVISE)
    assert peer.say(R.POSTCOPY_LISTEN) == 0


def send_table(peer: Peer) -> None:
    answer = peer.say_postcopy_table((region(),))
    assert answer == (region(user=PLACE),)


@pytest.mark.shows("POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END", "SET_MEM_TABLE")
def test_in_the_order_of_qemu(moving: Peer) -> None:
    other = memfd()
    reply = moving.session.receive(make_message(R.POSTCOPY_ADVISE))
    assert reply == HEADER.pack(R.POSTCOPY_ADVISE, REPLY_FLAGS, 0)
    (fd,) = moving.session.reply_fds
    os.fstat(fd)
    assert moving.say(R.POSTCOPY_LISTEN, ack=True) == 0
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)  # the reply has gone, and its copy with it
    table = (region(1 << 32, PAGE, 1 << 40, PAGE), region())
    answer = moving.say_postcopy_table(table, [other, moving.memory_fd])
    assert answer == (table[0]._replace(user_addr=PLACE + (1 << 32)), table[1]._replace(user_addr=PLACE))
    assert not moving.plane.regions  # nobody can touch it yet
    assert moving.say(R.SET_MEM_TABLE, 0) is None
    assert len(moving.plane.regions) == 2
    moving.start(0)
    assert moving.say(R.POSTCOPY_END, ack=True) == 0
    assert moving.plane.rings
    assert not moving.plane.postcopy
    os.close(other)


def test_end_without_any_memory(moving: Peer) -> None:
    listen(moving)
    assert moving.say(R.POSTCOPY_END) == 0
    moving.share_memory()
    assert isinstance(moving.plane.effects[-1], e.SetMemory)


def test_tables_go_on_being_released_until_the_end(moving: Peer) -> None:
    listen(moving)
    for _ in range(3):
        send_table(moving)
        assert moving.acked(R.SET_MEM_TABLE, 0) == 0
    assert moving.say(R.POSTCOPY_END) == 0
    assert moving.acked(R.SET_MEM_TABLE, (region(),), [moving.memory_fd]) == 0
    assert moving.plane.regions


@pytest.mark.parametrize("before", ["nothing", "ADVISE", "END"])
def test_end_without_listen_is_refused(moving: Peer, before: str) -> None:
    if before == "ADVISE":
        moving.say(R.POSTCOPY_ADVISE)
    if before == "END":
        listen(moving)
        assert moving.say(R.POSTCOPY_END) == 0
    assert moving.say(R.POSTCOPY_END) == 1
    assert not moving.session.closed


def test_end_before_the_release_is_refused(moving: Peer) -> None:
    listen(moving)
    send_table(moving)
    assert moving.say(R.POSTCOPY_END) == 1
    assert moving.say(R.SET_MEM_TABLE, 0) is None
    assert moving.say(R.POSTCOPY_END) == 0


def test_listen_without_advise_or_twice_is_refused(moving: Peer) -> None:
    assert moving.say(R.POSTCOPY_LISTEN) == 1
    listen(moving)
    assert moving.say(R.POSTCOPY_LISTEN) == 1


def test_listen_with_memory_is_refused(moving: Peer) -> None:
    moving.share_memory()
    moving.say(R.POSTCOPY_ADVISE)
    assert moving.say(R.POSTCOPY_LISTEN) == 1
    moving.start(0)  # and nothing is lost by it
    assert moving.plane.rings


def test_advise_again_replaces_the_descriptor(moving: Peer) -> None:
    for _ in range(1000):
        moving.say(R.POSTCOPY_ADVISE)
    assert moving.say(R.POSTCOPY_LISTEN) == 0


def test_advise_while_listening_closes(moving: Peer) -> None:
    listen(moving)
    assert "POSTCOPY_END comes first" in close_because(moving, R.POSTCOPY_ADVISE)
    assert not moving.plane.postcopy


def test_advise_without_a_userfaultfd_has_no_descriptor(moving: Peer) -> None:
    moving.plane.fail = {e.AdvisePostcopy}
    reply = moving.session.receive(make_message(R.POSTCOPY_ADVISE))
    assert reply == HEADER.pack(R.POSTCOPY_ADVISE, REPLY_FLAGS, 0)
    assert moving.session.reply_fds == []
    assert moving.say(R.POSTCOPY_LISTEN) == 1
    moving.share_memory()  # the connection is as good as before
    moving.start(0)


@pytest.mark.parametrize("word", [1, 1 << 63])
def test_a_wrong_release_closes(moving: Peer, word: int) -> None:
    listen(moving)
    send_table(moving)
    assert "a word must be 0" in close_because(moving, R.SET_MEM_TABLE, word, ack=True)
    assert not moving.plane.prepared


@pytest.mark.parametrize("state", ["off", "listening", "released"])
def test_a_release_of_nothing_closes(moving: Peer, state: str) -> None:
    if state != "off":
        listen(moving)
    if state == "released":
        send_table(moving)
        moving.say(R.SET_MEM_TABLE, 0)
    assert "a word must be 0, and come after" in close_because(moving, R.SET_MEM_TABLE, 0, ack=True)


def test_a_table_before_the_release_closes(moving: Peer) -> None:
    listen(moving)
    send_table(moving)
    reason = close_because(moving, R.SET_MEM_TABLE, (region(),), (moving.memory_fd,))
    assert "a word of 0 must release the table before" in reason


@pytest.mark.parametrize("effect", [e.PrepareMemory, e.AdoptMemory])
def test_a_table_that_cannot_be_mapped_closes(moving: Peer, effect: type) -> None:
    listen(moving)
    if effect is e.AdoptMemory:
        send_table(moving)
    moving.plane.fail = {effect}
    payload, fds = ((region(),), (moving.memory_fd,)) if effect is e.PrepareMemory else (0, ())
    close_because(moving, R.SET_MEM_TABLE, payload, fds, ack=True)
    assert not moving.plane.postcopy


def test_a_ring_does_not_start_before_the_release(moving: Peer) -> None:
    listen(moving)
    send_table(moving)
    kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    moving.say(R.SET_VRING_NUM, (0, 256))
    assert moving.acked(R.SET_VRING_KICK, 0, [kick]) == 1
    os.close(kick)


def test_close_lets_nobody_wait_before_it_stops_rings(moving: Peer) -> None:
    listen(moving)
    send_table(moving)
    moving.say(R.SET_MEM_TABLE, 0)
    moving.start(0)
    moving.plane.take()
    moving.session.close()
    assert [type(effect) for effect in moving.plane.take()] == [e.AbandonPostcopy, e.StopRing, e.SetMemory]


@pytest.mark.parametrize("request_id", [R.POSTCOPY_ADVISE, R.POSTCOPY_LISTEN, R.POSTCOPY_END])
def test_without_the_feature_it_closes(peer: Peer, request_id: Request) -> None:
    peer.negotiate()
    assert "PAGEFAULT" in close_because(peer, request_id)


@pytest.mark.shows("VHOST_USER_PROTOCOL_F_PAGEFAULT", "VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS")
def test_what_does_not_go_with_postcopy() -> None:
    region = v.mask(v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)
    for more in (SLOTS, region):
        with pytest.raises(UsageError, match="exclude each other"):
            net_offer(protocol_features=POSTCOPY | more)


def test_a_word_in_place_of_a_table_closes(peer: Peer) -> None:
    peer.negotiate()
    assert "after a table of a postcopy migration" in close_because(peer, R.SET_MEM_TABLE, 0, ack=True)
