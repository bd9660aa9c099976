"""REPLY_ACK: which messages are acknowledged, and which are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vq import virtio as v
from vq.check.cases import each
from vq.check.guest import Guest
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import Verdict, asked, say
from vq.message import NEED_REPLY, VERSION, Request, request_name
from vq.payload import VringAddr, VringState

SECTION = "vhost-user, Protocol features"
ACK = (v.VHOST_USER_PROTOCOL_F_REPLY_ACK,)
R = Request


def whole_setup(guest: Guest) -> Iterator[tuple[Request, Any, list[int]]]:
    """Every message of a start that has no reply of its own: request, payload, fds."""
    queue = guest.queues[0]
    desc, avail, used = queue.addresses
    base = 0x80008000 if queue.layout == "packed" else 0
    regions, fds = guest.regions
    yield R.SET_OWNER, None, []
    yield R.SET_FEATURES, guest.frontend.features, []
    yield R.SET_MEM_TABLE, tuple(regions), fds
    yield R.SET_VRING_NUM, VringState(0, queue.size), []
    yield R.SET_VRING_BASE, VringState(0, base), []
    yield R.SET_VRING_ADDR, VringAddr(0, 0, desc, used, avail, 0), []
    yield R.SET_VRING_ERR, 0, [guest.err_fd]
    yield R.SET_VRING_CALL, 0, [queue.call_fd]
    yield R.SET_VRING_KICK, 0, [queue.kick_fd]
    if v.has(guest.frontend.features, v.VHOST_USER_F_PROTOCOL_FEATURES):
        yield R.SET_VRING_ENABLE, VringState(0, 1), []


@check(SECTION, protocol=ACK)
def every_message(target: Target) -> str:
    """Each message with NEED_REPLY is acknowledged once, with 0 when it was right."""
    with target.guest(running=False) as guest:
        said = []
        for request, payload, fds in whole_setup(guest):
            asked(guest.frontend, request, payload, fds)
            said.append(request)
    return f"{len(said)} messages"


@check(SECTION, protocol=ACK)
def only_when_asked(target: Target) -> None:
    """A message without NEED_REPLY is not acknowledged."""
    with target.guest(running=False) as guest:
        for request, payload, fds in whole_setup(guest):
            verdict = say(guest.frontend, request, payload, fds, flags=VERSION)
            if verdict is not Verdict.SILENT:
                raise Failed(f"{request_name(request)} without NEED_REPLY: {verdict}")


@check(SECTION, protocol=ACK)
def a_stop_and_a_start(target: Target) -> None:
    """GET_VRING_BASE is answered once, with or without NEED_REPLY."""
    with target.guest() as guest:
        for flags in (VERSION, VERSION | NEED_REPLY):
            verdict = say(guest.frontend, R.GET_VRING_BASE, VringState(0, 0), flags=flags)
            if verdict is not Verdict.ANSWERED:
                raise Failed(f"flags {flags:#x}: {verdict}")


@check(SECTION, protocol=ACK)
def unknown_request(target: Target) -> str:
    """A request that does not exist is not acknowledged as done."""

    def act(request: int) -> str:
        with target.negotiate() as frontend:
            verdict = say(frontend, request, bytes(8))
            if verdict in (Verdict.DONE, Verdict.SILENT):
                raise Failed(str(verdict))
            return verdict

    return each(target, {f"request {request}": request for request in (60, 200, 0x7FFFFFFF)}, act)


@check(SECTION, features=(v.VHOST_USER_F_PROTOCOL_FEATURES,))
def not_negotiated(target: Target) -> str:
    """NEED_REPLY without REPLY_ACK does no harm; back-ends differ in whether they answer."""
    with target.negotiate(protocol=0) as frontend:
        verdict = say(frontend, R.SET_OWNER)
        if verdict not in (Verdict.DONE, Verdict.SILENT):
            raise Failed(f"SET_OWNER: {verdict}")
        return "acknowledges all the same" if verdict is Verdict.DONE else "stays silent"
