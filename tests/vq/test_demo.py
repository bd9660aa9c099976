"""The demo: engine, control plane and driver together, through a real socket and shared memory."""

from __future__ import annotations

import gc
import os
import threading
import time
from itertools import pairwise
from typing import Any

import pytest

from vq import demo
from vq.errors import BackendError, UsageError

CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("size", "queue_size"), [(64, 256), (65, 256), (1518, 256), (9000, 64), (65535, 256), (64, 2), (64, 4096)]
)
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_every_packet_comes_back(size: int, queue_size: int, layout: str) -> None:
    result = demo.run_demo(size, 0.2, layout, queue_size=queue_size)
    assert (result.lost, result.duplicated, result.reordered, result.changed) == (0, 0, 0, 0)
    assert result.ok
    assert result.packets > 100
    assert result.bytes == result.packets * size
    assert 0.2 <= result.seconds < 30
    assert result.rate == pytest.approx(result.packets / result.seconds)
    assert (result.layout, result.size, result.queue_size) == (layout, size, queue_size)


def test_progress_is_told() -> None:
    reports: list[demo.DemoResult] = []
    threads: set[int] = set()

    def note(report: demo.DemoResult) -> None:
        reports.append(report)
        threads.add(threading.get_ident())

    result = demo.run_demo(64, 0.5, on_progress=note, interval=0.1)
    assert len(reports) >= 3
    assert threads == {threading.get_ident()}
    counts = [report.packets for report in reports] + [result.packets]
    assert counts == sorted(counts)
    assert result.packets > 0
    # A busy machine may take both threads away for a whole interval: then no packet came, and the rate must say so.
    grown = [after > before for before, after in pairwise([0, *counts[:-1]])]
    assert any(grown)
    assert [report.rate > 0 for report in reports] == grown
    assert all(report.ok for report in reports)


def test_nothing_is_left_behind() -> None:
    demo.run_demo(64, 0.05)
    gc.collect()
    descriptors, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    affinity = os.sched_getaffinity(0)
    for _ in range(3):
        demo.run_demo(64, 0.05)
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads
    assert os.sched_getaffinity(0) == affinity


@pytest.mark.skipif(CPUS < 2, reason="needs two processors")
def test_processors_can_be_chosen() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    assert demo.run_demo(64, 0.1, cpus=(second, first)).cpus == (second, first)
    assert demo.run_demo(64, 0.1).cpus == (first, second)


def test_one_processor_is_enough() -> None:
    """Busy threads would take turns of a scheduler's slice each: both ends sleep instead."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        result = demo.run_demo(64, 0.3)
    finally:
        os.sched_setaffinity(0, before)
    assert result.ok
    assert result.cpus == ()


class Meddler:
    """Changes bytes of guest memory while the demo runs, as a faulty engine would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory: Any = None
        make = demo.GuestMemory

        def remember(*arguments: Any) -> Any:
            self.memory = make(*arguments)
            return self.memory

        monkeypatch.setattr(demo, "GuestMemory", remember)


def test_changed_packets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits flipped in the buffers under way: the demo says so, and is not ok."""
    meddler = Meddler(monkeypatch)

    def flip(report: demo.DemoResult) -> None:
        guest_addr, size, *_ = meddler.memory.regions[0]
        memory = meddler.memory.view(guest_addr, size)
        end = time.monotonic() + 0.1
        # The buffers of the transmitq come after the rings; payloads of 1514 bytes fill most of them.
        while time.monotonic() < end:
            for place in range(size // 4, size // 4 + 64 * 1500, 1500):
                memory[place] ^= 0x10

    for _ in range(20):  # on a loaded machine no packet may be under way while bits flip
        result = demo.run_demo(1514, 0.5, on_progress=flip, interval=0.1)
        if result.changed:
            break
    assert result.changed > 0
    assert not result.ok
    assert result.packets > 0


def test_a_broken_ring_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    queues: list[Any] = []
    make = demo.DriverQueue

    def remember(*arguments: Any, **options: Any) -> Any:
        queues.append(make(*arguments, **options))
        return queues[-1]

    monkeypatch.setattr(demo, "DriverQueue", remember)

    def attack(report: demo.DemoResult) -> None:
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            queues[0].used["id"][:] = 60000

    with pytest.raises(BackendError, match="60000 is outside the ring of 256"):
        demo.run_demo(64, 2, on_progress=attack, interval=0.05)


def test_an_interrupt_ends_it() -> None:
    def interrupt(report: demo.DemoResult) -> None:
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(64, 600, on_progress=interrupt, interval=0.05)
    assert time.monotonic() - begin < 60
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vq-")]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 63}, "64 to 65535"),
        ({"size": 65536}, "64 to 65535"),
        ({"duration": 0}, "duration"),
        ({"duration": float("inf")}, "duration"),
        ({"duration": float("nan")}, "duration"),
        ({"layout": "round"}, "layout 'round'"),
        ({"queue_size": 100}, "power of two"),
        ({"queue_size": 65536}, "power of two"),
        ({"queue_size": 2, "size": 60000}, "cannot hold"),
        ({"cpus": (0,)}, "two different"),
        ({"cpus": (0, 0)}, "two different"),
        ({"cpus": (0, 9999)}, "9999"),
        ({"interval": 0}, "interval"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        demo.run_demo(**options)
