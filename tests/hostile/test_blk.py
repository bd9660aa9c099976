"""Requests of a hostile virtio-blk driver: each fails by itself, or stops its queue; the worker serves on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blk_rig import (
    DISCARD,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    BlkGuest,
    blk_guest,
    header,
    make_file,
    ranges,
)
from engine_rig import PACKED, VERSION_1, every_layout
from inflight_rig import InflightFile
from waiting import wait_for

SECTORS = 2048


@pytest.fixture(params=[VERSION_1, PACKED], ids=["split", "packed"])
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlkGuest]:
    """A queue on a file of 1 MiB, which is unchanged after the test."""
    path = tmp_path / "disk.img"
    before = make_file(path)
    with blk_guest(path, request.param) as guest:
        yield guest
    assert path.read_bytes() == before


@pytest.fixture
def split_guest(tmp_path: Path) -> Iterator[BlkGuest]:
    """A queue with the split layout, for attacks on its available ring."""
    make_file(tmp_path / "disk.img")
    with blk_guest(tmp_path / "disk.img") as guest:
        yield guest


@pytest.mark.checklist(39)
@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (2**64 - 1, 512),
        (2**64 - 1, 1024),
        (2**63, 512),
        (2**55, 512),
        (2**55 - 1, 1024),
        (0, 511),
        (0, 1),
        (0, 513),
        (0, SECTORS * 512 + 512),
    ],
)
def test_sectors_that_the_disk_has_not(guest: BlkGuest, sector: int, length: int) -> None:
    """Line 39: sector numbers near 2^64, products that overflow, lengths that are no multiple of 512."""
    assert guest.ask(IN, sector, size=length)[::2] == (IOERR, 1)
    assert guest.ask(OUT, sector, bytes(length))[::2] == (IOERR, 1)
    assert guest.ask(IN, 0, size=512)[0] == OK


@pytest.mark.checklist(39)
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", IOERR),
        (bytes(15), IOERR),
        (ranges((0, 8, 0)) + b"x", IOERR),
        (ranges(*[(0, 0, 0)] * 17), IOERR),
        (ranges((0, 2**32 - 1, 0)), IOERR),
        (ranges((SECTORS, 1, 0)), IOERR),
        (ranges((2**64 - 1, 2, 0)), IOERR),
        (ranges((0, 0, 0), (SECTORS - 1, 2, 0)), IOERR),
        (ranges((0, 0, 2)), UNSUPP),
        (ranges((0, 0, 2**31)), UNSUPP),
    ],
)
def test_ranges(guest: BlkGuest, data: bytes, status: int) -> None:
    """Line 39: ranges to discard: their number, num_sectors 2^32 - 1, flags; one that is bad spoils all."""
    assert guest.ask(DISCARD, 0, data)[0] == status
    assert guest.ask(WRITE_ZEROES, 0, data)[0] == status
    if data == ranges((0, 0, 2)):
        assert guest.ask(DISCARD, 0, ranges((0, 0, 1)))[0] == UNSUPP


@pytest.mark.checklist(32, 33, 39)
@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ([header(IN)[:15]], [512, 1]),
        ([], [512, 1]),
        ([header(IN)], []),
        ([header(OUT), bytes(512)], []),
        ([b"x"], [1]),
    ],
)
def test_no_request_at_all(guest: BlkGuest, readable: Any, writable: Any) -> None:
    """Lines 32, 33, 39: a header that is too short, or no room for a status, stops the queue."""
    guest.add(readable, writable)
    guest.go()
    assert "without a whole header" in guest.broken()
    guest.queue.stop()  # and the next start is a clean one
    guest.driver.reset()
    guest.start()
    assert guest.ask(IN, size=512)[0] == OK


@pytest.mark.checklist(29)
@pytest.mark.parametrize("addr", [0, 2**64 - 4, 0x4000_0000 + (4 << 20) - 1, 2**63])
def test_addresses_outside_of_memory(guest: BlkGuest, addr: int) -> None:
    """Line 29: data or header outside of the guest's memory stops the queue, before the kernel sees the address."""
    guest.add([header(IN)], [(addr, 512), 1])
    guest.go()
    assert "address" in guest.broken()


@pytest.mark.checklist(31, 39)
def test_status_shares_memory_with_header_and_data(guest: BlkGuest) -> None:
    """Lines 31, 39: whatever lies over each other was read before it is written."""
    block = guest.memory.alloc(4096, 4096)
    at = block.guest_addr
    guest.memory.view(at, 16)[:] = header(IN, 1)
    guest.add([(at, 16)], [(at, 512), (at, 1)])
    guest.add([(at, 16)], [(at, 16), (at + 8, 1)])
    guest.go()
    assert sorted(length for _, length in guest.wait(2)) == [1, 513]
    assert guest.ask(GET_ID, size=20)[0] == OK


@pytest.mark.checklist(39, 42)
def test_more_pieces_than_a_request_has_room_for() -> None:
    """Lines 39, 42: a request of more pieces than we keep fails, with its status in the right place."""
    with blk_guest(None, size=1024) as guest:
        for count, status in ((255, OK), (256, IOERR), (700, IOERR)):
            buffer = guest.add([header(IN)], [512] * count + [1])
            guest.go()
            ((_, used),) = guest.wait()
            assert bytes(buffer.writable[-1])[0] == status
            assert used == (count * 512 + 1 if status == OK else 1)


@pytest.mark.checklist(27, 39)
def test_one_head_in_all_entries(split_guest: BlkGuest) -> None:
    """Lines 27, 39: the same head is made available again while it is under way; each entry is answered once."""
    driver = split_guest.driver
    split_guest.add([header(IN)], [262144, 1])
    driver.avail[2 : 2 + driver.size] = driver.avail[2]
    driver.avail[1] = driver.size
    os.eventfd_write(driver.kick_fd, 1)
    wait_for(lambda: int(driver.used_head[1]) == driver.size)
    assert split_guest.queue.broken is None


@pytest.mark.checklist(26)
@pytest.mark.parametrize("ahead", [65, 32768, 65535])
def test_available_index(split_guest: BlkGuest, ahead: int) -> None:
    """Line 26: an index further ahead than the ring has entries stops the queue."""
    split_guest.driver.avail[1] = ahead
    os.eventfd_write(split_guest.driver.kick_fd, 1)
    assert "available index" in split_guest.broken()


@pytest.mark.checklist(32)
def test_readable_after_writable(split_guest: BlkGuest) -> None:
    """Line 32: the header behind the data stops the queue."""
    split_guest.add([header(IN), bytes(512)], [512, 1])
    desc = split_guest.driver.desc
    head = int(split_guest.driver.avail[2])
    desc["flags"][head] |= 2
    split_guest.go()
    assert "device-readable descriptor after" in split_guest.broken()


@pytest.mark.checklist(39)
@every_layout
def test_a_request_in_flight_is_made_available_again(tmp_path: Path, layout: int) -> None:
    """Line 39: with an in-flight region the ring is broken by it: a request is recorded once."""
    make_file(tmp_path / "disk.img")
    with (
        InflightFile(layout, size=64) as region,
        blk_guest(tmp_path / "disk.img", layout, inflight=region.map()) as guest,
    ):
        guest.add([header(IN, 1)], [512, 1])
        if layout == PACKED:
            guest.add([header(IN, 2)], [512, 1])
            guest.driver.desc["id"][3:6] = guest.driver.desc["id"][0]
        else:
            guest.driver.avail[3] = guest.driver.avail[2]
            guest.driver.avail[1] = 2
        guest.queue.set_enabled(False)
        guest.go()
        if layout != PACKED:
            guest.driver.avail[1] = 2
        guest.queue.set_enabled(True)
        assert guest.broken() == "buffer made available again before it was used"
        guest.queue.stop()
        found = region.found(guest.driver)
        assert found is not None and not found.requests
