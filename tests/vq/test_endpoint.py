"""Listening, connecting again and again, and inherited sockets."""

from __future__ import annotations

import os
import resource
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vq.endpoint import PATH_MAX, Connector, Listener, adopt, listen
from vq.errors import ConnectionClosed, ResourceError, UsageError
from vq.message import Request, encode_request
from vq.transport import Connection


@pytest.fixture
def path(no_fd_is_left: None) -> Iterator[str]:
    """Give a path that is short enough for a socket, wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory(prefix="vq-") as folder:
        yield str(Path(folder) / "sock")


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def stale(path: str) -> None:
    """Leave a socket file behind as a killed process does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def test_accepts_and_removes_its_socket(path: str) -> None:
    listener = listen(path)
    assert listener.accept() is None
    with connect(path) as theirs:
        connection = listener.accept()
        assert isinstance(connection, Connection)
        theirs.send(encode_request(Request.GET_FEATURES))
        message = connection.receive()
        assert message is not None and message.request == Request.GET_FEATURES
        connection.close()
    listener.close()
    listener.close()
    assert not os.path.lexists(path)
    assert listener.fileno() == -1


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777])
def test_mode(path: str, mode: int) -> None:
    listener = listen(path, mode=mode)
    assert stat.S_IMODE(os.stat(path).st_mode) == mode
    listener.close()


def test_stale_socket_is_replaced(path: str) -> None:
    stale(path)
    listener = listen(path)
    connect(path).close()
    listener.close()


def test_living_peer_keeps_its_socket_and_notices_nothing(path: str) -> None:
    first = listen(path)
    with pytest.raises(ResourceError, match=r"a living process uses this socket; .*client") as caught:
        listen(path)
    assert caught.value.path == path
    assert first.accept() is None
    connect(path).close()
    first.close()


def test_socket_that_is_bound_but_does_not_listen_yet_is_alive(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        with pytest.raises(ResourceError, match="living"):
            listen(path)
    assert os.path.exists(path)


def test_living_socket_of_another_type_is_alive(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        with pytest.raises(ResourceError, match="living"):
            listen(path)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_not_removed(path: str, kind: str) -> None:
    target = Path(path)
    if kind == "file":
        target.write_text("precious")
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("/nowhere")
    with pytest.raises(ResourceError, match="not a socket"):
        listen(path)
    assert os.path.lexists(path)


def test_length_of_the_path(path: str) -> None:
    folder = os.path.dirname(path)
    longest = folder + "/" + "x" * (PATH_MAX - len(folder) - 1)
    assert len(longest) == 107
    listen(longest).close()
    for wrong in (longest + "x", folder + "/" + "é" * ((PATH_MAX - len(folder)) // 2 + 1)):
        with pytest.raises(ResourceError, match="107"):
            listen(wrong)
        with pytest.raises(ResourceError, match="107"):
            Connector(wrong)
    with pytest.raises(ResourceError, match="is empty; give one"):
        listen("")


def test_folder_that_does_not_exist(path: str) -> None:
    with pytest.raises(ResourceError, match="cannot listen: No such file") as caught:
        listen(path + "/below")
    assert caught.value.errno == 2
    assert caught.value.remedy


def test_socket_of_a_successor_is_left_alone(path: str) -> None:
    first = listen(path)
    os.unlink(path)
    second = listen(path)
    first.close()
    connect(path).close()
    second.close()


def test_connect_storm_leaves_nothing(path: str) -> None:
    listener = listen(path, backlog=4)
    for _ in range(500):
        theirs = connect(path)
        ours = listener.accept()
        theirs.close()
        assert ours is not None
        with pytest.raises(ConnectionClosed):
            ours.receive()
        ours.close()
    listener.close()


# --- Connector ----------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_connector_waits_longer_and_longer(path: str) -> None:
    clock = Clock()
    connector = Connector(path, first_delay=0.1, last_delay=1.0, clock=clock)
    pauses = []
    for _ in range(6):
        assert connector.next_attempt_in() == 0
        assert connector.attempt() is None
        pauses.append(round(connector.next_attempt_in(), 3))
        clock.now += connector.next_attempt_in() + 1e-9
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert connector.last_error is not None
    assert "No such file" in str(connector.last_error)


def test_connector_finds_the_peer_when_it_comes(path: str) -> None:
    connector = Connector(path)
    stale(path)
    assert connector.attempt() is None
    assert connector.last_error is not None and "refused" in str(connector.last_error)
    listener = listen(path)
    ours = connector.attempt()
    theirs = listener.accept(replies=True)
    assert ours is not None and theirs is not None
    assert connector.last_error is None
    theirs.send(encode_request(Request.GET_FEATURES))
    assert ours.receive() is not None
    for each in (ours, theirs, listener):
        each.close()


def test_peer_that_closes_at_once_is_not_asked_at_once(path: str) -> None:
    clock = Clock()
    listener = listen(path)
    connector = Connector(path, first_delay=0.1, last_delay=1.0, clock=clock)
    pauses = []
    for lifetime in (0.0, 0.0, 0.0, 60.0, 0.0):
        ours = connector.attempt()
        assert ours is not None
        ours.close()
        theirs = listener.accept()
        assert theirs is not None
        theirs.close()
        clock.now += lifetime
        connector.lost()
        pauses.append(round(connector.next_attempt_in(), 3))
        clock.now += connector.next_attempt_in() + 1e-9
    assert pauses == [0.1, 0.2, 0.4, 0.1, 0.2]
    listener.close()


def test_full_backlog_does_not_block(path: str) -> None:
    listener = listen(path, backlog=0)
    connector = Connector(path)
    made = []
    while (ours := connector.attempt()) is not None:
        made.append(ours)
        assert len(made) < 100
    assert connector.last_error is not None
    for connection in made:
        connection.close()
    listener.close()


# --- Inherited sockets --------------------------------------------------------------------------------------------


def test_a_connector_tries_again_when_too_many_files_are_open(path: str) -> None:
    connector = Connector(path, first_delay=0.1)
    listener = listen(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.dup(0)
    os.close(last)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last, hard))  # every file up to here is open
    try:
        assert connector.attempt() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert connector.next_attempt_in() > 0
    assert connector.last_error is not None
    assert "raise the limit of open files" in str(connector.last_error)
    connection = connector.attempt()
    assert connection is not None
    connection.close()
    listener.close()


def test_a_listener_closes_when_there_is_no_way_to_its_file(path: str) -> None:
    folder = Path(path).parent / "inner"
    folder.mkdir()
    listener = listen(str(folder / "sock"))
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("a file in its place")
    listener.close()
    assert listener.fileno() == -1


def test_inherited_listening_socket_is_never_unlinked(path: str) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    os.set_inheritable(sock.fileno(), True)
    listener = adopt(sock.detach())
    assert isinstance(listener, Listener)
    assert not os.get_inheritable(listener.fileno())
    with connect(path):
        connection = listener.accept()
        assert connection is not None
        connection.close()
    listener.close()
    assert os.path.exists(path)


def test_inherited_connected_socket(no_fd_is_left: None) -> None:
    ours, theirs = socket.socketpair()
    connection = adopt(ours.detach())
    assert isinstance(connection, Connection)
    theirs.send(encode_request(Request.GET_FEATURES))
    assert connection.receive() is not None
    connection.close()
    theirs.close()


def test_inherited_fd_of_another_kind_stays_open(no_fd_is_left: None) -> None:
    read_end, write_end = os.pipe()
    inet = socket.socket(socket.AF_INET)
    seqpacket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for fd in (read_end, inet.fileno(), seqpacket.fileno()):
        with pytest.raises(UsageError, match=f"fd {fd}: .*Unix stream socket"):
            adopt(fd)
        os.fstat(fd)
    with pytest.raises(UsageError, match="fd 9999"):
        adopt(9999)
    os.close(read_end)
    os.close(write_end)
    inet.close()
    seqpacket.close()
