"""One stream of messages: the only sendmsg and recvmsg, framing, and the passing of fds.

`Connection` never waits: it keeps what has come of an unfinished message, so that a slow or silent peer costs nobody
anything. `vq.endpoint` makes connections.

About fds on a stream: Linux ends a recvmsg behind the buffer that carried fds, but not before it, so a generous read
returns the end of one message together with the fds of the next. Therefore the header and the payload are read apart
and exactly, which costs messages with a payload a second system call. Only the read that starts a header provides room
for fds: where there is none the kernel drops fds that come and says MSG_CTRUNC.

Spec: vhost-user, "Communication".
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from vq.errors import BackendError, ConnectionClosed, FrontendError, PeerError
from vq.message import FDS_MAX, FRONTEND, HEADER, Header, Message, Table, close_fds, decode, decode_header
from vq.reaper import close_fd, close_socket

SEND_BUFFER_MAX: Final = 64 * 1024
SEND_FDS_MAX: Final = 16  # that wait with it: each takes one of those that all connections share
_SO_PASSSEC: Final = 34
_UCRED: Final = struct.Struct("=iII")  # pid, uid, gid
_FD_SIZE: Final = array.array("i").itemsize
_FDS_SENT_MAX: Final = 253  # SCM_MAX_FD of Linux: nobody can send more at once
_FDS_SPACE: Final = socket.CMSG_SPACE(_FDS_SENT_MAX * _FD_SIZE)


class Connection:
    """One stream of messages over a connected Unix socket.

    Parameters
    ----------
    sock
        Connected socket; the connection owns it from now on and makes it non-blocking.
    replies
        False: requests come in. True: replies come in.
    table
        Whose requests the stream carries: with those of the front-end the peer is a front-end if requests come in and a
        back-end if replies do; with those of the back-end it is the other way round.
    """

    def __init__(self, sock: socket.socket, *, replies: bool = False, table: Table = FRONTEND) -> None:
        self._sock = sock
        self._replies = replies
        self._table = table
        self._error: type[PeerError] = BackendError if replies == (table is FRONTEND) else FrontendError
        self._header = b""
        self._body = b""
        self._parsed: Header | None = None
        self._fds: list[int] = []
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._unsent_bytes = 0
        self.closed = False
        sock.setblocking(False)
        # An inherited socket may have these on; their control messages would look like fds that were cut off.
        for option in (socket.SO_PASSCRED, _SO_PASSSEC):
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, 0)

    def fileno(self) -> int:
        """Give the socket's fd, for an event loop; -1 when closed."""
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether `flush` has something to send when the socket can take it."""
        return bool(self._unsent)

    @property
    def amid_message(self) -> bool:
        """Whether a part of a message has come, and the rest has not."""
        return bool(self._header)

    def receive(self) -> Message | None:
        """Take the next message, or None if it has not come completely yet.

        One call takes one message, so the caller decides how many a peer may have served in a row. The message owns its
        fds.

        Raises
        ------
        ConnectionClosed
            The peer ended the connection between two messages.
        FrontendError, BackendError
            The stream is broken: form of a message, end inside of one, too many fds, or fds in a wrong place.
        """
        try:
            if self._parsed is None and not self._read_header():
                return None
            header = self._parsed
            assert header is not None
            if len(self._body) < header.size and not self._read_body(header):
                return None
            body = self._body
            self._header = self._body = b""
            self._parsed = None
            return decode(header, body, self._fds, reply=self._replies, error=self._error, table=self._table)
        except BaseException:
            close_fds(self._fds)
            raise

    def _read_header(self) -> bool:
        while len(self._header) < HEADER.size:
            # Fds belong to the first byte of the header, so only the first read may bring some.
            data = self._read(HEADER.size - len(self._header), FDS_MAX if not self._header else 0)
            if data is None:
                return False
            if not data:
                self._end()
            self._header += data
        self._parsed = decode_header(self._header, reply=self._replies, error=self._error, table=self._table)
        return True

    def _read_body(self, header: Header) -> bool:
        while len(self._body) < header.size:
            data = self._read(header.size - len(self._body), 0)
            if data is None:
                return False
            if not data:
                self._end()
            self._body += data
        return True

    def _read(self, size: int, allowed: int) -> bytes | None:
        """Read up to `size` bytes; None if nothing is there now, b"" at the end of the stream.

        There is always room for all fds that can come, allowed or not: the kernel would close the others in here, and
        closing can be made to hang (vq.reaper).
        """
        how = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(size, _FDS_SPACE, how)
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionResetError:
            return b""  # the peer went away without reading our last replies
        came = 0
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % _FD_SIZE])
                self._fds.extend(fds)
                came += len(fds)
        if came > allowed or flags & socket.MSG_CTRUNC:
            value = "too high" if allowed else "not 0 inside a message"
            limit = f"up to {FDS_MAX} come with the first byte of a message (or our own limit of open files is reached)"
            raise self._error(self._name(), "number of fds", value, limit, fatal=True)
        return data

    def _end(self) -> None:
        if not self._header:
            raise ConnectionClosed("the peer closed the connection")
        have = len(self._header) + len(self._body)
        size = HEADER.size + (self._parsed.size if self._parsed else 0)
        raise self._error(self._name(), "stream", "at its end", f"only {have} of {size} bytes came", fatal=True)

    def _name(self) -> str:
        return self._table.name(self._parsed.request) if self._parsed else "header"

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message now as far as the socket takes it, the rest with `flush`.

        Parameters
        ----------
        data
            A whole message.
        fds
            Fds to go with its first byte; they stay the caller's, who may close them at once.

        Raises
        ------
        FrontendError, BackendError
            The peer has left SEND_BUFFER_MAX bytes or SEND_FDS_MAX fds unread: it does not read its replies.
        ConnectionClosed
            The peer is gone.
        """
        rest = memoryview(data)
        if not self._unsent:
            rest = rest[self._write(rest, fds) :]
            if not rest:
                return
            if len(rest) < len(data):
                fds = ()
        if self._unsent_bytes + len(rest) > SEND_BUFFER_MAX:
            value = f"{self._unsent_bytes + len(rest)} bytes"
            limit = f"a peer may leave {SEND_BUFFER_MAX} bytes unread"
            raise self._error("messages to it", "unread", value, limit, fatal=True)
        waiting = sum(len(some) for _, some in self._unsent) + len(fds) if fds else 0
        if waiting > SEND_FDS_MAX:
            limit = f"a peer may leave {SEND_FDS_MAX} unread"
            raise self._error("messages to it", "unread descriptors", waiting, limit, fatal=True)
        copies: list[int] = []
        try:
            copies.extend(os.dup(fd) for fd in fds)
        except BaseException:
            close_fds(copies)
            raise
        self._unsent.append((rest, copies))
        self._unsent_bytes += len(rest)

    def flush(self) -> None:
        """Send what is left, as far as the socket takes it.

        Raises
        ------
        ConnectionClosed
            The peer is gone.
        """
        while self._unsent:
            data, fds = self._unsent[0]
            sent = self._write(data, fds)
            if not sent:
                return
            close_fds(fds)
            self._unsent_bytes -= sent
            if sent < len(data):
                self._unsent[0] = (data[sent:], [])
            else:
                self._unsent.popleft()

    def _write(self, data: memoryview, fds: Sequence[int]) -> int:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            return self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return 0
        except (BrokenPipeError, ConnectionResetError):
            raise ConnectionClosed("the peer closed the connection before it read our message") from None

    def peer_process(self) -> int:
        """The number of the process at the other end: of a listening socket, the one that made it listen."""
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return int(_UCRED.unpack(credentials)[0])

    def end_sending(self) -> None:
        """Tell the peer that nothing more comes, while its replies can still be received."""
        with suppress(OSError):  # the peer has closed already
            self._sock.shutdown(socket.SHUT_WR)

    def close(self, *, hang_up: bool = True) -> None:
        """Close the socket and every fd that waits in either direction. Does nothing the second time.

        Parameters
        ----------
        hang_up
            False: the peer must not see an end, since others hold the same socket.
        """
        self.closed = True
        close_fds(self._fds)
        for _, fds in self._unsent:
            close_fds(fds)
        self._unsent.clear()
        self._unsent_bytes = 0
        if self._sock.fileno() >= 0:
            if hang_up:
                close_socket(self._sock)
            else:
                close_fd(self._sock.detach())
