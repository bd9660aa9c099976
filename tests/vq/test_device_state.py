"""Device state: saved and loaded through a pipe, of each device, with everything that can be wrong about it."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blk_rig import make_file
from channel_rig import ALL, ChannelDevice, Hosted, Peer
from pump_rig import USUAL
from vq import virtio as v
from vq.device_state import HEAD, pack_state, unpack_state
from vq.devices.blk import BlkDevice, BlkState
from vq.devices.net import NetDevice, NetState
from vq.errors import BackendError, FrontendError
from vq.message import Request
from vq.payload import Config
from vq.state_transfer import STATE_MAX
from vq_core.disk import Disk

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


@pytest.mark.shows("SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE", "VHOST_USER_PROTOCOL_F_DEVICE_STATE")
@pytest.mark.parametrize("size", [0, 1, 5000, 65536, 65537, STATE_MAX])
def test_state_goes_there_and_back(device: ChannelDevice, peer: Peer, size: int) -> None:
    device.state = os.urandom(size)
    before = device.state
    saved = peer.frontend.save_state()
    assert saved == before
    changed = saved[::-1]
    peer.frontend.load_state(changed)
    assert device.state == changed


def test_state_moves_while_the_device_stands_only(device: ChannelDevice, peer: Peer) -> None:
    peer.start(0)
    with pytest.raises(BackendError, match="0x101"):
        peer.frontend.save_state()
    with pytest.raises(BackendError, match="0x101"):
        peer.frontend.load_state(b"new")
    peer.frontend.stop_ring(0)
    assert peer.frontend.save_state() == device.state
    # Started in the middle of a transfer: what came is not taken over.
    reader, writer = os.pipe()
    peer.frontend.begin_state(reader, load=True)
    os.write(writer, b"new")
    peer.start(0)
    for fd in (reader, writer):
        os.close(fd)
    with pytest.raises(BackendError, match="not transferred"):
        peer.frontend.check_state()
    assert device.state == b"as it was made"


def test_check_waits_for_the_end_and_the_rest_comes_in_order_behind_it(
    device: ChannelDevice, hosted: Hosted, peer: Peer, tmp_path: Path
) -> None:
    """The answer is owed until the transfer is over; other sessions of the same loop go on meanwhile."""
    reader, writer = os.pipe()
    peer.frontend.begin_state(reader, load=True)
    os.close(reader)
    peer.frontend.send(Request.CHECK_DEVICE_STATE)
    peer.frontend.send(Request.GET_QUEUE_NUM)
    time.sleep(0.05)
    assert hosted.call(lambda: 7) == 7  # the control thread is free
    os.write(writer, b"part")
    with pytest.raises(BackendError, match="nothing came"):
        peer.frontend.receive(0.1)
    os.close(writer)
    answers = [peer.frontend.receive() for _ in range(2)]
    assert [(answer.request, answer.payload) for answer in answers] == [
        (Request.CHECK_DEVICE_STATE, 0),
        (Request.GET_QUEUE_NUM, 2),
    ]
    assert device.state == b"part"


def test_who_leaves_while_an_answer_is_owed_is_gone(hosted: Hosted, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        peer = Peer(path)
        reader, writer = os.pipe()
        peer.frontend.begin_state(reader, load=True)
        peer.frontend.send(Request.CHECK_DEVICE_STATE)
        peer.close()
        os.close(reader)
        other = Peer(path)  # it is served at once
        assert other.frontend.queue_num() == 2
        os.close(writer)
        other.close()
    end = time.monotonic() + 60
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == before


def test_refusal_of_the_device_is_told(device: ChannelDevice, peer: Peer) -> None:
    device.refuses_state = True
    with pytest.raises(BackendError, match="not transferred"):
        peer.frontend.load_state(b"good")
    with pytest.raises(BackendError, match="not transferred"):
        peer.frontend.check_state()  # the answer stays
    device.refuses_state = False
    peer.frontend.load_state(b"good")
    peer.frontend.request(Request.RESET_DEVICE)
    with pytest.raises(BackendError, match="not transferred"):
        peer.frontend.check_state()  # and a reset forgets it
    device.state = bytes(STATE_MAX + 1)
    with pytest.raises(BackendError, match="0x101"):
        peer.frontend.save_state()


# -- what is in it --


def test_network_device(path: str) -> None:
    source = NetDevice("source", pairs=2)
    hosted = Hosted(source, path)
    peer = Peer(path, features=USUAL, protocol=ALL, queues=1)
    peer.frontend.request(Request.NET_SET_MTU, 9000)
    state = peer.frontend.save_state()
    found = unpack_state(state, v.VIRTIO_ID_NET, NetState)
    assert found == NetState(peer.features, 2, 9000)
    peer.close()
    hosted.close()
    target = NetDevice("target", pairs=2)
    hosted = Hosted(target, path)
    peer = Peer(path, features=USUAL, protocol=ALL, queues=1)
    peer.frontend.load_state(state)
    assert unpack_state(peer.frontend.save_state(), v.VIRTIO_ID_NET, NetState).mtu == 9000
    for wrong in (
        NetState(peer.features, 3, 9000),
        NetState(v.mask(v.VIRTIO_NET_F_RSS), 2, 9000),
        NetState(0, 2, 67),
        NetState(0, 2, 65536),
        NetState(0, 0, None),
        NetState(1 << 63, 1, None),
    ):
        with pytest.raises(BackendError, match="not transferred"):
            peer.frontend.load_state(pack_state(v.VIRTIO_ID_NET, wrong))
    assert unpack_state(peer.frontend.save_state(), v.VIRTIO_ID_NET, NetState).mtu == 9000
    peer.close()
    hosted.close()


def test_block_device(path: str, tmp_path: Path) -> None:
    make_file(tmp_path / "disk.img", 1 << 20)

    def host() -> tuple[Hosted, Peer]:
        hosted = Hosted(BlkDevice(Disk(str(tmp_path / "disk.img"))), path)
        features = USUAL | v.mask(v.VIRTIO_BLK_F_FLUSH, v.VIRTIO_BLK_F_CONFIG_WCE)
        return hosted, Peer(path, features=features, protocol=ALL, queues=1)

    hosted, peer = host()
    peer.frontend.request(Request.SET_CONFIG, Config(32, 0, b"\0"))
    state = peer.frontend.save_state()
    assert unpack_state(state, v.VIRTIO_ID_BLOCK, BlkState) == BlkState(peer.features, 2048, 0)
    peer.close()
    hosted.close()
    hosted, peer = host()
    assert peer.frontend.get_config(32, 1) == b"\1"
    peer.frontend.load_state(state)
    assert peer.frontend.get_config(32, 1) == b"\0"
    for wrong in (
        BlkState(peer.features, 2049, 1),
        BlkState(peer.features, 2048, 2),
        BlkState(v.mask(v.VIRTIO_BLK_F_ZONED), 2048, 1),
    ):
        with pytest.raises(BackendError, match="not transferred"):
            peer.frontend.load_state(pack_state(v.VIRTIO_ID_BLOCK, wrong))
    assert peer.frontend.get_config(32, 1) == b"\0"
    peer.close()
    hosted.close()


def body(data: bytes, **changes: int) -> bytes:
    head: dict[str, Any] = {"magic": b"vq-state", "version": 1, "kind": v.VIRTIO_ID_NET, "length": len(data)}
    head |= {"checksum": zlib.crc32(data)} | changes
    return HEAD.pack(*head.values()) + data


GOOD = msgspec.msgpack.encode({"features": 0, "pairs": 1, "from the future": [1, 2]})


def test_unknown_fields_are_ignored() -> None:
    assert unpack_state(body(GOOD), v.VIRTIO_ID_NET, NetState) == NetState(0, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"vq-state",
        body(GOOD)[:-1],
        body(GOOD) + b"\0",
        body(GOOD, version=0),
        body(GOOD, version=2),
        body(GOOD, kind=v.VIRTIO_ID_BLOCK),
        body(GOOD, length=0xFFFFFFFF),
        body(GOOD, checksum=0),
        b"VQ" + body(GOOD)[2:],
        body(b""),
        body(b"\xc1"),
        body(b"\x91" * 100_000),
        body(b"\xdd\xff\xff\xff\xff"),
        body(msgspec.msgpack.encode({"features": 0})),
        body(msgspec.msgpack.encode({"features": "0", "pairs": 1})),
        body(msgspec.msgpack.encode({"features": -1, "pairs": 1})),
        body(msgspec.msgpack.encode([0, 1])),
    ],
)
def test_what_is_no_state_is_refused(data: bytes) -> None:
    with pytest.raises(FrontendError):
        unpack_state(data, v.VIRTIO_ID_NET, NetState)


def test_front_end_believes_no_answer(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    for word in (0, 1, 0x200, 0x102):
        monkeypatch.setattr(peer.frontend, "request_fd", lambda *_, word=word: (word, None))
        with pytest.raises(BackendError, match="success without a descriptor"):
            peer.frontend.begin_state(writer, load=False)
    os.close(reader)
    os.close(writer)


def test_header_is_what_is_documented() -> None:
    data = pack_state(v.VIRTIO_ID_BLOCK, BlkState(1, 2, 1))
    magic, version, kind, length, checksum = struct.unpack_from("<8sHHII", data)
    assert (magic, version, kind, length) == (b"vq-state", 1, 2, len(data) - 20)
    assert checksum == zlib.crc32(data[20:])
