"""The stream of messages."""

from __future__ import annotations

from contextlib import closing

from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.message import NEED_REPLY, VERSION, Request, encode

SECTION = "vhost-user, Message Specification"


@check(SECTION)
def reply_form(target: Target) -> None:
    """A reply has version 1 and the reply bit, nothing else, the number of its request and the right size."""
    with target.open() as frontend:
        # Whatever comes in is checked for its form by the front-end.
        frontend.request(Request.GET_FEATURES)


@check(SECTION)
def need_reply_is_not_echoed(target: Target) -> None:
    """A reply to a message with NEED_REPLY comes once, without that bit."""
    with target.negotiate() as frontend:
        frontend.send(Request.GET_FEATURES, flags=VERSION | NEED_REPLY)
        frontend.send(Request.GET_PROTOCOL_FEATURES)
        for expected in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES):
            with closing(frontend.receive()) as message:
                if message.request != expected:
                    raise Failed(f"{expected.name} was expected, {message.name} came")


@check("vhost-user, Communication")
def pieces(target: Target) -> None:
    """A message that arrives byte by byte is one message."""
    with target.open() as frontend:
        for byte in encode(Request.SET_OWNER) + encode(Request.GET_FEATURES):
            frontend.send_bytes(bytes([byte]))
        frontend.receive().close()


@check("vhost-user, Communication")
def many_at_once(target: Target) -> None:
    """Messages that arrive together are answered one by one, in their order."""
    wanted = [Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_FEATURES]
    with target.negotiate() as frontend:
        frontend.send_bytes(b"".join(map(encode, [*wanted[:2], Request.SET_OWNER, wanted[2]])))
        came = []
        for _ in wanted:
            with closing(frontend.receive()) as message:
                came.append(message.request)
        if came != wanted:
            raise Failed(f"replies came in the order {came}, not {[int(request) for request in wanted]}")
