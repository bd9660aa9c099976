"""Each stage benchmark moves what it says it does: one short run of every case, and what came of it in the rings."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quality.tree import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.cases import CASES, HEADERS, Case, Job, prepare
from benchmarks.compiled import stages as compiled_stages
from benchmarks.guest import GUEST_ADDR, HEADER_BYTES, RINGS, Guest
from benchmarks.keep import KEPT, compact
from benchmarks.table import infos_of, main, read_result, rows, table

LAPS = 3  # odd: in the packed layout the last one runs with the other wrap counter
CSUM, TSO4 = 1, 2
BURST = 32


@pytest.fixture(scope="module")
def stages() -> ModuleType:
    return compiled_stages()


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    result: Case = request.param
    return result


@pytest.fixture
def job(stages: ModuleType, case: Case) -> Iterator[Job]:
    made = prepare(stages, case)
    yield made
    made.close()


def page(addr: int) -> int:
    return addr // 4096


def came_back(guest: Guest, lengths: list[int]) -> None:
    """Every buffer of the last lap is used, in order, with these lengths."""
    heads = [chain * guest.shape.slots for chain in range(guest.shape.chains)]
    expected = list(zip(heads, lengths, strict=True))
    used = guest.used()
    if guest.shape.in_order and not guest.receives:
        expected = expected[BURST - 1 :: BURST]  # one for each batch, the last (VIRTIO 1.3, 2.7.9 and 2.8.7)
        if not guest.shape.packed:
            skipped = [element for slot, element in enumerate(used) if slot % BURST]
            assert set(skipped) == {(0, 0)}
            used = used[::BURST]
    assert used == expected


def ring_is_marked(guest: Guest) -> None:
    """The log names the page of what the device writes, and nothing when it is off."""
    place = 0 if guest.shape.packed else RINGS[2]
    assert (page(GUEST_ADDR + place) in guest.marked()) == guest.shape.log
    assert guest.shape.log or not guest.marked()


def buffers_hold(guest: Guest, payloads: list[bytes]) -> None:
    """The payloads lie in the receive buffers, behind headers that say how many buffers each one takes."""
    share = guest.shape.share
    for number, payload in enumerate(payloads):
        data = b"".join(guest.read(number * share + i) for i in range(share))
        assert data[HEADER_BYTES:][: len(payload)] == payload
        assert struct.unpack("<H", data[10:12]) == (share,)
    if guest.shape.log:
        pages = {page(at) for parts in guest.places for addr, length in parts for at in (addr, addr + length - 1)}
        assert pages <= guest.marked()


def written_lengths(guest: Guest) -> list[int]:
    """What the device says it has written to each buffer of a lap."""
    total, each = HEADER_BYTES + guest.shape.size, sum(guest.shape.lengths)
    packet = [min(each, total - i * each) for i in range(guest.shape.share)]
    return packet * (guest.shape.chains // guest.shape.share)


# ---- what each stage must have done ----


def check_translate(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    assert result[2] == LAPS * job.units
    assert job.source is not None
    regions = [job.source.map.translate(addr, 1) for addr in job.data]
    assert None not in regions
    homes = [sum(start <= addr for start, _, _ in job.source.map.regions) for addr in job.data]
    moves = sum(a != b for a, b in itertools.pairwise(homes))
    near_and_same: tuple[bool, bool] = case.option
    assert moves == (len(job.data) - 1 if case.shape.regions == 64 and not near_and_same[1] else 0)


def check_walk(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    assert result[2] == LAPS * job.units * (HEADER_BYTES + case.shape.size)


def check_used(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    assert job.source is not None
    came_back(job.source, [0] * job.source.shape.chains)
    ring_is_marked(job.source)


def check_notify(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    if case.option == "signal":
        assert os.eventfd_read(job.data) == LAPS * job.units
    else:
        assert result[2] == (LAPS * job.units if case.option == "wanted" else 0)


def check_header(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    wants = {HEADERS["zero"]: 0, HEADERS["csum"]: CSUM, HEADERS["tso4"]: CSUM | TSO4}
    assert result[2] == wants[case.option]


def check_copy(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    source, target = job.data.both()
    assert source == target
    assert {len(data) for data in source} == {case.option}
    assert len(set(source)) == len(source)


def check_pull(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    check_used(case, job, result, stages)
    assert job.source is not None
    moved = job.source.port.snapshot()["from_guest"]
    assert (moved["packets"], moved["bytes"]) == (LAPS * job.units, LAPS * job.units * case.shape.size)
    assert moved["dropped"] == {}


def check_push(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    assert job.target is not None
    came_back(job.target, written_lengths(job.target))
    buffers_hold(job.target, job.data.payloads() * (job.units // BURST))
    ring_is_marked(job.target)
    flags = {job.target.read(i * case.shape.share)[0] for i in range(job.units)}
    assert flags == {1 if case.option == "changing" else 0}


def check_whole(case: Case, job: Job, result: tuple[int, ...], stages: ModuleType) -> None:
    assert job.source is not None
    assert job.target is not None
    came_back(job.source, [0] * job.source.shape.chains)
    came_back(job.target, written_lengths(job.target))
    buffers_hold(job.target, [job.source.payload(chain) for chain in range(job.source.shape.chains)])
    ring_is_marked(job.source)
    ring_is_marked(job.target)
    for guest in (job.source, job.target):
        state = guest.queue.snapshot()
        assert (state["calls"], state["broken"]) == (1 if case.shape.event_idx else 0, None)
        assert state["calls_suppressed"] > 0


CHECKS: dict[str, Callable[[Case, Job, tuple[int, ...], ModuleType], None]] = {
    "translate": check_translate,
    "walk": check_walk,
    "pop": check_used,
    "used": check_used,
    "notify": check_notify,
    "header": check_header,
    "copy": check_copy,
    "pull": check_pull,
    "pull, release": check_pull,
    "push": check_push,
    "whole round": check_whole,
}


def test_a_stage_moves_what_it_says(stages: ModuleType, case: Case, job: Job) -> None:
    result = job.run(LAPS)
    assert result[0] > 0
    assert result[1] == LAPS * job.units
    CHECKS[case.stage](case, job, result, stages)


def test_without_a_lap_nothing_moves(stages: ModuleType) -> None:
    for stage in ("used", "push"):
        case = next(case for case in CASES if case.stage == stage)
        job = prepare(stages, case)
        assert job.run(0)[:2] == (0, 0)
        guest = job.source or job.target
        assert guest is not None
        assert guest.used() == []
        job.close()


def test_every_stage_stands_in_both_layouts() -> None:
    free = {"translate", "header", "copy"}
    for stage in set(CHECKS) - free:
        assert {"split", "packed"} <= {case.layout for case in CASES if case.stage == stage}
    assert {case.stage for case in CASES} == set(CHECKS)
    assert len(set(map(str, CASES))) == len(CASES)


def test_the_table_sets_results_beside_older_ones() -> None:
    info = {"stage": "pop", "variant": "x", "unit": "packet", "layout": "packed", "cycles": 12.0}
    assert rows([info, {"mpps": 1}]) == {("pop", "x", "packet"): {"packed": 12.0}}
    columns: Any = table([info], [info | {"cycles": 10.0}]).columns
    assert list(columns[3].cells) == ["12.0 (+20%)"]


def test_a_result_is_kept_in_short_and_only_of_a_commit() -> None:
    item = {"name": "x", "extra_info": {"stage": "pop"}, "stats": {"min": 1.23456789e-9}}
    result = {"commit_info": {"id": "c", "dirty": False}, "benchmarks": [item, {"extra_info": {}}]}
    kept = json.loads(compact(dict(result)))
    assert kept == result | {"benchmarks": [item | {"stats": {"min": 1.2346e-9}}]}
    with pytest.raises(ValueError, match="changed commit c"):
        compact(result | {"commit_info": {"id": "c", "dirty": True}})


def test_the_kept_result_has_every_case() -> None:
    kept = infos_of(read_result(str(KEPT)))
    assert {(info["stage"], info["variant"], info["layout"]) for info in kept} == {
        (case.stage, case.variant, case.layout) for case in CASES
    }


def test_a_machine_is_named_by_its_processor_only() -> None:
    hooks = importlib.import_module("benchmarks.conftest")
    machine = {"node": "somewhere", "cpu": {"brand_raw": "a processor", "flags": []}, "release": "6"}
    hooks.pytest_benchmark_update_machine_info(None, machine)
    assert machine == {"cpu": "a processor"}


def test_a_result_says_for_what_it_was_compiled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hooks = importlib.import_module("benchmarks.conftest")
    result: dict[str, object] = {"commit_info": {"id": "c", "dirty": False}, "benchmarks": []}
    hooks.pytest_benchmark_update_json(None, [], result)
    build = result["build"]
    assert isinstance(build, dict)
    assert build["baseline"] and build["compiler"] and "-O3" in build["flags"]
    path = tmp_path / "0001.json"
    path.write_text(json.dumps(result))
    assert main([str(path)]) == 0
    assert f"0001.json for {build['baseline']}" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "no JSON", "[]"])
def test_a_file_that_is_no_result_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "0001.json"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: ") and line.endswith("make bench keeps results under .benchmarks/")
