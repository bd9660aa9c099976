"""``vq demo`` as a process, and what it makes of a bad result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import vq
from vq.cli import main
from vq.demo import DemoResult

COMMAND = [sys.executable, "-m", "vq", "demo"]


def test_a_summary_and_code_0() -> None:
    done = subprocess.run([*COMMAND, "--duration", "0.5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("packets verified", "Mpps", "Gbit/s", "lost", "duplicated", "changed", "split ring, 64 bytes"):
        assert part in done.stdout
    assert "every packet came back once, in order and unchanged" in done.stdout


@pytest.mark.parametrize("size", [64, 1518, 9000])
def test_json(size: int) -> None:
    command = [*COMMAND, "--duration", "1.5", "--size", str(size), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    *reports, final = [json.loads(line) for line in done.stdout.splitlines()]
    assert reports
    assert (final["final"], final["ok"], final["size"]) == (True, True, size)
    assert final["packets"] > 10_000
    assert final["bytes"] == final["packets"] * size
    assert [final[cause] for cause in ("lost", "duplicated", "reordered", "changed")] == [0, 0, 0, 0]
    assert "final" not in reports[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_soon(number: signal.Signals) -> None:
    child = subprocess.Popen([*COMMAND, "--duration", "600", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    begin = time.monotonic()
    child.send_signal(number)
    out, errors = child.communicate(timeout=120)
    assert time.monotonic() - begin < 100
    assert child.returncode == 128 + number
    assert b"Traceback" not in errors
    final = json.loads(out.splitlines()[-1])
    assert final["final"] is True
    assert final["packets"] > 10_000
    assert final["rate"] == pytest.approx(final["packets"] / final["seconds"])


def test_an_interrupt_leaves_the_summary_of_what_was_verified() -> None:
    child = subprocess.Popen([*COMMAND, "--duration", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(2)
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (130, "")
    assert "packets verified" in out
    assert "ended early; every packet so far came back once" in out


def test_an_interrupt_does_not_hide_a_bad_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    # No real run loses a packet on demand: the result is made, and the signal comes while it is made.
    result = DemoResult(
        layout="split", size=64, queue_size=256, cpus=(), packets=9, bytes=576, seconds=1.0, rate=9.0,
        lost=1, duplicated=0, reordered=0, changed=0, ok=False,
    )  # fmt: skip

    def interrupted(on_progress: Callable[[DemoResult], None], **arguments: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        on_progress(result)

    monkeypatch.setattr("vq.demo.run_demo", interrupted)
    assert main(["demo"]) == 1


def test_the_rate_of_a_report_is_that_of_its_second() -> None:
    command = [*COMMAND, "--duration", "2.5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    first, second, _ = [json.loads(line) for line in done.stdout.splitlines()]
    seconds = second["seconds"] - first["seconds"]
    assert 0.9 < seconds < 1.3
    assert second["rate"] == pytest.approx((second["packets"] - first["packets"]) / seconds)


@pytest.mark.parametrize("json_form", [True, False])
def test_one_bad_packet_is_code_1(
    json_form: bool, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    # No real run loses a packet on demand: only the result is made here, everything after it is real.
    result = DemoResult(
        layout="split", size=64, queue_size=256, cpus=(), packets=9, bytes=576, seconds=1.0, rate=9.0,
        lost=1, duplicated=0, reordered=0, changed=0, ok=False,
    )  # fmt: skip
    monkeypatch.setattr("vq.demo.run_demo", lambda **arguments: result)
    assert main(["demo", *(["--json"] if json_form else [])]) == 1
    out = capfdbinary.readouterr().out
    assert (b'"lost":1' if json_form else b"not every packet came back") in out
    assert vq.DemoResult is DemoResult
