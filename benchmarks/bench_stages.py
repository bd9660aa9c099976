"""Each stage of the way of a packet by itself, in cycles per packet.

    make bench                                       runs all, prints one table, keeps the result under .benchmarks/
    .venv/bin/pytest-benchmark compare               two runs side by side, for instance of two commits

The time that is shown is that of one packet (or call): the measured part of a round by the time stamp counter, divided
by the packets in it. README.md tells what is inside of it, and how to read it.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from benchmarks.cases import CASES, Case, prepare
from benchmarks.compiled import stages as compiled_stages

PASSES = 10  # over all cases: what disturbs the machine for a second disturbs one of them
ROUNDS = 40  # of a case in a pass
ROUND_S = 0.0004  # measured part of a round: short, so that some escape whatever else the machine does
_shown = [0.0]


@dataclass
class Costs:
    """What was measured of one case."""

    ticks: list[float] = field(default_factory=list)  # of one packet, a round each
    core: list[float] = field(default_factory=list)  # cycles of the core in a tick, a pass each


def shown_time() -> float:
    """The clock of these benchmarks, seconds: a round moves it on by the cost of one packet."""
    return _shown[0]


@cache
def tick_s() -> float:
    """Seconds of a tick of the time stamp counter."""
    stages = compiled_stages()
    ticks, start = stages.ticks(), time.perf_counter()
    time.sleep(0.05)
    return (time.perf_counter() - start) / (stages.ticks() - ticks)


def measure(stages: ModuleType, case: Case, costs: Costs) -> None:
    """One pass over one case, in memory of its own."""
    job = prepare(stages, case)
    try:
        warm = min(ticks / units for ticks, units, *_ in (job.run(4) for _ in range(4)))
        laps = max(2, round(ROUND_S / tick_s() / (warm * job.units)))
        for _ in range(ROUNDS):
            ticks, units, *_ = job.run(laps)
            if units != laps * job.units:
                raise AssertionError(f"{case}: {units} of {laps * job.units} moved")
            costs.ticks.append(ticks / units)
    finally:
        job.close()
    cycles, ticks = min((stages.core_cycles(10000) for _ in range(3)), key=lambda pair: pair[1])
    costs.core.append(cycles / ticks)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> dict[Case, Costs]:
    """All selected cases, measured in turns on one core."""
    stages = compiled_stages()
    chosen = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    costs = {params["case"]: Costs() for params in chosen if isinstance(params.get("case"), Case)}
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    try:
        for _ in range(PASSES):
            for case, cost in costs.items():
                measure(stages, case, cost)
    finally:
        os.sched_setaffinity(0, cpus)
    return costs


@pytest.mark.benchmark(timer=shown_time)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stage(benchmark: Any, note: Any, measured: dict[Case, Costs], case: Case) -> None:
    """One stage in one variant and layout: hands over, round by round, what was measured."""
    costs = measured[case]
    rounds = iter(costs.ticks)

    def show() -> None:
        _shown[0] += next(rounds) * tick_s()

    benchmark.group = case.stage
    benchmark.pedantic(show, rounds=len(costs.ticks))
    note(
        stage=case.stage,
        variant=case.variant,
        layout=case.layout,
        unit=case.unit,
        cycles=round(min(costs.ticks), 2),
        cycles_median=round(statistics.median(costs.ticks), 2),
        core_cycles_per_tick=round(max(costs.core), 3),
    )
