"""The back-end channel: our own requests to the front-end, on the socket that SET_BACKEND_REQ_FD brought.

Nothing here waits. One request that asks for an ack is under way at most; what comes up meanwhile is said afterwards,
in one message, since the front-end reads the whole configuration space anew each time.

Spec: vhost-user, "Back-end message types"; VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Final

from vq.errors import FrontendError
from vq.message import HEADER, REPLY_FLAGS, BackendRequest, encode_backend_request
from vq.payload import U64

__all__ = ["BackendChannel"]

ACK_BYTES: Final = HEADER.size + 8
ACK_S: Final = 10.0  # that an ack may take


class BackendChannel:
    """One end of the channel.

    Parameters
    ----------
    fd
        Socket from the front-end; it stays the caller's.

    Raises
    ------
    OSError
        There is no room for another descriptor.

    Notes
    -----
    Whatever is wrong with the channel raises `FrontendError` or `OSError`, and then it is of no use any more: the
    caller closes it, and the connection goes on. Threading: one control thread.
    """

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(fd))
        self._received = b""
        self._due = False  # the configuration space has changed, and nobody has been told
        self._asked_at: float | None = None  # an ack is awaited since

    def fileno(self) -> int:
        """The descriptor to wait for: readable when `receive` has something to do."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close our copy of the socket; may be called twice."""
        self._socket.close()

    def give_up(self) -> None:
        """End the conversation, so that the front-end knows too: the session holds the socket as well."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def announce_config(self, *, need_reply: bool) -> None:
        """Say that the configuration space has changed: now, or as soon as the ack before has come.

        Parameters
        ----------
        need_reply
            REPLY_ACK was negotiated, so that an ack can be asked for.
        """
        if self._asked_at is not None:
            self._due = True
            if time.monotonic() - self._asked_at > ACK_S:
                raise self._wrong("ack", "missing", f"it must come within {ACK_S:.0f} s")
            return
        self._due = False
        data = encode_backend_request(BackendRequest.CONFIG_CHANGE_MSG, need_reply=need_reply)
        # MSG_DONTWAIT belongs to the call; the front-end could clear O_NONBLOCK, which belongs to the open socket.
        if self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) != len(data):
            raise self._wrong("stream", "full", "the front-end must read what it is sent")
        if need_reply:
            self._asked_at = time.monotonic()

    def receive(self) -> bool:
        """Take the ack that was asked for; anything else is an error. False: the front-end has refused."""
        try:
            data = self._socket.recv(ACK_BYTES - len(self._received), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        if not data:
            raise self._wrong("stream", "at its end", "the channel lasts as long as the connection")
        if self._asked_at is None:
            raise self._wrong("message", "unexpected", "only acks that were asked for come this way")
        self._received += data
        if len(self._received) < ACK_BYTES:
            return True
        reply, self._received = self._received, b""
        request, flags, size = HEADER.unpack(reply[: HEADER.size])
        if (request, flags, size) != (BackendRequest.CONFIG_CHANGE_MSG, REPLY_FLAGS, 8):
            raise self._wrong("reply", (request, flags, size), "an ack is (2, 5, 8)")
        self._asked_at = None
        if self._due:
            self.announce_config(need_reply=True)
        return U64.decode(reply[HEADER.size :]) == 0

    @staticmethod
    def _wrong(field: str, value: object, limit: str) -> FrontendError:
        return FrontendError("back-end channel: CONFIG_CHANGE_MSG", field, value, limit)
