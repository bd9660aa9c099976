"""``vq bench`` against DPDK: its back-end by our driver, and both back-ends side by side."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from interop.process import wait_until
from interop.requirements import need
from interop.rig import Rig

pytestmark = pytest.mark.dpdk
COMMAND = [sys.executable, "-m", "vq", "bench"]


def bench(*words: str) -> dict[str, object]:
    done = subprocess.run([*COMMAND, *words, "--json"], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["final"] is True
    return dict(record)


def test_the_back_end_of_dpdk_by_its_socket(rig: Rig) -> None:
    sock = rig.sock()
    testpmd = rig.testpmd("back", f"net_vhost0,iface={sock}", core=0, options=["--forward-mode=io"])
    testpmd.command("start")
    wait_until("the socket", sock.exists, 10)
    short = ["--socket", str(sock), "--seconds", "0.1", "--repeat", "2"]
    record = bench("throughput", "size=64,1518", "window=32", *short)
    assert record["target"] == str(sock)
    rows = record["rows"]
    assert [row["settings"]["size"] for row in rows] == [64, 1518] or len({row["tag"] for row in rows}) > 1
    for row in rows:
        assert row["packets"] > 0 and row["wrong"] == 0
        assert row["busy"] is None  # not ours, so nothing is said about it
    for row in bench("latency", "pause=0", "driver=busy", *short)["rows"]:
        assert row["packets"] > 0 and row["wrong"] == 0
        assert 0 < row["latency"]["p50"] <= row["latency"]["p99"]


def test_one_pair_side_by_side() -> None:
    need("dpdk")
    words = ["--cells", "io-split-64", "--repeat", "1", "--seconds", "2", "--settle", "1", "--busy-cycles"]
    record = bench("peers", *words)
    (pair,) = record["pairs"]
    assert pair["cell"] == "io-split-64"
    assert pair["dpdk"] > 10_000 and pair["vq"] > 10_000
    assert pair["ratio"] == pytest.approx(pair["vq"] / pair["dpdk"])
    assert pair["dpdk_cycles"] > 1 and pair["vq_cycles"] > 1
    assert len(pair["distances"]) == 4  # before and after each half
    assert [row["cell"] for row in record["rows"]] == ([] if pair["tag"] == "mixed" else ["io-split-64"])
