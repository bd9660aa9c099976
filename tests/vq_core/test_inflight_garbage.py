"""In-flight regions of any content: refused or believed, as the reference does, and never more than that."""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference_inflight as reference
from blk_rig import IN, header, make_file
from engine_rig import PACKED, RING_PACKED, every_layout
from inflight_rig import BEGINNING, InflightFile
from vq_core.blk_worker import BlkWorker
from vq_core.disk import Disk
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.queue import Queue

SIZE = 8
COUNTERS = st.integers(0, 9) | st.integers(0, 2**64 - 1)
INDEX = st.integers(0, SIZE) | st.sampled_from([255, 32767, 32768, 65535])
many = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def split_regions(draw: st.DrawFn) -> bytes:
    """Nearly right ones: most of them have a single thing wrong with them, or nothing."""
    version = draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
    data = reference.SPLIT.pack(0, version, SIZE, draw(INDEX), draw(st.sampled_from([0, 0, 1, 3, 65535, 4000])))
    for _ in range(SIZE):
        data += reference.SPLIT_ENTRY.pack(draw(st.sampled_from([0, 0, 1, 1, 1, 2])), draw(INDEX), draw(COUNTERS))
    return data.ljust(reference.split_size(SIZE), b"\0")


@st.composite
def packed_regions(draw: st.DrawFn) -> bytes:
    """A right one, with up to two fields changed into anything."""
    seed = draw(st.integers(0, 2**32))
    chance = random.Random(seed)
    order = chance.sample(range(SIZE), SIZE)
    slot, wrap = draw(st.integers(0, SIZE - 1)), draw(st.integers(0, 1))
    rows = [[0, 0, 0, 0, 0, 0, 0, 0, 0] for _ in range(SIZE)]
    taken = chance.randrange(SIZE + 1)
    ids, counters, at = chance.sample(range(SIZE), SIZE), chance.sample(range(50), SIZE), 0
    while at < taken:
        count = chance.randrange(1, taken - at + 1)
        chain = order[at : at + count]
        for number, index in enumerate(chain):
            after = chain[number + 1] if number + 1 < count else chance.randrange(SIZE + 1)
            rows[index] = [0, after, 0, 0, 0, ids[at], chance.choice([0, 1, 2, 3, 4, 0x8081]), chance.randrange(9), 0]
        rows[chain[0]][0], rows[chain[0]][2:5] = 1, [chain[-1], count, counters[at]]
        at += count
    free = [*order[taken:], SIZE]
    for index, after in itertools.pairwise(free):
        rows[index][1] = after
    head = [0, 1, SIZE, free[0], free[0], slot, slot, wrap, wrap]
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.booleans()):
            place = draw(st.integers(1, 8))
            head[place] = draw(st.integers(0, 3)) if place > 6 else draw(INDEX)
        else:
            row, place = draw(st.integers(0, SIZE - 1)), draw(st.integers(0, 5))
            rows[row][place] = draw(COUNTERS) if place == 4 else draw(st.integers(0, 3)) if place == 0 else draw(INDEX)
    data = reference.PACKED.pack(*head) + b"".join(reference.PACKED_ENTRY.pack(*row) for row in rows)
    return data.ljust(reference.packed_size(SIZE), b"\0")


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory(64 << 20)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("garbage") / "disk.img"
    make_file(path)
    return path


def believe(hand: ModuleType, image: Path, memory: GuestMemory, layout: int, region: bytes) -> bool:
    """Start a ring with a region, beside the reference; whether both believe it."""
    driver = DriverQueue(memory, SIZE, features=layout)
    for sector in range(3 if layout & RING_PACKED else SIZE // 2):
        driver.add([header(IN, sector)], [513])
    driver.publish()
    disk = Disk(image)
    queue = Queue(0, "requestq0")
    worker = BlkWorker(disk, [queue])
    with InflightFile(layout, size=SIZE) as file:
        file.write(region)
        try:
            found = file.found(driver)
            expected = True
        except reference.ContradictionError:
            found, expected = None, False
        refused = None
        try:
            queue.start(
                MemoryMap(memory.regions), SIZE, *driver.addresses, BEGINNING[file.packed], layout,
                enabled=True, in_order=False, inflight=file.map(),
            )  # fmt: skip
        except ValueError as problem:
            refused = str(problem)
        assert (refused is None) == expected, refused
        assert refused is None or "in-flight region" in refused
        if refused is None:
            if found is not None:
                assert file.found(driver) == found  # repaired, it says the same
            hand.act(worker)
            queue.stop()
    worker.close()
    disk.close()
    driver.close()
    return expected


@many
@given(region=split_regions())
@pytest.mark.checklist(13)
def test_split(blk_hand: ModuleType, image: Path, memory: GuestMemory, region: bytes) -> None:
    believe(blk_hand, image, memory, 1 << 32, region)


@many
@given(region=packed_regions())
@pytest.mark.checklist(13)
def test_packed(blk_hand: ModuleType, image: Path, memory: GuestMemory, region: bytes) -> None:
    believe(blk_hand, image, memory, PACKED, region)


@every_layout
@many
@given(data=st.binary(min_size=600, max_size=600))
@pytest.mark.checklist(13)
def test_bytes(blk_hand: ModuleType, image: Path, memory: GuestMemory, layout: int, data: bytes) -> None:
    """Any bytes at all, with the version that has them read."""
    size = reference.packed_size(SIZE) if layout & RING_PACKED else reference.split_size(SIZE)
    believe(blk_hand, image, memory, layout, (data[:8] + struct.pack("<H", 1) + data[10:])[:size].ljust(size, b"\0"))
