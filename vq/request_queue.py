"""Our own requests on their way to the front-end: a bounded queue on the socket of the back-end channel.

Nothing here waits. One request that is to be answered is under way at most, since only the order tells which answer
belongs to which; those that are not answered may overtake the ones that wait for their turn, though never one about
the same subject. So a front-end that does not answer keeps back nothing but questions, and these fail after `ANSWER_S`.

Spec: vhost-user, "Back-end message types", VHOST_USER_PROTOCOL_F_REPLY_ACK.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from vq.errors import FrontendError, ResourceError, VqError
from vq.message import BACKEND, BACKEND_REQUESTS, BackendRequest, Message, close_fds, encode_backend_request
from vq.transport import Connection
from vq_core.timer import Timer

__all__ = ["ANSWER_S", "QUEUE_MAX", "Done", "RequestQueue"]

logger = logging.getLogger(__name__)

# Called with what went wrong, or None, and with the descriptor that an answer brought: the callee's from then on.
Done = Callable[[VqError | None, int | None], None]

QUEUE_MAX: Final = 256  # requests that wait
ANSWER_S: Final = 10.0  # that an answer may take, waiting for its turn included
MESSAGES_MAX: Final = 64  # taken in one go

B = BackendRequest
# Requests of one subject keep their order.
SUBJECTS: Final[dict[int, str]] = {
    B.IOTLB_MSG: "iotlb",
    B.CONFIG_CHANGE_MSG: "config",
    B.VRING_HOST_NOTIFIER_MSG: "notifier",
    B.VRING_CALL: "call",
    B.VRING_ERR: "err",
    B.SHARED_OBJECT_ADD: "shared object",
    B.SHARED_OBJECT_REMOVE: "shared object",
    B.SHARED_OBJECT_LOOKUP: "shared object",
    B.SHMEM_MAP: "shmem",
    B.SHMEM_UNMAP: "shmem",
}
# What is said twice before it was sent once is sent once.
IDEMPOTENT: Final = frozenset({B.IOTLB_MSG, B.CONFIG_CHANGE_MSG, B.VRING_CALL, B.VRING_ERR})


@dataclass(slots=True, eq=False)
class _Entry:
    """A request that has not been dealt with; owns its fds."""

    request: BackendRequest
    payload: Any
    fds: list[int]
    need_reply: bool
    done: Done | None
    deadline: float | None = None

    @property
    def answered(self) -> bool:
        return self.need_reply or BACKEND_REQUESTS[self.request].reply is not None

    def same(self, other: _Entry) -> bool:
        return (
            self.request in IDEMPOTENT
            and (self.request, self.payload, self.need_reply, self.done)
            == (other.request, other.payload, other.need_reply, other.done)
            and not self.fds
        )

    def finish(self, failure: VqError | None, fd: int | None = None) -> None:
        close_fds(self.fds)
        done, self.done = self.done, None
        if done is None:
            close_fds([] if fd is None else [fd])
            return
        try:
            done(failure, fd)
        except Exception:
            logger.exception("callback of %s failed", self.request.name)


class RequestQueue:
    """The socket, what waits for it, and what is to be answered.

    Parameters
    ----------
    fd
        Socket from the front-end; it stays the caller's.
    held
        Whether nothing may be said now: all rings stand.

    Raises
    ------
    FrontendError
        It is no Unix stream socket.
    OSError
        There is no room for more descriptors.

    Notes
    -----
    Event loops wait until `fileno()` is readable and call `dispatch()`. Threading: one control thread; callbacks run in
    it, and may send.
    """

    def __init__(self, fd: int, held: Callable[[], bool] = lambda: False) -> None:
        if not is_unix_stream(fd):
            limit = "the back-end channel is a Unix stream socket"
            raise FrontendError("SET_BACKEND_REQ_FD", "fd", "another socket", limit)
        self._held = held
        self._waiting: list[_Entry] = []
        self._asked: _Entry | None = None
        self.closed = False
        self._epoll = select.epoll()
        self._timer = Timer()
        self._connection = Connection(socket.socket(fileno=os.dup(fd)), replies=True, table=BACKEND)
        self._epoll.register(self._timer.fileno(), select.EPOLLIN)
        self._epoll.register(self._connection.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """The descriptor to wait for: readable when `dispatch` has something to do."""
        return self._epoll.fileno()

    @property
    def overdue(self) -> bool:
        """Whether an answer should have come and has not: questions will not be answered soon."""
        return self._asked is not None and self._asked.deadline == 0.0

    def close(self, reason: VqError | None = None, *, hang_up: bool = False) -> None:
        """Close our copy of the socket; everything that waits fails. May be called twice.

        Parameters
        ----------
        reason
            What the callbacks are told.
        hang_up
            End the conversation, so that the front-end knows too: the session holds the socket as well.
        """
        if self.closed:
            return
        self.closed = True
        failure = reason or ResourceError("the back-end channel was closed")
        self._connection.close(hang_up=hang_up)
        self._timer.close()
        self._epoll.close()
        left = [*([] if self._asked is None else [self._asked]), *self._waiting]
        self._asked = None
        self._waiting = []
        for entry in left:
            entry.finish(failure)

    def send(
        self,
        request: BackendRequest,
        payload: Any = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        done: Done | None = None,
    ) -> None:
        """Send a request, or keep it until its turn has come.

        Parameters
        ----------
        request, payload, fds
            By the table; the fds stay the caller's.
        need_reply
            Ask for an ack; a lookup is answered anyway.
        done
            Called once: with the answer, with a failure, or when a request that is not answered has left.

        Raises
        ------
        ResourceError
            Too many wait. A miss of the IOTLB is dropped instead, the oldest first: who needs it asks again.
        OSError
            There is no room for another descriptor.
        """
        entry = _Entry(request, payload, [], need_reply, done)
        if not fds and any(entry.same(other) for other in self._waiting):
            return
        if len(self._waiting) >= QUEUE_MAX and not self._make_room():
            if request == B.IOTLB_MSG:
                return
            remedy = "the front-end must read and answer what it is sent"
            raise ResourceError(f"{request.name}: {QUEUE_MAX} requests wait already", remedy=remedy)
        try:
            entry.fds.extend(os.dup(fd) for fd in fds)
        except BaseException:
            close_fds(entry.fds)
            raise
        self._waiting.append(entry)
        # A stream that fails here is seen by `dispatch`, whose caller can do something about it.
        with suppress(VqError, OSError):
            self.flush()

    def _make_room(self) -> bool:
        miss = next((e for e in self._waiting if e.request == B.IOTLB_MSG and not e.need_reply), None)
        if miss is None:
            return False
        self._waiting.remove(miss)
        miss.finish(ResourceError("IOTLB_MSG: too many wait"))
        return True

    def forget(self, request: BackendRequest, payload: Any) -> None:
        """Do not send what waits, if it is this and nobody wants to know."""
        self._waiting = [e for e in self._waiting if (e.request, e.payload) != (request, payload) or e.done]

    def flush(self) -> None:
        """Send what may be sent now.

        Raises
        ------
        VqError, OSError
            The channel is of no use any more.
        """
        if self.closed:
            return
        self._connection.flush()
        sent = True
        while sent and not self.closed and not self._held():
            sent = not self._connection.wants_write and self._send_next()
        if not self.closed:
            self._arm()

    def _send_next(self) -> bool:
        """Send the first request that is not kept back by another."""
        kept: set[str] = set()
        for entry in self._waiting:
            subject = SUBJECTS[entry.request]
            if subject not in kept and not (entry.answered and self._asked is not None):
                self._waiting.remove(entry)
                self._put(entry)
                return True
            kept.add(subject)
        return False

    def _put(self, entry: _Entry) -> None:
        if entry.answered:
            self._asked = entry
            entry.deadline = entry.deadline or time.monotonic() + ANSWER_S
        data = encode_backend_request(entry.request, entry.payload, need_reply=entry.need_reply)
        try:
            self._connection.send(data, entry.fds)
        finally:
            close_fds(entry.fds)
        if not entry.answered:
            entry.finish(None)

    def _arm(self) -> None:
        """Wait for what is awaited: room, an answer, the end of patience."""
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._connection.wants_write else 0)
        self._epoll.modify(self._connection.fileno(), wanted)
        if self._held():
            return
        now = time.monotonic()
        ends = []
        for entry in [*self._waiting, *([] if self._asked is None else [self._asked])]:
            if entry.answered and entry.deadline is None:
                entry.deadline = now + ANSWER_S
            if entry.deadline:
                ends.append(entry.deadline)
        if ends:
            self._timer.set(min(ends) - now)

    def dispatch(self) -> None:
        """Take answers, send what waits, and give up what took too long.

        Raises
        ------
        VqError, OSError
            The channel is of no use any more: the stream has ended or is broken.
        """
        for _ in range(MESSAGES_MAX):
            message = self._connection.receive()
            if message is None:
                break
            try:
                self._take(message)
            finally:
                message.close()
            if self.closed:
                return
        if self._asked is None and self._connection.amid_message:
            raise self._unexpected("message")
        self._timer.clear()
        self._expire()
        self.flush()

    def _take(self, message: Message) -> None:
        asked = self._asked
        if asked is None:
            raise self._unexpected(message.name)
        if message.request != asked.request:
            name = BACKEND.name(asked.request)
            raise FrontendError(name, "reply", message.name, "an answer repeats the request", fatal=True)
        found = asked.request == B.SHARED_OBJECT_LOOKUP and message.payload == 0
        if len(message.fds) != found:
            limit = f"this answer brings {int(found)}"
            raise FrontendError(message.name, "number of fds", len(message.fds), limit, fatal=True)
        self._asked = None
        refusal = None
        if message.payload != 0:
            refusal = FrontendError(message.name, "ack", message.payload, "the front-end refused")
        asked.finish(refusal, message.take_fd())

    @staticmethod
    def _unexpected(what: str) -> FrontendError:
        limit = "only answers that were asked for come this way"
        return FrontendError("back-end channel", what, "unexpected", limit, fatal=True)

    def _expire(self) -> None:
        now = time.monotonic()
        late = [entry for entry in self._waiting if entry.deadline and entry.deadline <= now]
        self._waiting = [entry for entry in self._waiting if entry not in late]
        asked = self._asked
        if asked is not None and asked.deadline and asked.deadline <= now:
            asked.deadline = 0.0  # its answer may still come, and is not taken for that of another
            limit = f"it must come within {ANSWER_S:.0f} s"
            asked.finish(FrontendError(BACKEND.name(asked.request), "answer", "missing", limit))
        for entry in late:
            entry.finish(
                ResourceError(f"{entry.request.name} was not sent: an answer is missing since {ANSWER_S:.0f} s")
            )


def is_unix_stream(fd: int) -> bool:
    """Tell whether a socket is one; others may announce errors again and again that reading does not take away."""
    # The family is given, so that it is not asked for in a way that some sockets do not answer.
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
    try:
        found = [probe.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_DOMAIN, socket.SO_TYPE)]
    finally:
        probe.detach()
    return found == [socket.AF_UNIX, socket.SOCK_STREAM]
