"""A block device in a process of its own, killed again and again in the middle of its work: its driver sees pauses.

Each round another process goes on with the region that the one before has left. The driver, which lives on, knows what
it was told; the reference reads what region and rings say; the file has what was acknowledged.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from blk_rig import FLUSH, IN, OUT, SECTOR, header
from engine_rig import EVENT_IDX, INDIRECT, RING_PACKED, every_layout
from inflight_rig import BEGINNING, InflightFile, waiting_ids
from stepping import forked
from vq_core.blk_worker import BlkWorker
from vq_core.disk import Disk
from vq_core.driver import Buffer, DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.queue import Queue

QUEUES = 3
SIZE = 32
ROUNDS = 120
PLACES = 40  # of the disk, each written by one request at a time
PLACE_BYTES = 264 * SECTOR  # the longest go to the pool


def stamp(place: int, version: int, length: int) -> bytes:
    return struct.pack("<II", place, version) * (length // 8)


class Driver:
    """Three queues of a driver that writes, reads back and flushes, and believes nothing."""

    def __init__(self, layout: int, path: Path, chance: random.Random) -> None:
        self.features = layout | EVENT_IDX | INDIRECT
        self.path, self.chance = path, chance
        self.memory = GuestMemory(64 << 20)
        self.map = MemoryMap(self.memory.regions)
        self.queues = [DriverQueue(self.memory, SIZE, features=self.features) for _ in range(QUEUES)]
        self.region = InflightFile(layout, QUEUES, SIZE)
        self.under_way: list[dict[Buffer, tuple[int, int, int, int]]] = [{} for _ in self.queues]
        self.written = [(0, 0)] * PLACES  # version and length that the driver was told of
        self.busy: set[int] = set()
        self.done = 0

    def add(self) -> None:
        """Fill the rings with requests of all kinds."""
        for queue, under_way in zip(self.queues, self.under_way, strict=True):
            while queue.free >= 4 and len(self.busy) < PLACES - 2 and self.chance.random() < 0.9:
                place = self.chance.choice([place for place in range(PLACES) if place not in self.busy])
                version, length = self.written[place]
                sector, indirect = place * 264, self.chance.random() < 0.3
                kind = self.chance.choice([OUT, OUT, IN, FLUSH])
                if kind == OUT:
                    version, length = version + 1, self.chance.choice([SECTOR, 8 * SECTOR, PLACE_BYTES])
                    buffer = queue.add([header(OUT, sector), stamp(place, version, length)], [1], indirect=indirect)
                elif kind == IN and length:
                    buffer = queue.add([header(IN, sector)], [length, 1], indirect=indirect)
                else:
                    kind = FLUSH
                    buffer = queue.add([header(FLUSH)], [1])
                self.busy.add(place)
                under_way[buffer] = (kind, place, version, length)
            queue.publish()
            queue.kick()

    def poll(self) -> None:
        """Take what was used; the queue itself refuses what is not outstanding."""
        for queue, under_way in zip(self.queues, self.under_way, strict=True):
            for buffer, _ in queue.poll():
                kind, place, version, length = under_way.pop(buffer)
                assert bytes(buffer.writable[-1]) == b"\0"
                if kind == OUT:
                    self.written[place] = (version, length)
                elif kind == IN:
                    assert bytes(buffer.writable[0]) == stamp(place, version, length), "an older write came later"
                self.busy.discard(place)
                self.done += 1

    def check_region(self) -> int:
        """What is outstanding is in flight or waits in the ring, each once; how many requests are in flight."""
        count = 0
        for index, (queue, under_way) in enumerate(zip(self.queues, self.under_way, strict=True)):
            found = self.region.found(queue, index)
            if found is None:  # killed before it had started this ring
                continue
            again = [request.id for request in found.requests]
            everywhere = [*again, *waiting_ids(queue, found.avail)]
            assert sorted(everywhere) == sorted(buffer.id for buffer in under_way)
            count += len(again)
        return count

    def check_file(self) -> None:
        with self.path.open("rb") as file:
            for place, (version, length) in enumerate(self.written):
                if place not in self.busy:
                    file.seek(place * PLACE_BYTES)
                    assert file.read(length) == stamp(place, version, length), f"place {place}, version {version}"

    def serve(self) -> None:
        """What the back-end does, in its own process, until it is killed."""
        queues = [Queue(index, f"requestq{index}") for index in range(QUEUES)]
        worker = BlkWorker(Disk(self.path), queues)
        region = self.region.map()
        for queue, driver in zip(queues, self.queues, strict=True):
            queue.start(
                self.map, SIZE, *driver.addresses, self.base(driver), self.features, enabled=True, in_order=False,
                kick_fd=driver.kick_fd, call_fd=driver.call_fd, inflight=region,
            )  # fmt: skip
        for _ in range(4):
            threading.Thread(target=worker.pool.serve, daemon=True).start()
        worker.run()

    def base(self, queue: DriverQueue) -> Any:
        """What QEMU says after a crash."""
        packed = bool(self.features & RING_PACKED)
        return BEGINNING[packed] if packed else int(queue.used_head[1])

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.region.close()
        self.memory.close()


@every_layout
@pytest.mark.parametrize("seed", [1, 2])
def test_kills(tmp_path: Path, layout: int, seed: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(PLACES * PLACE_BYTES))
    chance = random.Random(seed)
    driver = Driver(layout, path, chance)
    in_flight = kept = 0
    for round_ in range(ROUNDS + 1):
        before = driver.done
        pid = forked(driver.serve)
        try:
            end = time.monotonic() + chance.choice([0.005, 0.01, 0.03])
            # Killed at any moment; the last one may finish, and now and then one must have done something.
            must = round_ % 5 == 4
            patience = time.monotonic() + 60
            while time.monotonic() < end or (must and driver.done == before) or round_ == ROUNDS:
                if round_ == ROUNDS and not any(driver.under_way):
                    break
                assert time.monotonic() < patience, "requests hang"
                driver.poll()
                if round_ < ROUNDS:
                    driver.add()
                else:
                    time.sleep(0.001)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        driver.poll()
        found = driver.check_region()
        in_flight += found
        kept += found > 0
        driver.check_file()
    assert driver.done > ROUNDS
    assert kept > ROUNDS // 10, f"{in_flight} requests in flight at {kept} of {ROUNDS} kills"
    driver.close()
