"""Guest memory: sealed regions, and blocks that nobody else uses."""

from __future__ import annotations

import fcntl
import gc
import itertools
import os
import random

import pytest

from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory


def test_memory_is_sealed_and_mapped() -> None:
    memory = GuestMemory(8192, mmap_offset=4096)
    ((guest_addr, size, user_addr, offset, fd),) = memory.regions
    assert (size, offset) == (8192, 4096)
    assert guest_addr != user_addr
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    memory.view(guest_addr + 10, 5)[:] = b"hello"
    assert os.pread(fd, 5, 4096 + 10) == b"hello"


def test_memory_closes_its_descriptors() -> None:
    before = set(os.listdir("/proc/self/fd"))
    memory = GuestMemory(4096)
    queue = DriverQueue(memory, 4)
    view = memory.view(memory.regions[0][0], 4)
    memory.close()
    queue.close()
    assert set(os.listdir("/proc/self/fd")) == before
    view[:] = b"live"
    assert bytes(view) == b"live"


def test_memory_regions_do_not_overlap() -> None:
    memory = GuestMemory(8192, guest_addr=0x10000, user_addr=0x90000)
    memory.add_region(4096, guest_addr=0x12000, user_addr=0x80000)
    for guest_addr, user_addr in ((0x11000, 0x200000), (0x200000, 0x91000), (0xF000, 0x300000)):
        with pytest.raises(ValueError, match="overlaps"):
            memory.add_region(8192, guest_addr=guest_addr, user_addr=user_addr)
    assert len(memory.regions) == 2


def test_memory_refuses_what_spans_regions() -> None:
    memory = GuestMemory(4096, guest_addr=0x10000)
    memory.add_region(4096, guest_addr=0x11000)
    assert (len(memory.view(0x10FFF, 1)), len(memory.view(0x11000, 4096))) == (1, 4096)
    with pytest.raises(ValueError, match="one region"):
        memory.view(0x10FFF, 2)
    with pytest.raises(ValueError, match="one region"):
        memory.view(0x11FFF, 2)


def test_blocks_are_aligned_disjoint_zeroed_and_reused() -> None:
    memory = GuestMemory(64 * 4096)
    random.seed(1)
    blocks = []
    for _ in range(100):
        align = random.choice((1, 16, 64, 256, 4096))
        block = memory.alloc(random.randint(1, 300), align)
        assert block.guest_addr % max(64, align) == 0
        assert bytes(block) == bytes(block.size)
        memoryview(block)[:] = b"x" * block.size
        blocks.append(block)
        if len(blocks) > 20:
            blocks.pop(random.randrange(20))
        spans = sorted((one.guest_addr, one.size) for one in blocks)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))


def test_a_view_keeps_its_block() -> None:
    memory = GuestMemory(4096)
    view = memoryview(memory.alloc(2048))
    first = memory.alloc(2048).guest_addr
    gc.collect()
    assert memory.alloc(2048).guest_addr == first  # the dropped one, not the one that `view` holds
    del view


def test_memory_says_when_it_is_full() -> None:
    memory = GuestMemory(4096)
    block = memory.alloc(4096)
    with pytest.raises(MemoryError, match="larger"):
        memory.alloc(1)
    memory.add_region(4096)
    assert memory.alloc(4096).guest_addr > block.guest_addr
