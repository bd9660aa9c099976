"""The configuration space of a disk, byte by byte as a front-end sees it on its socket."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from blk_front import PROTOCOL, USUAL, BlkConfig, Guest, fields, serving
from blk_rig import content, make_file
from vq import virtio as v
from vq.devices.blk import BlkDevice
from vq.errors import BackendError
from vq.message import Request
from vq.payload import Config
from vq.server import Server
from vq_core.disk import Disk
from waiting import wait_for

SIZE = 3 << 20
SPACE = ctypes.sizeof(BlkConfig)
GET_FEATURES, SET_FEATURES, GET_PROTOCOL, SET_PROTOCOL, GET_CONFIG, SET_CONFIG = 1, 2, 15, 16, 24, 25
VERSION, REPLY, NEED_REPLY = 1, 4, 8


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    make_file(tmp_path / "disk.img", SIZE)
    return tmp_path / "disk.img"


@pytest.fixture
def server(image: Path, path: str) -> Iterator[Server]:
    with serving(Disk(image), path, queues=3) as server:
        yield server


class Wire:
    """A front-end that says whatever bytes it likes."""

    def __init__(self, path: str, features: int = USUAL) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(path)
        self.say(SET_PROTOCOL, struct.pack("<Q", PROTOCOL))
        self.say(SET_FEATURES, struct.pack("<Q", features | 1 << 30))

    def say(self, request: int, payload: bytes, flags: int = VERSION) -> None:
        self.sock.sendall(struct.pack("<III", request, flags, len(payload)) + payload)

    def hear(self) -> tuple[int, int, bytes]:
        """Give request, flags and payload of a reply."""
        request, flags, size = struct.unpack("<III", self._take(12))
        return request, flags, self._take(size)

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def get(self, offset: int, size: int, room: int | None = None, flags: int = 0) -> bytes:
        """The payload of a GET_CONFIG's reply; `room` is what the payload really has behind its 12 bytes."""
        asked = struct.pack("<III", offset, size, flags) + bytes([0xA5]) * (size if room is None else room)
        self.say(GET_CONFIG, asked)
        request, answer_flags, payload = self.hear()
        assert (request, answer_flags) == (GET_CONFIG, VERSION | REPLY)
        return payload

    def set(self, offset: int, data: bytes, flags: int = 0) -> int:
        """Send a SET_CONFIG that wants an ack; the ack."""
        self.say(SET_CONFIG, struct.pack("<III", offset, len(data), flags) + data, VERSION | NEED_REPLY)
        request, answer_flags, payload = self.hear()
        assert (request, answer_flags, len(payload)) == (SET_CONFIG, VERSION | REPLY, 8)
        return int.from_bytes(payload, "little")

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def wire(server: Server, path: str) -> Iterator[Wire]:
    wire = Wire(path)
    yield wire
    wire.close()


def expected(device: BlkDevice, **more: int) -> bytes:
    """The whole space, encoded by the second decoder's structure from what the disk is known to be."""
    physical = device.disk.physical_block_bytes
    config = BlkConfig(
        capacity=SIZE // 512, seg_max=126, blk_size=512, physical_block_exp=(physical // 512).bit_length() - 1,
        min_io_size=physical // 512, writeback=1, num_queues=3, max_discard_sectors=1 << 22, max_discard_seg=16,
        discard_sector_alignment=physical // 512, max_write_zeroes_sectors=1 << 15, max_write_zeroes_seg=16,
        write_zeroes_may_unmap=1,
    )  # fmt: skip
    for name, value in more.items():
        setattr(config, name, value)
    return bytes(config)


def device_of(server: Server) -> BlkDevice:
    assert isinstance(server.device, BlkDevice)
    return server.device


@pytest.mark.shows("GET_CONFIG", "VHOST_USER_PROTOCOL_F_CONFIG")
def test_every_part_of_the_space(server: Server, wire: Wire) -> None:
    """At each offset, in each length that a field or a front-end has; what lies behind the space reads as zero."""
    space = expected(device_of(server)) + bytes(256)
    for offset in range(SPACE):
        for size in (1, 2, 3, 4, 8, 57, 60, SPACE - offset, SPACE - offset + 1, 256 - offset):
            if not 0 < size <= 256 - offset:
                continue
            assert wire.get(offset, size) == struct.pack("<III", offset, size, 0) + space[offset : offset + size]


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (SPACE, 1), (SPACE, 0), (0, 257), (1, 256), (0xFFFFFFFF, 1), (0xFFFFFFFF, 2), (0x80000000, 16),
     (SPACE - 1, 256)],
)  # fmt: skip
def test_a_part_that_is_not_there_has_an_empty_answer(wire: Wire, offset: int, size: int) -> None:
    assert wire.get(offset, size) == b""
    assert len(wire.get(0, 8)) == 20  # and the connection goes on


@pytest.mark.parametrize(("size", "room"), [(8, 7), (8, 9), (8, 0), (0xFFFFFFF4, 8), (0xFFFFFFFF, 0), (256, 0)])
def test_a_length_that_contradicts_the_message(wire: Wire, size: int, room: int) -> None:
    """Empty, or the end: never a byte that was not asked for."""
    try:
        assert wire.get(0, size, room) == b""
    except (EOFError, ConnectionError):
        return
    assert len(wire.get(0, 8)) == 20


def test_flags_come_back_as_they_were(wire: Wire) -> None:
    for flags in (0, 1, 2, 0xFFFFFFFF):
        assert wire.get(0, 8, flags=flags)[8:12] == struct.pack("<I", flags)


@pytest.mark.shows("SET_CONFIG", "VIRTIO_BLK_F_CONFIG_WCE")
def test_every_byte_but_one_is_read_only(server: Server, wire: Wire) -> None:
    whole = wire.get(0, SPACE)[12:]
    for offset in [*range(SPACE + 2), 0xFFFFFFFF]:
        for data in (b"\0", b"\1", b"\0\0", b"\1" * 8):
            if (offset, len(data)) != (32, 1):
                assert wire.set(offset, data) == 1, (offset, data)
    for value in range(2, 256):
        assert wire.set(32, bytes([value])) == 1
    assert wire.set(32, b"") == 1
    assert wire.get(0, SPACE)[12:] == whole == expected(device_of(server))
    for value in (0, 1, 0):
        assert wire.set(32, bytes([value])) == 0
        assert wire.get(0, SPACE)[12:] == expected(device_of(server), writeback=value)


def test_the_migration_flag(server: Server, wire: Wire) -> None:
    """The source's whole space comes; of it the guest's own choice is taken over, and nothing about the disk."""
    lie = bytes(BlkConfig(capacity=7, blk_size=4096, num_queues=99, writeback=0))
    for flags in (1, 2):
        assert wire.set(0, lie, flags) == 0
        assert wire.get(0, SPACE)[12:] == expected(device_of(server), writeback=0)
        assert wire.set(0, lie[:32], flags) == 0  # without that byte nothing changes
        assert wire.set(32, b"\1") == 0
    for flags in (3, 4, 0x80000000):
        assert wire.set(32, b"\1", flags) == 1
    assert wire.set(0, lie + b"\0", 1) == 1
    assert wire.set(0, bytes(BlkConfig(writeback=2)), 1) == 1
    assert wire.get(32, 1)[12:] == b"\1"


def test_a_read_only_disk(image: Path, path: str) -> None:
    with serving(Disk(image, True), path) as server:
        wire = Wire(path, 1 << 32)
        zero = dict.fromkeys(("max_discard_sectors", "max_discard_seg", "discard_sector_alignment"), 0)
        zero |= dict.fromkeys(("max_write_zeroes_sectors", "max_write_zeroes_seg", "write_zeroes_may_unmap"), 0)
        assert wire.get(0, SPACE)[12:] == expected(device_of(server), num_queues=1, **zero)
        assert wire.set(32, b"\0") == 1
        wire.close()


def test_without_the_protocol_feature_there_is_no_space(server: Server, path: str) -> None:
    guest = Guest(path, protocol=PROTOCOL & ~v.mask(v.VHOST_USER_PROTOCOL_F_CONFIG))
    with pytest.raises(BackendError):
        guest.frontend.request(Request.SET_CONFIG, Config(32, 0, b"\0"))
    guest.close()


@pytest.mark.parametrize("sectors", [1, 100, 6144, 12345, 1 << 20])
def test_a_resize_by_a_call(server: Server, image: Path, path: str, sectors: int) -> None:
    """Larger or smaller: the new capacity is there, a multiple of a sector, and all else is as it was."""
    os.truncate(image, sectors * 512 + 511)
    guest = Guest(path)
    server.call(device_of(server).resize)
    wait_for(lambda: guest.config()["capacity"] == sectors)
    assert guest.config() | {"capacity": 0} == fields(expected(device_of(server), capacity=0))
    guest.start()
    if sectors < 1 << 20:
        assert guest.ask(1, content(512)) == 0
    guest.close()
