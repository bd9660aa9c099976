"""The documents: commands and files that they name exist, options are all there, links lead somewhere, examples run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quality.tree import ROOT, files, name
from vq.port_kinds import KINDS, markdown
from vq.ports import parse_ports
from vq.testing import Guest
from waiting import wait_for

DOCUMENTS = [path for path in files() if path.suffix == ".md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def command_lines(path: Path) -> list[str]:
    """Each command of the shell blocks of a document, continued lines joined, comments cut off."""
    blocks = [match[2] for match in FENCE.finditer(path.read_text()) if match[1] == "sh"]
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in (raw.partition("#")[0].strip() for raw in text.splitlines()) if line]


COMMANDS = [pytest.param(line, id=f"{path.stem}: {line[:60]}") for path in DOCUMENTS for line in command_lines(path)]


def options_of(command: str) -> str:
    return subprocess.run([sys.executable, "-m", "vq", command, "--help"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_exists(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[0] in targets
    elif program == "vq":
        known = options_of(words[0])
        assert f"Usage: vq {words[0]}" in known
        for option in (word for word in words if word.startswith("-")):
            assert re.search(rf"{option}\b", known), option
        if words[0] == "pump":
            assert parse_ports([word for word in words if re.match(r"[a-z]+:", word)])
    else:
        assert program in {"pip", "qemu-system-x86_64"}


def test_the_first_screen_has_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text().split("\n")[:20]
    assert [line.split("#")[0].strip() for line in first if line.startswith("make ")] == ["make demo", "make test"]


def test_pump_md_has_the_table_of_the_program() -> None:
    assert markdown() in (ROOT / "docs/pump.md").read_text(), "replace its part by: python -m vq.port_kinds"


def test_pump_md_has_every_drop_cause() -> None:
    from vq_core.counters import DROP_NAMES

    text = (ROOT / "docs/pump.md").read_text()
    assert [cause for cause in DROP_NAMES if f"`{cause}`" not in text] == []


def test_pump_md_has_every_field_of_the_report(tmp_path: Path) -> None:
    import vq
    from vq_core.queue import Queue

    with vq.Pump([f"vhost:{tmp_path / 'a.sock'}", "null:"]) as pump:
        report = pump.snapshot()
    (guest, null) = report["ports"].values()
    fields = {*report, *guest, *null, *report["workers"][0], *Queue(0, "receiveq0").snapshot()}
    text = (ROOT / "docs/pump.md").read_text()
    assert [field for field in fields if not field.startswith(("to_", "from_")) and f"`{field}`" not in text] == []


def test_results_md_has_every_field_of_a_result() -> None:
    from vq.bench.facts import Facts
    from vq.bench.measure import Run
    from vq.bench.peers import Pair, PeerRow
    from vq.bench.sleeping import LoadRatio, WakeUp
    from vq.bench.summary import Row
    from vq.bench.tune import Refused, Trial, Verdict

    kinds = (Facts, Run, Row, Pair, PeerRow, WakeUp, LoadRatio, Trial, Verdict, Refused)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    fields |= {"bits", "spread", "limited_by_driver", "ratio", "ok", "noise", "proposal", "wrong", "problems", "facts"}
    text = (ROOT / "docs/results.md").read_text()
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []


def test_the_readme_names_every_kind() -> None:
    text = (ROOT / "README.md").read_text()
    assert [kind.usage for kind in KINDS.values() if f"`{kind.usage}" not in text] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_named_files_and_links_exist(path: Path) -> None:
    text = path.read_text()
    named = re.findall(r"`((?:vq|vq_core|tests|scripts|docs|examples)/[\w./-]+|\.ci/run)`", text)
    missing = [item for item in named if not (ROOT / item).exists()]
    missing += [
        link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link and not (path.parent / link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["generate.py", "0.1"], "1518 bytes"),
        (["echo.py", "1.2"], "listening: 0 packets came"),
        (["device.py"], "remember the milk"),
    ],
)
def test_examples_run(words: list[str], part: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert part in done.stdout


@pytest.mark.parametrize("name", ["generate.py", "echo.py"])
@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_an_example_refuses_a_wrong_time(name: str, seconds: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / name), seconds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{name}: duration {float(seconds)}")


@pytest.mark.parametrize("words", [["generate.py", "30"], ["echo.py", "30"]])
def test_an_example_that_is_interrupted_ends_without_a_traceback(words: list[str]) -> None:
    command = [sys.executable, "-u", str(ROOT / "examples" / words[0]), *words[1:]]

    def hear() -> None:  # a shell has its jobs in the background ignore SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    time.sleep(1.5)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (130, "")


def test_the_example_that_asks_gets_an_answer(tmp_path: Path) -> None:
    import threading

    import vq

    path = str(tmp_path / "a.sock")
    with vq.Pump([f"vhost:{path}", "null:"]) as pump:
        serving = threading.Thread(target=pump.run)
        serving.start()
        try:
            command = [sys.executable, str(ROOT / "examples/ask.py"), path]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        finally:
            pump.request_stop()
            serving.join()
    assert done.returncode == 0, done.stderr
    assert "MRG_RXBUF" in done.stdout.split()


@contextmanager
def example(name: str, path: Path) -> Iterator[None]:
    """Run an example that serves a device; it ends by SIGTERM, and well."""
    with subprocess.Popen([sys.executable, str(ROOT / "examples" / name), str(path)]) as child:
        try:
            wait_for(lambda: path.exists() or child.poll() is not None)
            yield
        finally:
            child.send_signal(signal.SIGTERM)
    assert child.returncode == 0


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_the_first_device_fills_buffers(layout: str, tmp_path: Path) -> None:
    with example("first_device.py", tmp_path / "s"), Guest(tmp_path / "s", layout=layout) as guest:
        seen = {guest.ask(room=64) for _ in range(20)}
    assert len(seen) == 20
    assert {len(data) for data in seen} == {64}


def test_the_asyncio_device_answers_when_it_is_done(tmp_path: Path) -> None:
    with example("asyncio_device.py", tmp_path / "s"), Guest(tmp_path / "s") as guest:
        guest.send(b"x" * 300, 300)
        guest.send(b"first", 5)
        assert [answer for _, answer in guest.used(2)] == [b"FIRST", b"X" * 300]


def test_the_tutorial_has_the_first_device() -> None:
    """The text and the example are the same, and short."""
    program = (ROOT / "examples/first_device.py").read_text()
    assert f"```python\n{program}```" in (ROOT / "docs/devices.md").read_text()
    assert program.count("\n") <= 20


def test_the_text_about_cython_has_parts_of_the_example() -> None:
    folder = ROOT / "examples/cython_device"
    text = (ROOT / "docs/devices.md").read_text().partition("## In Cython")[2].partition("\n## ")[0]
    device, host = (match[2] for match in FENCE.finditer(text) if match[1] in ("cython", "python"))
    assert device in (folder / "fnv.pyx").read_text()
    assert host in (folder / "hashing.py").read_text()
