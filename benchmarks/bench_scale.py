"""What many ports cost those that have traffic: rate, time to plan, memory.

    make bench                                       runs all, keeps the result under .benchmarks/

The rate of ACTIVE guests among MANY listening ports is measured in turns with that of the same guests alone, so that
whatever else the machine does meets both; `extra_info` has the median of the ratios. The engine and our driver have a
core each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import vq
from vq import virtio as v
from vq.frontend import Frontend, RingSetup
from vq.payload import Region
from vq.pump import Pump
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.traffic import Exchange, traffic_memory_bytes

ACTIVE = 8
MANY = 512
ENTRIES = 256
ROUNDS = 15
PACKETS = 2_000_000
CPUS = tuple(sorted(os.sched_getaffinity(0))[:2])
FEATURES = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_F_EVENT_IDX)
PROTOCOL_FEATURES = v.mask(v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK)

two_cores = pytest.mark.skipif(len(CPUS) < 2, reason="engine and driver need a core each")


class Bed:
    """A pump of `count` vhost ports whose control loop is turned by hand; nobody is connected yet.

    Parameters
    ----------
    shape
        "echo": each port for itself. "switch": one switch of all.
    count
        Ports.
    """

    def __init__(self, stack: ExitStack, shape: str, count: int) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vq-bench-")))
        self.shape = shape
        self.paths = [str(folder / f"{number}.sock") for number in range(count)]
        ports = [f"vhost:{path}" for path in self.paths]
        groups = [[port] for port in ports] if shape == "echo" else ports
        self.pump = stack.enter_context(Pump(groups, cpus=CPUS[1:] or None))
        self._stack = stack

    def connect(self, number: int, bytes_each: int) -> tuple[DriverQueue, DriverQueue]:
        """Start a guest at a port; its transmitq and receiveq."""
        with self.served():
            frontend = self._stack.enter_context(Frontend.connect(self.paths[number], timeout=20))
            features = frontend.negotiate(FEATURES, PROTOCOL_FEATURES)
            frontend.set_features(features)
            memory = self._stack.enter_context(GuestMemory(bytes_each))
            table = memory.regions
            frontend.set_mem_table([Region(*row[:4]) for row in table], [row[4] for row in table])
            receiveq, transmitq = (DriverQueue(memory, ENTRIES, features=features) for _ in range(2))
            for index, queue in enumerate((receiveq, transmitq)):
                self._stack.callback(queue.close)
                frontend.start_ring(RingSetup(index, ENTRIES, *queue.addresses, 0, queue.kick_fd, queue.call_fd))
        return transmitq, receiveq

    @contextmanager
    def served(self) -> Iterator[None]:
        """Have the control loop run meanwhile."""
        ended = threading.Event()

        def loop() -> None:
            while not ended.is_set():
                self.pump.dispatch(0.001)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def traffic(self, size: int) -> Exchange:
        """Traffic of ACTIVE guests: each with itself (echo), or round in a ring (switch)."""
        room = 2 * traffic_memory_bytes(ENTRIES, size)
        # Spread over all ports, as guests of a large host are.
        guests = [self.connect(number * len(self.paths) // ACTIVE, room) for number in range(ACTIVE)]
        step = 0 if self.shape == "echo" else 1
        streams = [(guests[n][0], guests[(n + step) % ACTIVE][1]) for n in range(ACTIVE)]
        if step:
            self._introduce(guests)
        return Exchange(streams, size, cpu=CPUS[0])

    def _introduce(self, guests: list[tuple[DriverQueue, DriverQueue]]) -> None:
        """Tell the switch who is where: the address of stream n belongs to guest n + 1."""
        for number in range(ACTIVE):
            transmitq = guests[(number + 1) % ACTIVE][0]
            address = bytes([2, 0x76, 0x71, 0, number, 2])
            transmitq.add([bytes(12) + bytes.fromhex("0180c2000000") + address + b"\x88\xb5" + bytes(50)])
            transmitq.kick()
            end = time.monotonic() + 10
            while not transmitq.poll():
                assert time.monotonic() < end, "the switch does not take a packet"


def run(traffic: Exchange) -> float:
    """Seconds for PACKETS more packets."""
    before: float = traffic.seconds
    traffic.run(packets=traffic.counters["sent"] + PACKETS)
    return float(traffic.seconds) - before


@two_cores
@pytest.mark.parametrize("shape", ["echo", "switch"])
@pytest.mark.parametrize("size", [64, 1518])
def test_rate(benchmark: Any, shape: str, size: int) -> None:
    """ACTIVE of MANY ports, in turns with ACTIVE of ACTIVE."""
    with ExitStack() as stack:
        few, many = (Bed(stack, shape, count).traffic(size) for count in (ACTIVE, MANY))
        alone: list[float] = []
        benchmark.pedantic(run, args=(many,), setup=lambda: alone.append(run(few)), rounds=ROUNDS, warmup_rounds=0)
        for traffic in (few, many):
            assert not any(traffic.counters[fault] for fault in ("lost", "duplicated", "reordered", "changed"))
    among = benchmark.stats.stats.data
    benchmark.extra_info.update(
        mpps=round(PACKETS / statistics.median(among) / 1e6, 3),
        mpps_alone=round(PACKETS / statistics.median(alone) / 1e6, 3),
        ratio=round(statistics.median(one / other for one, other in zip(alone, among, strict=True)), 4),
        size=size,
        vq=vq.__version__,
    )


@pytest.mark.parametrize("shape", ["echo", "switch"])
def test_plan(benchmark: Any, shape: str) -> None:
    """The flows made anew: nothing has changed; MANY ports, of which ACTIVE have guests."""
    with ExitStack() as stack:
        bed = Bed(stack, shape, MANY)
        for number in range(ACTIVE):
            bed.connect(number, 1 << 20)

        benchmark(bed.pump.replan)


@pytest.mark.parametrize("shape", ["echo", "switch"])
def test_plan_with_one_more(benchmark: Any, shape: str) -> None:
    """A port becomes a source (it announces its guest) among MANY - 1 with guests; its worker has obeyed."""
    with ExitStack() as stack:
        bed = Bed(stack, shape, MANY)
        for number in range(1, MANY):
            bed.connect(number, 1 << 20)
        port = bed.pump.ports[0].port

        def settle() -> None:
            while port.sources:
                time.sleep(0.001)
            bed.pump.replan()
            port.announce(bytes.fromhex("525400123456"))

        benchmark.pedantic(bed.pump.replan, setup=settle, rounds=200, warmup_rounds=5)


MEMORY_OF_PORTS = """
import gc, json, sys
from pathlib import Path
from vq.pump import Pump

def private_kib():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

first, groups = json.load(sys.stdin)
with Pump(first):
    gc.collect()
    before = private_kib()
    with Pump(groups):
        gc.collect()
        print(private_kib() - before)
"""


@pytest.mark.parametrize("shape", ["echo", "switch"])
def test_memory(benchmark: Any, shape: str, tmp_path: Path) -> None:
    """A process that opens MANY ports: its time, and what one port more takes, in a process that has done it before."""
    ports = [f"vhost:{tmp_path}/{number}.sock" for number in range(MANY)]
    groups = [[port] for port in ports] if shape == "echo" else ports
    request = json.dumps([[f"vhost:{tmp_path}/first.sock"], groups])

    def run_it() -> None:
        child = subprocess.run(
            [sys.executable, "-c", MEMORY_OF_PORTS], input=request, capture_output=True, text=True, check=True
        )
        found.append(int(child.stdout))

    found: list[int] = []
    benchmark.pedantic(run_it, rounds=3)
    benchmark.extra_info["kib_per_port"] = round(statistics.median(found) / MANY, 1)
