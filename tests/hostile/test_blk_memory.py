"""Line 11 for the block device: memory that its owner truncates fails the requests in it and ends its connection.

What the worker touches itself raises SIGBUS, and the guard answers it. What a system call touches (small requests in
the worker, large ones in other threads) fails with EFAULT. The process serves the next front-end in either case.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blk_rig import FLUSH, GET_ID, IN, OUT, header, make_file
from disk_rig import VERSION_1, DiskGuest
from engine_rig import RING_PACKED
from hostile.memory import HUGE_PAGE, LoseableMemory, huge_pages_free
from hostile.process import Program, wait_until
from vq.frontend import RingSetup
from vq_core.guest_memory import GuestMemory

PAGE = 4096
LOST = (0x2_0000_0000, 0x7F00_0000_0000)  # guest and user address of the memory that goes away
DATA = LOST[0] + PAGE
every_size = pytest.mark.parametrize("size", [4096, 262144], ids=["small", "large"])
every_layout = pytest.mark.parametrize("layout", [0, RING_PACKED], ids=["split", "packed"])


class BlkProgram(Program):
    """`vq blk` on a file of 1 MiB."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "blk.sock")
        self.image = folder / "disk.img"
        self.content = make_file(self.image)
        words = ["-m", "vq", "blk", "--socket-path", self.path, "--blk-file", str(self.image), "-v"]
        super().__init__(words, folder)
        wait_until("vq blk listens", lambda: Path(self.path).exists(), 20)

    def connect(self, layout: int) -> DiskGuest:
        return DiskGuest(self.path, VERSION_1 | layout, GuestMemory(1 << 20))

    def serves(self, layout: int) -> None:
        """Insist that a front-end that comes now has its requests done, and gets back what the disk holds."""
        with self.connect(layout) as guest:
            block = guest.memory.alloc(4096)
            assert guest.ask(IN, 8, (block.guest_addr, 4096)) == 0
            assert memoryview(block) == self.content[4096:8192]

    def ended(self) -> list[str]:
        """Why connections have ended so far."""
        return [line for line in self.messages.splitlines() if " disconnected=" in line]

    def shared_maps_are_gone(self) -> None:
        wait_until("all guest memory is unmapped", lambda: self.holdings().shared_maps == 0)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlkProgram]:
    program = BlkProgram(tmp_path_factory.mktemp("blk"))
    yield program
    program.process.terminate()
    assert program.process.wait(60) == 0
    assert "Traceback" not in program.messages
    assert program.image.read_bytes() == program.content
    program.close()


@pytest.fixture(params=["pages", "huge pages"])
def lost(request: pytest.FixtureRequest) -> Iterator[LoseableMemory]:
    """Memory that will be taken away."""
    huge = request.param == "huge pages"
    if huge and huge_pages_free() == 0:
        pytest.skip("no huge pages; sudo sysctl vm.nr_hugepages=64")
    memory = LoseableMemory(HUGE_PAGE, *LOST, huge=huge)
    yield memory
    memory.close()


@pytest.fixture
def guest(program: BlkProgram, lost: LoseableMemory, layout: int) -> Iterator[DiskGuest]:
    """A guest with a running ring, and memory beside it that will be lost; in the end all is as it should be."""
    before = len(program.ended())
    with program.connect(layout) as guest:
        guest.frontend.add_region(lost.region, lost.fd)
        yield guest
        assert guest.frontend.wait_closed(10)
        wait_until("the log says why", lambda: len(program.ended()) > before)
        assert "truncated" in program.ended()[-1]
    program.shared_maps_are_gone()
    program.serves(layout)


def send(guest: DiskGuest, readable: list[object], writable: list[object], count: int = 1) -> None:
    for _ in range(count):
        guest.driver.add(readable, writable)  # type: ignore[arg-type]
    guest.driver.publish()
    guest.driver.kick()


@pytest.mark.checklist(11)
@every_layout
@every_size
@pytest.mark.parametrize("kind", [IN, OUT])
def test_data_is_taken_away(guest: DiskGuest, lost: LoseableMemory, kind: int, size: int) -> None:
    """Line 11: the kernel comes upon it: the request fails, and what was written to the disk is nothing."""
    lost.truncate()
    place = (DATA, size)
    send(guest, [header(kind, 0)] + [place] * (kind == OUT), [place] * (kind == IN) + [1])


@pytest.mark.checklist(11)
@every_layout
@every_size
@pytest.mark.parametrize("lost", ["pages"], indirect=True)
def test_data_is_taken_away_under_requests(guest: DiskGuest, lost: LoseableMemory, size: int) -> None:
    """Line 11: the same in the middle of many of them."""
    truncate_under_requests(guest, lost, size)


def truncate_under_requests(guest: DiskGuest, lost: LoseableMemory, size: int) -> None:
    send(guest, [header(IN, 0)], [(DATA, size), 1], 20)
    lost.truncate()
    time.sleep(0.002)
    send(guest, [header(IN, 0)], [(DATA, size), 1])


@pytest.mark.checklist(11)
@every_layout
@every_size
@pytest.mark.parametrize("lost", ["huge pages"], indirect=True)
def test_a_huge_page_is_taken_away_under_requests(
    program: BlkProgram, lost: LoseableMemory, size: int, layout: int
) -> None:
    """Line 11: the connection ends, or all is done: Linux may leave us a huge page that is used in that very moment."""
    with program.connect(layout) as guest:
        guest.frontend.add_region(lost.region, lost.fd)
        truncate_under_requests(guest, lost, size)
        done = []

        def over() -> bool:
            done.extend(guest.driver.poll())
            return len(done) == 21 or guest.frontend.wait_closed(0.05)

        wait_until("requests are done, or the connection ends", over, 10)
    program.shared_maps_are_gone()
    program.serves(layout)


@pytest.mark.checklist(11)
@every_layout
@pytest.mark.parametrize("part", ["header", "status", "serial"])
def test_what_the_worker_touches_is_taken_away(guest: DiskGuest, lost: LoseableMemory, part: str) -> None:
    """Line 11: header, status byte and the serial number are read and written by the worker itself."""
    lost.truncate()
    if part == "header":
        send(guest, [(DATA, 16)], [512, 1])
    elif part == "status":
        send(guest, [header(FLUSH)], [(DATA, 1)])
    else:
        send(guest, [header(GET_ID)], [(DATA, 20), 1])
    time.sleep(0.01)
    send(guest, [header(FLUSH)], [1])  # the loss is seen at the next look at the latest


@pytest.mark.checklist(11)
@pytest.mark.parametrize("layout", [0], ids=["split"])
@pytest.mark.parametrize("idle", [False, True])
def test_the_ring_is_taken_away(guest: DiskGuest, lost: LoseableMemory, layout: int, idle: bool) -> None:
    """Line 11: the worker meets it when it is kicked, or while it serves."""
    guest.frontend.stop_ring(0)
    ring = lost.ring(64)
    base = lost.user_addr
    driver = guest.driver
    guest.frontend.start_ring(
        RingSetup(0, 64, base, base + 0x8000, base + 0x10000, 0, driver.kick_fd, driver.call_fd, None)
    )
    if not idle:
        block = guest.memory.alloc(4096)
        memoryview(block)[:16] = header(FLUSH)
        ring.chain((block.guest_addr, 16, 0), (block.guest_addr + 16, 1, 2))
        ring.offer(0)
        os.eventfd_write(driver.kick_fd, 1)
    lost.truncate()
    os.eventfd_write(driver.kick_fd, 1)
