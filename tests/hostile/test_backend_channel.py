"""Lines 19 and 49: bad peers on the back-end channel: each costs the channel and nothing else, from either end."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from channel_rig import ChannelDevice, Hosted, Outcome, Peer, RawBackend, RawChannel
from vhost_rig import open_fds
from vq.errors import BackendError, ResourceError
from vq.message import BackendRequest, Message, Request
from vq.payload import VringState
from vq.request_queue import QUEUE_MAX
from waiting import wait_for

B = BackendRequest


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@pytest.fixture
def hosted(path: str) -> Iterator[Hosted]:
    hosted = Hosted(ChannelDevice(), path)
    yield hosted
    hosted.close()


@pytest.fixture
def peer(hosted: Hosted) -> Iterator[Peer]:
    peer = Peer(hosted.path)
    yield peer
    peer.close()


@pytest.fixture
def raw(peer: Peer) -> Iterator[RawChannel]:
    raw = RawChannel(peer)
    yield raw
    raw.close()


def end_of_channel(peer: Peer, raw: RawChannel) -> None:
    assert raw.ended()
    assert peer.frontend.queue_num() == 2


@pytest.mark.checklist(19)
def test_a_front_end_that_never_reads_fills_a_bounded_queue(hosted: Hosted, peer: Peer, raw: RawChannel) -> None:
    """Line 19: a peer that never reads: what waits is bounded, the caller hears of it, and nobody waits."""
    peer.start()
    number = 0

    def fill() -> None:
        nonlocal number
        for number in range(20_000):
            hosted.channel.send(B.VRING_CALL, VringState(number % (2 * QUEUE_MAX), 0))

    with pytest.raises(ResourceError, match="wait already"):
        hosted.call(fill)
    assert peer.frontend.queue_num() == 2
    # What waits twice waits once, so that a full queue takes what it has already.
    hosted.send(B.VRING_CALL, VringState((number - 1) % (2 * QUEUE_MAX), 0))
    # All that was taken comes, once somebody reads.
    for expected in range(number):
        assert raw.take() == (B.VRING_CALL, 1, struct.pack("=II", expected % (2 * QUEUE_MAX), 0))


@pytest.mark.checklist(19)
@pytest.mark.parametrize(
    "wrong",
    [
        {"request": B.VRING_CALL},
        {"request": 0},
        {"request": 0xFFFFFFFF},
        {"flags": 1},
        {"flags": 13},
        {"flags": 6},
        {"size": 4},
        {"size": 0xFFFFFFFF},
        {"fds": (0,)},
        {"fds": (0,) * 40},
    ],
)
def test_wrong_answer_ends_the_channel(hosted: Hosted, peer: Peer, raw: RawChannel, wrong: dict[str, Any]) -> None:
    """Line 19: an answer with another id, flags or size, or with descriptors, ends the channel alone."""
    peer.start()
    outcome, waiting = Outcome(), Outcome()
    hosted.send(B.VRING_ERR, VringState(0, 0), need_reply=True, done=outcome)
    hosted.send(B.VRING_CALL, VringState(0, 0), need_reply=True, done=waiting)
    assert raw.take()[0] == B.VRING_ERR
    raw.answer(**({"request": B.VRING_ERR} | wrong))
    end_of_channel(peer, raw)
    assert "channel is broken" in str(outcome.failure)
    assert "channel is broken" in str(waiting.failure)
    assert hosted.channel.broken
    with pytest.raises(ResourceError, match="no back-end channel"):
        hosted.send(B.VRING_CALL, VringState(0, 0))
    again = RawChannel(peer)  # and a new one works
    hosted.send(B.VRING_CALL, VringState(0, 0))
    assert again.take()[0] == B.VRING_CALL
    again.close()


@pytest.mark.checklist(19)
def test_answer_that_nobody_asked_for_ends_the_channel(hosted: Hosted, peer: Peer, raw: RawChannel) -> None:
    """Line 19: an answer without a question."""
    peer.start()
    raw.answer(B.VRING_CALL)
    end_of_channel(peer, raw)


@pytest.mark.checklist(19)
def test_the_channel_is_replaced_again_and_again(hosted: Hosted, peer: Peer) -> None:
    """Line 19: sent again and again, it leaves nothing behind."""
    peer.start()
    before = len(os.listdir("/proc/self/fd"))
    last = None
    for _ in range(50):
        outcome = Outcome()
        raw = RawChannel(peer)
        hosted.send(B.VRING_ERR, VringState(0, 0), need_reply=True, done=outcome)
        assert raw.take()[0] == B.VRING_ERR
        raw.close()
        assert last is None or last.calls
        last = outcome
    # The same socket again is not hung up by the end of the one before.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(3):
            peer.frontend.request(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
        hosted.send(B.VRING_CALL, VringState(0, 0))
        ours.settimeout(60)
        assert len(ours.recv(100)) == 20
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before + 4)


@pytest.mark.checklist(49)
def test_front_end_refuses_what_it_does_not_know(hosted: Hosted, peer: Peer) -> None:
    """Line 49: requests that are unknown, served by nobody, or not negotiated."""
    back = RawBackend(peer.frontend, IOTLB_MSG=lambda _: None)
    with back.sock:
        back.say(77, b"whatever")
        assert back.answer() == (77, 5, 8, 1)
        back.say(B.CONFIG_CHANGE_MSG)  # known, and nobody serves it
        assert back.answer() == (B.CONFIG_CHANGE_MSG, 5, 8, 1)
        back.say(B.IOTLB_MSG, bytes(32))  # served, and not negotiated
        assert back.answer() == (B.IOTLB_MSG, 5, 8, 1)
        back.say(78, b"", flags=1)
        assert back.server.refused == 4
        assert not back.server.closed


@pytest.mark.checklist(49)
@pytest.mark.parametrize(
    ("request_", "payload", "flags", "fds"),
    [
        (B.CONFIG_CHANGE_MSG, b"x", 9, 0),
        (B.CONFIG_CHANGE_MSG, b"", 5, 0),
        (B.CONFIG_CHANGE_MSG, b"", 2, 0),
        (B.CONFIG_CHANGE_MSG, b"", 17, 0),
        (B.CONFIG_CHANGE_MSG, b"", 9, 1),
        (B.VRING_HOST_NOTIFIER_MSG, struct.pack("=QQQ", 0, 4096, 0), 9, 0),
        (B.VRING_HOST_NOTIFIER_MSG, struct.pack("=QQQ", 1 << 8, 4096, 0), 9, 1),
        (B.VRING_HOST_NOTIFIER_MSG, struct.pack("=QQQ", 0, 4096, 0), 9, 2),
        (99, bytes(5000), 9, 0),
    ],
)
def test_front_end_ends_a_channel_that_is_no_stream_of_requests(
    hosted: Hosted,
    peer: Peer,
    request_: int,
    payload: bytes,
    flags: int,
    fds: int,
) -> None:
    """Line 49: what is no stream of requests ends the channel, and no handler sees it."""
    called: list[Message] = []
    back = RawBackend(peer.frontend, CONFIG_CHANGE_MSG=called.append, VRING_HOST_NOTIFIER_MSG=called.append)
    with back.sock:
        with pytest.raises(BackendError):
            back.say(request_, payload, flags, (0,) * fds)
        assert back.server.closed
        assert not called
    assert peer.frontend.queue_num() == 2


@pytest.mark.checklist(49)
def test_front_end_does_not_keep_answers_for_a_back_end_that_never_reads(hosted: Hosted, peer: Peer) -> None:
    """Line 49: a back-end that asks and never reads the answers."""
    back = RawBackend(peer.frontend, CONFIG_CHANGE_MSG=lambda _: None)

    def flood() -> None:
        for _ in range(100_000):
            back.say(B.CONFIG_CHANGE_MSG)

    with back.sock, pytest.raises(BackendError, match="unread"):
        flood()
    assert back.server.closed
    assert peer.frontend.queue_num() == 2


@pytest.mark.checklist(19, 5)
def test_only_a_unix_stream_socket_is_a_channel(hosted: Hosted, peer: Peer) -> None:
    """Lines 5 and 19: others can say for ever that there is an error, which would wake the control thread for ever."""
    kinds = [
        (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
        (socket.AF_NETLINK, socket.SOCK_RAW),
    ]
    before = open_fds()
    for family, kind in kinds:
        with socket.socket(family, kind) as sock, pytest.raises(BackendError, match="refused"):
            peer.frontend.request(Request.SET_BACKEND_REQ_FD, None, [sock.fileno()])
    wait_for(lambda: open_fds() == before)
    raw = RawChannel(peer)
    assert raw.silent()
    raw.close()
