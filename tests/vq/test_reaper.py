"""Closing never waits for the peer, and a back-end whose closing hangs takes no new front-end."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vq.backend import Backend
from vq.devices.net import NetDevice
from vq.reaper import Reaper, close_socket
from waiting import wait_for

LINGER_S = 120


def lingering() -> tuple[int, socket.socket]:
    """A TCP socket with unsent data, whose close() waits for LINGER_S or until its other end is closed; and that."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        reader, _ = server.accept()
    sender.setblocking(False)
    try:
        while True:
            sender.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
    sender.setblocking(True)
    return sender.detach(), reader


def test_a_lingering_socket_costs_a_moment_only() -> None:
    reaper = Reaper()
    fd, reader = lingering()
    reaper.close(fd)
    assert reaper.busy == 1  # it has returned, and the closing still goes on
    reader.close()
    wait_for(lambda: not reaper.busy)
    reaper.stop()


def test_the_path_of_a_file_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a mount namespace of its own gives a file system of its own any path, that of a memfd too."""
    reaper = Reaper()
    fd, reader = lingering()
    monkeypatch.setattr(os, "readlink", lambda path: "/memfd:x/file")
    reaper.close(fd)
    assert reaper.busy == 1  # it has returned, and the closing still goes on
    reader.close()
    reaper.stop()


def test_without_room_for_a_thread_closing_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    reaper = Reaper()
    with monkeypatch.context() as patch, open(os.devnull) as file:
        patch.setattr(threading.Thread, "start", no_room)
        reaper.close(os.dup(file.fileno()))
    assert reaper.busy == 1
    with reaper.active():
        wait_for(lambda: not reaper.busy)
    reaper.stop()


def test_an_interpreter_that_ends_begins_no_thread() -> None:
    """What is left to be closed then, as by a program that dies of an error, must not keep it from ending."""
    code = (
        "import socket\n"
        "from vq.reaper import Reaper\n"
        "class Last:\n"
        "    def __init__(self): self.reaper, self.pair = Reaper(), socket.socketpair()\n"
        "    def __del__(self): self.reaper.close(self.pair[0].detach()); print('closed')\n"
        "last = Last()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n")


def test_ordinary_descriptors_are_closed_when_close_returns() -> None:
    reaper = Reaper()
    with open(os.devnull) as file:
        plain = os.dup(file.fileno())
    ours, theirs = socket.socketpair()
    for fd in (os.eventfd(0), os.memfd_create("x"), plain, ours.detach(), theirs.detach()):
        reaper.close(fd)
        try:
            os.fstat(fd)
        except OSError:
            continue
        raise AssertionError(f"descriptor {fd} is still open")
    reaper.stop()


def test_a_backend_that_cannot_close_takes_nobody_until_it_can(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    fd, reader = lingering()
    with Backend(NetDevice("a", pairs=1), path=path) as backend:
        with socket.socket(socket.AF_UNIX) as hostile:
            hostile.connect(path)
            backend.dispatch()
            # More bytes than a header before the fd, so that it still waits in the socket when the connection ends.
            hostile.sendall(bytes(12))
            socket.send_fds(hostile, [b"x"], [fd])
            os.close(fd)
            backend.dispatch()
        assert backend.state == "listening"
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(path)
            backend.dispatch()
            assert backend.state == "listening", "what the first one left is not closed yet"
            reader.close()

            def connected() -> bool:
                backend.dispatch()
                return backend.state == "connected"

            wait_for(connected)


def test_threads_that_serve_do_not_disturb_each_other() -> None:
    """Whoever begins first and ends first leaves no reaper behind in another thread, nor in its own."""
    inside, leave = threading.Event(), threading.Event()

    def serve() -> None:
        with Reaper().active():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=serve)
    with Reaper().active():
        thread.start()
        assert inside.wait(60)
    leave.set()
    thread.join()
    ours, theirs = socket.socketpair()
    copy = socket.socket(fileno=os.dup(ours.fileno()))
    close_socket(ours)  # in place, since this thread serves nobody: the copy lives on
    copy.sendall(b"x")
    assert theirs.recv(1) == b"x"
    copy.close()
    theirs.close()
