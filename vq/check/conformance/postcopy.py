"""Postcopy migration, as its destination: order and replies. All pages are there, so nobody has to bring one."""

from __future__ import annotations

import os
from itertools import pairwise

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL, Guest
from vq.check.outcome import Failed, Skipped
from vq.check.registry import check
from vq.check.target import Target
from vq.errors import BackendError, ConnectionClosed
from vq.frontend import Frontend

POSTCOPY = (v.VHOST_USER_PROTOCOL_F_PAGEFAULT,)
PROTOCOL = BASIC_PROTOCOL | v.mask(*POSTCOPY)
SECTION = "vhost-user, Front-end message types: "


@check(SECTION + "POSTCOPY_ADVISE", protocol=POSTCOPY)
def advise(target: Target) -> str:
    """POSTCOPY_ADVISE is answered with a userfaultfd."""
    with target.negotiate(protocol=PROTOCOL) as frontend:
        os.close(_advise(frontend))
    return "with a userfaultfd"


@check(SECTION + "SET_MEM_TABLE", protocol=POSTCOPY)
def order(target: Target) -> None:
    """A table is answered with where its regions lie, serves once it is released, and goes on after POSTCOPY_END."""
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        userfaultfd = _advise(guest.frontend)
        try:
            guest.frontend.postcopy_listen()
            _share(guest)
            guest.start_all()
            target.driving.exchange(guest)
            guest.frontend.postcopy_end()
            target.driving.exchange(guest)
        finally:
            os.close(userfaultfd)


@check(SECTION + "POSTCOPY_LISTEN", protocol=POSTCOPY)
def listen_with_memory(target: Target) -> str:
    """POSTCOPY_LISTEN is refused when there is memory already, which could not be waited for."""
    with target.guest(protocol=PROTOCOL) as guest:
        os.close(_advise(guest.frontend))
        try:
            guest.frontend.postcopy_listen()
        except ConnectionClosed:
            return "connection closed"
        except BackendError as problem:
            if problem.field != "ack":
                raise
            target.driving.exchange(guest)
            return "refused"
        raise Failed("it was accepted")


def _advise(frontend: Frontend) -> int:
    """Give the back-end's userfaultfd, which the caller closes."""
    fd = frontend.postcopy_advise()
    if fd is None:
        raise Skipped("the back-end has no userfaultfd to give; see its log")
    kind = os.readlink(f"/proc/self/fd/{fd}")
    if kind != "anon_inode:[userfaultfd]":
        os.close(fd)
        raise Failed(f"the reply brings {kind}")
    return fd


def _share(guest: Guest) -> None:
    """Give the memory table, and release it."""
    regions, fds = guest.regions
    places = guest.frontend.send_postcopy_table(regions, fds)
    ordered = sorted((place.user_addr, place.user_addr + place.size) for place in places)
    if any(end > start for (_, end), (start, _) in pairwise(ordered)):
        raise Failed("the regions overlap in the back-end")
    guest.frontend.release_postcopy_table()
