"""What becomes of one message, right or wrong, without ever waiting for silence.

Behind each message goes a GET_FEATURES: replies come in the order of requests, so if its reply is the first one,
nothing answered the message before.

Spec: vhost-user, "Communication", "Protocol features" (REPLY_ACK).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from enum import StrEnum
from typing import Any, Final

from vq import virtio as v
from vq.check.outcome import Failed
from vq.errors import BackendError, ConnectionClosed
from vq.frontend import Frontend
from vq.message import FRONTEND_REQUESTS, NEED_REPLY, VERSION, Request, request_name

__all__ = ["Verdict", "asked", "harmless", "refusal", "say", "settled"]

ASKING: Final = VERSION | NEED_REPLY


class Verdict(StrEnum):
    """The ways a message can end."""

    DONE = "acknowledged"
    REFUSED = "refused"
    ANSWERED = "answered"
    SILENT = "no answer"
    CLOSED = "connection closed"


def say(
    frontend: Frontend, request: int, payload: Any = b"", fds: Sequence[int] = (), *, flags: int = ASKING
) -> Verdict:
    """Send a message, and tell what becomes of it.

    Parameters
    ----------
    frontend
        A connection; of no use any more after CLOSED.
    request
        Request number, known or not.
    payload
        Bytes as they are, or a value for the request's codec.
    fds
        Fds to go along; they stay the caller's.
    flags
        Header flags, by default with NEED_REPLY.

    Raises
    ------
    Failed
        Two replies came, or the connection neither answers nor ends.
    BackendError
        A reply is malformed.
    """
    if not isinstance(payload, bytes):
        payload = FRONTEND_REQUESTS[request].payload.encode(payload)
    try:
        frontend.send(request, payload, fds, flags)
        frontend.send(Request.GET_FEATURES)
        verdict = _first(frontend, request)
        if verdict is not Verdict.SILENT:
            with closing(frontend.receive()) as barrier:
                if barrier.request != Request.GET_FEATURES:
                    raise Failed(f"{request_name(request)} was answered twice")
        return verdict
    except ConnectionClosed:
        return Verdict.CLOSED
    except BackendError as problem:
        if problem.field == "stream":
            return Verdict.CLOSED
        if problem.field == "time":
            raise Failed(f"{request_name(request)}: the connection neither answers nor ends") from problem
        raise


def _first(frontend: Frontend, request: int) -> Verdict:
    with closing(frontend.receive()) as message:
        if message.request == Request.GET_FEATURES != request:
            return Verdict.SILENT
        if message.request != request:
            raise Failed(f"{request_name(request)} was answered by a {message.name}")
        rule = FRONTEND_REQUESTS.get(request)
        if rule is not None and rule.reply is not None:
            return Verdict.ANSWERED
        # The reply to an unknown request is kept as bytes.
        good = message.payload == 0 or (isinstance(message.payload, bytes) and not any(message.payload))
        return Verdict.DONE if good else Verdict.REFUSED


def asked(frontend: Frontend, request: int, payload: Any = b"", fds: Sequence[int] = ()) -> None:
    """Say something that is right, and insist that it is acknowledged."""
    verdict = say(frontend, request, payload, fds)
    if verdict is not Verdict.DONE:
        raise Failed(f"{request_name(request)} with NEED_REPLY: {verdict}")


def refusal(frontend: Frontend, request: int, payload: Any = b"", fds: Sequence[int] = ()) -> str:
    """Say something that is wrong, and insist that it is refused or ends the connection; tells which."""
    verdict = say(frontend, request, payload, fds)
    if verdict in (Verdict.DONE, Verdict.ANSWERED):
        raise Failed(f"{verdict}, as if it were right")
    if verdict is Verdict.SILENT and frontend.has_protocol(v.VHOST_USER_PROTOCOL_F_REPLY_ACK):
        raise Failed("no answer to NEED_REPLY: a front-end would wait forever")
    return str(verdict)


def harmless(frontend: Frontend, request: int, payload: Any = b"", fds: Sequence[int] = ()) -> str:
    """Say something that no front-end says, where any answer will do, also one of a form that is wrong; tells which."""
    try:
        return say(frontend, request, payload, fds)
    except BackendError:
        return "answered in a form of its own"


def settled(frontend: Frontend) -> str:
    """Insist that a connection, whatever was sent on it, still answers or has ended; tells which."""
    try:
        frontend.send(Request.GET_FEATURES)
        for reply in frontend.replies():
            with closing(reply) as message:
                if message.request == Request.GET_FEATURES:
                    return "connection kept"
    except ConnectionClosed:
        return str(Verdict.CLOSED)
    except BackendError as problem:
        if problem.field == "stream":
            return str(Verdict.CLOSED)
        raise Failed(f"the connection neither answers nor ends ({problem})") from problem
    raise Failed("the connection neither answers nor ends")
