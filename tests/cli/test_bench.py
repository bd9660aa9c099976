"""``vq bench`` as a process: tables, JSON, CSV, signals, exit codes, errors with their remedy."""

from __future__ import annotations

import csv
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vq.bench.cells import DIRECTIONS
from vq.bench.files import check_writable
from vq.bench.settings import AXES
from vq.cli.bench_options import Output
from vq.cli.bench_report import save_csv
from vq.cli.signals import AskedTwice, Ending

COMMAND = [sys.executable, "-m", "vq", "bench"]
SHORT = ["--seconds", "0.02", "--repeat", "2"]


def bench(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def final(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["final"] is True
    return dict(record)


def test_alone_it_measures_throughput_over_packet_sizes() -> None:
    out = bench(*SHORT).stdout
    for part in ("throughput of vq", "Mpps", "Gbit/s", "back-end busy", "cycles/packet", "every packet came back once"):
        assert part in out, part
    assert all(f" {size} " in out for size in (64, 1518, 9000))
    assert "Linux" in out and "gcc" in out and "vq bench --seconds 0.02" in out  # machine, build, command


def test_json_has_each_run_and_then_everything(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    done = bench("throughput", "size=64,128", "ring=128", *SHORT, "--json", "--csv", str(path))
    *lines, _ = [json.loads(line) for line in done.stdout.splitlines()]
    record = final(done)
    assert [line["run"]["settings"]["size"] for line in lines] == [64, 128, 64, 128]
    assert record["runs"] == [line["run"] for line in lines]
    assert record["ok"] is True and record["target"] == "vq"
    facts = record["facts"]
    assert facts["cpu_model"] and facts["kernel"] and facts["flags"] and facts["date"]
    assert facts["command"].startswith("vq bench throughput size=64,128 ring=128")
    for row in record["rows"]:
        assert row["settings"]["ring"] == 128
        assert row["low"] <= row["rate"] <= row["high"]
        assert row["packets"] > 0 and row["wrong"] == 0
        assert row["tag"] in ("near", "far", "mixed", "unknown")
    written = list(csv.DictReader(path.open()))
    assert len(written) == len(record["rows"])
    assert {row["command"] for row in written} == {facts["command"]}


def test_latency() -> None:
    done = bench("latency", "pause=0,300", "poll=adaptive", *SHORT, "--json")
    for row in final(done)["rows"]:
        latency = row["latency"]
        assert 0 < latency["p50"] <= latency["p99"] <= latency["p99_9"]
    # Percentiles need round trips: enough of them on a machine that others use as well.
    out = bench("latency", "--seconds", "0.3", "--repeat", "2").stdout
    for part in ("latency of vq", "p50 µs", "p99.9 µs", "adaptive", "sleep", "sleeps/s", "wake latency, pause=200"):
        assert part in out, part


def test_a_sweep_of_two_axes() -> None:
    record = final(bench("sweep", "window=1,32", "descriptors=1,2,indirect", *SHORT, "--json"))
    points = {(row["settings"]["window"], row["settings"]["descriptors"]) for row in record["rows"]}
    assert points == {(window, kind) for window in (1, 32) for kind in ("1", "2", "indirect")}
    record = final(bench("sweep", "size=64,512", "--measure", "latency", *SHORT, "--json"))
    assert {row["measure"] for row in record["rows"]} == {"latency"}


def test_block_devices(tmp_path: Path) -> None:
    plot = tmp_path / "a.svg"
    words = ["blk", "verify=on", *SHORT, "--csv", str(tmp_path / "a.csv")]
    record = final(bench(*words, "--json", "--plot", str(plot)))
    assert record["ok"] is True and record["problems"] == [] and record["ratios"] == []
    assert {run["settings"]["disk"] for run in record["runs"]} == {"null", "tmpfs"}
    assert len(record["runs"]) == 4
    for row in record["rows"]:
        assert row["requests"] > 0 and row["low"] <= row["rate"] <= row["high"] and row["backend"] == "vq"
    assert "thousand requests a second" in plot.read_text()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == len(record["rows"]) + 1
    out = bench("blk", "disk=null", *SHORT).stdout
    for part in ("requests of 4096 bytes", "k requests/s", "every request was done", "vq bench blk disk=null"):
        assert part in out, part


def test_wrong_usage_of_the_block_benchmark(tmp_path: Path) -> None:
    for words, code, text in (
        (["size=64"], 2, "AXIS is disk, block"),
        (["--peer-options", "aio=native"], 2, "--peer"),
        (["--socket", "a", "--peer", "qemu-storage-daemon"], 2, "--socket"),
        (["disk=null", "--socket", "a"], 2, "started here"),
        (["depth=64", "descriptors=3"], 2, "larger ring"),
        (["writes=1", "verify=on"], 2, "disk=tmpfs"),
        (["--socket", str(tmp_path / "none")], 4, "none"),
    ):
        assert text in bench("blk", *words, code=code).stderr


def test_polling_is_compared_in_pairs() -> None:
    record = final(bench("sweep", "poll=busy,adaptive", *SHORT, "--json"))
    for load in record["load_ratios"]:  # none if the cores' distance changed in every pair
        assert load["settings"]["poll"] == "adaptive" and load["pairs"] <= 2
        assert 0 < load["low"] <= load["ratio"] <= load["high"]
    assert record["wake_ups"] == []


def test_a_program_is_measured_beside_none(tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text("def seen(burst):\n    open(__file__ + '.seen', 'w').close()\n")
    program = f"{tmp_path}/seen.py:seen"
    record = final(bench("sweep", f"program=none,{program}", *SHORT, "--json"))
    assert [run["settings"]["program"] for run in record["runs"]] == ["none", program] * 2
    assert (tmp_path / "seen.py.seen").exists()
    assert "no file nowhere.py" in bench("sweep", "program=nowhere.py:f", *SHORT, code=2).stderr
    assert "on its own command line" in bench("sweep", f"program={program}", "--socket", "a.sock", code=2).stderr


def test_tune_compares_with_the_defaults() -> None:
    done = bench("tune", "ring=64", "poll=busy", *SHORT, "--json")
    record = final(done)
    assert {verdict["name"] for verdict in record["verdicts"]} >= {"ring=64", "poll=busy"}
    assert record["wrong"] == []
    assert record["noise"] >= 0 and record["facts"]["command"].startswith("vq bench tune")
    for verdict in record["verdicts"]:
        assert verdict["low"] <= verdict["ratio"] <= verdict["high"]
        assert verdict["verdict"] == "too few pairs"
    out = bench("tune", "ring=64", "--measure", "latency", *SHORT).stdout
    for part in ("noise: the defaults against themselves", "for a verdict: take --repeat 3 or more", "ring=64", "p99"):
        assert part in out, part
    assert "propose:" not in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_what_was_measured(number: signal.Signals, code: int) -> None:
    words = ["sweep", "size=64,128", "--seconds", "0.1", "--repeat", "500", "--json"]
    child = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first = json.loads(child.stdout.readline())
    begin = time.monotonic()
    child.send_signal(number)
    out, errors = child.communicate(timeout=120)
    assert time.monotonic() - begin < 60
    assert (child.returncode, errors) == (code, "")
    record = json.loads(out.splitlines()[-1])
    assert record["final"] is True
    assert record["runs"][0] == first["run"]
    assert record["rows"][0]["packets"] > 0


def test_the_same_signal_twice_in_a_row_is_one_request() -> None:
    """``timeout`` sends it to the process, and to the group of the process."""
    words = ["size=64,128", "--seconds", "0.1", "--repeat", "500", "--json"]
    child = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGTERM)
    out, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (143, "")
    assert json.loads(out.splitlines()[-1])["final"] is True


def test_asked_again_later_it_ends_at_once() -> None:
    ending = Ending()
    ending(signal.SIGTERM, None)
    ending(signal.SIGTERM, None)
    ending._since -= 1  # a second ago
    with pytest.raises(AskedTwice) as caught:
        ending(signal.SIGHUP, None)
    assert (ending.signal, caught.value.number) == (signal.SIGTERM, signal.SIGHUP)
    assert isinstance(caught.value, KeyboardInterrupt)


def test_an_interrupt_leaves_the_table() -> None:
    words = ["--seconds", "0.05", "--repeat", "1000"]
    child = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(3)
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (130, "")
    assert "ended early" in out and "Mpps" in out


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["speed"], 2, "write AXIS=VALUES"),
        (["sweep"], 2, "nothing to vary"),
        (["size=63"], 2, "from 64 to 65535"),
        (["sweep", "size=64", "size=65"], 2, "was given already"),
        (["latency", "queues=2"], 2, "latency is that of one packet"),
        (["--repeat", "0"], 2, "--repeat 0"),
        (["--seconds", "0"], 2, "write seconds"),
        (["--plot", "x.txt"], 2, ".png, .svg, .pdf, or terminal"),
        (["--csv", "no/such/folder/a.csv"], 4, "make it first"),
        (["--socket", "no/such/socket", "size=64"], 4, "no/such/socket"),
        (["poll=adaptive", "--socket", "a.sock"], 2, "on its own command line"),
        (["tunee"], 2, "did you mean vq bench tune?"),
        (["sizes=64"], 2, "did you mean size?"),
        (["size=64.."], 2, "size=64..: a range is of numbers"),
        (["sweep", "poll=1"], 2, "'1' is not known; use busy, adaptive. See vq bench sweep --help."),
        (["sweep", "pause=5"], 2, "use vq bench latency"),
        (["--repeat", "1.5"], 2, "'1.5' is no whole number"),
        (["tune", "ring=64", "ring=128"], 2, "ring was given already"),
        (["tune", "size=64"], 2, "no setting to tune"),
        (["tune", "ring=256"], 2, "nothing to try"),
        (["tune", "--size", "1"], 2, "size=1"),
        (["peers", "--cells", "io"], 2, "write DIRECTION-LAYOUT-SIZE"),
        (["peers", "--repeat", "0"], 2, "--repeat 0"),
        (["peers", "--seconds", "0"], 2, "--seconds 0: write 1 to 3600 seconds"),
        (["peers", "--settle", "61"], 2, "--settle 61: write 0 to 60 seconds"),
    ],
)
def test_wrong_words_are_answered_with_the_remedy(words: list[str], code: int, part: str) -> None:
    done = bench(*words, code=code)
    assert done.stderr.startswith("vq: error: ") and part in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before(tmp_path: Path, option: str) -> None:
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    done = bench(option, str(folder), "size=64", code=4)
    assert f"{folder}: a folder is there; name a file" in done.stderr
    assert done.stdout == ""
    # Also root cannot write there.
    done = bench(option, "/proc/self/none.svg", "size=64", code=4)
    assert "/proc/self/none.svg: cannot be written" in done.stderr
    assert done.stdout == ""


def test_looking_whether_a_file_can_be_written_leaves_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("of yesterday")
    check_writable(path)
    save_csv(Output(csv=path), [])
    assert path.read_text() == "of yesterday"


def test_json_and_a_plot_of_characters_do_not_mix() -> None:
    pytest.importorskip("plotext")
    done = bench("size=64", "--json", "--plot", "terminal", code=2)
    assert "plot into a file" in done.stderr and done.stdout == ""


def test_it_says_who_closed_the_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "rude.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        closing = threading.Thread(target=lambda: listener.accept()[0].close())
        closing.start()
        done = bench("--socket", path, "size=64", *SHORT, code=3)
        closing.join()
    assert f"vq: error: {path}: the peer closed the connection" in done.stderr


def test_peers_without_testpmd_say_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "peers", "--cells", "io-split-64"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode == 4
    assert "dpdk-testpmd is not there; install DPDK" in done.stderr


def test_help_is_complete() -> None:
    out = bench("--help").stdout
    assert "Usage: vq bench" in out
    for word in (*AXES, "throughput", "latency", "sweep", "peers", "tune", "--json", "--csv", "--plot", "--socket"):
        assert word in out, word
    for command in ("throughput", "latency", "sweep", "peers", "tune"):
        assert f"Usage: vq bench {command}" in bench(command, "--help").stdout


def test_help_of_a_part_has_what_it_takes() -> None:
    assert "AXIS=VALUES" not in bench("peers", "--help").stdout
    peers = bench("peers", "--help").stdout
    assert all(f"  {name} " in peers for name in DIRECTIONS)
    tune = bench("tune", "--help").stdout
    assert "Usage: vq bench tune [AXIS=VALUES...] [OPTIONS]" in tune
    assert all((f"  {name} " in tune) is (name not in ("size", "pause", "log", "program")) for name in AXES)
    assert "  window " not in bench("latency", "--help").stdout
    assert "microseconds between two packets" in bench("latency", "--help").stdout


def test_nothing_heavy_is_loaded_for_help() -> None:
    code = "import sys, vq.cli; vq.cli.main(['bench', '--help']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()[-1]
    assert not {"numpy", "matplotlib", "plotext"} & set(
        out.replace("'", "").replace("[", "").replace("]", "").split(", ")
    )
