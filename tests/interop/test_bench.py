"""``vq bench`` against DPDK and QEMU's storage daemon: by our driver, and side by side with ours."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from interop.process import wait_until
from interop.requirements import need
from interop.rig import Rig

COMMAND = [sys.executable, "-m", "vq", "bench"]


def bench(*words: str) -> dict[str, object]:
    done = subprocess.run([*COMMAND, *words, "--json"], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["final"] is True
    return dict(record)


@pytest.mark.dpdk
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


@pytest.mark.dpdk
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


def test_storage_daemon_side_by_side() -> None:
    """Every request of both is done and verified, on either disk."""
    need("storage-daemon")
    words = ["--peer", "qemu-storage-daemon", "--repeat", "1", "--seconds", "0.2", "--peer-options", "aio=threads"]
    record = bench("blk", "verify=on", *words)
    assert record["problems"] == []
    runs = {(run["settings"]["disk"], run["backend"]): run for run in record["runs"]}
    assert len(runs) == 4
    assert all(run["ok"] and run["reads"] for run in runs.values()), runs
    written = bench("blk", "disk=tmpfs", "writes=30", "verify=on", *words)["runs"]
    assert all(run["ok"] and run["reads"] and run["writes"] for run in written), written
    for ratio in record["ratios"]:
        disk = ratio["settings"]["disk"]
        expected = runs[disk, "vq"]["rate"] / runs[disk, "qemu-storage-daemon"]["rate"]
        assert ratio["ratio"] == pytest.approx(expected)


def test_a_layout_that_the_peer_lacks_is_told() -> None:
    need("storage-daemon")
    words = ["--peer", "qemu-storage-daemon", "--repeat", "1", "--seconds", "0.1"]
    record = bench("blk", "disk=null", "layout=packed", *words)
    (problem,) = record["problems"]
    assert "qemu-storage-daemon" in problem and "RING_PACKED" in problem
    assert [run["backend"] for run in record["runs"]] == ["vq"]
