"""Headers and streams that are wrong."""

from __future__ import annotations

from vq.check.cases import each
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import Verdict, say
from vq.errors import BackendError, ConnectionClosed
from vq.message import HEADER, REPLY, VERSION, Request, encode

SECTION = "vhost-user, Message Specification"
GET_FEATURES, SET_FEATURES = Request.GET_FEATURES, Request.SET_FEATURES


def _sent(target: Target, data: bytes) -> str:
    """Send bytes on a fresh connection, the last ones; tells how it ends."""
    with target.open() as frontend:
        frontend.send_bytes(data)
        frontend.end_sending()
        try:
            for message in frontend.replies():
                message.close()
        except ConnectionClosed:
            return Verdict.CLOSED
        except BackendError as problem:
            # Which form an answer to nonsense has is nobody's concern.
            return Verdict.CLOSED if problem.field == "stream" else Verdict.ANSWERED
    raise Failed("the connection stays open after its end")


@check(SECTION)
def sizes(target: Target) -> str:
    """A size that is huge, or does not suit the request, does not make the back-end wait or allocate for it."""
    cases = {
        f"request {request} of {size:#x} bytes": HEADER.pack(request, VERSION, size)
        for request in (GET_FEATURES, SET_FEATURES, Request.SET_MEM_TABLE, Request.GET_CONFIG, 1000)
        for size in (4097, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    }
    return each(target, cases, lambda data: _sent(target, data))


@check(SECTION)
def too_short(target: Target) -> str:
    """A payload that is shorter than the request's, with what it has in it, is not read beyond its end."""
    requests = (
        SET_FEATURES, Request.SET_MEM_TABLE, Request.SET_VRING_NUM, Request.SET_VRING_ADDR, Request.SET_VRING_BASE,
        Request.GET_VRING_BASE, Request.SET_VRING_KICK, Request.SET_LOG_BASE, Request.SET_VRING_ENABLE,
        Request.IOTLB_MSG, Request.GET_CONFIG, Request.SET_CONFIG, Request.GET_INFLIGHT_FD, Request.ADD_MEM_REG,
    )  # fmt: skip
    cases = {f"{request.name} of {size} bytes": (request, size) for request in requests for size in (0, 3)}

    def act(case: tuple[Request, int]) -> str:
        request, size = case
        return _sent(target, encode(request, bytes(size)))

    return each(target, cases, act)


@check(SECTION)
def flags(target: Target) -> str:
    """Another version, reserved bits, or the reply bit in a request."""
    values = (0, 2, 3, VERSION | REPLY, VERSION | 1 << 4, VERSION | 1 << 31, 0xFFFFFFFF)
    cases = {f"flags {value:#x}": encode(GET_FEATURES, flags=value) for value in values}
    return each(target, cases, lambda data: _sent(target, data))


@check(SECTION)
def request_numbers(target: Target) -> str:
    """Requests that do not exist, whatever table they are looked up in."""

    def act(request: int) -> str:
        with target.negotiate() as frontend:
            verdict = say(frontend, request, bytes(24))
            if verdict is Verdict.DONE:
                raise Failed("it is acknowledged as done")
            return verdict

    numbers = (0, 61, 127, 128, 255, 256, 65535, 65536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    return each(target, {f"request {number}": number for number in numbers}, act)


@check("vhost-user, Communication")
def truncated(target: Target) -> str:
    """The stream ends inside a header or inside a payload."""
    message = encode(Request.SET_VRING_ADDR, bytes(40))
    return each(
        target, {f"after {size} bytes": message[:size] for size in (1, 4, 11, 12, 13, 51)}, lambda d: _sent(target, d)
    )


@check("vhost-user, Communication")
def noise(target: Target) -> str:
    """Bytes that are no messages at all."""
    cases = {"zeroes": bytes(600), "ones": b"\xff" * 600, "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20}
    return each(target, cases, lambda data: _sent(target, data))


@check("vhost-user, Communication")
def silent_connection(target: Target) -> None:
    """Half a message that never goes on is no trouble for the connection after it."""
    with target.open() as frontend:
        frontend.send_bytes(HEADER.pack(SET_FEATURES, VERSION, 8))
    target.verify()


@check("vhost-user, Communication")
def unread_replies(target: Target) -> str:
    """Thousands of requests whose replies nobody reads."""
    with target.open() as frontend:
        frontend.timeout = 0.2
        try:
            for _ in range(200):
                frontend.send_bytes(encode(GET_FEATURES) * 100)
        except ConnectionClosed:
            return str(Verdict.CLOSED)
        except BackendError:
            return "reads no more until its replies are read"
    return "all were taken"
