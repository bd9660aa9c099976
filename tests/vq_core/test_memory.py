"""Memory maps: only what lies whole inside a region is translated, whatever the table; lost memory is survived."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vq_core
from vq_core.dirty import DirtyLog
from vq_core.memory import MemoryMap

PAGE = 4096
USER = 0x7F00_0000_0000


@pytest.fixture
def memfd():
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, 64 * PAGE)
    yield fd
    os.close(fd)


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:guest" in line for line in maps)


slots = st.tuples(st.integers(0, 15), st.integers(1, 4 * PAGE))
regions = st.lists(slots, min_size=1, max_size=8, unique_by=lambda slot: slot[0])


@given(regions, st.data())
def test_translation_agrees_with_the_table(table, data):
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 64 * PAGE)
        layout = [(slot * 4 * PAGE, size, USER + slot * 64 * PAGE, slot * PAGE) for slot, size in table]
        memory = MemoryMap([(*region, fd) for region in layout])
        assert memory.regions == tuple(sorted(region[:3] for region in layout))
        edges = [edge for start, size, *_ in layout for edge in (start - 1, start, start + size - 1, start + size)]
        address = data.draw(st.one_of(st.sampled_from([e for e in edges if e >= 0]), st.integers(0, 2**64 - 1)))
        length = data.draw(st.one_of(st.integers(0, 5 * PAGE), st.integers(0, 2**64 - 1)))
        ordered = sorted(layout)
        expected = None
        for i, (start, size, *_) in enumerate(ordered):
            if start <= address < start + size and address + length <= start + size:
                expected = (i, address - start)
        assert memory.translate(address, length) == expected
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ([], "at least one region"),
        ([(0, 0, 0, 0)], "not positive"),
        ([(2**64 - PAGE, 2 * PAGE, 0, 0)], "exceeds 64 bits"),
        ([(0, 2 * PAGE, 2**64 - PAGE, 0)], "exceeds 64 bits"),
        ([(0, PAGE, 0, 2**64 - PAGE)], "too large"),
        ([(0, 2 * PAGE, USER, 0), (PAGE, PAGE, 2 * USER, 0)], "overlap in guest_addr"),
        ([(0, PAGE, USER, 0), (PAGE, PAGE, USER + PAGE - 1, 0)], "overlap in user_addr"),
        ([(0, 65 * PAGE, USER, 0)], "which has"),
        ([(0, PAGE, USER, 64 * PAGE)], "which has"),
        ([(slot * PAGE, PAGE, USER + slot * PAGE, 0) for slot in range(510)], "509 are possible"),
    ],
)
def test_bad_tables_are_refused_and_nothing_stays_mapped(memfd, table, complaint):
    before = mappings()
    with pytest.raises(ValueError, match=complaint):
        MemoryMap([(*region, memfd) for region in table])
    assert mappings() == before


def test_unaligned_offsets_are_mapped_where_they_belong(memfd):
    os.pwrite(memfd, b"here", 5 * PAGE + 100)
    memory = MemoryMap([(PAGE, PAGE, USER, 5 * PAGE + 100, memfd)])
    assert memory.translate(PAGE, PAGE) == (0, 0)


def test_a_read_only_file_is_refused(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(PermissionError):
        MemoryMap([(0, PAGE, USER, 0, fd)])
    os.close(fd)


def test_adding_and_removing_share_mappings_and_leave_none_behind(memfd):
    before = mappings()
    first = MemoryMap([(0, PAGE, USER, 0, memfd)])
    second = first.plus((PAGE, PAGE, USER + PAGE, 8 * PAGE, memfd))
    assert mappings() == before + 2
    third = second.minus(0, PAGE, USER)
    del first, second
    assert mappings() == before + 1
    assert third.regions == ((PAGE, PAGE, USER + PAGE),)
    with pytest.raises(KeyError):
        third.minus(0, PAGE, USER)
    with pytest.raises(ValueError, match="overlap"):
        third.plus((PAGE, PAGE, 0, 0, memfd))
    assert third.minus(PAGE, PAGE, USER + PAGE) is None
    del third
    assert mappings() == before


def test_maps_and_logs_are_released_whatever_thread_drops_them(memfd):
    before = mappings()
    kept = [MemoryMap([(0, 4 * PAGE, USER, 0, memfd)]) for _ in range(50)]
    kept += [DirtyLog(memfd, PAGE, 0) for _ in range(50)]
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    assert mappings() == before


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (-1, 0), (PAGE, 64 * PAGE), (65 * PAGE, 0), (2**63, 2**63), (1, -1)]
)
def test_bad_logs_are_refused(memfd, size, offset):
    with pytest.raises(ValueError, match="dirty log"):
        DirtyLog(memfd, size, offset)


GREEDY = """
import os, threading
from vq_core.dirty import DirtyLog
from vq_core.memory import MemoryMap
from vq_core.queue import Queue

def memfd(size):
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    return fd

def table(count):
    return [(number << 20, 4096, number << 20, number % 2 << 13, greedy) for number in range(count)]

def fill(count):
    taken = []
    try:
        while True:
            taken.append(MemoryMap(table(count)))
    except OSError:
        return taken

greedy, honest = memfd(4 << 12), memfd(1 << 20)
memory = MemoryMap([(0, 1 << 20, 0, 0, honest)])
large = fill(509)
try:
    MemoryMap(table(32)).plus((1 << 40, 4096, 1 << 40, 0, greedy))
except OSError as error:
    print("a large table:", error.strerror)
usual = fill(32) + fill(1)
print("room for usual tables:", len(usual) > 512)
for make in (lambda: MemoryMap(table(1)), lambda: DirtyLog(greedy, 4096, 0)):
    try:
        make()
    except OSError as error:
        print(error.strerror)
thread = threading.Thread(target=lambda: None)
thread.start()
thread.join()
os.ftruncate(honest, 0)
Queue(0, "queue").start(memory, 16, 0, 0x1000, 0x2000, 0, 1 << 32)
print("lost:", memory.lost)
del usual[-1], large[0]
print("again:", len(fill(1)))
"""


def test_mappings_of_greedy_peers_leave_room_for_everybody_else():
    """At the kernel's limit no thread starts, and truncated memory ends the process."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    environment = os.environ | {"PYTHONPATH": str(Path(vq_core.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", GREEDY], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a large table: no memory table of 33 regions: too many mappings in this process",
        "room for usual tables: True",
        *[f"too many mappings in this process: {limit // 4 * 3}"] * 2,
        "lost: True",
        "again: 510",
    ]
