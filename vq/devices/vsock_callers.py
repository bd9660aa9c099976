"""Programs of the host that come to the socket device: they connect, and say which port of the guest they want.

Who says nothing keeps nobody out: it is sent away after `PATIENCE_S`, and before that when `CALLERS_MAX` wait and
another one comes.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vq.closing import Closing
from vq.endpoint import listen
from vq.errors import ResourceError
from vq_core.timer import Timer

__all__ = ["CALLERS_MAX", "Callers"]

CALLERS_MAX: Final = 64  # that have not said yet whom they want
PATIENCE_S: Final = 10.0  # until they must have
PAUSE_S: Final = 0.1  # after an accept that failed
ACCEPTS_MAX: Final = 64  # in one turn
WORDS_MAX: Final = 32  # bytes of "CONNECT P"
CONNECT: Final = b"CONNECT "


class _Caller:
    """One of them, and what it has said so far."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.words = b""
        self.deadline = deadline


class Callers(Closing):
    """Listens for them, and hands them over with the port that they want.

    Parameters
    ----------
    path
        Where they connect.
    events
        Where what is waited for is registered; whoever polls it calls `dispatch`.
    taken
        Called with the socket, which is the callee's then, and the port of the guest.

    Raises
    ------
    ResourceError
        The path cannot be listened on.

    Notes
    -----
    Threading: one control thread.
    """

    def __init__(self, path: str, events: select.epoll, taken: Callable[[socket.socket, int], None]) -> None:
        self._events = events
        self._taken = taken
        self._callers: dict[int, _Caller] = {}  # by descriptor; who came first stands first
        self._pause = Timer()
        self._patience = Timer()
        self._listener = listen(path)
        for watched in (self._listener, self._pause, self._patience):
            events.register(watched.fileno(), select.EPOLLIN)

    def listens(self, fd: int) -> bool:
        """Whether new callers come by this descriptor."""
        return fd == self._listener.fileno()

    def dispatch(self, fd: int) -> None:
        """Look at a descriptor, if it is one of these."""
        if self.listens(fd):
            self._accept()
        elif fd == self._pause.fileno():
            self._pause.clear()
            self._events.modify(self._listener.fileno(), select.EPOLLIN)
        elif fd == self._patience.fileno():
            self._patience.clear()
            self._expire()
        elif fd in self._callers:
            self._hear(fd)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                sock = self._listener.accept_socket()
            except ResourceError:  # too many files are open
                self._events.modify(self._listener.fileno(), 0)
                self._pause.set(PAUSE_S)
                return
            if sock is None:
                return
            sock.setblocking(False)
            if len(self._callers) >= CALLERS_MAX:
                self._forget(next(iter(self._callers))).close()
            fd = sock.fileno()
            self._callers[fd] = _Caller(sock, time.monotonic() + PATIENCE_S)
            self._events.register(fd, select.EPOLLIN)
            if len(self._callers) == 1:
                self._patience.set(PATIENCE_S)
            self._hear(fd)  # most have spoken already

    def _hear(self, fd: int) -> None:
        """Take what a caller says, up to the end of its line: the rest is for the guest."""
        caller = self._callers[fd]
        port = None
        with suppress(OSError):
            try:
                words = caller.sock.recv(WORDS_MAX - len(caller.words), socket.MSG_PEEK)
            except BlockingIOError:
                return
            line, end, _ = words.partition(b"\n")
            # Taken even if it is no whole line: what lies there would wake us for ever.
            caller.words += caller.sock.recv(len(line + end))
            if words and not end and len(caller.words) < WORDS_MAX:
                return  # the rest is on its way
            port = _port(caller.words)
        sock = self._forget(fd)
        if port is None:
            sock.close()
        else:
            self._taken(sock, port)

    def _expire(self) -> None:
        now = time.monotonic()
        for fd, caller in list(self._callers.items()):
            if caller.deadline > now:
                self._patience.set(caller.deadline - now)
                return
            self._forget(fd).close()

    def _forget(self, fd: int) -> socket.socket:
        self._events.unregister(fd)
        return self._callers.pop(fd).sock

    def close(self) -> None:
        for fd in list(self._callers):
            self._forget(fd).close()
        self._pause.close()
        self._patience.close()
        self._listener.close()


def _port(words: bytes) -> int | None:
    """The port in "CONNECT P" and a line feed; None: it is something else."""
    number = words.removeprefix(CONNECT).strip()
    if not (words.startswith(CONNECT) and words.endswith(b"\n") and number.isdigit()):
        return None
    port = int(number)
    return port if port < 1 << 32 else None
