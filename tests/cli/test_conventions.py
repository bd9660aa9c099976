"""What the specification wants of a back-end program, and what a service manager does: as processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import vq
from vq.bench.blk_link import open_blk_link
from vq.bench.blk_settings import BlkSettings
from vq.cli.service import Service, guests
from vq.errors import VqError
from vq.frontend import Frontend
from vq.transport import Connection
from waiting import wait_for

COMMAND = [sys.executable, "-m", "vq", "pump"]
NET = [sys.executable, "-c", "import sys; from vq.cli import main_net; sys.exit(main_net())"]
BLK = [sys.executable, "-c", "import sys; from vq.cli import main_blk; sys.exit(main_blk())"]
NULL_DISK = [*BLK, "--null=1M", "--queues=1"]
CAPABILITIES = {"net": [], "block": ["read-only", "blk-file"]}
# A service manager sets LISTEN_PID between fork and exec, as only the child knows its number.
ACTIVATE = 'import os, sys; os.environ["LISTEN_PID"] = str(os.getpid()); os.execvp(sys.argv[1], sys.argv[1:])'


@contextmanager
def running(command: list[str], **more: object) -> Iterator[subprocess.Popen[str]]:
    child: subprocess.Popen[str] = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )  # type: ignore[call-overload]
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def ends(child: subprocess.Popen[str]) -> str:
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert "Traceback" not in errors
    return out


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--print-capabilities"],
        ["--print-capabilities", "--no-such-option", "nonsense"],
        ["--fd=99", "--socket-path=/nowhere/a", "--cpu", "x", "--print-capabilities"],
    ],
)
@pytest.mark.parametrize(
    ("command", "kind"), [(COMMAND, "net"), (NET, "net"), (BLK, "block")], ids=["vq pump", "vq-net", "vq-blk"]
)
def test_capabilities_are_printed_whatever_stands_beside(command: list[str], kind: str, words: list[str]) -> None:
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"type": kind, "features": CAPABILITIES[kind]}


@pytest.mark.parametrize(("name", "kind"), [("vq-net", "net"), ("vq-blk", "block")])
def test_the_descriptor_is_what_qemu_describes(name: str, kind: str) -> None:
    folder = Path(vq.__file__).parent
    (path,) = (path for path in (folder / "share").iterdir() if path.name.endswith(f"{name}.json"))
    assert re.fullmatch(r"\d\d-[\w-]+\.json", path.name)
    descriptor = json.loads(path.read_text())
    assert set(descriptor) <= {"description", "type", "binary", "tags"}
    assert descriptor["type"] == kind
    assert descriptor["binary"].startswith("/")
    scripts = tomllib.loads((folder.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(descriptor["binary"]).name == name
    assert scripts[name] == f"vq.cli:{name.replace('vq-', 'main_')}"


def test_every_descriptor_is_tested() -> None:
    assert len(list((Path(vq.__file__).parent / "share").iterdir())) == 2


@pytest.mark.parametrize("command", [[*NET, "null:"], NULL_DISK], ids=["vq-net", "vq-blk"])
def test_it_stays_in_the_foreground(command: list[str], tmp_path: Path) -> None:
    """The program that was started is the one that serves, in the session and folder that it was given."""
    path = tmp_path / "a.sock"
    with running([*command, "--socket-path=a.sock"], cwd=tmp_path) as child:
        wait_for(lambda: can_connect(path))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            (pid, _, _) = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        assert pid == child.pid
        assert os.getsid(child.pid) == os.getsid(0)
        assert os.readlink(f"/proc/{child.pid}/cwd") == str(tmp_path)
        assert os.readlink(f"/proc/{child.pid}/fd/2").startswith("pipe:")
        child.send_signal(signal.SIGTERM)
        ends(child)
    assert not path.exists()


@pytest.mark.parametrize(
    "serving",
    [
        "from vq.cli import main_blk; sys.argv[1:] = ['--null=1M', '--socket-path=a.sock']; sys.exit(main_blk())",
        "import vq; vq.serve(BlkDevice(Disk(None, False, size=1 << 20), queues=1), socket_path='a.sock')",
    ],
    ids=["vq-blk", "vq.serve"],
)
def test_it_ends_in_order_as_soon_as_it_can_be_seen(serving: str, tmp_path: Path) -> None:
    """A signal that comes with the socket: before anything of the loop that serves it has begun."""
    code = f"""
import os, signal, sys
from vq.backend import Backend
from vq.devices.blk import BlkDevice
from vq_core.disk import Disk

def listen(self, *words, **more):
    make(self, *words, **more)
    assert os.path.exists("a.sock")
    signal.raise_signal(signal.SIGTERM)

make, Backend.__init__ = Backend.__init__, listen
{serving}
"""
    with running([sys.executable, "-c", code], cwd=tmp_path) as child:
        ends(child)
    assert not (tmp_path / "a.sock").exists()


def test_a_disk_on_a_connected_socket_is_served_until_its_end() -> None:
    ours, theirs = socket.socketpair()
    with running([*NULL_DISK, f"--fd={theirs.fileno()}"], pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        with Frontend(Connection(ours, replies=True), timeout=120) as frontend:
            frontend.negotiate(1 << 32, 1 << 9)
            assert frontend.get_config(0, 8) == (2048).to_bytes(8, "little")
        ends(child)


def test_a_disk_ends_at_sigterm_with_requests_under_way(tmp_path: Path) -> None:
    """What was acknowledged is in the file; the ring has no request half done."""
    path, image = tmp_path / "a.sock", tmp_path / "disk.img"
    image.write_bytes(bytes(4 << 20))
    settings = BlkSettings(depth=32, writes=100, block=65536)
    with running([*BLK, f"--socket-path={path}", f"--blk-file={image}", "--json"]) as child:
        wait_for(lambda: can_connect(path))
        # At the end it asks the rings to stop, and nobody is there any more.
        with suppress(VqError, OSError), open_blk_link(str(path), settings, None) as load:
            driver = threading.Thread(target=load.run, args=(60,))
            driver.start()
            try:
                wait_for(lambda: load.counters["writes"] > 100)
                child.send_signal(signal.SIGTERM)
                report = json.loads(ends(child))
            finally:
                load.stop()
                driver.join()
        counters = load.counters
        assert counters["failed"] == counters["changed"] == 0
        assert sum(queue["writes"] for queue in report["queues"]) == counters["writes"] > 100
    assert not path.exists()


def test_the_socket_path_of_the_conventions(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with running([*NET, f"--socket-path={path}", "null:"]) as child:
        wait_for(lambda: can_connect(path))
        child.send_signal(signal.SIGTERM)
        assert f"vhost:{path}: listens on {path}" in ends(child)
    assert not path.exists()


def test_a_connected_socket_is_served_until_its_end() -> None:
    ours, theirs = socket.socketpair()
    with running([*NET, f"--fd={theirs.fileno()}", "null:"], pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        with Frontend(Connection(ours, replies=True), timeout=120) as frontend:
            assert frontend.negotiate(1 << 32) >> 32 & 1
        assert " was passed, up to 8 queue pairs" in ends(child)


def test_path_and_fd_exclude_each_other() -> None:
    done = subprocess.run([*COMMAND, "--fd=0", "--socket-path=/a"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--socket-path and --fd name the same socket" in done.stderr


def test_a_service_manager_passes_sockets_and_hears_how_it_goes(tmp_path: Path) -> None:
    path, notify = tmp_path / "a.sock", tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket(socket.AF_UNIX) as first:
        manager.bind(str(notify))
        manager.settimeout(60)
        first.bind(str(path))
        first.listen()
        # The first fd that a service manager passes is 3; a shell puts ours there.
        shell = f'exec 3<&{first.fileno()} && exec "$0" -c \'{ACTIVATE}\' "$0" -m vq pump "$@"'
        command = ["bash", "-c", shell, sys.executable, "vhost:fd=guest", "null:", "--json", "--interval", "0.1"]
        environment = os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "guest", "NOTIFY_SOCKET": str(notify)}
        with running(command, env=environment, pass_fds=[first.fileno()]) as child:
            assert manager.recv(1000) == b"READY=1\nSTATUS=2 ports; guests: 1 listening"
            with Frontend.connect(str(path), timeout=120):
                assert manager.recv(1000) == b"STATUS=2 ports; guests: 1 connected"
            assert manager.recv(1000) == b"STATUS=2 ports; guests: 1 listening"
            child.send_signal(signal.SIGTERM)
            assert manager.recv(1000) == b"STOPPING=1"
            ends(child)
        assert can_connect(path), "the socket stays the service manager's"


def test_a_disk_of_a_service_manager(tmp_path: Path) -> None:
    path, notify = tmp_path / "a.sock", tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(notify))
        manager.settimeout(60)
        environment = os.environ | {"NOTIFY_SOCKET": str(notify)}
        with running([*NULL_DISK, f"--socket-path={path}"], env=environment) as child:
            assert manager.recv(1000) == b"READY=1\nSTATUS=blk: listening"
            with Frontend.connect(str(path), timeout=120):
                assert manager.recv(1000) == b"STATUS=blk: connected"
            assert manager.recv(1000) == b"STATUS=blk: listening"
            child.send_signal(signal.SIGTERM)
            assert manager.recv(1000) == b"STOPPING=1"
            ends(child)


@pytest.mark.parametrize("command", [[*NET, "null:"], NULL_DISK], ids=["vq-net", "vq-blk"])
def test_the_watchdog_of_a_service_manager(command: list[str], tmp_path: Path) -> None:
    """Signs of life come in less than the time that the service manager waits, though nothing else happens."""
    notify = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(notify))
        manager.settimeout(60)
        environment = os.environ | {"NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": "200000"}
        since = time.monotonic()
        with running([*command, f"--socket-path={tmp_path / 'a.sock'}"], env=environment) as child:
            assert manager.recv(1000).startswith(b"READY=1\n")
            for _ in range(20):
                assert manager.recv(1000) == b"WATCHDOG=1"
            assert time.monotonic() - since > 1.8, "more often than twice in each period"
            child.send_signal(signal.SIGSTOP)
            manager.settimeout(1)
            with pytest.raises(TimeoutError):  # a few may have been on their way
                [manager.recv(1000) for _ in range(10)]
            manager.settimeout(60)
            child.send_signal(signal.SIGCONT)
            assert manager.recv(1000) == b"WATCHDOG=1"
            child.send_signal(signal.SIGTERM)
            ends(child)


@pytest.mark.parametrize("more", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_PID": "1"}])
def test_no_watchdog_without_a_request_for_it(more: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    usual = {"WATCHDOG_USEC": "1000000"} if "WATCHDOG_PID" in more else {}
    for name, value in {**usual, **more}.items():
        monkeypatch.setenv(name, value)
    assert Service().alive is None


def test_an_abstract_name_of_a_service_manager() -> None:
    name = f"vq-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        manager.settimeout(60)
        environment = os.environ | {"NOTIFY_SOCKET": "@" + name}
        done = subprocess.run([*COMMAND, "gen:count=1", "null:"], env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert manager.recv(1000) == b"READY=1\nSTATUS=2 ports"
        assert manager.recv(1000) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["/nowhere/notify", "vsock:2:1234", "x" * 300, "/" + "x" * 300])
def test_a_service_manager_that_cannot_be_told_is_no_error(address: str) -> None:
    environment = os.environ | {"NOTIFY_SOCKET": address}
    done = subprocess.run([*COMMAND, "gen:count=1", "null:"], env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_status_counts_guests_by_their_state() -> None:
    states = ["running", "listening", "running"]
    ports = {f"vhost:{n}": {"kind": "vhost", "state": state} for n, state in enumerate(states)}
    assert guests({"ports": ports | {"null": {"kind": "null", "state": "open"}}}) == (
        "4 ports; guests: 1 listening, 2 running"
    )
    assert guests({"ports": {"gen": {"kind": "gen", "state": "open"}}}) == "1 port"
