"""The way of a packet, timed: end to end with our own driver, and the worker alone between two ports of ours.

    make bench                                       runs all, keeps the result under .benchmarks/
    .venv/bin/pytest-benchmark compare               two runs side by side, for instance of two commits

Each round moves a fixed number of packets; engine and driver have a core each. Times are only comparable on one machine
while nothing else runs on it; `extra_info` says which machine and how many packets a second.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import pytest

import vq
from vq.demo import echo_backend, open_exchange
from vq.pump import Pump

ROUNDS = 5
CPUS = tuple(sorted(os.sched_getaffinity(0))[:2])


def note(benchmark: Any, packets: int, size: int) -> None:
    """Say what was moved, and where."""
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        mpps=round(packets / seconds / 1e6, 3),
        gbit_s=round(packets * size * 8 / seconds / 1e9, 3),
        size=size,
        vq=vq.__version__,
        machine=platform.processor() or platform.machine(),
        kernel=platform.release(),
    )


@pytest.mark.skipif(len(CPUS) < 2, reason="engine and driver need a core each")
@pytest.mark.parametrize("queue_size", [256, 1024])
@pytest.mark.parametrize("size", [64, 256, 1518, 9000, 65535])
def test_echo(benchmark: Any, size: int, queue_size: int) -> None:
    """Driver to engine and back, every packet verified."""
    packets = max(20_000, 2_000_000 // (1 + size // 256))
    with echo_backend(CPUS) as path, open_exchange(path, size, queue_size, CPUS) as exchange:

        def run() -> None:  # the limit counts from the start of the exchange
            exchange.run(packets=exchange.counters["sent"] + packets)

        benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
        counters = exchange.counters
    assert counters["verified"] == packets * (ROUNDS + 1)
    note(benchmark, packets, size)


@pytest.mark.parametrize("sink", ["null:", "null:copy"])
@pytest.mark.parametrize("size", [64, 1518])
def test_worker_alone(benchmark: Any, size: int, sink: str) -> None:
    """Generator to sink: what a burst costs in the worker, without a guest."""
    packets = 5_000_000

    def run() -> None:
        with Pump([f"gen:size={size},count={packets}", sink], cpus=CPUS[:1], poll="busy") as pump:
            final = pump.run()
        moved.append(final["workers"][0]["busy_cycles"])

    moved: list[int] = []
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    note(benchmark, packets, size)
    benchmark.extra_info["cycles_per_packet"] = round(sorted(moved)[len(moved) // 2] / packets, 2)
