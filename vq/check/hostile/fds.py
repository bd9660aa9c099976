"""Fds that are too many, too few, in the wrong place or of the wrong kind."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vq import virtio as v
from vq.check.cases import each
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import Verdict, harmless, say, settled
from vq.errors import ConnectionClosed
from vq.message import NEED_REPLY, VERSION, Request, encode
from vq.payload import VRING_NOFD_MASK, Region

SECTION = "vhost-user, Communication"
ACK = (v.VHOST_USER_PROTOCOL_F_REPLY_ACK,)
MOST = 253  # that a message can carry (SCM_MAX_FD of Linux)
WORD = (0).to_bytes(8, "little")


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    """Make eventfds, and close them."""
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@check(SECTION)
def counts(target: Target) -> str:
    """More fds than a message takes, fds with one that takes none, none where one is needed."""
    cases = {
        f"{request.name} with {count} fds": (request, payload, count)
        for request, payload, counts in (
            (Request.SET_OWNER, b"", (1, 9, MOST)),
            (Request.SET_VRING_NUM, bytes(8), (1, 33)),
            (Request.SET_VRING_KICK, WORD, (0, 2, MOST)),
            (Request.SET_VRING_CALL, VRING_NOFD_MASK.to_bytes(8, "little"), (1, 8)),
            (Request.SET_LOG_BASE, bytes(16), (0, 2)),
        )
        for count in counts
    }

    def act(case: tuple[Request, bytes, int]) -> str:
        request, payload, count = case
        with target.negotiate() as frontend, eventfds(count) as fds:
            return harmless(frontend, request, payload, fds)

    return each(target, cases, act)


@check("vhost-user, Front-end message types: SET_MEM_TABLE")
def regions_without_fds(target: Target) -> str:
    """A memory table with fewer or more fds than regions is not taken."""

    def act(count: int) -> str:
        with target.guest(running=False) as guest:
            regions, fds = guest.regions
            verdict = say(guest.frontend, Request.SET_MEM_TABLE, tuple(regions), (fds * 5)[:count])
            if verdict is Verdict.DONE:
                raise Failed("it is acknowledged as done")
            return verdict

    return each(target, {f"{count} fds for 2 regions": count for count in (0, 1, 3, 8)}, act)


@check(SECTION)
def with_the_payload(target: Target) -> str:
    """Fds that come with the payload, not with the header, belong to nobody."""
    with target.negotiate() as frontend, eventfds(2) as fds:
        message = encode(Request.SET_VRING_NUM, bytes(8), VERSION | NEED_REPLY)
        with suppress(ConnectionClosed):
            frontend.send_bytes(message[:14], fds[:1])
            frontend.send_bytes(message[14:], fds)
        return settled(frontend)


@contextmanager
def _odd_fds() -> Iterator[dict[str, int]]:
    """An fd of each kind that is no eventfd."""
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    found = {
        "directory": os.open("/", os.O_RDONLY),
        "/dev/null": os.open("/dev/null", os.O_RDWR),
        "path": os.open("/", os.O_PATH),
        "pipe, reading end": reader,
        "pipe, writing end": writer,
        "socket": ours.detach(),
    }
    theirs.close()
    try:
        yield found
    finally:
        for fd in found.values():
            os.close(fd)


@check("vhost-user, Front-end message types: SET_VRING_KICK, SET_VRING_CALL")
def kinds(target: Target) -> str:
    """What is no eventfd, as kick and as call fd of a ring that runs."""

    def act(case: tuple[Request, int]) -> str:
        request, fd = case
        with target.guest() as guest:
            verdict = harmless(guest.frontend, request, guest.victim, [fd])
            if verdict not in (Verdict.DONE, Verdict.REFUSED):
                return verdict
            for index in range(len(guest.queues)):
                guest.kick(index)
            return settled(guest.frontend)

    with _odd_fds() as fds:
        requests = (Request.SET_VRING_KICK, Request.SET_VRING_CALL)
        cases = {f"{request.name} of a {kind}": (request, fd) for request in requests for kind, fd in fds.items()}
        return each(target, cases, act)


@check("vhost-user, Front-end message types: SET_MEM_TABLE", protocol=ACK)
def memory_kinds(target: Target) -> str:
    """What cannot be mapped, as memory."""

    def act(fd: int) -> str:
        with target.negotiate() as frontend:
            verdict = say(frontend, Request.SET_MEM_TABLE, (Region(0, 1 << 20, 1 << 40, 0),), [fd])
            if verdict is Verdict.DONE:
                raise Failed("it is acknowledged as done")
            return verdict

    with _odd_fds() as fds:
        return each(target, {kind: fd for kind, fd in fds.items() if kind != "/dev/null"}, act)
