"""The program as users call it: exit codes, one line for each error, help, completion."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vq
from vq.cli import exit_code
from vq.errors import BackendError, ConnectionClosed, FrontendError, GuestError, ResourceError, UsageError
from vq.port_kinds import KINDS


def call(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vq", *arguments]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def test_version() -> None:
    done = call("--version")
    assert (done.returncode, done.stdout.strip()) == (0, vq.__version__)


def test_help_names_the_commands_and_the_exit_codes() -> None:
    done = call("--help")
    assert done.returncode == 0
    for part in ("pump", "demo", "--install-completion", "Exit codes: 0 done", "4 the machine refused"):
        assert part in done.stdout


def test_help_of_pump_names_every_kind_and_option() -> None:
    done = call("pump", "--help")
    assert done.returncode == 0
    for kind in KINDS.values():
        assert kind.usage in done.stdout
        for option in kind.options:
            assert option.usage in done.stdout
    for option in ("--duration", "--interval", "--json", "--cpu", "--poll", "--verbose"):
        assert option in done.stdout


@pytest.mark.parametrize("columns", [60, 90])
def test_help_of_pump_hangs_its_wrapped_lines(columns: int) -> None:
    environment = os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "vq", "pump", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment).stdout
    lines = text[text.index("PORT is KIND") :].splitlines()[2:]
    starts = tuple(kind.usage for kind in KINDS.values())
    assert all(line.startswith((*starts, "    ")) for line in lines if line.strip()), text
    assert max(map(len, lines)) <= columns
    for part in ("count=N", "speed=0..1000000:", "an existing FILE is", "is the same as vq pump X"):
        assert part in " ".join(text.split())


def test_help_of_demo_says_what_it_does() -> None:
    text = " ".join(call("demo", "--help").stdout.split())
    assert "Send numbered packets through a vhost-user socket and shared memory, and check every one." in text
    assert "exit codes 130, 143 and 129" in text
    assert "Processors of the driver and of the engine" in text  # in the order that run_demo takes


def test_help_names_the_exit_code_of_each_signal() -> None:
    text = " ".join(call("--help").stdout.split())
    assert "129, 130 and 143 SIGHUP, SIGINT and SIGTERM ended" in text


WORDS = [["qemu"], ["libvirt"], ["bench"], ["bench", "tune"], ["bench", "peers"], ["bench", "latency"], ["demo"]]


@pytest.mark.parametrize("words", WORDS)
def test_help_fills_the_lines_of_a_narrow_terminal(words: list[str]) -> None:
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "vq", *words, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment).stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for line, following in itertools.pairwise(lines):
        # Inside a paragraph a line ends only where the next word has no room.
        if line[:1].isalpha() and following[:1].isalpha() and not line.startswith("Usage"):
            assert len(line.rstrip()) + 1 + len(following.split()[0]) >= 80, text


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    command = f"exec {sys.executable} -m vq pump gen:count=10 null: {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_that_nobody_reads_is_no_error() -> None:
    command = f"{sys.executable} -m vq --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) in ((141, ""), (0, ""))  # 0: written before `true` was gone


@pytest.mark.parametrize("words", [["pump", "gen:", "--sub-burst", "8.5"], ["demo", "--size", "64.5"]])
def test_a_fraction_is_not_rounded(words: list[str]) -> None:
    done = call(*words)
    assert done.returncode == 2
    assert "is no whole number" in done.stderr


@pytest.mark.parametrize("form", ["--json", "--interval=1"])
def test_a_full_disk_is_named(form: str) -> None:
    command = [sys.executable, "-m", "vq", "pump", "gen:count=10", "null:", form]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 4
    assert done.stderr == "vq: error: standard output: No space left on device\n"


@pytest.mark.parametrize("example", ["ask.py", "echo.py"])
def test_an_example_without_its_socket_ends_with_one_line(example: str, tmp_path: Path) -> None:
    path = str(tmp_path / "no" / "a.sock")
    words = [path] if example == "ask.py" else ["1", path]
    script = Path(__file__).parents[2] / "examples" / example
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert path in done.stderr


@pytest.mark.parametrize(("example", "words"), [("ask.py", []), ("echo.py", ["soon"]), ("generate.py", ["soon"])])
def test_an_example_called_wrongly_tells_its_usage(example: str, words: list[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / example
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"usage: python examples/{example}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    done = call("--install-completion", "--shell", shell, "--output", str(script))
    assert done.returncode == 0, done.stderr
    assert "pump" in script.read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["pumpe"], "pumpe"),
        (["pump"], "at least one PORT"),
        (["pump", "null:", "--wrong"], "--wrong"),
        (["pump", "null:", "--duration", "soon"], "--duration"),
        (["pump", "null:", "--duration", "0"], "--duration is 0"),
        (["pump", "null:", "--interval", "-1"], "--interval is -1"),
        (["pump", "null:", "--poll", "never"], "adaptive"),
        (["pump", "null:", "--cpu", "4-1"], "runs backwards"),
        (["pump", "vhots:/a"], "did you mean vhost?"),
        (["pump", "echo:"], "echo:"),
        (["demo", "--layout", "round"], "split"),
        (["demo", "--size", "1"], "size"),
        (["demo", "foo"], "vq demo takes no argument: foo. See vq demo --help."),
        (["pump", "null:", "--wrong"], "See vq pump --help."),
        (["pump", "vhots:/a"], "See vq pump --help."),
        (["pumpe"], "See vq --help."),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments: list[str], part: str) -> None:
    done = call(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("vq: error: ")
    assert done.stderr.count("\n") == 1
    assert part in done.stderr
    assert done.stdout == ""


def test_a_refusal_of_the_machine_is_one_line_and_code_4(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "a.sock"
    done = call("pump", f"vhost:{missing}")
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert str(missing) in done.stderr
    assert "No such file or directory" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (FrontendError("GET_FEATURES", "size", 3, "0"), 3),
        (BackendError("GET_FEATURES", "size", 3, "8"), 3),
        (GuestError(0, 1, "loop"), 3),
        (ConnectionClosed(), 3),
        (ResourceError("no"), 4),
        (PermissionError(13, "no"), 4),
    ],
)
def test_whose_fault_decides_the_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code
