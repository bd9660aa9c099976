"""Our driver on a block device: it verifies what it reads, sees what is wrong, and rows are made of its runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blk_front import serving
from blk_rig import content
from vq.bench.blk_backends import OwnBlk, SocketBlk, StorageDaemon, memory_file
from vq.bench.blk_link import open_blk_link
from vq.bench.blk_measure import BlkRun, blk_rows, ratios, run_blk
from vq.bench.blk_settings import BLK_AXES, BlkSettings, check_blk_settings
from vq.bench.settings import combinations, parse_axes
from vq.bench.target import Places
from vq.errors import BackendError, ResourceError, UsageError
from vq_core.blk_load import BlkLoad, blk_load_memory_bytes
from vq_core.disk import Disk
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

SMALL = BlkSettings(depth=8, verify="on", driver="sleep")
SIZE = 2 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Make a file whose blocks differ."""
    path = tmp_path / "disk.img"
    path.write_bytes(content(SIZE))
    return path


def counted(load: BlkLoad, seconds: float = 0.1) -> dict[str, int]:
    """Run once more, and give what has been added."""
    before = load.counters
    load.run(seconds)
    return {name: value - before[name] for name, value in load.counters.items()}


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("descriptors", ["indirect", "3"])
@pytest.mark.parametrize("queues", [1, 3])
def test_what_is_read_is_what_was_written(
    image: Path, tmp_path: Path, layout: str, descriptors: str, queues: int
) -> None:
    settings = replace(SMALL, layout=layout, descriptors=descriptors, queues=queues, writes=40)
    path = str(tmp_path / "s")
    with serving(Disk(image), path, queues=3), open_blk_link(path, settings, None) as load:
        found = counted(load)
        assert found["reads"] > 100 and found["writes"] > 100
        assert (found["failed"], found["changed"], found["lost"]) == (0, 0, 0)
        assert load.seconds >= 0.1
    assert image.read_bytes() != content(SIZE)


@pytest.mark.parametrize("block", [512, 65536])
def test_other_sizes_of_blocks(image: Path, tmp_path: Path, block: int) -> None:
    path = str(tmp_path / "s")
    with serving(Disk(image), path), open_blk_link(path, replace(SMALL, block=block, writes=50), None) as load:
        found = counted(load)
        assert found["reads"] and found["writes"]
        assert (found["failed"], found["changed"], found["lost"]) == (0, 0, 0)


def test_without_writes_nothing_is_written(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with serving(Disk(image), path), open_blk_link(path, replace(SMALL, verify="off"), None) as load:
        assert counted(load)["writes"] == 0
    assert image.read_bytes() == content(SIZE)


def test_other_content_is_seen(image: Path, tmp_path: Path) -> None:
    """Each block has been read when the file is changed behind the back-end."""
    path = str(tmp_path / "s")
    with serving(Disk(image), path), open_blk_link(path, SMALL, None) as load:
        while load.counters["reads"] < 20 * SIZE // 4096:
            assert counted(load)["changed"] == 0
        with image.open("r+b") as file:
            file.write(content(SIZE // 2, seed=2))
        assert counted(load)["changed"] > 0


def test_requests_that_fail_are_seen(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with serving(Disk(image), path), open_blk_link(path, replace(SMALL, writes=50), None) as load:
        assert counted(load)["failed"] == 0
        os.truncate(image, SIZE // 2)  # reads beyond the end fail; writes make the file longer again
        found = counted(load)
        assert found["failed"] > 0 and found["reads"] > 0


def test_requests_that_are_lost_end_the_run(tmp_path: Path) -> None:
    """Nobody serves the ring."""
    with GuestMemory(blk_load_memory_bytes(64, 8, 4096)) as memory:
        queue = DriverQueue(memory, 64, features=1 << 32)
        load = BlkLoad([queue], 100, depth=8, patience=0.1)
        load.run(30)
        assert load.counters == {"reads": 0, "writes": 0, "failed": 0, "changed": 0, "lost": 8}
        queue.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"blocks": 0}, "0 blocks"),
        ({"blocks": 1 << 32}, "blocks"),
        ({"size": 700}, "700 bytes"),
        ({"size": 2 << 20}, "bytes"),
        ({"depth": 0}, "depth 0"),
        ({"writes": 101}, "writes 101"),
        ({"patience": 0}, "patience 0"),
        ({"poll": "x"}, "poll 'x'"),
        ({"verify": True, "blocks": 63}, "too few to verify"),
        ({"indirect": True}, "INDIRECT_DESC"),
        ({"queues": []}, "0 queues"),
    ],
)
def test_wrong_loads(options: dict[str, Any], text: str) -> None:
    with GuestMemory(1 << 20) as memory:
        queue = DriverQueue(memory, 128, features=1 << 32)
        arguments = {"queues": [queue], "blocks": 1000} | options
        with pytest.raises(ValueError, match=text):
            BlkLoad(arguments.pop("queues"), arguments.pop("blocks"), **arguments)
        queue.close()


def test_a_disk_that_is_too_small_and_features_that_lack(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with serving(Disk(None, True, size=1 << 19), path, packed=False):
        with pytest.raises(UsageError, match="too few to verify"), open_blk_link(path, replace(SMALL, depth=128), None):
            pass
        with pytest.raises(UsageError, match="read-only"), open_blk_link(path, replace(SMALL, writes=1), None):
            pass
        with pytest.raises(BackendError, match="RING_PACKED"):
            open_blk_link(path, replace(SMALL, layout="packed"), None).__enter__()
        with pytest.raises(BackendError, match="queues=2"):
            open_blk_link(path, replace(SMALL, queues=2), None).__enter__()


def test_axes_and_settings_that_do_not_fit() -> None:
    axes = parse_axes(["depth=1..4", "disk=null,tmpfs"], BLK_AXES)
    assert [(p["depth"], p["disk"]) for p in combinations(axes)] == [
        (1, "null"), (2, "null"), (4, "null"), (1, "tmpfs"), (2, "tmpfs"), (4, "tmpfs"),
    ]  # fmt: skip
    for text in ("size=64", "block=1000", "disk=x"):
        with pytest.raises(UsageError):
            parse_axes([text], BLK_AXES)
    with pytest.raises(UsageError, match="larger ring"):
        check_blk_settings(replace(SMALL, depth=64, descriptors="3"))
    with pytest.raises(UsageError, match="1 GiB"):
        check_blk_settings(replace(SMALL, depth=128, block=1 << 20, queues=16))


def test_a_run_of_our_own_back_end() -> None:
    (run,) = run_blk([OwnBlk(None)], [replace(SMALL, disk="tmpfs", writes=50)], Places(), seconds=0.05, repeat=1)
    assert run.ok and run.reads and run.writes
    assert (run.backend, run.round, run.tag) == ("vq", 0, "unknown")


def test_a_back_end_that_is_gone(tmp_path: Path) -> None:
    found: list[str] = []
    runs = run_blk(
        [SocketBlk(str(tmp_path / "none"))], [SMALL], Places(), seconds=0.05, repeat=2,
        failed=lambda what, error: found.append(str(error)),
    )  # fmt: skip
    assert list(runs) == []
    assert len(found) == 2
    with pytest.raises(ResourceError):
        list(run_blk([SocketBlk(str(tmp_path / "none"))], [SMALL], Places(), seconds=0.05, repeat=1))


def test_the_file_of_a_disk_is_gone_afterwards() -> None:
    with memory_file([SMALL, replace(SMALL, disk="tmpfs")]) as path:
        assert path is not None and path.stat().st_blocks * 512 >= path.stat().st_size > 0
    assert not path.exists()
    with memory_file([SMALL]) as path:
        assert path is None


def test_the_command_line_of_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    words = StorageDaemon(0, "aio=io_uring").command(replace(SMALL, queues=2), Path("/a,b"), "/s")
    assert "filename=/a,,b" in words[2] and words[2].endswith(",aio=io_uring,node-name=n")
    assert "num-queues=2" in words[4]
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ResourceError, match="qemu-utils"):
        StorageDaemon(0)


def run(backend: str, number: int, rate: float, near: bool = True, **wrong: int) -> BlkRun:
    distance = 60.0 if near else 300.0
    counters = {"failed": 0, "changed": 0, "lost": 0} | wrong
    return BlkRun(
        SMALL, backend, number, 10, 0, 1.0, rate=rate, distances=(distance, distance), tag="near" if near else "far",
        **counters,
    )  # fmt: skip


def test_rows_and_ratios_are_of_one_tag() -> None:
    runs = [
        run("a", 0, 100), run("b", 0, 40), run("b", 1, 50), run("a", 1, 200), run("a", 2, 10, near=False),
        run("b", 2, 5),
    ]  # fmt: skip
    rows = {(row.backend, row.tag): row for row in blk_rows(runs)}
    assert set(rows) == {("a", "near"), ("b", "near"), ("a", "far")}
    assert (rows["a", "near"].rate, rows["a", "near"].low, rows["a", "near"].high) == (150, 100, 200)
    assert rows["b", "near"].runs == 3
    assert rows["a", "near"].bits == 150 * 4096 * 8
    (ratio,) = ratios(runs, "a", "b")
    assert (ratio.tag, ratio.pairs, ratio.ratio, ratio.low, ratio.high) == ("near", 2, 3.25, 2.5, 4.0)
    assert run("a", 0, 1).ok and not run("a", 0, 1, lost=1).ok
    assert blk_rows([run("a", 0, 1, changed=3)])[0].wrong == 3
    assert ratios([run("a", 0, 1)], "a", "b") == []
