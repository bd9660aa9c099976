"""A block device ends after any one of its stores to ring and in-flight region: nothing is lost, nothing done twice.

The engine is stopped after each instruction. Wherever ring or region has changed, another engine goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

import reference_inflight as reference
from blk_rig import FLUSH, IN, header, make_file
from engine_rig import INDIRECT, PACKED, RING_PACKED, VERSION_1
from inflight_rig import BEGINNING, InflightFile, waiting_ids
from stepping import states
from vq_core.blk_worker import BlkWorker
from vq_core.disk import Disk
from vq_core.driver import Buffer, DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.queue import Queue

SIZE = 16
LONG = 264 * 512  # goes to the pool
BASES = {VERSION_1: [0, 65533], PACKED: [0x8000, 11 | 0x8000, 13]}


class World:
    """A ring with five requests on it, of which two are left to the pool; each world is like every other."""

    def __init__(self, features: int, base: int) -> None:
        self.features, self.base = features | INDIRECT, base
        self.memory = GuestMemory(2 << 20)
        self.map = MemoryMap(self.memory.regions)
        self.driver = DriverQueue(self.memory, SIZE, features=self.features, base=base)
        self.region = InflightFile(features, size=SIZE)
        start, _, used = self.driver.guest_addresses
        self.ring = self.memory.view(start, used + 6 + 8 * SIZE - start)
        self.buffers = [
            self.driver.add([header(IN, 1)], [512, 1]),
            self.driver.add([header(IN, 2)], [LONG, 1]),
            self.driver.add([header(IN, 3)], [512, 1], indirect=True),
            self.driver.add([header(IN, 4)], [LONG, 1]),
            self.driver.add([header(FLUSH)], [1]),
        ]
        self.driver.publish()

    def look(self) -> bytes:
        return bytes(self.ring) + self.region.read()

    def restore(self, state: bytes) -> None:
        self.ring[:] = state[: len(self.ring)]
        self.region.write(state[len(self.ring) :])

    def close(self) -> None:
        self.region.close()
        self.driver.close()
        self.memory.close()


@contextmanager
def world(features: int, base: int) -> Iterator[World]:
    made = World(features, base)
    try:
        yield made
    finally:
        made.close()


class Engine:
    """A block device on a world, moved by hand."""

    def __init__(self, hand: ModuleType, path: Path, world: World) -> None:
        self.hand, self.world = hand, world
        self.disk = Disk(path)
        self.queue = Queue(0, "requestq0")
        self.worker = BlkWorker(self.disk, [self.queue])

    def start(self, base: int) -> None:
        self.queue.start(
            self.world.map, SIZE, *self.world.driver.addresses, base, self.world.features,
            enabled=True, in_order=False, inflight=self.world.region.map(),
        )  # fmt: skip

    def act(self) -> None:
        """Everything that there is to do, in two batches: the second one in reverse order."""
        self.hand.act(self.worker)

    def close(self) -> None:
        self.queue.stop()
        self.worker.close()
        self.disk.close()


@contextmanager
def engine(hand: ModuleType, path: Path, world: World) -> Iterator[Engine]:
    made = Engine(hand, path, world)
    try:
        yield made
    finally:
        made.close()


def check_found(world: World, done: set[Buffer]) -> list[Buffer]:
    """What the region says is all that is missing, each once; the buffers to do again, in their order."""
    found = world.region.found(world.driver)
    assert found is not None
    left = {buffer.id: buffer for buffer in world.buffers if buffer not in done}
    again = [request.id for request in found.requests]
    assert sorted([*again, *waiting_ids(world.driver, found.avail)]) == sorted(left)
    return [left[number] for number in again]


def go_on(hand: ModuleType, path: Path, features: int, base: int, state: bytes) -> None:
    """Let another engine go on from a state, and insist that each request is used once."""
    with world(features, base) as after, engine(hand, path, after) as next_one:
        after.restore(state)
        done = [buffer for buffer, _ in after.driver.poll()]
        again = check_found(after, set(done))
        next_one.start(after_crash(features))
        next_one.act()
        used = [buffer for buffer, _ in after.driver.poll()]
        assert sorted(buffer.id for buffer in done + used) == sorted(buffer.id for buffer in after.buffers)
        # What need not wait is given back in the order in which it was begun: first what is done once more.
        short = [buffer for buffer in used if sum(len(part) for part in buffer.writable) < LONG]
        assert short == sorted(short, key=lambda buffer: again.index(buffer) if buffer in again else len(again))
        assert next_one.queue.broken is None
        left = after.region.found(after.driver)
        assert left is not None and not left.requests and left.used == left.avail


def after_crash(features: int) -> int:
    return BEGINNING[bool(features & RING_PACKED)]


def cuts(hand: ModuleType, path: Path, features: int, base: int) -> list[bytes]:
    """Ring and region after each store of an engine."""
    with world(features, base) as first, engine(hand, path, first) as one:
        one.start(base)
        return list(states(one.act, first.look))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_file(tmp_path / "disk.img")
    return tmp_path / "disk.img"


@pytest.mark.parametrize(("features", "base"), [(layout, base) for layout in BASES for base in BASES[layout]])
def test_each_store(blk_hand: ModuleType, path: Path, features: int, base: int) -> None:
    seen = cuts(blk_hand, path, features, base)
    assert len(seen) > 30
    for state in seen:
        go_on(blk_hand, path, features, base, state)


@pytest.mark.parametrize(("features", "base"), [(VERSION_1, 65533), (PACKED, 11 | 0x8000)])
def test_each_store_of_a_repair(blk_hand: ModuleType, path: Path, features: int, base: int) -> None:
    """The engine that goes on ends as well, while it starts."""
    repairs = 0
    cut_again: set[bytes] = set()
    for state in cuts(blk_hand, path, features, base)[::2]:
        with world(features, base) as again, engine(blk_hand, path, again) as one:
            again.restore(state)
            shape = (again.map, SIZE, again.driver.addresses, after_crash(features), again.features)
            blk_hand.prepare(one.queue, again.region.map(), *shape)
            seen = list(states(blk_hand.resume, again.look))
        repairs += len(seen) > 1
        cut_again.update(seen[1:-1])
    assert repairs > 2
    for state in cut_again:
        go_on(blk_hand, path, features, base, state)


def test_reference_reads_a_fresh_region() -> None:
    assert reference.split(bytes(reference.split_size(4)), 4, 4, 9) is None
    assert reference.packed(bytes(reference.packed_size(4)), 4, 4, [0] * 4) is None
