"""Sockets that the process was started with: which names mean which fd, and what a pump does with them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import vq
from pump_rig import Guest, pumping
from vq.errors import UsageError
from vq.inherited import find_fd, listen_fds, listening_path
from vq.ports import parse_port, parse_ports
from waiting import wait_for

OURS = {"LISTEN_PID": str(os.getpid())}


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "a.sock"))
        sock.listen()
        yield sock


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, []),
        ({"LISTEN_FDS": "1"}, []),
        ({"LISTEN_PID": "1", "LISTEN_FDS": "1"}, []),
        (OURS | {"LISTEN_FDS": "0"}, []),
        (OURS | {"LISTEN_FDS": "-1"}, []),
        (OURS | {"LISTEN_FDS": "many"}, []),
        (OURS | {"LISTEN_FDS": "9" * 30}, []),
        (OURS | {"LISTEN_FDS": "2"}, [("unknown", 3), ("unknown", 4)]),
        (OURS | {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}, [("a", 3), ("b", 4)]),
        (OURS | {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "a"}, [("a", 3), ("unknown", 4), ("unknown", 5)]),
        (OURS | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b:c"}, [("a", 3)]),
    ],
)
def test_what_a_service_manager_passes(environment: dict[str, str], found: list[tuple[str, int]]) -> None:
    assert listen_fds(environment) == found


def test_a_name_must_mean_one_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (OURS | {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:b"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match="'c'; passed are a, b"):
        find_fd("c")
    with pytest.raises(UsageError, match="2 sockets have the name 'b'; write one of fd=4, fd=5"):
        find_fd("b")


@pytest.mark.parametrize("number", ["999", "9" * 12, "9" * 200])
def test_an_fd_that_is_not_open_is_named(number: str) -> None:
    with pytest.raises(UsageError, match=f"{number} is not open"):
        find_fd(number)
    with pytest.raises(UsageError, match=f"PORT 'vhost:fd={number}': fd {number} is not open"):
        parse_ports([f"vhost:fd={number}"])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("vhost:fd=", "neither the number nor the name"),
        ("vhost:fd=a:b", "neither the number nor the name"),
        ("vhost:fd=\u00e9", "neither the number nor the name"),
        ("vhost:fd=" + "9" * 5000, "neither the number nor the name"),
        ("vhost:fd=3,client", "client is for a PATH"),
        ("vhost:fd=3,mode=0600", "mode is for a PATH"),
    ],
)
def test_each_mistake_is_named(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_port(text)


def test_a_path_may_begin_like_a_descriptor() -> None:
    assert parse_port("vhost:./fd=3").inherited == ""
    assert parse_port("vhost:fd=3,queues=2").inherited == "3"
    assert parse_port("tap:fd=3").inherited == ""


def test_two_numbers_of_one_socket_cannot_be_two_ports(listening: socket.socket) -> None:
    twin = os.dup(listening.fileno())
    with pytest.raises(UsageError, match="the same socket as"):
        parse_ports([f"vhost:fd={listening.fileno()}", f"vhost:fd={twin}"])
    os.close(twin)


def test_something_else_than_a_unix_stream_socket_is_refused() -> None:
    with open("/dev/null") as file, pytest.raises(UsageError, match="pass the number of an open Unix stream socket"):
        vq.Pump([f"vhost:fd={file.fileno()}"])


def test_where_an_inherited_socket_listens(listening: socket.socket, tmp_path: Path) -> None:
    assert listening_path(listening.fileno()) == str(tmp_path / "a.sock")
    ours, theirs = socket.socketpair()
    assert listening_path(ours.fileno()) == listening_path(99999) == ""
    ours.close()
    theirs.close()


def test_guests_come_and_go_on_a_listening_socket_that_stays(listening: socket.socket, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    fd = os.dup(listening.fileno())
    with pumping(f"vhost:fd={fd}") as pump:
        for count in (1, 2):
            with Guest(str(path)) as guest:
                guest.post(100)
                guest.send(b"x" * 60)
                assert guest.receive()[1] == b"x" * 60
                assert pump.snapshot()["ports"][f"vhost:fd={fd}"]["connections"] == count
    assert path.exists(), "a socket that was passed is not ours to remove"
    with socket.socket(socket.AF_UNIX) as late:
        late.connect(str(path))  # its owner still listens


def test_a_pump_ends_with_the_last_guest_of_connected_sockets() -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    ports = [f"vhost:fd={ours.detach()}" for ours, _ in pairs]
    with vq.Pump([*ports, "null:"]) as pump:
        thread = threading.Thread(target=pump.run, daemon=True)
        thread.start()
        pairs[0][1].close()
        wait_for(lambda: pump.snapshot()["ports"][ports[0]]["state"] == "closed")
        assert thread.is_alive()
        pairs[1][1].close()
        thread.join(60)
        assert not thread.is_alive()
