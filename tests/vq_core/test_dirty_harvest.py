"""A copy of guest memory that is kept by the log alone, while the device writes: in the end it equals memory.

The driver stands still while the device writes, so that every difference is a mark that is missing, came before its
store, or was lost between two threads. At the end the ring is stopped: its device writes no more, events included.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from blk_rig import IN, BlkGuest, content, header
from dirty_rig import LogFile, Mirror, log_queue
from engine_rig import EVENT_IDX, INDIRECT, MRG_RXBUF, PACKED, PAGE, VERSION_1, Guest, pattern, running
from vq_core.disk import Disk
from vq_core.guest_memory import GuestMemory
from vq_core.plan import Plan
from vq_core.worker import Worker
from waiting import wait_for

FIRST = 0x10_0000
MEMORY = 640 * PAGE
RING = 512
ROUNDS = 25
LAYOUTS = {
    "split": VERSION_1,
    "split, event index": VERSION_1 | EVENT_IDX,
    "packed": PACKED,
    "packed, event index": PACKED | EVENT_IDX,
}
SHAPES = {
    "one buffer": (MRG_RXBUF, [(1526,)], [40, 1500, 900]),
    "header apart": (MRG_RXBUF, [(12, 1514)], [60, 1500]),
    "merged": (MRG_RXBUF, [(600,), (12, 300), (100, 500)], [60, 1500, 1700]),
    "chains": (INDIRECT, [(5, 7, 100, 1500), (12, 1000, 600)], [40, 1500]),
}


@pytest.fixture
def log() -> Iterator[LogFile]:
    made = LogFile((FIRST + MEMORY) // PAGE // 32 * 32 + 32)
    yield made
    made.close()


class Receiver:
    """A guest whose receiveq is filled anew in each round, all of its buffers blank."""

    def __init__(self, features: int, buffers: list[tuple[int, ...]]) -> None:
        self.guest = Guest(features, size=RING, memory=GuestMemory(MEMORY, guest_addr=FIRST))
        self.buffers = buffers
        self.random = random.Random(1)
        self.block = self.guest.memory.alloc(480 * PAGE, PAGE)
        self.view = memoryview(self.block)

    def post(self) -> int:
        """Make all available that the memory has room for; the number of packets that certainly find room."""
        at, count = 0, 0
        self.view[:] = bytes(len(self.view))
        while self.guest.receiveq.free > 12:
            lengths = self.random.choice(self.buffers)
            if at + sum(lengths) + 100 * len(lengths) > len(self.view):
                break
            parts = []
            for length in lengths:
                at += self.random.choice([0, 1, 100])
                parts.append((self.block.guest_addr + at, length))
                at += length
            indirect = bool(self.guest.features & INDIRECT) and self.random.random() < 0.5
            self.guest.receiveq.add((), parts, indirect=indirect)
            count += 1
        self.guest.receiveq.publish()
        return count


@pytest.mark.shows("VHOST_F_LOG_ALL", "SET_VRING_ADDR")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_received_packets(harness: ModuleType, harvest: ModuleType, log: LogFile, layout: int, shape: str) -> None:
    features, buffers, lengths = SHAPES[shape]
    receiver, source = Receiver(layout | features, buffers), harness.Feed()
    guest = receiver.guest
    queue, driver = guest.rings[0]
    looks = pages = 0
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(source, 0, guest.port, 0)]))
        for number in range(ROUNDS):
            count = receiver.post() // (4 if shape == "merged" else 1)
            packets = [pattern(lengths[packet % len(lengths)], number + packet) for packet in range(count)]
            wanted = guest.to_guest["packets"] + count
            while number % 2 and len(packets) > count // 2:  # the log comes while they are being delivered
                source.add(packets.pop())
            log_queue(queue, driver, log)
            with Mirror(harvest, guest.memory, log) as mirror:
                while packets:
                    source.add(packets.pop())
                wait_for(lambda wanted=wanted: guest.to_guest["packets"] >= wanted)
                base = queue.stop()
            assert mirror.stale() == set(), f"round {number}"
            looks, pages = looks + mirror.rounds, pages + mirror.harvester.taken
            fds = {"kick_fd": driver.kick_fd, "call_fd": driver.call_fd}
            queue.start(guest.map, RING, *driver.addresses, base, guest.features, enabled=True, **fds)
            driver.poll()
            while driver.outstanding:  # what merged packets left
                source.add(pattern(60, 0))
                wait_for(lambda: bool(driver.poll()) or not driver.outstanding)
    assert looks > 2 * ROUNDS and pages > MEMORY // PAGE * ROUNDS


@pytest.mark.shows("VHOST_F_LOG_ALL", "SET_VRING_ADDR")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("folder", ["/dev/shm", None], ids=["tmpfs", "disk"])
def test_disk_reads(harvest: ModuleType, log: LogFile, layout: int, folder: str | None, tmp_path: Path) -> None:
    """By the worker itself and by the pool, in many parts; the log comes before the requests or while they run."""
    if folder and not os.access(folder, os.W_OK):
        pytest.skip(f"no tmpfs at {folder}")
    path = Path(folder) / f"vq-test-{os.getpid()}.img" if folder else tmp_path / "disk.img"
    path.write_bytes(content(1 << 20, 3))
    rng = random.Random(2)
    guest = BlkGuest(Disk(path, True), layout | INDIRECT, size=128, memory=GuestMemory(MEMORY, guest_addr=FIRST))
    block = guest.memory.alloc(400 * PAGE, PAGE)
    view = memoryview(block)
    looks = 0
    try:
        for number in range(ROUNDS):
            view[:] = bytes(len(view))
            at, count = 0, 0
            while guest.driver.free > 8 and at < len(view) - 80_000:
                parts = []
                for length in rng.choice([[512], [4096], [512, 1024], [500, 12], [65536], [16384, 4096, 8192]]):
                    at += rng.choice([0, 3, 1000])
                    parts.append((block.guest_addr + at, length))
                    at += length
                parts.append((block.guest_addr + at + rng.choice([0, PAGE]), 1))
                at += PAGE + 1
                guest.add([header(IN, rng.randrange(1900))], parts, indirect=rng.random() < 0.3)
                count += 1
            guest.driver.publish()
            if number % 2:
                guest.driver.kick()
            log_queue(guest.queue, guest.driver, log)
            with Mirror(harvest, guest.memory, log) as mirror:
                guest.driver.kick()
                guest.wait(count)
                base = guest.queue.stop()
            assert mirror.stale() == set(), f"round {number}"
            looks += mirror.rounds
            guest.start(base=base)
    finally:
        guest.close()
        path.unlink()
    assert looks > ROUNDS
