"""How the front-end role talks to a back-end: requests, the answers that are due, and the back-end's own requests.

Flags, request, size and number of fds of every reply are checked, and every wait ends. What each request is for stands
in `vq.frontend_messages`.

Spec: vhost-user, "Communication", "Message specification".
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Self

from vq import virtio as v
from vq.closing import Closing
from vq.endpoint import Connector, listen
from vq.errors import BackendError, ConnectionClosed, ResourceError, UsageError
from vq.message import FRONTEND_REQUESTS, VERSION, Message, Request, Rule, encode, encode_request, request_name
from vq.request_server import Handler, RequestServer
from vq.transport import Connection

__all__ = ["Dialogue"]

# Replies that may bring an fd, and that must not bring more than one.
_REPLIES_WITH_FD: Final = frozenset(
    {Request.POSTCOPY_ADVISE, Request.GET_INFLIGHT_FD, Request.GET_SHARED_OBJECT, Request.SET_DEVICE_STATE_FD}
)


class _Expected:
    """A reply on its way, and the message when it has come."""

    __slots__ = ("message",)

    def __init__(self) -> None:
        self.message: Message | None = None


class Dialogue(Closing):
    """A connection to a back-end, over which messages go.

    Parameters
    ----------
    connection
        A connection that expects replies.
    timeout
        Seconds that any answer may take.

    Attributes
    ----------
    features, protocol_features
        What has been acknowledged so far.
    offered_features, offered_protocol_features
        What the back-end has offered.
    channel
        Serves the requests of the back-end, while we wait for something and in `serve`; None before `open_channel`.
    """

    def __init__(self, connection: Connection, *, timeout: float = 5.0) -> None:
        self._connection = connection
        self.timeout = timeout
        self.offered_features = 0
        self.offered_protocol_features = 0
        self.features = 0
        self.protocol_features = 0
        self.channel: RequestServer | None = None
        self._expected: deque[_Expected] = deque()  # replies on their way, in order

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, timeout: float = 5.0) -> Self:
        """Connect to a back-end that listens, trying again until the time is over.

        Raises
        ------
        ResourceError
            Nobody listened in time.
        """
        connector = Connector(path, first_delay=0.01, last_delay=0.1)
        end = time.monotonic() + timeout
        while True:
            connection = connector.attempt(replies=True)
            if connection is not None:
                return cls(connection, timeout=timeout)
            if time.monotonic() >= end and connector.last_error is not None:
                raise connector.last_error
            time.sleep(connector.next_attempt_in())

    @classmethod
    def listen(cls, path: str | os.PathLike[str], *, timeout: float = 5.0) -> Self:
        """Wait for a back-end that connects to us (client mode).

        Raises
        ------
        ResourceError
            Nobody connected in time.
        """
        listener = listen(path)
        try:
            _wait(listener.fileno(), select.POLLIN, timeout)
            connection = listener.accept(replies=True)
        finally:
            listener.close()
        if connection is None:
            remedy = "start the back-end in client mode"
            raise ResourceError(f"no back-end connected within {timeout:g} s", path=os.fsdecode(path), remedy=remedy)
        return cls(connection, timeout=timeout)

    @classmethod
    def adopt(cls, sock: socket.socket, *, timeout: float = 5.0) -> Self:
        """Use a connected socket, such as one end of a socketpair; the front-end owns it from now on."""
        return cls(Connection(sock, replies=True), timeout=timeout)

    def fileno(self) -> int:
        """Give the socket's fd; -1 when closed."""
        return self._connection.fileno()

    def peer_process(self) -> int:
        """Give the number of the process that listens, as the kernel knows it."""
        return self._connection.peer_process()

    def close(self) -> None:
        """Close the connection: the back-end must then let go of everything."""
        self._connection.close()
        if self.channel is not None:
            self.channel.close()

    def has_protocol(self, bit: int) -> bool:
        """Tell whether a protocol feature has been acknowledged."""
        return v.has(self.protocol_features, bit)

    # --- Messages ----------------------------------------------------------------------------------------------------

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION) -> None:
        """Send any bytes as a message, right or wrong, and wait for nothing."""
        self._transmit(encode(request, payload, flags), fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send any bytes, with fds at the first of them, and wait for nothing: pieces of messages, several at once."""
        self._transmit(data, fds)

    def end_sending(self) -> None:
        """Send nothing more: what the back-end has got of a message is all that comes of it."""
        self._connection.end_sending()

    def receive(self, timeout: float | None = None) -> Message:
        """Wait for the next reply, whatever it answers; its form has been checked.

        Raises
        ------
        BackendError
            Wrong form, end inside a message, or nothing in time.
        ConnectionClosed
            The back-end ended the connection.
        """
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        message = None
        while message is None:
            message = self._receive_or_serve(end, timeout or self.timeout)
        return message

    def replies(self, timeout: float | None = None) -> Iterator[Message]:
        """Give whatever comes, however much it is, until the time for all of it is over.

        Raises
        ------
        BackendError, ConnectionClosed
            As `receive`, but for the time.
        """
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while (left := end - time.monotonic()) > 0:
            message = self._connection.receive()
            if message is None:
                self._wait(left)
            else:
                yield message

    def _receive_or_serve(self, end: float, timeout: float) -> Message | None:
        """Wait for something to come and take it: a reply, or requests of the back-end, which are served."""
        message = self._connection.receive()
        if message is not None:
            return message
        left = end - time.monotonic()
        if left <= 0:
            raise BackendError("reply", "time", "over", f"nothing came within {timeout:g} s")
        self._wait(left)
        return None

    def _wait(self, seconds: float, events: int = select.POLLIN) -> None:
        """Wait for the main socket, and serve the channel, if there is one, once something comes there."""
        channel = self.channel
        poller = select.poll()
        poller.register(self._connection.fileno(), events)
        if channel is not None and not channel.closed:
            poller.register(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.wants_write else 0))
        ready = [fd for fd, _ in poller.poll(max(0.0, seconds) * 1000)]
        if channel is not None and channel.fileno() in ready:
            channel.dispatch()

    def request(self, request: int, payload: Any = None, fds: Sequence[int] = ()) -> Any:
        """Send a request, and wait for its reply or ack if one is due.

        Parameters
        ----------
        request
            Request number.
        payload
            Value for the request's codec (`vq.payload`), None for none.
        fds
            Fds to go along; they stay the caller's.

        Returns
        -------
        object
            The decoded payload of the request's own reply; None for a request that is only acked.

        Raises
        ------
        BackendError
            A nack, a wrong reply, or none in time.
        ConnectionClosed
            The back-end ended the connection.
        """
        message = self._exchange(request, payload, fds)
        if message is None:
            return None
        try:
            if message.fds:
                limit = "this request takes its reply without; use request_fd"
                raise BackendError(message.name, "number of fds", len(message.fds), limit)
            return message.payload
        finally:
            message.close()

    def request_fd(self, request: int, payload: Any = None, fds: Sequence[int] = ()) -> tuple[Any, int | None]:
        """Send a request whose reply may bring an fd; the caller owns that fd."""
        message = self._exchange(request, payload, fds)
        if message is None:
            return None, None
        return message.payload, message.take_fd()

    def _exchange(self, request: int, payload: Any, fds: Sequence[int]) -> Message | None:
        rule = FRONTEND_REQUESTS[request]
        acked = rule.reply is None and (rule.ack_always or self.has_protocol(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
        self._transmit(encode_request(request, payload, need_reply=acked), fds)
        if rule.reply is None and not acked:
            return None
        message = self._reply()
        try:
            self._check(request, message, acked)
        except BaseException:
            message.close()
            raise
        return None if acked else message

    def _reply(self) -> Message:
        """Wait for the reply to what was sent last.

        Who serves the back-end meanwhile may send requests too (an IOTLB update, because of a miss): replies are handed
        out in the order of the requests.
        """
        mine = _Expected()
        self._expected.append(mine)
        end = time.monotonic() + self.timeout
        try:
            while mine.message is None:
                message = self._receive_or_serve(end, self.timeout)
                if message is not None:
                    self._expected.popleft().message = message
            return mine.message
        finally:
            with suppress(ValueError):  # it has come
                self._expected.remove(mine)

    def _check(self, request: int, message: Message, acked: bool) -> None:
        name = request_name(request)
        if message.request != request:
            raise BackendError(name, "reply", message.name, "a reply repeats the request", fatal=True)
        limit = 1 if request in _REPLIES_WITH_FD else 0
        if len(message.fds) > limit:
            raise BackendError(name, "number of fds", len(message.fds), f"the reply takes up to {limit}", fatal=True)
        if acked and message.payload != 0:
            raise BackendError(name, "ack", message.payload, "the back-end refused; see its log")

    def _transmit(self, data: bytes, fds: Sequence[int]) -> None:
        end = time.monotonic() + self.timeout
        self._connection.send(data, fds)
        while self._connection.wants_write:
            left = end - time.monotonic()
            if left <= 0:
                raise BackendError("request", "time", "over", f"the back-end read nothing for {self.timeout:g} s")
            self._wait(left, select.POLLOUT)
            self._connection.flush()

    # --- The back-end channel ----------------------------------------------------------------------------------------

    def open_channel(self, handlers: Mapping[int, Handler] | None = None) -> RequestServer:
        """Give the back-end a channel for its own requests; one that was given before is closed.

        Parameters
        ----------
        handlers
            Who serves which request; may be changed later (`RequestServer.handlers`). They run while we wait for a
            reply, and in `serve`; they may send requests, except under a `receive` of the caller's own.

        Raises
        ------
        UsageError
            BACKEND_REQ was not negotiated.
        """
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_BACKEND_REQ):
            raise UsageError("open_channel: BACKEND_REQ was not negotiated; want it in negotiate()")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        server = RequestServer(ours, self.may_ask, handlers)
        try:
            with theirs:
                self.request(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
        except BaseException:
            server.close()
            raise
        if self.channel is not None:
            self.channel.close()
        self.channel = server
        return server

    def may_ask(self, rule: Rule, with_fds: bool) -> bool:
        """Whether the back-end may make a request, by what was negotiated."""
        protocol, feature = rule.gate
        return (
            (protocol is None or self.has_protocol(protocol))
            and (feature is None or v.has(self.features, feature))
            and (not with_fds or self.has_protocol(v.VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD))
        )

    def serve(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Serve the back-end until a condition holds or the time is over; tells whether it holds."""
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while not until():
            left = end - time.monotonic()
            if left <= 0:
                return False
            poller = select.poll()
            if self.channel is not None and not self.channel.closed:
                poller.register(self.channel.fileno(), select.POLLIN)
            if poller.poll(min(left, 0.01) * 1000) and self.channel is not None:
                self.channel.dispatch()
        return True

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Tell whether the back-end closes the connection in time; replies on the way are thrown away."""
        try:
            for message in self.replies(timeout):
                message.close()
            return False
        except ConnectionClosed:
            return True
        except BackendError as problem:
            return problem.field == "stream"  # closed in the middle of a reply; anything else is no end


def _wait(fd: int, events: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(fd, events)
    poll.poll(max(0.0, seconds) * 1000)
