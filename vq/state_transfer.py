"""A device's state on its way through a pipe of the front-end: saved before a migration, loaded after it.

Nothing here waits. The pipe is opened anew, for us alone, so that the front-end cannot make it block; a transfer that
does not move for `STATE_S` has failed, and so has one beyond `STATE_MAX`. CHECK_DEVICE_STATE is answered at its end.

Spec: vhost-user, "Migrating back-end state".
"""

from __future__ import annotations

import fcntl
import os
import select
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vq.errors import FrontendError, UsageError, VqError
from vq_core.timer import Timer

__all__ = ["STATE_MAX", "STATE_S", "StateTransfer"]

STATE_MAX: Final = 1 << 20  # bytes
STATE_S: Final = 20.0  # without progress
CHUNKS_MAX: Final = 16  # moved in one go, so that a large state does not delay others
CHUNK: Final = 64 * 1024

SAVE: Final = "SET_DEVICE_STATE_FD (save)"
LOAD: Final = "SET_DEVICE_STATE_FD (load)"


class StateTransfer:
    """The transfer of one back-end; at most one is under way.

    Parameters
    ----------
    epoll
        Where what is waited for is registered.
    warn
        Called with a text for people when a transfer fails.

    Notes
    -----
    Threading: one control thread.
    """

    def __init__(self, epoll: select.epoll, warn: Callable[[str], None]) -> None:
        self._epoll = epoll
        self._warn = warn
        self._fd = -1
        self._timer: Timer | None = None
        self._name = ""
        self._unsent = memoryview(b"")
        self._came = bytearray()
        self._load: Callable[[bytes], None] | None = None
        self._ok: bool | None = None  # how the last one has ended

    def save(self, fd: int, state: bytes) -> None:
        """Begin to write a state; the descriptor stays the caller's.

        Raises
        ------
        VqError, OSError
            It cannot begin: another one is under way, the state is too long, this is no writable pipe.
        """
        if len(state) > STATE_MAX:
            raise UsageError(f"the state has {len(state)} bytes; {STATE_MAX} are allowed")
        self._begin(SAVE, fd, os.O_WRONLY, select.EPOLLOUT)
        self._unsent = memoryview(state)

    def load(self, fd: int, load: Callable[[bytes], None]) -> None:
        """Begin to read a state up to its end, and hand it over then; the descriptor stays the caller's.

        Raises
        ------
        VqError, OSError
            It cannot begin: another one is under way, this is no readable pipe.
        """
        self._begin(LOAD, fd, os.O_RDONLY, select.EPOLLIN)
        self._came = bytearray()
        self._load = load

    def _begin(self, name: str, fd: int, mode: int, events: int) -> None:
        if self._fd >= 0:
            raise FrontendError(name, "transfer", "under way", "one after the other")
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:["):
            raise FrontendError(name, "fd", "no pipe", "state goes through a pipe")
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE not in (mode, os.O_RDWR):
            raise FrontendError(name, "fd", "open the wrong way", "a state is written when saved, read when loaded")
        self._ok = None
        self._name = name
        self._timer = Timer()
        self._timer.set(STATE_S)
        self._fd = os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._timer.fileno(), select.EPOLLIN)
        self._epoll.register(self._fd, events)

    def check(self) -> bool | None:
        """How the transfer has ended: True, well; False, not so; None, it is under way.

        Raises
        ------
        FrontendError
            There was none.
        """
        if self._fd < 0 and self._ok is None:
            raise FrontendError("CHECK_DEVICE_STATE", "transfer", "missing", "SET_DEVICE_STATE_FD begins one")
        return None if self._fd >= 0 else self._ok

    def dispatch(self, fd: int) -> bool:
        """Go on, if this descriptor is one that is waited for; False: it is not. Never raises for what a peer did."""
        if self._timer is None or fd not in (self._fd, self._timer.fileno()):
            return False
        try:
            if fd != self._fd:
                raise FrontendError(self._name, "progress", "missing", f"it must move within {STATE_S:.0f} s")
            for _ in range(CHUNKS_MAX):
                if not (self._write() if self._name == SAVE else self._read()):
                    break
        except (VqError, OSError) as error:
            self._warn(str(error) if isinstance(error, VqError) else f"{self._name}: {error.strerror}")
            self._finish(False)
        return True

    def _write(self) -> bool:
        """Write a part; whether more can be tried."""
        if not self._unsent:
            self._finish(True)
            return False
        try:
            count = os.write(self._fd, self._unsent[:CHUNK])
        except BlockingIOError:
            return False
        self._unsent = self._unsent[count:]
        self._moved()
        return True

    def _read(self) -> bool:
        """Read a part; whether more can be tried."""
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            load = self._load
            assert load is not None
            load(bytes(self._came))
            self._finish(True)
            return False
        self._came += data
        if len(self._came) > STATE_MAX:
            raise FrontendError(self._name, "state", f"more than {STATE_MAX} bytes", "no state of ours is that long")
        self._moved()
        return True

    def _moved(self) -> None:
        assert self._timer is not None
        self._timer.set(STATE_S)

    def _finish(self, ok: bool) -> None:
        self._ok = ok
        self._drop()

    def _drop(self) -> None:
        if self._fd >= 0:
            self._epoll.unregister(self._fd)
            os.close(self._fd)  # the front-end sees the end of what is saved
            self._fd = -1
        if self._timer is not None:
            with suppress(FileNotFoundError):
                self._epoll.unregister(self._timer.fileno())
            self._timer.close()
            self._timer = None
        self._unsent = memoryview(b"")
        self._came = bytearray()
        self._load = None

    def forget(self) -> None:
        """Stop what is under way, and know nothing of what was."""
        self._drop()
        self._ok = None
