"""The small devices that ship, driven by the guest of vq.testing."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vq
from driver_rig import every_layout
from vq.devices.console import RECEIVEQ, TRANSMITQ, ConsoleDevice
from vq.devices.i2c import FAIL_NEXT, READ, Eeprom, I2cDevice
from vq.devices.rng import RngDevice
from vq.testing import Guest
from waiting import wait_for

Connect = Callable[..., Guest]
pytest_plugins = ["vq.testing.plugin"]


# -- rng --


@every_layout
def test_entropy_comes_from_its_source(vq_guest: Connect, layout: str) -> None:
    guest = vq_guest(RngDevice(lambda count: bytes([count % 256]) * count), layout=layout)
    assert guest.ask(room=[3, 9]) == b"\x0c" * 12
    assert len(guest.ask(room=1 << 20)) == RngDevice.max_bytes


# -- console --


@pytest.fixture
def console(vq_guest: Connect) -> tuple[ConsoleDevice, Guest]:
    device = ConsoleDevice.at_pty()
    return device, vq_guest(device, queues=2, features=1)


def test_both_ways_through_a_terminal(console: tuple[ConsoleDevice, Guest]) -> None:
    device, guest = console
    assert device.path is not None
    terminal = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
    try:
        assert guest.ask(b"login: ", queue=TRANSMITQ) == b""
        assert os.read(terminal, 100) == b"login: "
        guest.send(room=64, queue=RECEIVEQ)
        os.write(terminal, b"root\n")
        assert guest.used(queue=RECEIVEQ)[0][1] == b"root\n"
    finally:
        os.close(terminal)


def test_what_comes_before_there_is_a_buffer_waits(vq_guest: Connect) -> None:
    source, feed = os.pipe()
    sink = os.open(os.devnull, os.O_WRONLY)
    guest = vq_guest(ConsoleDevice(source, sink), queues=2)
    os.write(feed, b"early bird")
    guest.send(room=5, queue=RECEIVEQ)
    assert guest.used(queue=RECEIVEQ)[0][1] == b"early"
    guest.send(room=64, queue=RECEIVEQ)
    assert guest.used(queue=RECEIVEQ)[0][1] == b" bird"
    os.close(feed)


def test_a_file_is_read_to_its_end(vq_guest: Connect, tmp_path: Path) -> None:
    """Nothing can wait for files; a service has /dev/null as its input."""
    (tmp_path / "input").write_bytes(b"0123456789" * 1000)
    source = os.open(tmp_path / "input", os.O_RDONLY)
    device = ConsoleDevice(source, os.open(os.devnull, os.O_WRONLY))
    guest = vq_guest(device, queues=2)
    got = b""
    while len(got) < 10000:
        guest.send(room=4000, queue=RECEIVEQ)
        got += guest.used(queue=RECEIVEQ)[0][1]
    assert got == b"0123456789" * 1000
    guest.send(room=4000, queue=RECEIVEQ)
    guest.ask(b"still there", queue=TRANSMITQ)
    assert not device.queues[RECEIVEQ].broken


def test_a_guest_waits_for_a_sink_that_nobody_reads(vq_guest: Connect) -> None:
    reader, sink = os.pipe()
    source = os.open(os.devnull, os.O_RDONLY)
    guest = vq_guest(ConsoleDevice(source, sink), queues=2)
    block = os.urandom(32768)
    for _ in range(8):
        guest.send(block, queue=TRANSMITQ)
    taken = bytearray()
    while len(taken) < 8 * len(block):
        taken += os.read(reader, 65536)
    assert bytes(taken) == block * 8
    guest.used(8, queue=TRANSMITQ)
    os.close(reader)


def test_the_size_of_the_terminal(console: tuple[ConsoleDevice, Guest]) -> None:
    device, guest = console
    device.resize(132, 50)
    guest.wait_config_change()
    assert struct.unpack("<HHII", guest.config(12)) == (132, 50, 0, 0)


# -- i2c --


def request(address: int, flags: int = 0, data: bytes = b"") -> list[bytes]:
    return [struct.pack("<HHI", address << 1, 0, flags), data]


@every_layout
def test_an_eeprom_on_the_bus(vq_guest: Connect, layout: str) -> None:
    chip = Eeprom(b"factory")
    guest = vq_guest(I2cDevice({0x50: chip}), layout=layout, features=1)
    assert guest.ask(request(0x50, data=b"\x03TEST"), 1) == b"\0"
    assert guest.ask(request(0x50, data=b"\x00"), 1) == b"\0"
    assert guest.ask(request(0x50, READ), [8, 1]) == b"facTEST\xff\0"
    assert guest.ask(request(0x50), 1) == b"\0"  # is it there
    assert guest.ask(request(0x51), 1) == b"\1"


@given(st.lists(st.tuples(st.binary(max_size=600), st.integers(0, 600)), max_size=8))
def test_the_place_of_an_eeprom_goes_round(steps: list[tuple[bytes, int]]) -> None:
    """As if each byte went by itself."""
    chip = Eeprom()
    content, place = bytearray(b"\xff" * 256), 0
    for data, size in steps:
        chip.write(data)
        place = data[0] if data else place
        for byte in data[1:]:
            content[place] = byte
            place = (place + 1) % 256
        assert chip.content == content
        assert chip.read(size) == bytes(content[(place + i) % 256] for i in range(size))
        place = (place + size) % 256


def test_what_follows_a_failure_fails_too_if_it_should(vq_guest: Connect) -> None:
    chip = Eeprom()
    guest = vq_guest(I2cDevice({0x50: chip}))
    answers = [guest.ask(request(a, FAIL_NEXT, b"\0!"), 1) for a in (0x20, 0x50)]
    assert (answers, chip.content[0]) == ([b"\1", b"\1"], 0xFF)
    guest.ask(request(0x20, 0, b"\0!"), 1)
    assert guest.ask(request(0x50, 0, b"\0!"), 1) == b"\0"
    assert chip.content[0] == ord("!")


def test_a_chip_that_does_not_answer_and_a_request_without_form(vq_guest: Connect) -> None:
    class Dead(Eeprom):
        def read(self, size: int) -> bytes:
            raise OSError(errno.EIO, "no acknowledgement")

    device = I2cDevice({1: Dead()})
    guest = vq_guest(device)
    assert guest.ask(request(1, READ), [2, 1]) == b"\0\0\1"
    guest.send(b"short", 1)
    wait_for(lambda: device.queues[0].broken)
    with pytest.raises(vq.UsageError, match="must be one of"):
        Guest("/nowhere", layout="round")
