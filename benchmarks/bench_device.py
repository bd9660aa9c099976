"""A device in Python: how many chains a second it answers on one core, driven by our own driver on the other.

    make bench TESTS="-k device"

The device is a process of its own. Each round sends chains as fast as they come back, 32 at a time, or 256. Where the
driver, which is Python as well, is the slower side, the rate is the driver's: `extra_info` has the rate end to end, and
that of the device by the processor time that it took.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vq.testing import Guest

BATCH = 32
CHAINS = 200_000
ROUNDS = 5
CPUS = tuple(sorted(os.sched_getaffinity(0))[:2])
ANSWER = """
        for chain in queue:
            chain.write(chain.read())
            chain.complete()
"""
COUNT = ANSWER.replace("chain.read()", "b'0123456789abcdef'")
BURST = """
        while burst := queue.pull():
            burst.scatter(burst.heads(16))
            burst.complete()
"""
DEVICE = """
import os, sys, vq

class Answer(vq.Device):
    def handle(self, queue):
{work}

os.sched_setaffinity(0, {{{cpu}}})
vq.serve(Answer(), socket_path=sys.argv[1])
"""

two_cores = pytest.mark.skipif(len(CPUS) < 2, reason="device and driver need a core each")


@pytest.fixture
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Run a device that does some work on each chain; its process and its socket."""
    folder = tempfile.TemporaryDirectory(prefix="vq-bench-")
    path = Path(folder.name, "s")
    code = DEVICE.format(work=request.param, cpu=CPUS[0])
    with folder, subprocess.Popen([sys.executable, "-c", code, str(path)]) as child:
        try:
            while not path.exists():
                assert child.poll() is None
                time.sleep(0.01)
            yield child.pid, path
        finally:
            child.terminate()


def processor_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@two_cores
@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize(
    ("device", "batch"),
    [(ANSWER, BATCH), (COUNT, BATCH), (BURST, BATCH), (BURST, 256)],
    indirect=["device"],
    ids=["echo", "write", "burst", "burst256"],
)
def test_device(benchmark: Any, device: tuple[int, Path], batch: int, layout: str) -> None:
    """Requests of 16 bytes with room for 16."""
    pid, path = device
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CPUS[1]})
    try:
        with Guest(path, size=8 * batch, layout=layout) as guest:
            driver = guest.drivers[0]

            def run() -> None:
                sent = done = 0
                while done < CHAINS:
                    while sent < CHAINS and sent - done <= 2 * batch:
                        for _ in range(batch):
                            driver.add([b"0123456789abcdef"], [16])
                        driver.publish()
                        driver.kick()
                        sent += batch
                    done += len(driver.poll())

            run()
            before = processor_seconds(pid)
            benchmark.pedantic(run, rounds=ROUNDS)
            busy = processor_seconds(pid) - before
    finally:
        os.sched_setaffinity(0, mask)
    benchmark.extra_info["chains_s"] = round(CHAINS / benchmark.stats.stats.median)
    benchmark.extra_info["chains_per_busy_s"] = round(ROUNDS * CHAINS / busy)
