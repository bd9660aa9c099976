"""The block device behind a socket: configuration space, cache, growth and the back-end channel."""

from __future__ import annotations

import gc
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blk_front import PROTOCOL, Guest, fields, serving
from blk_rig import FLUSH, IN, OK, content, make_file
from vhost_rig import open_fds
from vq import virtio as v
from vq.devices.blk import BlkDevice
from vq.errors import BackendError, UsageError
from vq.message import Request
from vq.payload import Config
from vq.server import Server
from vq_core.disk import Disk
from waiting import wait_for

CHANGED = struct.pack("=III", 2, 1, 0)
CHANGED_ACK_WANTED = struct.pack("=III", 2, 9, 0)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "blk.sock")


@pytest.fixture
def server(tmp_path: Path, path: str) -> Iterator[Server]:
    """A back-end of two queues on a file of 1 MiB."""
    make_file(tmp_path / "disk.img")
    with serving(Disk(tmp_path / "disk.img"), path, queues=2) as server:
        yield server


@pytest.fixture
def guest(server: Server, path: str) -> Iterator[Guest]:
    guest = Guest(path)
    yield guest
    guest.close()


def test_without_enough_threads_there_is_no_device_and_nothing_is_left(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the number of processes is limited: those that run are ended, and no other is waited for."""
    make_file(tmp_path / "disk.img")
    before = open_fds()
    start, started = threading.Thread.start, []

    def start_some(thread: threading.Thread) -> None:
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Server(BlkDevice(Disk(tmp_path / "disk.img")), path=path)
    gc.collect()
    assert open_fds() == before
    assert not any(thread.is_alive() for thread in started)


def device_of(server: Server) -> BlkDevice:
    assert isinstance(server.device, BlkDevice)
    return server.device


@pytest.mark.shows(
    "GET_CONFIG", "VIRTIO_BLK_F_SEG_MAX", "VIRTIO_BLK_F_BLK_SIZE", "VIRTIO_BLK_F_TOPOLOGY", "VIRTIO_BLK_F_MQ"
)
def test_configuration_space(guest: Guest) -> None:
    found = guest.config()
    physical = 1 << found["physical_block_exp"]
    sectors = physical
    assert found == fields(bytes(96)) | {
        "capacity": 2048, "seg_max": 126, "blk_size": 512, "physical_block_exp": found["physical_block_exp"],
        "min_io_size": physical, "writeback": 1, "num_queues": 2, "max_discard_sectors": 1 << 22,
        "max_discard_seg": 16, "discard_sector_alignment": sectors, "max_write_zeroes_sectors": 1 << 15,
        "max_write_zeroes_seg": 16, "write_zeroes_may_unmap": 1,
    }  # fmt: skip
    assert guest.frontend.get_config(0, 57) == guest.frontend.get_config(0, 60)[:57]  # QEMU 7.2 and 10
    assert guest.frontend.get_config(0, 256)[60:] == bytes(196)
    assert guest.frontend.get_config(32, 1) == b"\1"
    assert guest.frontend.queue_num() == 2
    with pytest.raises(BackendError, match="empty"):
        guest.frontend.get_config(96, 1)


@pytest.mark.shows("SET_CONFIG", "VHOST_USER_PROTOCOL_F_CONFIG", "VIRTIO_BLK_F_CONFIG_WCE")
def test_only_writeback_can_be_written(server: Server, guest: Guest) -> None:
    request = guest.frontend.request
    for wrong in ((0, b"\1" * 8), (31, b"\1"), (33, b"\1"), (32, b"\1\1"), (32, b"\2"), (32, b"\xff"), (96, b"\0")):
        with pytest.raises(BackendError):
            request(Request.SET_CONFIG, Config(wrong[0], 0, wrong[1]))
    guest.start()
    assert guest.ask(FLUSH) == OK
    request(Request.SET_CONFIG, Config(32, 0, b"\0"))
    assert guest.config()["writeback"] == 0
    request(Request.SET_CONFIG, Config(32, 0, b"\1"))
    with pytest.raises(BackendError):  # as a migration would, but a device that runs is no migration's target
        request(Request.SET_CONFIG, Config(0, 1, bytes(60)))
    guest.frontend.stop_ring(0)
    request(Request.SET_CONFIG, Config(0, 1, bytes(60)))
    found = guest.config()
    assert (found["writeback"], found["capacity"], found["num_queues"]) == (0, 2048, 2)
    request(Request.RESET_DEVICE)
    assert guest.config()["writeback"] == 1


@pytest.mark.shows("BACKEND_CONFIG_CHANGE_MSG", "SET_BACKEND_REQ_FD", "VHOST_USER_PROTOCOL_F_BACKEND_REQ")
def test_growth_is_told_once_the_guest_runs(server: Server, guest: Guest, tmp_path: Path) -> None:
    os.truncate(tmp_path / "disk.img", 2 << 20)
    device = device_of(server)
    server.call(device.resize)
    assert guest.config()["capacity"] in (2048, 4096)
    guest.ours.settimeout(0.05)
    with pytest.raises(TimeoutError):
        guest.ours.recv(100)  # all rings stand
    guest.ours.settimeout(60)
    guest.start()
    assert guest.ours.recv(100) == CHANGED_ACK_WANTED
    assert guest.config()["capacity"] == 4096
    # Two more before the ack of the first: told in one message, after it.
    for size in (3, 4):
        os.truncate(tmp_path / "disk.img", size << 20)
        server.call(device.resize)
        wait_for(lambda wanted=size: device.disk.capacity == wanted << 11)
    guest.ours.send(struct.pack("=IIIQ", 2, 5, 8, 0)[:7])
    guest.ours.send(struct.pack("=IIIQ", 2, 5, 8, 0)[7:])
    assert guest.ours.recv(100) == CHANGED_ACK_WANTED
    guest.ours.send(struct.pack("=IIIQ", 2, 5, 8, 1))  # a refusal is no end
    server.call(device.resize)  # nothing has changed
    assert guest.ask(IN, size=512) == OK
    os.truncate(tmp_path / "disk.img", 1 << 20)
    server.call(device.resize)
    assert guest.ours.recv(100) == CHANGED_ACK_WANTED


def test_growth_without_acks(server: Server, path: str, tmp_path: Path) -> None:
    guest = Guest(path, protocol=PROTOCOL & ~v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
    guest.start()
    for size in (2, 3):
        os.truncate(tmp_path / "disk.img", size << 20)
        server.call(device_of(server).resize)
        assert guest.ours.recv(100) == CHANGED
    guest.close()


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack("=IIIQ", 1, 5, 8, 0),
        struct.pack("=IIIQ", 2, 1, 8, 0),
        struct.pack("=IIIQ", 2, 5, 9, 0),
        bytes(20),
        None,
    ],
)
def test_a_channel_that_fails_is_given_up(server: Server, guest: Guest, tmp_path: Path, answer: bytes | None) -> None:
    guest.start()
    os.truncate(tmp_path / "disk.img", 2 << 20)
    server.call(device_of(server).resize)
    assert guest.ours.recv(100) == CHANGED_ACK_WANTED
    if answer is None:
        guest.ours.shutdown(socket.SHUT_RDWR)
    else:
        guest.ours.send(answer)
        assert guest.ours.recv(100) == b""
    assert guest.ask(IN, size=512) == OK
    assert guest.config()["capacity"] == 4096


def test_message_that_nobody_asked_for_ends_the_channel(guest: Guest) -> None:
    guest.ours.send(b"x")
    assert guest.ours.recv(100) == b""
    guest.start()
    assert guest.ask(IN, size=512) == OK


def test_write_is_stable_unless_the_driver_knows_of_a_cache(server: Server, path: str) -> None:
    """Written through: without FLUSH, or with the cache switched off. The pool does what must reach the medium."""
    device = device_of(server)

    def waited() -> int:
        return int(device.snapshot()["queues"][0]["waited"])

    guest = Guest(path, v.mask(v.VIRTIO_F_VERSION_1))
    guest.start()
    assert guest.ask(1, content(512)) == OK
    stable = 0 if device.disk.ready else 1  # memory has no medium behind it
    assert waited() == stable
    guest.close()
    guest = Guest(path)
    guest.start()
    guest.frontend.request(Request.SET_CONFIG, Config(32, 0, b"\0"))
    assert guest.ask(1, content(512)) == OK
    assert waited() == 2 * stable
    guest.close()


def test_front_ends_one_after_the_other(server: Server, path: str) -> None:
    for _ in range(3):
        guest = Guest(path)
        guest.start()
        assert guest.ask(1, content(512)) == OK
        assert guest.ask(IN, size=512) == OK
        guest.close()
    assert device_of(server).snapshot()["queues"][0]["writes"] == 3


def test_broken_queue_is_told(server: Server, guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    guest.start()
    guest.driver.add([b"short"], [1])
    guest.driver.publish()
    guest.driver.kick()
    wait_for(lambda: "requestq0" in caplog.text)
    assert "VIRTIO 1.3, 5.2.6" in caplog.text


def test_wrong_number_of_queues(tmp_path: Path) -> None:
    disk = Disk(None, size=4096)
    with pytest.raises(UsageError, match="257 queues"):
        BlkDevice(disk, queues=257)
