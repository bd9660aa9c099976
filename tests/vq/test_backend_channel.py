"""The back-end channel between a real back-end and a real front-end: order, answers, patience."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from channel_rig import ALL, ChannelDevice, Hosted, Outcome, Peer, RawChannel
from vq import request_queue
from vq import virtio as v
from vq.errors import BackendError, FrontendError, ResourceError, UsageError
from vq.message import BackendRequest, Message
from vq.payload import VringArea, VringState
from waiting import wait_for

B = BackendRequest
NEED_REPLY = 8


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


# -- both roles --


@pytest.mark.shows("SET_BACKEND_REQ_FD", "VHOST_USER_PROTOCOL_F_BACKEND_REQ")
def test_a_request_is_served_and_answered(hosted: Hosted, peer: Peer) -> None:
    got: list[Any] = []

    def changed(message: Message) -> None:
        got.append((message.name, message.payload, message.need_reply))

    channel = peer.frontend.open_channel({B.CONFIG_CHANGE_MSG: changed})
    peer.start()
    outcome = Outcome()
    hosted.send(B.CONFIG_CHANGE_MSG, need_reply=True, done=outcome)
    assert peer.frontend.serve(lambda: bool(got))
    wait_for(lambda: outcome.calls)
    assert got == [("BACKEND_CONFIG_CHANGE_MSG", None, True)]
    assert outcome.calls == [(None, None)]
    assert (channel.served, channel.refused) == (1, 0)


def test_a_refusal_reaches_the_caller(hosted: Hosted, peer: Peer) -> None:
    def refuse(message: Message) -> None:
        raise BackendError(message.name, "mood", "bad", "come again")

    peer.frontend.open_channel({B.CONFIG_CHANGE_MSG: refuse})
    peer.start()
    for request, payload in ((B.CONFIG_CHANGE_MSG, None), (B.VRING_CALL, VringState(0, 0))):  # nobody serves the second
        outcome = Outcome()
        hosted.send(request, payload, need_reply=True, done=outcome)
        assert peer.frontend.serve(lambda outcome=outcome: bool(outcome.calls))
        assert isinstance(outcome.failure, FrontendError)
        assert "refused" in str(outcome.failure)
    assert peer.frontend.queue_num() == 2


def test_the_front_end_asks_while_it_serves_and_serves_while_it_waits(hosted: Hosted, peer: Peer) -> None:
    """A handler sends requests of its own on the main socket, under a request that waits for its reply."""
    answers: list[int] = []
    peer.frontend.open_channel({B.CONFIG_CHANGE_MSG: lambda _: answers.append(peer.frontend.queue_num())})
    peer.start()
    asked = Outcome()
    hosted.send(B.CONFIG_CHANGE_MSG, need_reply=True, done=asked)
    for _ in range(20):
        assert peer.frontend.get_config(0, 8) == bytes(8)
        assert peer.frontend.queue_num() == 2
    assert peer.frontend.serve(lambda: bool(asked.calls))
    assert answers == [2]


def test_nothing_is_sent_before_it_may_be(hosted: Hosted, path: str) -> None:
    with pytest.raises(ResourceError, match="nobody is connected"):
        hosted.send(B.CONFIG_CHANGE_MSG)
    peer = Peer(path, protocol=ALL & ~v.mask(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS))
    with pytest.raises(ResourceError, match="no back-end channel"):
        hosted.send(B.CONFIG_CHANGE_MSG)
    raw = RawChannel(peer)
    with pytest.raises(UsageError, match="INBAND_NOTIFICATIONS not negotiated"):
        hosted.send(B.VRING_CALL, VringState(0, 0))
    with pytest.raises(UsageError, match="ACCESS_PLATFORM not negotiated"):
        hosted.send(B.IOTLB_MSG)
    with pytest.raises(UsageError, match="0 descriptors; it takes 1"):
        hosted.send(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 4096, 0))
    with pytest.raises(UsageError, match="no payload of it"):
        hosted.send(B.VRING_HOST_NOTIFIER_MSG, (1 << 64, 0, 0))
    assert not hosted.call(hosted.channel.can_send, B.VRING_ERR)
    outcome = Outcome()
    hosted.send(B.CONFIG_CHANGE_MSG, done=outcome)
    assert raw.silent()  # all rings stand
    assert not outcome.calls
    peer.start()
    assert raw.take() == (B.CONFIG_CHANGE_MSG, 1, b"")
    wait_for(lambda: outcome.calls)
    assert outcome.calls == [(None, None)]
    peer.frontend.stop_ring(0)
    hosted.send(B.CONFIG_CHANGE_MSG)
    assert raw.silent()
    raw.close()
    peer.close()


def test_descriptors_go_along_and_need_their_feature(hosted: Hosted, path: str) -> None:
    for bits, allowed in ((ALL, True), (ALL & ~v.mask(v.VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD), False)):
        peer = Peer(path, protocol=bits)
        got: list[int | None] = []

        def keep(message: Message, got: list[int | None] = got) -> None:
            got.append(message.take_fd())

        peer.frontend.open_channel({B.VRING_HOST_NOTIFIER_MSG: keep})
        peer.start()
        fd = os.memfd_create("page")
        try:
            if allowed:
                hosted.send(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 4096, 0), [fd])
                assert peer.frontend.serve(lambda got=got: bool(got))
                assert got[0] is not None
                assert os.fstat(got[0]).st_ino == os.fstat(fd).st_ino
                os.close(got[0])
            else:
                with pytest.raises(UsageError, match="BACKEND_SEND_FD not negotiated"):
                    hosted.send(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 4096, 0), [fd])
        finally:
            os.close(fd)
        peer.close()
        wait_for(lambda: hosted.backend.state == "listening")


# -- order and patience --


def test_one_question_at_a_time_and_what_needs_no_answer_overtakes(hosted: Hosted, peer: Peer, raw: RawChannel) -> None:
    peer.start()
    hosted.send(B.CONFIG_CHANGE_MSG, need_reply=True, done=Outcome())
    hosted.send(B.VRING_CALL, VringState(1, 0), need_reply=True, done=Outcome())
    hosted.send(B.VRING_CALL, VringState(0, 0))  # of the same subject: it must not overtake
    hosted.send(B.VRING_ERR, VringState(0, 0))
    assert raw.take()[:2] == (B.CONFIG_CHANGE_MSG, 1 | NEED_REPLY)
    assert raw.take()[:2] == (B.VRING_ERR, 1)
    assert raw.silent()
    raw.answer(B.CONFIG_CHANGE_MSG)
    assert raw.take() == (B.VRING_CALL, 1 | NEED_REPLY, struct.pack("=II", 1, 0))
    assert raw.take() == (B.VRING_CALL, 1, struct.pack("=II", 0, 0))


def test_who_never_answers_keeps_back_only_questions(
    hosted: Hosted, peer: Peer, raw: RawChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_queue, "ANSWER_S", 0.2)
    peer.start()
    first, second = Outcome(), Outcome()
    hosted.send(B.VRING_ERR, VringState(0, 0), need_reply=True, done=first)
    hosted.send(B.VRING_CALL, VringState(0, 0), need_reply=True, done=second)
    assert raw.take()[0] == B.VRING_ERR
    wait_for(lambda: first.calls and second.calls)
    assert "answer is missing; it must come within" in str(first.failure)
    assert isinstance(second.failure, ResourceError)
    assert "was not sent" in str(second.failure)
    hosted.send(B.VRING_CALL, VringState(1, 0))
    assert raw.take() == (B.VRING_CALL, 1, struct.pack("=II", 1, 0))
    hosted.call(hosted.device.config_changed)  # told without a question
    assert raw.take() == (B.CONFIG_CHANGE_MSG, 1, b"")
    # The late answer is nobody else's, and from then on questions are asked again.
    third = Outcome()
    monkeypatch.setattr(request_queue, "ANSWER_S", 20.0)
    hosted.send(B.CONFIG_CHANGE_MSG, need_reply=True, done=third)
    assert raw.silent()
    raw.answer(B.VRING_ERR)
    assert raw.take()[:2] == (B.CONFIG_CHANGE_MSG, 1 | NEED_REPLY)
    raw.answer(B.CONFIG_CHANGE_MSG)
    wait_for(lambda: third.calls)
    assert third.calls == [(None, None)]
    assert len(first.calls) == 1


def test_a_change_that_cannot_be_told_for_want_of_room_is_told_later(
    hosted: Hosted, peer: Peer, raw: RawChannel
) -> None:
    """Whoever changes the device must not suffer from a front-end that reads nothing."""
    peer.start()
    for number in range(request_queue.QUEUE_MAX + 1):  # all behind the first one, which is not answered
        hosted.send(B.VRING_CALL, VringState(number, 0), need_reply=True)
    with pytest.raises(ResourceError, match="requests wait already"):
        hosted.send(B.VRING_CALL, VringState(number + 1, 0))
    hosted.call(hosted.device.config_changed)
    seen = []
    while B.CONFIG_CHANGE_MSG not in seen:
        seen.append(raw.take()[0])
        raw.answer(seen[-1])
    assert len(seen) <= request_queue.QUEUE_MAX + 2


def test_end_of_stream_ends_the_channel(hosted: Hosted, peer: Peer, raw: RawChannel) -> None:
    peer.start()
    outcome = Outcome()
    hosted.send(B.VRING_ERR, VringState(0, 0), need_reply=True, done=outcome)
    raw.take()
    raw.ours.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: outcome.calls)
    assert "closed the back-end channel" in str(outcome.failure)
    assert peer.frontend.queue_num() == 2


def test_callbacks_hear_of_the_end_of_the_connection(hosted: Hosted, path: str) -> None:
    peer = Peer(path)
    raw = RawChannel(peer)
    peer.start()
    asked, waiting = Outcome(), Outcome()
    hosted.send(B.VRING_ERR, VringState(0, 0), need_reply=True, done=asked)
    hosted.send(B.VRING_CALL, VringState(0, 0), need_reply=True, done=waiting)
    raw.close()
    peer.close()
    wait_for(lambda: asked.calls and waiting.calls)
    assert isinstance(asked.failure, ResourceError)
    wait_for(lambda: hosted.backend.state == "listening")


def test_a_callback_that_fails_costs_nothing(
    hosted: Hosted, peer: Peer, raw: RawChannel, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(failure: Any, fd: int | None) -> None:
        raise RuntimeError("defect")

    peer.start()
    hosted.send(B.VRING_ERR, VringState(0, 0), need_reply=True, done=broken)
    raw.take()
    raw.answer(B.VRING_ERR)
    wait_for(lambda: "callback of VRING_ERR failed" in caplog.text)
    hosted.send(B.VRING_CALL, VringState(0, 0))
    assert raw.take()[0] == B.VRING_CALL
