"""Two guests on one file: only one runs, unless nobody writes or nobody looks."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from blk_front import PROTOCOL, USUAL, Guest, serving
from blk_rig import IN, OK, OUT, content, make_file
from vq import translation
from vq import virtio as v
from vq.devices import disk_lock
from vq.devices.disk_lock import DiskLock
from vq.errors import BackendError, ConnectionClosed
from vq.frontend import RingSetup
from vq.message import Request
from vq.payload import Iotlb
from vq_core.disk import Disk
from waiting import wait_for


@pytest.fixture
def image(tmp_path: Path) -> Path:
    make_file(tmp_path / "disk.img")
    return tmp_path / "disk.img"


def refused(path: str) -> None:
    """Start a ring: the message is refused, and where there is no room to say so the connection ends."""
    guest = Guest(path)
    with pytest.raises(BackendError, match="ack is 1"):
        guest.start()
    guest.close()
    guest = Guest(path, protocol=PROTOCOL & ~v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
    with pytest.raises(ConnectionClosed):  # noqa: PT012 - whichever of them comes too late
        guest.start()
        guest.frontend.get_config(0, 8)
    guest.close()


def test_the_second_writer_waits_for_the_first(image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the two ends of a live migration: both are connected, and one runs at a time."""
    source, destination = str(tmp_path / "a"), str(tmp_path / "b")
    with serving(Disk(image), source, queues=2), serving(Disk(image), destination):
        first = Guest(source)
        first.start()
        assert first.ask(OUT, content(512)) == OK
        refused(destination)
        wait_for(lambda: "is locked" in caplog.text)
        assert "disk.img" in caplog.text and "--no-lock" in caplog.text
        assert first.ask(OUT, content(512)) == OK
        second = Guest(destination)
        first.frontend.stop_ring(0)
        second.start()
        assert second.ask(IN, size=512) == OK
        second.close()  # by its end, without a word
        wait_for(lambda: not locked(image))
        first.start()
        assert first.ask(IN, size=512) == OK
        first.close()


@pytest.mark.parametrize(
    ("first_options", "second_options", "runs"),
    [
        ({"read_only": True}, {"read_only": True}, True),
        ({"read_only": True}, {}, False),
        ({}, {"read_only": True}, False),
        ({"lock": False}, {}, True),
        ({}, {"lock": False}, True),
    ],
)
def test_readers_and_those_who_do_not_look(
    image: Path, tmp_path: Path, first_options: dict[str, Any], second_options: dict[str, Any], runs: bool
) -> None:
    def disk(options: dict[str, Any]) -> Disk:
        return Disk(image, options.pop("read_only", False))

    first_options, second_options = dict(first_options), dict(second_options)
    one, two = str(tmp_path / "a"), str(tmp_path / "b")
    with serving(disk(first_options), one, **first_options), serving(disk(second_options), two, **second_options):
        guest = Guest(one)
        guest.start()
        if runs:
            other = Guest(two)
            other.start()
            assert other.ask(IN, size=512) == OK
            other.close()
        else:
            refused(two)
        assert guest.ask(IN, size=512) == OK
        guest.close()


def test_the_lock_is_there_while_a_ring_is_started(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    with serving(Disk(image), path):
        guest = Guest(path)
        assert not locked(image)
        guest.start()
        assert locked(image)
        guest.frontend.stop_ring(0)
        assert not locked(image)
        guest.start()
        guest.close()
        wait_for(lambda: not locked(image))


def locked(image: Path) -> bool:
    """Whether anybody has a lock on the bytes that QEMU looks at."""
    with image.open("rb") as file:
        ask = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
        return bool(struct.unpack("@hhqqi4x", fcntl.fcntl(file, fcntl.F_OFD_GETLK, ask))[0] != fcntl.F_UNLCK)


def test_locks_are_let_go_when_somebody_is_in_the_way(image: Path) -> None:
    with image.open("r+b") as one, image.open("r+b") as two:
        first, second = DiskLock(one.fileno(), read_only=False), DiskLock(two.fileno(), read_only=False)
        assert first.hold() and first.hold()
        assert not second.hold()
        first.release()
        first.release()
        assert not locked(image)
        assert second.hold()


def test_a_file_system_without_locks(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*words: object) -> int:
        raise OSError(disk_lock.NO_LOCKS[1], "No locks available")

    monkeypatch.setattr(DiskLock, "_ask", refuse)
    path = str(tmp_path / "a")
    with serving(Disk(image), path):
        guest = Guest(path)
        guest.start()
        assert guest.ask(IN, size=512) == OK
        guest.close()
    assert "cannot be locked: No locks available" in caplog.text


def test_a_ring_behind_an_iommu_that_is_still_locked_out(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits for a translation, cannot start when that has come, and is tried again when another is not answered."""
    monkeypatch.setattr(translation, "PATIENCE_S", 0.05)
    source, destination = str(tmp_path / "a"), str(tmp_path / "b")
    with serving(Disk(image), source), serving(Disk(image), destination, queues=2) as server:
        first = Guest(source)
        first.start()
        second = Guest(destination, USUAL | v.mask(v.VIRTIO_F_ACCESS_PLATFORM))
        rings = [RingSetup(0, 64, *second.driver.addresses, 0), RingSetup(1, 64, 1 << 40, 1 << 41, 1 << 42, 0)]
        for ring in rings:
            second.frontend.start_ring(ring)  # the second never gets anywhere, so that a question stays open
        user, size = second.memory.regions[0][2], second.memory.regions[0][1]
        with pytest.raises(BackendError, match="refused"):
            second.frontend.request(Request.IOTLB_MSG, Iotlb(user, size, user, 3, 2))
        wait_for(lambda: server.backend is not None and server.backend.state == "listening")
        second.close()
        assert first.ask(OUT, content(512)) == OK
        first.close()
        wait_for(lambda: not locked(image))
        third = Guest(destination)
        third.start()
        assert third.ask(IN, size=512) == OK
        third.close()
    assert "is locked" in caplog.text
