"""Guest memory that changes under a running device: what is taken away is unmapped and left alone, what comes is used.

The removed memory belongs to the front-end again, so it writes a pattern over it the moment the answer is there, and
finds it unchanged later: no worker, thread or system call of the back-end still writes to it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blk_rig import IN, OK, OUT, content, header, make_file
from disk_rig import VERSION_1, DiskGuest, serving
from hostile.memory import HUGE_PAGE, huge_pages_free
from pump_rig import USUAL, Background, Guest, every_layout, mapped, pumping
from vq.payload import Region
from vq_core.guest_memory import GuestMemory
from vq_core.guest_memory import Region as OwnRegion
from vq_core.traffic import Sink
from waiting import wait_for

PAGE = 4096
MIB = 1 << 20
PATTERN = b"\xa5" * MIB


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "a.sock")


def row(region: OwnRegion) -> Region:
    return Region(region.guest_addr, region.size, region.user_addr, region.mmap_offset)


def mappings(region: OwnRegion) -> int:
    """How often this process has mapped the file behind a region: once as its owner, once more as back-end."""
    inode = str(os.fstat(region.fd).st_ino)
    with open("/proc/self/maps") as maps:
        return sum(line.split()[4] == inode for line in maps)


def overwrite(region: OwnRegion) -> memoryview:
    """Write the pattern over a whole region."""
    view = memoryview(region)
    for at in range(0, len(view), MIB):
        view[at : at + MIB] = PATTERN[: len(view[at : at + MIB])]
    return view


def unchanged(view: memoryview) -> bool:
    return all(view[at : at + MIB] == PATTERN[: len(view[at : at + MIB])] for at in range(0, len(view), MIB))


# ---- what is removed ----


@pytest.mark.shows("REM_MEM_REG")
@pytest.mark.parametrize("way", ["REM_MEM_REG", "SET_MEM_TABLE"])
@every_layout
def test_receive_buffers_are_removed_in_a_flood(path: str, layout: int, way: str) -> None:
    """A generator writes into the buffers as fast as it can; after the answer it writes no byte more."""
    dice = random.Random(layout)
    with pumping("gen:size=1514", f"vhost:{path}"):
        for _ in range(8):
            memory = GuestMemory(64 * PAGE)  # rings alone have room in it
            extra = memory.add_region(4 * MIB)
            with Guest(path, USUAL | layout, memory=memory) as guest:
                assert mappings(extra) == 2
                sink = Sink(guest.receiveqs, 1514, poll="busy")
                thread = threading.Thread(target=sink.run, kwargs={"duration": 20})
                thread.start()
                wait_for(lambda sink=sink: sink.counters["received"] > 256)
                time.sleep(dice.random() * 0.01)
                if way == "REM_MEM_REG":
                    guest.frontend.remove_region(row(extra))
                else:
                    first = memory.regions[0]
                    guest.frontend.set_mem_table([Region(*first[:4])], [first[4]])
                view = overwrite(extra)
                assert mappings(extra) == 1, "the mapping is still there after the answer"
                sink.stop()
                thread.join(60)
                assert not thread.is_alive()
                time.sleep(0.01)
                assert unchanged(view)


@pytest.mark.parametrize("size", [4096, 262144], ids=["small requests", "large requests"])
@every_layout
def test_read_buffers_are_removed_under_requests(tmp_path: Path, path: str, layout: int, size: int) -> None:
    """Reads are under way, some of them in other threads; none of them writes after the answer."""
    image = tmp_path / "disk.img"
    make_file(image, 8 * MIB)
    dice = random.Random(layout)
    with serving(image, path):
        for _ in range(15):
            memory = GuestMemory(MIB)
            extra = memory.add_region(16 * MIB)
            with DiskGuest(path, VERSION_1 | layout, memory) as guest:
                assert mappings(extra) == 2
                for number in range(20):
                    place = (extra.guest_addr + number * size, size)
                    guest.driver.add([header(IN, number)], [place, 1])
                guest.driver.publish()
                guest.driver.kick()
                time.sleep(dice.random() * 0.002)
                guest.frontend.remove_region(row(extra))
                view = overwrite(extra)
                assert mappings(extra) == 1, "the mapping is still there after the answer"
                time.sleep(0.005)
                assert unchanged(view)


# ---- many regions ----


@pytest.mark.shows("ADD_MEM_REG", "REM_MEM_REG", "GET_MAX_MEM_SLOTS")
@every_layout
def test_all_slots_come_and_go_while_traffic_runs(path: str, layout: int) -> None:
    """509 regions, taken out and put back in any order, while others carry checked traffic."""
    dice = random.Random(layout)
    with pumping(f"vhost:{path}"), Guest(path, USUAL | layout) as guest:
        background = Background(guest.streams())
        spare = GuestMemory(16 * PAGE)
        fd = spare.regions[0][4]
        own = mapped()
        # One file, mapped again and again: neighbours for the guest, with gaps between every third and the next.
        rows = [
            Region(0x10_0000_0000 + (number + number // 3) * PAGE, PAGE, 0x9000_0000_0000 - number * 3 * PAGE, PAGE)
            for number in range(508)
        ]
        live: list[Region] = []
        for one in rows:
            guest.frontend.add_region(one, fd)
            live.append(one)
        assert mapped() == own + 508
        background.goes_on(50)
        for step in range(1500):
            if live and (len(live) == 508 or dice.random() < 0.5):
                gone = live.pop(dice.randrange(len(live)))
                guest.frontend.remove_region(gone)
            else:
                missing = dice.choice([one for one in rows if one not in live][:20])
                guest.frontend.add_region(missing, fd)
                live.append(missing)
            if step % 100 == 0:
                assert mapped() == own + len(live)
                background.goes_on(10)
        guest.share()  # the table as it was at first takes the place of all
        assert mapped() == own
        background.goes_on(50)
        background.finish()


# ---- places ----

NEED_HUGE = pytest.mark.skipif(huge_pages_free() < 8, reason="no huge pages; sudo sysctl vm.nr_hugepages=64")
TRAFFIC_BYTES = 4 * MIB


def above_4_gib() -> GuestMemory:
    return GuestMemory(TRAFFIC_BYTES, guest_addr=0x1_0000_0000)


def near_the_end() -> GuestMemory:
    return GuestMemory(TRAFFIC_BYTES, guest_addr=(1 << 64) - 16 * MIB, user_addr=(1 << 64) - 32 * MIB)


def sparse() -> GuestMemory:
    """Rings low, buffers far away, and more regions with gaps between; user addresses in another order."""
    memory = GuestMemory(64 * PAGE, guest_addr=PAGE)
    memory.add_region(PAGE, guest_addr=1 << 32, user_addr=0x2000)
    memory.add_region(TRAFFIC_BYTES, guest_addr=1 << 52, user_addr=1 << 30)
    memory.add_region(PAGE, guest_addr=1 << 60, user_addr=1 << 62)
    return memory


def behind_an_offset() -> GuestMemory:
    return GuestMemory(TRAFFIC_BYTES, mmap_offset=5 * PAGE)


def huge_pages() -> GuestMemory:
    return GuestMemory(2 * HUGE_PAGE, hugepages=True)


def huge_pages_behind_an_offset() -> GuestMemory:
    """Beginning with the second huge page, and ending inside of one."""
    return GuestMemory(HUGE_PAGE + HUGE_PAGE // 2 + PAGE, mmap_offset=HUGE_PAGE, hugepages=True)


PLACES = [
    above_4_gib, near_the_end, sparse, behind_an_offset,
    pytest.param(huge_pages, marks=NEED_HUGE), pytest.param(huge_pages_behind_an_offset, marks=NEED_HUGE),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@every_layout
def test_packets_in_memory_of_every_kind(path: str, layout: int, place: Callable[[], GuestMemory]) -> None:
    with pumping(f"vhost:{path}"), Guest(path, USUAL | layout, memory=place()) as guest:
        background = Background(guest.streams())
        background.goes_on(2000)
        background.finish()


@pytest.mark.parametrize("place", PLACES)
@every_layout
def test_requests_in_memory_of_every_kind(
    tmp_path: Path, path: str, layout: int, place: Callable[[], GuestMemory]
) -> None:
    """Small requests and large ones, which go different ways."""
    image = tmp_path / "disk.img"
    data = make_file(image)
    with serving(image, path), DiskGuest(path, VERSION_1 | layout, place()) as guest:
        for size in (4096, 262144):
            block = guest.memory.alloc(size)
            where = (block.guest_addr, size)
            assert guest.ask(IN, 8, where) == OK
            assert memoryview(block) == data[4096 : 4096 + size]
            memoryview(block)[:] = content(size, 7)
            assert guest.ask(OUT, 16, where) == OK
            assert image.read_bytes()[8192 : 8192 + size] == content(size, 7)
            image.write_bytes(data)


@NEED_HUGE
def test_a_region_at_an_odd_place_of_a_huge_page(tmp_path: Path, path: str) -> None:
    """A region that begins and ends anywhere in its file, of huge pages: the bytes are those that are meant."""
    image = tmp_path / "disk.img"
    data = make_file(image)
    memory = GuestMemory(MIB)
    other = GuestMemory(2 * HUGE_PAGE, hugepages=True)
    fd = other.regions[0][4]
    odd = Region(0x9_0000_0000 + 3, HUGE_PAGE + 777, 0x8000_0000_0000 + 5, HUGE_PAGE // 2 + 333)
    with serving(image, path) as server, DiskGuest(path, VERSION_1, memory) as guest, other:
        guest.frontend.add_region(odd, fd)
        for at in (0, HUGE_PAGE // 2 - 333 - 100, odd.size - 4096):
            assert guest.ask(IN, 4, (odd.guest_addr + at, 4096)) == OK
            start = other.regions[0][0] + odd.mmap_offset + at
            assert other.view(start, 4096) == data[2048 : 2048 + 4096]
        guest.driver.add([header(IN, 0)], [(odd.guest_addr + odd.size - 511, 512), 1])
        guest.driver.publish()
        guest.driver.kick()
        wait_for(lambda: server.device.queues[0].broken)
        guest.frontend.remove_region(odd)
