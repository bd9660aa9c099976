"""The front-end's end of the back-end channel: serves what a back-end asks, and believes nothing of it.

A request is legal when its feature was negotiated and somebody serves it here; any other is refused if the back-end
wants to know, and the channel goes on. A stream that is broken ends the channel.

Spec: vhost-user, "Back-end message types"; a front-end's duties.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

from vq.errors import BackendError, ConnectionClosed, VqError
from vq.message import BACKEND, BACKEND_REQUESTS, BackendRequest, Message, Rule, close_fds, encode_ack
from vq.transport import Connection

__all__ = ["Handler", "RequestServer"]

logger = logging.getLogger(__name__)

# Serves a request whose form has been checked, takes the fds that it keeps, and raises VqError or OSError to refuse.
# Returns the fd that answers a SHARED_OBJECT_LOOKUP, which the server closes, or None.
Handler = Callable[[Message], int | None]

MESSAGES_MAX: Final = 64  # served in one go
NESTED_MAX: Final = 8  # requests that are served while another one's handler waits for the back-end


class RequestServer:
    """Serves the requests of a back-end.

    Parameters
    ----------
    sock
        Our end of the channel; owned from now on.
    negotiated
        Tells for a row of the table whether its features were negotiated; with True as second argument also whether
        descriptors may come.
    handlers
        Who serves what.

    Attributes
    ----------
    served, refused : int
        Requests so far.

    Notes
    -----
    Pollable: `fileno()` is readable when `dispatch()` has something to do. Threading: one thread.
    """

    def __init__(
        self,
        sock: socket.socket,
        negotiated: Callable[[Rule, bool], bool],
        handlers: Mapping[int, Handler] | None = None,
    ) -> None:
        self._connection = Connection(sock, table=BACKEND)
        self._negotiated = negotiated
        self.handlers: dict[int, Handler] = dict(handlers or {})
        self.served = 0
        self.refused = 0
        self._nested = 0  # calls of `dispatch` that are under way

    def fileno(self) -> int:
        """The descriptor to wait for; -1 when closed."""
        return self._connection.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether answers wait until the back-end reads."""
        return self._connection.wants_write

    @property
    def closed(self) -> bool:
        """Whether the channel is over."""
        return self._connection.closed

    def close(self) -> None:
        """End the channel."""
        self._connection.close()

    def dispatch(self) -> int:
        """Serve what has come; does not wait.

        Returns
        -------
        int
            Number of requests that were served or refused.

        Raises
        ------
        BackendError
            The stream is broken; the channel is closed.
        """
        count = 0
        self._nested += 1
        try:
            self._connection.flush()
            while count < MESSAGES_MAX and not self.closed:
                message = self._connection.receive()
                if message is None:
                    break
                count += 1
                try:
                    self._answer(message)
                finally:
                    message.close()
        except ConnectionClosed:
            self.close()
        except BaseException:
            self.close()
            raise
        finally:
            self._nested -= 1
        return count

    def _answer(self, message: Message) -> None:
        rule = BACKEND_REQUESTS.get(message.request)
        lookup = message.request == BackendRequest.SHARED_OBJECT_LOOKUP
        fd = None
        try:
            fd = self._handler(message, rule)(message)
            failed = lookup and fd is None
        except (VqError, OSError) as failure:
            logger.info("%s refused: %s", message.name, failure)
            failed = True
        self.refused += failed
        self.served += not failed
        fds = [] if fd is None else [fd]
        try:
            if (message.need_reply or lookup) and not self.closed:
                self._connection.send(encode_ack(message.request, failed), fds if lookup else [])
        finally:
            close_fds(fds)

    def _handler(self, message: Message, rule: Rule | None) -> Handler:
        handler = self.handlers.get(message.request)
        problem: tuple[str, Any, str] | None = None
        if rule is None:
            problem = ("request", message.request, "no such request")
        elif not self._negotiated(rule, bool(message.fds)):
            problem = ("features", "not negotiated", "the request needs them")
        elif handler is None:
            problem = ("request", "not served", "this front-end does without")
        elif self._nested > NESTED_MAX:
            # A back-end that asks on instead of answering would take us ever deeper.
            problem = ("request", "inside of others", f"at most {NESTED_MAX} are served inside of each other")
        if problem is not None:
            raise BackendError(message.name, *problem)
        assert handler is not None
        return handler
