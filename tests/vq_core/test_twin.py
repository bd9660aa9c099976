"""What `chain_twin` takes for a header and its data in a descriptor each, whatever stands in the ring by then."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from engine_rig import PACKED, VERSION_1, Guest, every_layout

NEXT, WRITE, INDIRECT = 1, 2, 4
NUM = 5
HEADER, DATA, TABLE = 0x1000, 0x2000, 0x3000
BEYOND = 1 << 40  # where the guest has no memory

Row = tuple[int, int, int, int]  # addr, len, flags, next


class Case:
    """A guest whose descriptors are written by hand."""

    def __init__(self, layout: int, size: int) -> None:
        self.guest = Guest(layout, size=size)
        self.packed = bool(layout != VERSION_1)
        self.base = self.guest.memory.regions[0][0]

    def put(self, slot: int, row: Row, *, receiveq: bool = False) -> None:
        """Write a descriptor; the last field is its id in a packed ring."""
        queue = self.guest.receiveq if receiveq else self.guest.transmitq
        addr, length, flags, last = row
        for name, value in (("addr", addr), ("len", length), ("flags", flags), ("id" if self.packed else "next", last)):
            queue.desc[slot][name] = value

    def table(self, *rows: Row) -> None:
        """Write an indirect table."""
        view = self.guest.memory.view(self.base + TABLE, 16 * len(rows))
        for number, (addr, length, flags, last) in enumerate(rows):
            tail = (last, flags) if self.packed else (flags, last)
            entry = b"".join(
                value.to_bytes(size, "little") for value, size in zip((addr, length, *tail), (8, 4, 2, 2), strict=True)
            )
            view[16 * number : 16 * number + 16] = entry


@every_layout
@pytest.mark.parametrize("way", [0, WRITE])
def test_two_of_one_direction(harness: ModuleType, layout: int, way: int) -> None:
    """In the ring and in a table; in a packed ring over its end as well."""
    case = Case(layout, 8 if layout == VERSION_1 else NUM)
    case.put(3, (DATA, 200, way, 2))
    twin = harness.twin(case.guest.port, False, 2, (HEADER, 12, NEXT | way, 3))
    assert twin[0][:2] == (HEADER, 12)
    assert twin[1] == (DATA, 200, way)
    assert twin[2:] == (2, 2)
    case.put(0, (DATA, 200, way, 4))
    assert harness.twin(case.guest.port, False, 4, (HEADER, 12, NEXT | way, 0))[2:] == (2, 4)
    case.table((HEADER, 12, NEXT | way, 1), (DATA, 200, way, 0))
    twin = harness.twin(case.guest.port, False, 2, (case.base + TABLE, 32, INDIRECT, 2))
    assert twin == ((HEADER, 12, NEXT | way), (DATA, 200, way), 1, 2)


@pytest.mark.parametrize("receiveq", [False, True])
def test_a_chain_is_never_longer_than_its_ring(harness: ModuleType, receiveq: bool) -> None:
    """The driver takes NEXT away between two looks: in a ring of one the second descriptor would be the first one."""
    case = Case(PACKED, 1)
    way = WRITE if receiveq else 0
    case.put(0, (DATA, 200, way, 0), receiveq=receiveq)
    assert harness.twin(case.guest.port, receiveq, 0, (HEADER, 12, NEXT | way, 0)) is None


RING: list[tuple[str, Row, Row]] = [
    ("a single one", (HEADER, 12, 0, 3), (DATA, 200, 0, 2)),
    ("of three", (HEADER, 12, NEXT, 3), (DATA, 200, NEXT, 2)),
    ("ends in a table", (HEADER, 12, NEXT, 3), (DATA, 32, INDIRECT, 2)),
    ("a table and more", (HEADER, 32, NEXT | INDIRECT, 3), (DATA, 200, INDIRECT, 2)),
    ("writable behind readable", (HEADER, 12, NEXT, 3), (DATA, 200, WRITE, 2)),
    ("readable behind writable", (HEADER, 12, NEXT | WRITE, 3), (DATA, 200, 0, 2)),
    ("of 2^32 bytes", (HEADER, 12, NEXT, 3), (DATA, 0xFFFFFFF4, 0, 2)),
]


@every_layout
@pytest.mark.parametrize(("first", "second"), [row[1:] for row in RING], ids=[row[0] for row in RING])
def test_not_in_the_ring(harness: ModuleType, layout: int, first: Row, second: Row) -> None:
    """All else is left to the cursor."""
    case = Case(layout, 8)
    case.put(3, second)
    assert harness.twin(case.guest.port, False, 2, first) is None


@pytest.mark.parametrize("following", [8, 0xFFFF])
def test_next_outside_the_table(harness: ModuleType, following: int) -> None:
    case = Case(VERSION_1, 8)
    assert harness.twin(case.guest.port, False, 2, (HEADER, 12, NEXT, following)) is None


TABLES: list[tuple[str, int, int, Row, Row]] = [
    ("in no memory", BEYOND, 32, (HEADER, 12, NEXT, 1), (DATA, 200, 0, 0)),
    ("at the end of all addresses", (1 << 64) - 16, 32, (HEADER, 12, NEXT, 1), (DATA, 200, 0, 0)),
    ("half in memory", (1 << 20) - 16, 32, (HEADER, 12, NEXT, 1), (DATA, 200, 0, 0)),
    *((f"of {size} bytes", TABLE, size, (HEADER, 12, NEXT, 1), (DATA, 200, 0, 0)) for size in (0, 16, 31, 33, 48)),
    ("in a table", TABLE, 32, (HEADER, 12, NEXT | INDIRECT, 1), (DATA, 200, INDIRECT, 0)),
    ("of two directions", TABLE, 32, (HEADER, 12, NEXT, 1), (DATA, 200, WRITE, 0)),
    ("of 2^32 bytes", TABLE, 32, (HEADER, 12, NEXT, 1), (DATA, 0xFFFFFFF4, 0, 0)),
]


@every_layout
@pytest.mark.parametrize(
    ("addr", "length", "first", "second"), [row[1:] for row in TABLES], ids=[row[0] for row in TABLES]
)
def test_not_in_a_table(harness: ModuleType, layout: int, addr: int, length: int, first: Row, second: Row) -> None:
    """All else is left to the cursor, tables that do not lie in one region too."""
    case = Case(layout, 8)
    case.table(first, second)
    found: Any = harness.twin(
        case.guest.port, False, 2, ((case.base + addr) % (1 << 64) if addr < BEYOND else addr, length, INDIRECT, 2)
    )
    assert found is None


@pytest.mark.parametrize("following", [0, 2, 0xFFFF])
def test_a_split_table_in_another_order(harness: ModuleType, following: int) -> None:
    case = Case(VERSION_1, 8)
    case.table((HEADER, 12, NEXT, following), (DATA, 200, 0, 0))
    assert harness.twin(case.guest.port, False, 2, (case.base + TABLE, 32, INDIRECT, 0)) is None


def test_a_packed_table_is_taken_whole_whatever_its_next_says(harness: ModuleType) -> None:
    """2.8.7: the device ignores NEXT in an indirect table."""
    case = Case(PACKED, 8)
    for flags in ((0, 0), (0, NEXT), (NEXT, NEXT)):
        case.table((HEADER, 12, flags[0], 9), (DATA, 200, flags[1], 9))
        twin = harness.twin(case.guest.port, False, 2, (case.base + TABLE, 32, INDIRECT, 6))
        assert twin[1:] == ((DATA, 200, 0), 1, 6)
