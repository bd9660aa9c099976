"""``vq pump`` as a process: reports, signals, sockets; with ports that need neither root nor a guest."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "vq", "pump"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []
    yield children
    for child in children:
        child.kill()
        child.communicate()


def start(children: list[subprocess.Popen[str]], *arguments: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children.append(child)
    return child


def wait_listening(path: Path, child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert child.poll() is None, child.communicate()
        with socket.socket(socket.AF_UNIX) as sock:
            if sock.connect_ex(str(path)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nobody listens on {path}")


def test_a_finite_source_ends_the_pump_with_every_packet_counted() -> None:
    done = run("gen:count=100000,size=100", "null:copy", "--json")
    assert done.returncode == 0, done.stderr
    final = records(done.stdout)[-1]
    assert final["final"] is True
    assert final["ports"]["gen"]["from_gen"] == {"packets": 100000, "bytes": 10000000, "dropped": {}}
    assert final["ports"]["null"]["to_null"] == {"packets": 100000, "bytes": 10000000, "dropped": {}}
    assert [
        set(worker) >= {"cpu", "busy_cycles", "idle_cycles", "rounds", "sleeps"} for worker in final["workers"]
    ] == [True]


def test_intervals_are_one_json_object_a_line_and_grow() -> None:
    done = run("gen:", "null:", "--json", "--duration", "1", "--interval", "0.2")
    assert done.returncode == 0, done.stderr
    *intervals, final = records(done.stdout)
    assert 3 <= len(intervals) <= 5
    assert all("final" not in record for record in intervals)
    counts = [record["ports"]["null"]["to_null"]["packets"] for record in [*intervals, final]]
    assert counts[0] > 0
    assert counts == sorted(set(counts))
    assert final["uptime"] == pytest.approx(1.0, abs=0.3)
    assert abs(final["time"] - time.time()) < 60


def test_plain_reports_where_there_is_no_terminal() -> None:
    done = run("gen:", "null:", "--duration", "0.5", "--interval", "0.2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["gen: open", "null: open"]
    assert sum(" null open to_null " in line and "pps " in line for line in lines) >= 2
    assert "\x1b" not in done.stdout
    end = lines.index("in all:")
    assert not any(" from_null " in line for line in lines[:end])
    assert not any(" to_gen " in line for line in lines[:end])
    assert any(" to_gen 0 pps 0 bit/s 0 packets" in line for line in lines[end:])


@pytest.mark.parametrize("columns", [140, 60])
def test_a_terminal_gets_a_table_if_it_is_wide_enough(columns: int) -> None:
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    command = [*COMMAND, "gen:", "null:", "--duration", "0.8", "--interval", "0.2"]
    child = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env=environment)
    os.close(follower)
    shown = b""
    while child.poll() is None or select.select([leader], [], [], 0)[0]:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
    os.close(leader)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    text = shown.decode()
    for part in ("vq pump, 1 s in all", "pps", "bit/s", "to_null", "worker 0", "\x1b["):
        assert part in text
    assert ("direction" in text) == (columns == 140)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_promptly_and_leave_no_socket(
    number: signal.Signals, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    path = tmp_path / "a.sock"
    child = start(started, f"vhost:{path}", "null:", "--json")
    wait_listening(path, child)
    begin = time.monotonic()
    child.send_signal(number)
    out, errors = child.communicate(timeout=120)
    assert time.monotonic() - begin < 10
    assert child.returncode == 0, errors
    assert "Traceback" not in errors
    assert records(out)[-1]["final"] is True
    assert not path.exists()


def test_nohup_keeps_it_alive(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    path = tmp_path / "a.sock"
    child = subprocess.Popen(
        ["nohup", *COMMAND, f"vhost:{path}", "null:", "--json"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started.append(child)
    wait_listening(path, child)
    child.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=120)
    assert child.returncode == 0


def test_the_first_lines_say_where_it_listens_and_how_qemu_gets_there(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    path = tmp_path / "a.sock"
    child = start(started, f"vhost:{path}", "null:")
    assert child.stdout is not None
    assert child.stdout.readline() == f"vhost:{path}: listens on {path}, up to 8 queue pairs\n"
    assert f"-chardev socket,id=vq0,path={path},reconnect-ms=1000 " in child.stdout.readline()


def test_the_socket_gets_its_mode(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    path = tmp_path / "a.sock"
    child = start(started, f"vhost:{path},mode=0600", "null:")
    wait_listening(path, child)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_socket_of_a_living_pump_is_refused_and_left_alone(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    path = tmp_path / "a.sock"
    child = start(started, f"vhost:{path}", "null:")
    wait_listening(path, child)
    second = run(f"vhost:{path}", "null:")
    assert second.returncode == 4
    assert second.stderr.count("\n") == 1
    assert str(path) in second.stderr
    wait_listening(path, child)


def test_a_stale_socket_is_replaced(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    path = tmp_path / "a.sock"
    child = start(started, f"vhost:{path}", "null:")
    wait_listening(path, child)
    child.kill()
    child.wait()
    assert path.exists()
    wait_listening(path, start(started, f"vhost:{path}", "null:"))


def test_a_reader_that_goes_away_ends_it_without_a_word(started: list[subprocess.Popen[str]]) -> None:
    child = start(started, "gen:", "null:", "--json", "--interval", "0.1")
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(timeout=120) == 141
    assert child.stderr is not None
    assert child.stderr.read() == ""


def test_connections_are_logged_as_key_value(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    path = tmp_path / "a.sock"
    child = start(started, f"vhost:{path}", "null:", "--json", "-v")
    wait_listening(path, child)
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if f"connected={path}" in line]
    assert lines
    assert all(line.startswith("time=") and " level=info logger=vq." in line for line in lines)


@pytest.mark.parametrize("sub_burst", ["0", "33"])
def test_a_sub_burst_outside_of_a_burst_is_refused(sub_burst: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vq", "pump", "gen:count=1", "null:", "--sub-burst", sub_burst],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"--sub-burst is {sub_burst}; write 1 to 32 packets" in done.stderr
