"""``vq check`` as a process: on a pump of ours everything passes, and what it says about others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import vq
from waiting import wait_for

COMMAND = [sys.executable, "-m", "vq", "check"]


def call(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture
def pump(tmp_path: Path) -> Iterator[str]:
    """A pump that echoes, as `vq pump` runs it."""
    path = str(tmp_path / "a.sock")
    with vq.Pump([f"vhost:{path}"]) as pump:
        serving = threading.Thread(target=pump.run)
        serving.start()
        yield path
        pump.request_stop()
        serving.join()


@pytest.mark.parametrize("kind", ["net", "any"])
def test_everything_passes_on_our_own(pump: str, kind: str) -> None:
    done = call(pump, "--type", kind, "--json", "--timeout", "5")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record for record in records if record.get("outcome") == "fail"] == []
    assert done.returncode == 0, done.stderr
    final = records.pop()
    assert (final["final"], final["ok"], final["fail"]) == (True, True, 0)
    assert final["pass"] + final["skipped"] == len(records)
    # Skipped is what our network device does not offer, or what is for another one; nothing else.
    skipped = {record["name"]: record["reason"] for record in records if record["outcome"] == "skipped"}
    other = {"net": ("for --type blk",), "any": ("for --type blk", "for --type net", "for --type net and blk")}[kind]
    unoffered = ("CONFIG", "INFLIGHT_SHMFD", "PAGEFAULT", "SHARED_OBJECT", "SHMEM")
    control = ("CTRL_VQ", "CTRL_RX", "CTRL_VLAN", "CTRL_RX_EXTRA", "CTRL_MAC_ADDR", "CTRL_GUEST_OFFLOADS")

    def allowed(name: str, reason: str) -> bool:
        lacking = reason.removeprefix("not offered: ").split(", ")
        if "control." in name and "CTRL_VQ" in lacking:
            return set(lacking) <= {*control, "CONFIG"}
        return reason in (*other, *(f"not offered: {name}" for name in unoffered))

    assert [name for name, reason in skipped.items() if not allowed(name, reason)] == []
    assert all(record["section"] and record["title"] for record in records)
    if kind == "net":
        assert final["pass"] > 120
        assert "out and back" in next(record["reason"] for record in records if record["name"] == "net.packed")


@pytest.mark.parametrize("words", [["--queues", "4"], ["--read-only", "--queues", "1"]], ids=["writable", "read-only"])
def test_everything_passes_on_our_disk(tmp_path: Path, words: list[str]) -> None:
    """Also while it sleeps; and the file is what it was before."""
    path, image = tmp_path / "a.sock", tmp_path / "disk.img"
    content = os.urandom(4 << 20)
    image.write_bytes(content)
    command = [sys.executable, "-m", "vq", "blk", "--socket-path", str(path), "--blk-file", str(image), *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            wait_for(path.exists)
            done = call(str(path), "--type", "blk", "--json", "--timeout", "5", timeout=120)
            assert child.poll() is None
        finally:
            child.terminate()
    *records, final = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record for record in records if record["outcome"] == "fail"] == []
    assert (done.returncode, final["ok"], final["fail"]) == (0, True, 0), done.stderr
    # Skipped is what is for another type of device, or what our disk does not offer; nothing else.
    skipped = {record["name"]: record["reason"] for record in records if record["outcome"] == "skipped"}
    allowed = ("for --type net", "not offered: PAGEFAULT", "not offered: SHARED_OBJECT", "not offered: SHMEM")
    assert [(name, reason) for name, reason in skipped.items() if reason not in allowed] == []
    assert final["pass"] > 110
    assert image.read_bytes() == content


def test_a_table_for_people(pump: str) -> None:
    done = call(pump, "--type", "net", "--only", "framing.*", "--only", "config.*")
    assert done.returncode == 0, done.stderr
    assert "framing.pieces" in done.stdout
    assert "not offered: CONFIG" in done.stdout
    assert "4 passed, 0 failed, 3 skipped" in done.stdout


def test_a_back_end_that_dies_is_named_and_started_again(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    program = tmp_path / "fragile.py"
    # Answers GET_FEATURES, and aborts at the first header that is anything else.
    program.write_text(
        "import os, socket, struct, sys\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(sys.argv[1])\n"
        "listener.listen()\n"
        "while True:\n"
        "    peer, _ = listener.accept()\n"
        "    while head := peer.recv(12):\n"
        "        if head[:4] != bytes([1, 0, 0, 0]): os.abort()\n"
        "        peer.sendall(struct.pack('=IIIQ', 1, 5, 8, 1 << 32))\n"
    )
    words = [str(path), "--only", "hostile.framing.truncated", "--only", "framing.*", "--timeout", "1", "--json"]
    done = call(*words, "--start", f"{sys.executable} {program} {path}")
    records = {record.get("name"): record for record in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1, done.stderr
    assert records["framing.reply-form"]["outcome"] == "pass"
    # Each of these ends it; each finds it running again.
    for name in ("framing.pieces", "hostile.framing.truncated"):
        assert records[name]["outcome"] == "fail"
    assert "SIGABRT" in records["hostile.framing.truncated"]["reason"]


def test_without_a_start_the_rest_is_skipped(tmp_path: Path) -> None:
    import socket

    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(12)
                peer.sendall(bytes([1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]) + bytes(8))
                peer.recv(12)
            listener.close()

        serving = threading.Thread(target=serve)
        serving.start()
        done = call(path, "--only", "framing.*", "--timeout", "0.5", "--json")
        serving.join()
    outcomes = [json.loads(line).get("outcome") for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert outcomes == ["fail", "skipped", "skipped", "skipped", None]


def test_nobody_there_is_a_resource_error(tmp_path: Path) -> None:
    done = call(str(tmp_path / "none.sock"), "--timeout", "0.2")
    assert done.returncode == 4
    assert "start the back-end first" in done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "needs the SOCKET"),
        (["x.sock", "--only", "nothing.*"], "no check is named 'nothing.*'"),
        (["x.sock", "--timeout", "0"], "--timeout is 0"),
        (["x.sock", "--start", " "], "the command that starts the back-end is empty"),
    ],
)
def test_misuse(words: list[str], part: str) -> None:
    done = call(*words)
    assert done.returncode == 2
    assert part in done.stderr
    assert "vq check --help" in done.stderr or "--list" in done.stderr


def test_the_list_names_all_checks_once() -> None:
    done = call("--list", "--json")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    names = [record["name"] for record in records]
    assert len(names) == len(set(names)) > 130
    assert {record["group"] for record in records} == {"conformance", "hostile"}
    assert all(record["section"].startswith(("vhost-user", "VIRTIO 1.3")) for record in records)
    assert "net.packed: Packets over packed rings (VIRTIO 1.3, 5.1.6)" in call("--list").stdout


def test_a_signal_ends_it_between_two_checks(pump: str) -> None:
    command = [*COMMAND, pump, "--type", "net", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    out, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (143, "")
    *left, final = map(json.loads, out.splitlines())
    assert final["final"] is True
    assert 1 + len(left) < len(call("--list", "--type", "net").stdout.splitlines()) / 2
