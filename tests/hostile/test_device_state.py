"""Line 20: front-ends that transfer a device's state in bad faith."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from channel_rig import ALL, ChannelDevice, Hosted, Peer
from pump_rig import USUAL
from vq import state_transfer
from vq.devices.net import NetDevice
from vq.errors import BackendError
from vq.message import Request
from vq.payload import Transfer
from vq.state_transfer import STATE_MAX

NO_FD = 0x100
FAILED = 0x101


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@pytest.fixture
def device() -> ChannelDevice:
    return ChannelDevice()


@pytest.fixture
def hosted(device: ChannelDevice, path: str) -> Iterator[Hosted]:
    hosted = Hosted(device, path)
    yield hosted
    hosted.close()


@pytest.fixture
def peer(hosted: Hosted) -> Iterator[Peer]:
    peer = Peer(hosted.path)
    yield peer
    peer.close()


def reply_of(peer: Peer, direction: int, phase: int, fd: int) -> Any:
    return peer.frontend.request(Request.SET_DEVICE_STATE_FD, Transfer(direction, phase), [fd])


@pytest.mark.checklist(20)
def test_wrong_requests_are_answered_with_an_error(peer: Peer, tmp_path: Path) -> None:
    """Line 20: a wrong direction, phase or descriptor, and a second transfer beside the first."""
    reader, writer = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    event = os.eventfd(0)
    for direction, phase, fd in (
        (2, 0, writer),
        (0xFFFFFFFF, 0, writer),
        (0, 1, writer),
        (0, 0, reader),
        (1, 0, writer),
        (0, 0, file),
        (1, 0, file),
        (0, 0, event),
        (0, 0, peer.frontend.fileno()),
    ):
        assert reply_of(peer, direction, phase, fd) == FAILED
    assert peer.frontend.request(Request.CHECK_DEVICE_STATE) == 1
    assert reply_of(peer, 1, 0, reader) == NO_FD
    assert reply_of(peer, 1, 0, reader) == FAILED  # one after the other, in either direction
    assert reply_of(peer, 0, 0, writer) == FAILED
    for fd in (reader, writer, file, event):
        os.close(fd)
    assert peer.frontend.request(Request.CHECK_DEVICE_STATE) == 0


@pytest.mark.checklist(20)
@pytest.mark.parametrize("load", [False, True])
def test_a_pipe_where_nothing_moves(
    device: ChannelDevice, peer: Peer, monkeypatch: pytest.MonkeyPatch, load: bool
) -> None:
    """Line 20: a reader that never reads, a writer that neither writes nor goes: it fails, and nobody has waited."""
    monkeypatch.setattr(state_transfer, "STATE_S", 0.2)
    device.state = bytes(STATE_MAX)
    reader, writer = os.pipe()
    try:
        peer.frontend.begin_state(reader if load else writer, load=load)
        assert peer.frontend.queue_num() == 2
        with pytest.raises(BackendError, match="not transferred"):
            peer.frontend.check_state()
        assert len(device.state) == STATE_MAX
    finally:
        os.close(reader)
        os.close(writer)
    device.state = b"again"
    assert peer.frontend.save_state() == b"again"


@pytest.mark.checklist(20)
def test_a_state_without_end_is_cut_off(device: ChannelDevice, peer: Peer) -> None:
    """Line 20: a huge blob is read up to a limit."""
    reader, writer = os.pipe()
    peer.frontend.begin_state(reader, load=True)
    os.close(reader)
    written = 0

    def flood() -> None:
        nonlocal written
        while True:
            written += os.write(writer, bytes(65536))

    with pytest.raises(BrokenPipeError):
        flood()
    os.close(writer)
    assert written < STATE_MAX + (1 << 20)
    with pytest.raises(BackendError, match="not transferred"):
        peer.frontend.check_state()
    assert device.state == b"as it was made"


@pytest.mark.checklist(20)
def test_the_front_end_can_clear_o_nonblock(device: ChannelDevice, hosted: Hosted, peer: Peer) -> None:
    """Line 20: the pipe is opened anew: its flags as the front-end has them do not reach us."""
    device.state = bytes(STATE_MAX)
    reader, writer = os.pipe()
    peer.frontend.begin_state(writer, load=False)
    stop = threading.Event()

    def clear() -> None:
        while not stop.is_set():
            os.set_blocking(writer, True)
            os.set_blocking(reader, True)

    thread = threading.Thread(target=clear)
    thread.start()
    for _ in range(20):
        assert peer.frontend.queue_num() == 2
    stop.set()
    thread.join()
    os.close(writer)
    total = 0
    while data := os.read(reader, 1 << 20):
        total += len(data)
    assert total == STATE_MAX
    os.close(reader)
    peer.frontend.check_state()


@pytest.mark.checklist(20)
def test_garbage_is_no_state(path: str) -> None:
    """Line 20: a state that is garbage changes nothing, whatever it is."""
    device = NetDevice("net", pairs=1)
    hosted = Hosted(device, path)
    peer = Peer(path, features=USUAL, protocol=ALL)
    good = peer.frontend.save_state()
    dice = random.Random(20)
    for number in range(60):
        wrong = bytearray(good)
        for _ in range(1 + number % 4):
            wrong[dice.randrange(len(wrong))] ^= 1 << dice.randrange(8)
        if wrong == good:
            continue
        with pytest.raises(BackendError, match="not transferred"):
            peer.frontend.load_state(bytes(wrong))
        with pytest.raises(BackendError, match="not transferred"):
            peer.frontend.load_state(dice.randbytes(dice.randrange(2000)))
    assert peer.frontend.save_state() == good
    peer.close()
    hosted.close()
