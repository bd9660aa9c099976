"""Rings whose kicks and calls are messages: verified traffic without a single descriptor for notifications."""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blk_rig import IN, OK, content, header, make_file
from channel_rig import ALL, ChannelDevice, Hosted, Outcome, Peer, RawChannel
from pump_rig import PROTOCOL, USUAL, Background, Guest, every_layout, pumping
from vq import virtio as v
from vq.devices.blk import BlkDevice
from vq.frontend import RingSetup
from vq.message import BackendRequest, Message, Request
from vq.payload import VringState
from vq_core.disk import Disk
from waiting import wait_for

B = BackendRequest
INBAND = v.mask(
    v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_MQ,
)  # fmt: skip


class InbandGuest(Guest):
    """A guest whose driver kicks and is called as ever, by eventfds that the back-end never gets: `bridge` carries each
    signal over in a message.
    """

    def start(self, pair: int = 0, *, enable: bool = True) -> None:
        self.calls = dict.fromkeys(range(2 * len(self.receiveqs)), 0)
        if self.frontend.channel is None:
            self.frontend.open_channel({B.VRING_CALL: self.called})
        for index in (2 * pair, 2 * pair + 1):
            self.frontend.enable_ring(index, enable)
            driver = self.queue(index)
            setup = RingSetup(index, driver.size, *driver.addresses, driver.used_idx, inband=True)
            self.frontend.start_ring(setup, enable=False)

    def called(self, message: Message) -> None:
        self.calls[message.payload.ring] += 1
        os.eventfd_write(self.queue(message.payload.ring).call_fd, 1)

    @contextmanager
    def bridge(self) -> Iterator[None]:
        """Carry kicks and calls over, in a thread that has the front-end for itself."""
        stop = threading.Event()
        kicks = {self.queue(index).kick_fd: index for index in self.calls}

        def carry() -> None:
            poll = select.poll()
            channel = self.frontend.channel
            assert channel is not None
            for fd in (*kicks, channel.fileno()):
                poll.register(fd, select.POLLIN)
            while not stop.is_set():
                for fd, _ in poll.poll(60):
                    if fd in kicks:
                        os.eventfd_read(fd)
                        self.frontend.kick_ring(kicks[fd])
                    else:
                        channel.dispatch()

        thread = threading.Thread(target=carry)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(60)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@pytest.mark.shows("VRING_KICK", "BACKEND_VRING_CALL", "VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS")
@every_layout
def test_traffic_over_messages_only(path: str, layout: int) -> None:
    """Two queue pairs in full flow, and one packet after the other between which everybody sleeps."""
    options: dict[str, Any] = {"pairs": 2, "protocol": PROTOCOL | INBAND}
    with pumping(f"vhost:{path}"), InbandGuest(path, USUAL | layout, **options) as guest, guest.bridge():
        background = Background(guest.streams())
        background.goes_on(300)
        background.finish()
    with pumping(f"vhost:{path}"), InbandGuest(path, USUAL | layout, **options) as guest, guest.bridge():
        for number in range(20):
            data = bytes([number]) * 60
            guest.post(60)
            guest.send(data)
            assert guest.receive(20)[1] == data
            time.sleep(0.005)
        assert guest.calls[0] >= 5, "the receiveq was not called"


@every_layout
def test_disk_over_messages_only(path: str, tmp_path: Path, layout: int) -> None:
    make_file(tmp_path / "disk.img", 1 << 20)
    hosted = Hosted(BlkDevice(Disk(str(tmp_path / "disk.img"))), path)
    peer = Peer(path, features=USUAL | layout, protocol=PROTOCOL | INBAND, queues=1)
    called: list[int] = []
    peer.frontend.open_channel({B.VRING_CALL: lambda message: called.append(message.payload.ring)})
    driver = peer.drivers[0]
    peer.start(inband=True)
    for number in range(20):
        data = content(512)
        for request, readable, writable in ((1, [data], [1]), (IN, [], [512, 1])):
            called.clear()
            driver.arm()
            buffer = driver.add([header(request, number), *readable], writable)
            driver.publish()
            driver.kick()  # whether the worker sleeps or not
            peer.frontend.kick_ring(0)
            assert peer.frontend.serve(lambda: bool(called)), "no call by message"
            assert [token.id for token, _ in driver.poll()] == [buffer.id]
            assert bytes(buffer.writable[-1])[0] == OK
        assert bytes(buffer.writable[0]) == data
    peer.close()
    hosted.close()


# -- which notification it is --


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


def signal(hosted: Hosted, index: int, kind: str) -> None:
    """Do what the data plane does: signal the descriptor that the queue has been given."""
    applier = hosted.backend._applier
    assert applier is not None
    hosted.call(hosted.device.queues[index].signal, getattr(applier.rings[index], f"{kind}_fd"))


@pytest.mark.shows("BACKEND_VRING_CALL", "BACKEND_VRING_ERR")
def test_calls_and_errors_are_told_ring_by_ring(hosted: Hosted, peer: Peer, raw: RawChannel) -> None:
    for index in (0, 1):
        peer.start(index, inband=True)
    for index in (1, 0, 0):
        for kind, request in (("call", B.VRING_CALL), ("err", B.VRING_ERR)):
            signal(hosted, index, kind)
            assert raw.take() == (request, 1, struct.pack("=II", index, 0))
    assert raw.silent()


def test_a_descriptor_wins_and_so_does_polling(hosted: Hosted, peer: Peer, raw: RawChannel) -> None:
    peer.start(0, inband=True)
    with_fd = peer.drivers[0].call_fd
    peer.frontend.set_call(0, with_fd)
    assert os.eventfd_read(with_fd) == 1  # installed on a started ring: signalled once
    signal(hosted, 0, "call")
    assert os.eventfd_read(with_fd) == 1
    assert raw.silent()
    peer.start(1, call_fd=None)  # polled
    signal(hosted, 1, "call")
    assert raw.silent()
    # A front-end that has used descriptors is not called by messages when a stop has dropped them.
    peer.frontend.stop_ring(0)
    peer.start(0, inband=True)
    signal(hosted, 0, "call")
    assert raw.silent()


def test_nothing_is_told_of_a_ring_that_stands(hosted: Hosted, peer: Peer, raw: RawChannel) -> None:
    peer.start(0, inband=True)
    peer.start(1, inband=True)
    hosted.send(B.CONFIG_CHANGE_MSG, need_reply=True, done=Outcome())
    raw.take()
    for index in (0, 1):
        hosted.send(B.VRING_CALL, VringState(index, 0), need_reply=True, done=Outcome())  # it keeps the calls back
    for index in (0, 1):
        signal(hosted, index, "call")
    peer.frontend.stop_ring(0)
    raw.answer(B.CONFIG_CHANGE_MSG)
    for index in (0, 1):
        assert raw.take()[2] == struct.pack("=II", index, 0)
        raw.answer(B.VRING_CALL)
    assert raw.take() == (B.VRING_CALL, 1, struct.pack("=II", 1, 0))
    assert raw.silent()


def test_the_last_call_comes_before_the_answer_to_the_stop(hosted: Hosted, peer: Peer, raw: RawChannel) -> None:
    for _ in range(20):
        peer.start(0, inband=True)
        applier = hosted.backend._applier
        assert applier is not None
        call_fd = applier.rings[0].call_fd
        assert call_fd is not None
        os.eventfd_write(call_fd, 1)  # perhaps seen by the control thread before the stop, perhaps not
        peer.frontend.stop_ring(0)
        raw.ours.setblocking(False)
        assert raw.take() == (B.VRING_CALL, 1, struct.pack("=II", 0, 0))
        assert raw.silent()


def test_kick_by_message_of_a_ring_with_a_descriptor(hosted: Hosted, peer: Peer) -> None:
    peer.start(0)
    for _ in range(3):
        peer.frontend.kick_ring(0)


def test_rings_by_message_leave_nothing_behind(hosted: Hosted, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        peer = Peer(path)
        peer.frontend.open_channel()
        for _ in range(5):
            for index in (0, 1):
                peer.start(index, inband=True)
            peer.frontend.stop_ring(0)
            peer.frontend.request(Request.RESET_DEVICE)
        peer.start(1, inband=True)
        peer.close()
        wait_for(lambda: hosted.backend.state == "listening")
    wait_for(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_without_the_feature_a_ring_is_not_kicked_by_message(hosted: Hosted, path: str) -> None:
    bits: Any = ALL & ~v.mask(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
    peer = Peer(path, protocol=bits)
    raw = RawChannel(peer)
    peer.start(0)
    signal(hosted, 0, "call")
    assert raw.silent()
    raw.close()
    peer.close()
