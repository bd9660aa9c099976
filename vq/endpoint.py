"""How connections come to be: listen on a path, connect to one again and again, take over an inherited fd.

Whether we listen or connect says nothing about who is front-end and who is back-end. Nothing here waits, except that
`listen` may wait up to a second for another process of ours that is just making its socket.

Spec: vhost-user, "Communication", "Backend program conventions".
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from vq.errors import ResourceError, UsageError
from vq.transport import Connection

PATH_MAX: Final = 107  # sun_path has 108 bytes with the final NUL


class Listener:
    """A listening Unix socket; made by `listen` or `adopt`."""

    def __init__(self, sock: socket.socket, path: str = "") -> None:
        self._sock = sock
        self._own: tuple[int, int] | None = None  # device and inode of the socket file that we made
        self.path = path
        sock.setblocking(False)

    def bind(self, mode: int | None, backlog: int) -> None:
        """Make the socket file and listen; `listen` explains."""
        try:
            if mode is not None:
                # Linux gives the socket file the mode of the unbound socket less the umask, so that at no moment it
                # has more rights than asked for; chmod afterwards adds what the umask took.
                os.fchmod(self._sock.fileno(), mode)
            with _directory_lock(self.path):
                _remove_stale(self.path)
                self._sock.bind(self.path)
            status = os.lstat(self.path)
            self._own = (status.st_dev, status.st_ino)
            if mode is not None:
                os.chmod(self.path, mode)
            self._sock.listen(backlog)
        except OSError as problem:
            remedy = "check that the directory exists and may be written to"
            raise ResourceError("cannot listen", errno=problem.errno or 0, path=self.path, remedy=remedy) from problem

    def fileno(self) -> int:
        """Give the socket's fd, for an event loop; -1 when closed."""
        return self._sock.fileno()

    def accept(self, *, replies: bool = False) -> Connection | None:
        """Take the next connection, or None if nobody waits.

        Raises
        ------
        ResourceError
            We cannot have more connections now, for want of fds or memory.
        """
        sock = self.accept_socket()
        return None if sock is None else Connection(sock, replies=replies)

    def accept_socket(self) -> socket.socket | None:
        """As `accept`, for a socket of another protocol."""
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None
        except OSError as problem:
            remedy = "close some, or raise the limit of open files (ulimit -n)"
            raise ResourceError("cannot accept", errno=problem.errno or 0, path=self.path, remedy=remedy) from problem
        return sock

    def close(self) -> None:
        """Stop listening, and remove the socket file if it is still the one that we made."""
        if self._own is not None:
            with suppress(OSError):  # it is not there any more, or the way to it is not
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == self._own:
                    os.unlink(self.path)
            self._own = None
        self._sock.close()


def listen(path: str | os.PathLike[str], *, mode: int | None = None, backlog: int = 8) -> Listener:
    """Listen on a socket path; a socket file that nobody uses any longer is replaced.

    Parameters
    ----------
    path
        Where; up to 107 bytes.
    mode
        Permission bits of the socket file, 0 to 0o777; None leaves them to the umask.
    backlog
        Connections that may wait to be accepted.

    Raises
    ------
    UsageError
        The mode has other bits; decimal digits, such as 660 in place of 0o660, have them.
    ResourceError
        The path is too long, is not a socket, belongs to a living process, or cannot be made.
    """
    path = _checked_path(path)
    if mode is not None and not (isinstance(mode, int) and 0 <= mode <= 0o777):
        raise UsageError(f"mode is {mode!r}; permission bits are 0 to 0o777, and octal, such as 0o660")
    listener = Listener(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path)
    try:
        listener.bind(mode, backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _checked_path(path: str | os.PathLike[str]) -> str:
    text = os.fsdecode(path)
    size = len(os.fsencode(text))
    if size == 0:
        raise ResourceError("the path of the socket is empty", remedy="give one, such as /run/vq/a.sock")
    if size > PATH_MAX:
        remedy = f"a socket path has 1 to {PATH_MAX} bytes; use a shorter directory"
        raise ResourceError(f"the path has {size} bytes", path=text, remedy=remedy)
    return text


@contextmanager
def _directory_lock(path: str) -> Iterator[None]:
    """Keep other processes of ours out between the look for a stale socket and the bind.

    The lock sits on the directory, so that it leaves no file behind. It only guards against a race, so that after a
    second without it we go on.
    """
    fd = -1
    with suppress(OSError):  # not readable for us; bind will tell whether it can be used
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(100 if fd >= 0 else 0):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.01)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _remove_stale(path: str) -> None:
    """Remove a socket file that no process has bound; raise if anything else is there."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        remedy = "choose another path or remove it"
        raise ResourceError("a file that is not a socket is there", path=path, remedy=remedy)
    # A datagram socket cannot connect to a stream socket: the kernel refuses for the type if a living process has it
    # bound and for want of a listener if not, and the living process notices nothing of the question.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        answer = probe.connect_ex(path)
    if answer == errno.ECONNREFUSED:
        with suppress(FileNotFoundError):
            os.unlink(path)
    elif answer in (0, errno.EPROTOTYPE):
        remedy = "stop that process, choose another path, or connect to it (client mode)"
        raise ResourceError("a living process uses this socket", path=path, remedy=remedy)
    elif answer != errno.ENOENT:
        remedy = "check the permissions of the socket and its directory"
        raise ResourceError("cannot tell whether the socket is in use", errno=answer, path=path, remedy=remedy)


def adopt(fd: int, *, replies: bool = False) -> Listener | Connection:
    """Take over an inherited Unix stream socket, listening or connected; it is never unlinked.

    Raises
    ------
    UsageError
        The fd is not a Unix stream socket; it stays the caller's.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as problem:
        raise UsageError(f"fd {fd}: {problem.strerror}; pass the number of an open Unix stream socket") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise UsageError(f"fd {fd}: a {sock.family.name} {sock.type.name} socket; pass a Unix stream socket")
    os.set_inheritable(fd, False)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return Listener(sock)
    return Connection(sock, replies=replies)


class Connector:
    """Connects to a listening peer, again and again, with growing pauses; never waits.

    Parameters
    ----------
    path
        Where the peer listens.
    first_delay, last_delay
        Pause after the first failure and the longest pause, in seconds; each failure doubles it.
    clock
        Monotonic time in seconds.

    Notes
    -----
    When `next_attempt_in` has passed call `attempt`; when the connection has ended call `lost`.
    """

    STABLE = 1.0  # seconds after which a connection counts as a success, so that its end starts the pauses anew

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        first_delay: float = 0.05,
        last_delay: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = _checked_path(path)
        self.last_error: ResourceError | None = None
        self._first = first_delay
        self._last = last_delay
        self._clock = clock
        self._delay = first_delay
        self._due = clock()
        self._since = 0.0

    def next_attempt_in(self) -> float:
        """Tell how many seconds are left until the next attempt is due; 0 = now."""
        return max(0.0, self._due - self._clock())

    def attempt(self, *, replies: bool = False) -> Connection | None:
        """Try to connect; None (and a reason in `last_error`) if nobody is there."""
        sock = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)  # a full backlog is a failure like others, not a reason to wait
            sock.connect(self.path)
        except OSError as problem:
            if sock is not None:
                sock.close()
            number = problem.errno or 0
            remedy = "start the peer that is to listen there"
            if number in (errno.EACCES, errno.EPERM):
                remedy = "check the permissions of the socket and its directory"
            elif number in (errno.EMFILE, errno.ENFILE):
                remedy = "close some files, or raise the limit of open files (ulimit -n)"
            self.last_error = ResourceError("cannot connect", errno=number, path=self.path, remedy=remedy)
            self._postpone()
            return None
        self.last_error = None
        self._since = self._clock()
        return Connection(sock, replies=replies)

    def lost(self) -> None:
        """Say that the connection has ended; a peer that closes at once is not asked again at once."""
        if self._clock() - self._since >= self.STABLE:
            self._delay = self._first
        self._postpone()

    def _postpone(self) -> None:
        self._due = self._clock() + self._delay
        self._delay = min(self._last, 2 * self._delay)
