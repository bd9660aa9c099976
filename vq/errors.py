"""The exception tree: whose fault it was decides the class.

========================  =====================================================
`UsageError`              the caller: a wrong argument or a call in a wrong state
`FrontendError`           the peer in the front-end role broke the protocol
`BackendError`            the peer in the back-end role broke the protocol
`GuestError`              the driver in the guest broke a ring
`ResourceError`           the machine: a file, a permission, a limit
`ConnectionClosed`        nobody: the peer ended the connection between two messages
========================  =====================================================
"""

from __future__ import annotations

import os


class VqError(Exception):
    """Base of everything that vq raises on purpose.

    Attributes
    ----------
    fatal
        True when the stream or the state can no longer be trusted, so that only closing the connection is left.
    """

    fatal = False


class UsageError(VqError):
    """The caller asked for something that makes no sense; the message says what to write instead."""


class PeerError(VqError):
    """The process at the other end of the socket broke the protocol.

    Parameters
    ----------
    request
        Name of the message, such as "SET_VRING_NUM".
    field
        The part of it that was wrong.
    value
        What it held.
    limit
        What it should have been: range, size, state.
    fatal
        Only closing is left. A failure that is not fatal is answered with a nack where the message has room for one.
    """

    peer = "peer"

    def __init__(self, request: str, field: str, value: object, limit: str, *, fatal: bool = False) -> None:
        super().__init__(f"{self.peer}: {request}: {field} is {value}; {limit}")
        self.request = request
        self.field = field
        self.value = value
        self.limit = limit
        self.fatal = fatal


class FrontendError(PeerError):
    """The front-end (QEMU, virtio-user, ...) broke the protocol."""

    peer = "front-end"


class BackendError(PeerError):
    """The back-end that we drive broke the protocol, refused, or did not answer in time."""

    peer = "back-end"


class GuestError(VqError):
    """The driver broke a ring; only that ring stops.

    Parameters
    ----------
    queue
        Index of the virtqueue.
    head
        Head of the descriptor chain, or None if the ring itself was wrong.
    cause
        What was found, with value and limit.
    section
        Where the specification says so, such as "VIRTIO 1.3, 2.7.13".
    """

    def __init__(self, queue: int, head: int | None, cause: str, section: str = "") -> None:
        where = f"queue {queue}" if head is None else f"queue {queue}, head {head}"
        super().__init__(f"{where}: {cause}; queue stopped" + (f" ({section})" if section else ""))
        self.queue = queue
        self.head = head
        self.cause = cause
        self.section = section


class ResourceError(VqError):
    """The machine refused: a path, a permission, a limit.

    Parameters
    ----------
    what
        What could not be done, for people.
    errno
        Error number of the system call, 0 if it was our own check.
    path
        The file, socket or interface concerned.
    remedy
        What the reader can do about it.
    """

    def __init__(self, what: str, *, errno: int = 0, path: str = "", remedy: str = "") -> None:
        reason = f": {os.strerror(errno)}" if errno else ""
        where = f"{path}: " if path else ""
        super().__init__(f"{where}{what}{reason}" + (f"; {remedy}" if remedy else ""))
        self.what = what
        self.errno = errno
        self.path = path
        self.remedy = remedy


class ConnectionClosed(VqError):
    """The peer closed the connection between two messages, which is the orderly way to end a session."""
