"""The session: memory table and dirty log."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vhost_rig import (
    PAGE,
    USER,
    Peer,
    close_because,
    memfd,
    region,
)
from vq import effects as e
from vq import shared_file
from vq.errors import FrontendError
from vq.message import Request
from vq.payload import Log, Region

R = Request


@pytest.mark.shows("SET_MEM_TABLE")
def test_memory_table_reaches_the_data_plane(peer: Peer) -> None:
    other = memfd()
    table = (region(), region(1 << 32, PAGE, 1 << 40, PAGE))
    assert peer.say(R.SET_MEM_TABLE, table, [peer.memory_fd, other]) is None
    (effect,) = peer.plane.take()
    assert isinstance(effect, e.SetMemory)
    assert [(r.guest_addr, r.size, r.user_addr, r.mmap_offset) for r in effect.regions] == [tuple(r) for r in table]
    for known in effect.regions:  # the fds are closed: nobody but the mapping needs them
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(known.fd)
    os.close(other)


def test_same_table_again_is_nothing_new(ready: Peer) -> None:
    ready.share_memory()
    assert ready.plane.take() == []


def test_same_addresses_in_another_file_are_new(ready: Peer) -> None:
    other = memfd()
    ready.say(R.SET_MEM_TABLE, (region(),), [other])
    os.close(other)
    assert [type(effect) for effect in ready.plane.take()] == [e.SetMemory]


def test_table_replaced_while_rings_run(ready: Peer) -> None:
    ready.start(0)
    ready.plane.take()
    more = (region(), region(1 << 32, PAGE, 1 << 40))
    assert ready.acked(R.SET_MEM_TABLE, more, [ready.memory_fd, ready.memory_fd]) == 0
    assert [type(effect) for effect in ready.plane.take()] == [e.SetMemory]
    assert ready.session.rings[0].started


def test_failing_table_leaves_the_old_one(ready: Peer) -> None:
    ready.plane.fail = {e.SetMemory}
    held = ready.session.regions
    assert ready.acked(R.SET_MEM_TABLE, (region(size=PAGE),), [ready.memory_fd]) == 1
    assert ready.session.regions == held
    assert ready.plane.regions[0].size == 16 * PAGE


END = 1 << 64
WRONG_TABLES = {
    "empty region": (region(size=0),),
    "guest address passes 2^64": (region(END - PAGE, 2 * PAGE),),
    "user address passes 2^64": (region(user=END - 1, size=2),),
    "offset passes 2^64": (region(offset=END - PAGE, size=PAGE + 1),),
    "size passes 2^64": (region(2, END - 1, 0, 0),),
    "guest overlap by a byte": (region(0, PAGE + 1, USER), region(PAGE, PAGE, 0)),
    "user overlap by a byte": (region(0, PAGE, PAGE), region(1 << 20, PAGE + 1, 0)),
    "twice the same": (region(), region()),
    "one inside another": (region(0, 8 * PAGE, 0), region(PAGE, PAGE, 1 << 40)),
}


@pytest.mark.parametrize("table", WRONG_TABLES.values(), ids=WRONG_TABLES.keys())
def test_wrong_table_is_refused_whole(ready: Peer, table: tuple[Region, ...]) -> None:
    held = ready.session.regions
    assert ready.acked(R.SET_MEM_TABLE, table, [ready.memory_fd] * len(table)) == 1
    assert (ready.plane.take(), ready.session.regions) == ([], held)
    close_because(ready, R.SET_MEM_TABLE, table, (ready.memory_fd,) * len(table))


def test_region_up_to_the_last_byte(peer: Peer) -> None:
    peer.negotiate()
    table = (region(END - PAGE, PAGE, END - PAGE, 0), region(0, PAGE, 0, 0))
    assert peer.acked(R.SET_MEM_TABLE, table, [peer.memory_fd] * 2) == 0


@pytest.mark.shows("ADD_MEM_REG", "REM_MEM_REG", "VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS")
def test_regions_come_and_go(ready: Peer) -> None:
    extra = region(1 << 32, PAGE, 1 << 40, PAGE)
    assert ready.acked(R.ADD_MEM_REG, extra, [ready.memory_fd]) == 0
    (added,) = ready.plane.take()
    assert isinstance(added, e.AddRegion) and added.region.guest_addr == 1 << 32
    assert ready.acked(R.ADD_MEM_REG, extra, [ready.memory_fd]) == 1  # there already
    assert ready.acked(R.REM_MEM_REG, extra._replace(size=2 * PAGE)) == 1
    assert ready.acked(R.REM_MEM_REG, extra._replace(user_addr=0)) == 1
    assert ready.plane.take() == []
    # the offset does not count, and an fd of an old front-end is closed unused
    assert ready.acked(R.REM_MEM_REG, extra._replace(mmap_offset=0), [ready.memory_fd]) == 0
    assert [type(effect) for effect in ready.plane.take()] == [e.RemoveRegion]
    assert ready.acked(R.REM_MEM_REG, extra) == 1
    assert len(ready.session.regions) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_added_region_takes_one_fd(ready: Peer, count: int) -> None:
    assert ready.acked(R.ADD_MEM_REG, region(1 << 32, PAGE, 1 << 40), [ready.memory_fd] * count) == 1


@pytest.mark.shows("GET_MAX_MEM_SLOTS", "ADD_MEM_REG", "VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS")
def test_slots_are_limited(ready: Peer) -> None:
    for n in range(1, 8):
        assert ready.acked(R.ADD_MEM_REG, region(n << 32, PAGE, n << 40), [ready.memory_fd]) == 0
    assert ready.acked(R.ADD_MEM_REG, region(8 << 32, PAGE, 8 << 40), [ready.memory_fd]) == 1
    assert ready.acked(R.REM_MEM_REG, region(3 << 32, PAGE, 3 << 40)) == 0
    assert ready.acked(R.ADD_MEM_REG, region(8 << 32, PAGE, 8 << 40), [ready.memory_fd]) == 0


def test_failing_region_changes_nothing(ready: Peer) -> None:
    ready.plane.fail = {e.AddRegion, e.RemoveRegion}
    held = ready.session.regions
    assert ready.acked(R.ADD_MEM_REG, region(1 << 32, PAGE, 1 << 40), [ready.memory_fd]) == 1
    assert ready.acked(R.REM_MEM_REG, region()) == 1
    assert ready.session.regions == held


@pytest.mark.shows("SET_LOG_BASE", "VHOST_USER_PROTOCOL_F_LOG_SHMFD")
def test_log_is_mapped_and_echoed(ready: Peer) -> None:
    assert ready.say(R.SET_LOG_BASE, Log(0x2000, 0), [ready.memory_fd], ack=True) == Log(0x2000, 0)
    (effect,) = ready.plane.take()
    assert isinstance(effect, e.SetLog) and (effect.size, effect.offset) == (0x2000, 0)
    assert ready.say(R.SET_LOG_BASE, Log(0x1000, 0x1000), [ready.memory_fd]) == Log(0x1000, 0x1000)


@pytest.mark.parametrize("area", [Log(0, 0), Log(PAGE, END - PAGE + 1), Log(END - 1, 2)])
def test_wrong_log_closes(ready: Peer, area: Log) -> None:
    close_because(ready, R.SET_LOG_BASE, area, (ready.memory_fd,), ack=True)


def test_log_that_cannot_be_mapped_closes(ready: Peer) -> None:
    ready.plane.fail = {e.SetLog}
    close_because(ready, R.SET_LOG_BASE, Log(PAGE, 0), (ready.memory_fd,))


@pytest.mark.shows("SET_LOG_FD")
def test_log_event_is_kept_and_replaced(ready: Peer) -> None:
    event = os.eventfd(0)
    assert ready.acked(R.SET_LOG_FD, None, [event]) == 0
    assert ready.acked(R.SET_LOG_FD, None, [event]) == 0
    os.close(event)
    assert ready.acked(R.SET_LOG_FD, None, [ready.memory_fd]) == 1
    assert ready.say(R.SET_LOG_FD, None, [ready.memory_fd]) is None


def _mounted_fuse(at: Path) -> Callable[[], None]:
    """Mount a FUSE file system whose server never answers; gives what takes it away."""
    libc = ctypes.CDLL(None, use_errno=True)
    server = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"vq-test", bytes(at), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")

    def unmount() -> None:
        os.close(server)  # now all that waits for an answer gets an error
        libc.umount2(bytes(at), 2)  # MNT_DETACH

    return unmount


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root: sudo make test")
@pytest.mark.parametrize("name", ["SET_MEM_TABLE", "ADD_MEM_REG", "SET_LOG_BASE"])
def test_file_of_a_server_that_never_answers_is_refused_at_once(ready: Peer, tmp_path: Path, name: str) -> None:
    unmount = _mounted_fuse(tmp_path)
    stuck = threading.Timer(60, unmount)
    stuck.start()
    try:
        fd = os.open(tmp_path, os.O_PATH)
        one = region(1 << 40, PAGE, 1 << 41)
        payload = {"SET_MEM_TABLE": (one,), "ADD_MEM_REG": one, "SET_LOG_BASE": Log(PAGE, 0)}[name]
        start = time.monotonic()
        with pytest.raises(FrontendError, match=f"{name}: memory file is on a fuse file system"):
            ready.say(R[name], payload, [fd])
        assert time.monotonic() - start < 30
        os.close(fd)
    finally:
        stuck.cancel()
        unmount()


@pytest.mark.parametrize("kind", ["pipe", "eventfd", "socket"])
def test_what_is_no_file_is_no_memory(ready: Peer, kind: str) -> None:
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    elif kind == "eventfd":
        fd = os.eventfd(0)
    else:
        fd = socket.socket().detach()
    with pytest.raises(FrontendError, match="memory file is of an unknown file system"):
        ready.say(R.ADD_MEM_REG, region(1 << 40, PAGE, 1 << 41), [fd])
    os.close(fd)


@pytest.mark.parametrize("kind", ["9p", "ceph", "fuse.sshfs", "fuseblk", "lustre", "nfs4", "virtiofs", "unheard-of"])
def test_only_file_systems_known_to_be_local_hold_memory(
    ready: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(shared_file, "_file_system", lambda fd: kind)
    (tmp_path / "memory").write_bytes(bytes(PAGE))
    fd = os.open(tmp_path / "memory", os.O_RDWR)
    with pytest.raises(FrontendError, match=f"memory file is on a {kind} file system"):
        ready.say(R.ADD_MEM_REG, region(1 << 40, PAGE, 1 << 41), [fd])
    monkeypatch.setattr(shared_file, "_file_system", lambda fd: "xfs")
    shared_file.check_memory_file("ADD_MEM_REG", fd)
    os.close(fd)
