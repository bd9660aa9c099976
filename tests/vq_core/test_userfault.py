"""Memory maps whose pages are on their way: what can be touched when, and what becomes of it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.userfault import DEVICE, Userfault

PAGE = 4096
BYTES = 16 * PAGE


@pytest.fixture
def userfault() -> Iterator[Userfault]:
    try:
        made = Userfault()
    except OSError:
        pytest.skip("userfaultfd is not permitted here")
    yield made
    made.close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(BYTES) as made:
        made.add_region(BYTES, mmap_offset=PAGE)
        yield made


def permissions(address: int) -> str:
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, permissions = line.split()[:2]
            start, end = (int(part, 16) for part in place.split("-"))
            if start <= address < end:
                return permissions
    raise LookupError(f"{address:#x}")


def test_nothing_can_be_touched_before_it_is_open(userfault: Userfault, memory: GuestMemory) -> None:
    table = MemoryMap(memory.regions, userfault)
    assert table.may_block
    assert sorted(table.host_addrs) == [row[0] for row in memory.regions]
    assert [permissions(address) for address in table.host_addrs.values()] == ["---s", "---s"]
    table.open()
    assert [permissions(address) for address in table.host_addrs.values()] == ["rw-s", "rw-s"]
    userfault.settle()
    assert not table.may_block
    assert not table.lost


def test_forsaken_memory_is_ours_alone(userfault: Userfault, memory: GuestMemory) -> None:
    table = MemoryMap(memory.regions, userfault)
    table.open()
    before = [os.fstat(row[4]).st_blocks for row in memory.regions]
    userfault.forsake()
    assert table.lost
    assert [permissions(address) for address in table.host_addrs.values()] == ["rw-p", "rw-p"]
    assert [os.fstat(row[4]).st_blocks for row in memory.regions] == before


def test_a_map_is_not_kept_by_its_userfaultfd(userfault: Userfault, memory: GuestMemory) -> None:
    table = MemoryMap(memory.regions, userfault)
    known = weakref.ref(table)
    del table
    gc.collect()
    assert known() is None
    userfault.settle()
    userfault.forsake()


def test_a_region_begins_on_a_page(userfault: Userfault, memory: GuestMemory) -> None:
    guest_addr, size, user_addr, _, fd = memory.regions[0]
    with pytest.raises(ValueError, match="must begin on a page"):
        MemoryMap([(guest_addr, size - PAGE, user_addr, 64, fd)], userfault)


def test_memory_of_a_disk_is_refused(userfault: Userfault) -> None:
    """Missing pages of a file with a disk behind it come from there."""
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as made:
        made.truncate(BYTES)
        with pytest.raises(OSError, match="share memory from a memfd, tmpfs or hugetlbfs"):
            MemoryMap([(0, BYTES, 0, 0, made.fileno())], userfault)


def test_nobody_waits_at_first(userfault: Userfault) -> None:
    assert userfault.waiting == 0


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="gives up privileges")
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--bounding-set", "-sys_ptrace,-sys_admin"], "0"),  # by /dev/userfaultfd, which is root's
        (["--reuid", "65534", "--clear-groups", "--bounding-set", "-all"], "not permitted"),
    ],
    ids=["device", "nobody"],
)
def test_what_it_takes(words: list[str], answer: str) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1" or not Path(DEVICE).exists():
        pytest.skip("everybody may have one, or there is no device")
    code = (
        "from vq_core.userfault import Userfault\n"
        "try:\n    print(Userfault().waiting)\nexcept PermissionError:\n    print('not permitted')"
    )
    command = ["setpriv", *words, "--inh-caps", "-all", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == answer, done.stderr
