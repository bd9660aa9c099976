"""Driver-side queues of both layouts, for tests."""

from __future__ import annotations

import pytest

from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

VERSION_1 = 1 << 32
EVENT_IDX = 1 << 29
IN_ORDER = 1 << 35
MEBIBYTE = 1 << 20
LAYOUTS = {"split": VERSION_1, "packed": VERSION_1 | 1 << 34}
SIZES = {"split": [1, 2, 4, 16, 256], "packed": [1, 2, 3, 5, 256]}
RINGS = [(layout, size) for layout, sizes in SIZES.items() for size in sizes]

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make(layout: str, size: int = 8, features: int = 0, base: int | None = None) -> DriverQueue:
    """A queue in memory of its own."""
    queue = DriverQueue(GuestMemory(MEBIBYTE), size, features=LAYOUTS[layout] | features, base=base)
    assert queue.layout == layout
    return queue


def position(layout: str, size: int, count: int) -> int:
    """Where a ring stands that `count` buffers of one descriptor have passed: its base."""
    if layout == "split":
        return count % 65536
    return count % size | (0 if count // size % 2 else 0x8000)
