"""What a program between two ports costs: one worker, 64 bytes, from a generator to nowhere.

make bench TESTS="-k program"
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vq
import vq_core
from vq_core.program import DROP

CPUS = sorted(os.sched_getaffinity(0))[:1]
ROUNDS = 5
SECONDS = 0.5
INCLUDE = Path(vq_core.__file__).parent / "include"
SOURCE = """
#include "vq_program.h"
uint32_t no_ipv6(void *state, const vq_packet_t *packets, uint16_t *verdicts, uint32_t count) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < count; i++)
        if (packets[i].data[12] == 0x86 && packets[i].data[13] == 0xdd) {
            verdicts[i] = VQ_VERDICT_DROP;
            found++;
        }
    return found;
}
"""


def compiled(folder: Path) -> vq.Program:
    """A program of C."""
    source, library = folder / "program.c", folder / "program.so"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-O3", "-shared", "-fPIC", f"-I{INCLUDE}", "-o", library, source], check=True)
    return vq.NativeProgram(ctypes.CDLL(str(library)).no_ipv6, abi=1)


def passes(burst: vq.Burst) -> None:
    """Look at nothing."""


def by_length(burst: vq.Burst) -> Any:
    """Look at all lengths."""
    verdicts = burst.verdicts
    verdicts[burst.lengths < 60] = DROP
    return verdicts


def by_head(burst: vq.Burst) -> Any:
    """Look at all ethertypes."""
    found = burst.heads(14)[:, 12:].view(">u2")[:, 0] == 0x86DD
    return np.where(found, DROP, 0) if found.any() else None


def by_field(burst: vq.Burst) -> Any:
    """The same, one field of each."""
    found = burst.field(12, ">u2") == 0x86DD
    return np.where(found, DROP, 0) if found.any() else None


KINDS: dict[str, Callable[[Path], Any]] = {
    "none": lambda folder: None,
    "C": compiled,
    "passes": lambda folder: passes,
    "by length": lambda folder: by_length,
    "by head": lambda folder: by_head,
    "by field": lambda folder: by_field,
}


@pytest.mark.parametrize("kind", KINDS)
def test_program(benchmark: Any, kind: str, tmp_path: Path) -> None:
    """Packets a second and cycles a packet."""
    program = KINDS[kind](tmp_path)
    found: list[tuple[float, float]] = []

    def run() -> None:
        with vq.Pump(["gen:size=64", "null:"], program=program, cpus=CPUS, poll="busy") as pump:
            pump.run(duration=SECONDS)
            now = pump.snapshot()
        packets = now["ports"]["null"]["to_null"]["packets"]
        found.append((packets / now["uptime"] / 1e6, now["workers"][0]["busy_cycles"] / packets))

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    found.sort()
    benchmark.extra_info["mpps"], benchmark.extra_info["cycles"] = found[len(found) // 2]
