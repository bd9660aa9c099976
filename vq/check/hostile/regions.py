"""Memory tables that are wrong."""

from __future__ import annotations

import struct

from vq import virtio as v
from vq.check.cases import each
from vq.check.guest import A_BYTES, A_USER, B_BYTES, B_USER, BASIC_PROTOCOL, PAGE, A, B, Guest
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import Verdict, refusal, say, settled
from vq.message import Request
from vq.payload import Region

SECTION = "vhost-user, Memory regions description"
ACK = (v.VHOST_USER_PROTOCOL_F_REPLY_ACK,)
SLOTS = (v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,)
R = Request
END = 1 << 64
FIRST = Region(A, A_BYTES, A_USER, 0)
SECOND = Region(B, B_BYTES, B_USER, 0)


@check(SECTION, protocol=ACK)
def impossible(target: Target) -> str:
    """Regions without bytes, larger than their file, or whose end overflows, are refused."""
    cases = {
        "no bytes": Region(A, 0, A_USER, 0),
        "larger than the file": Region(A, 1 << 40, A_USER, 0),
        "offset behind the file": Region(A, A_BYTES, A_USER, 1 << 32),
        "offset and size behind the file": Region(A, A_BYTES, A_USER, A_BYTES - PAGE),
        "guest addresses overflow": Region(END - PAGE, A_BYTES, A_USER, 0),
        "user addresses overflow": Region(A, A_BYTES, END - PAGE, 0),
        "offset and size overflow": Region(A, A_BYTES, A_USER, END - PAGE),
        "everything": Region(END - 1, END - 1, END - 1, END - 1),
    }

    def act(region: Region) -> str:
        with target.guest(running=False) as guest:
            return refusal(guest.frontend, R.SET_MEM_TABLE, (region,), guest.regions[1][:1])

    return each(target, cases, act)


@check(SECTION, protocol=ACK)
def overlapping(target: Target) -> str:
    """Regions that overlap, for the guest or for the front-end, are refused."""
    cases = {
        "the same twice": (FIRST, FIRST),
        "guest addresses": (FIRST, SECOND._replace(guest_addr=A + PAGE)),
        "user addresses": (FIRST, SECOND._replace(user_addr=A_USER + PAGE)),
        "by a page": (FIRST, SECOND._replace(guest_addr=B - PAGE)),
    }

    def act(table: tuple[Region, Region]) -> str:
        with target.guest(running=False) as guest:
            return refusal(guest.frontend, R.SET_MEM_TABLE, table, guest.regions[1])

    return each(target, cases, act)


@check(SECTION, protocol=ACK)
def counts(target: Target) -> str:
    """A number of regions that is 0, too large, or not that of the payload, is refused."""

    def act(case: tuple[int, int]) -> str:
        count, have = case
        with target.guest(running=False) as guest:
            places = [number * A_BYTES for number in range(have)]
            rows = b"".join(struct.pack("=QQQQ", A + at, A_BYTES, A_USER + at, 0) for at in places)
            table = struct.pack("=II", count, 0) + rows
            return refusal(guest.frontend, R.SET_MEM_TABLE, table, guest.regions[1][:1] * min(have, 8))

    cases = {f"{count:#x} regions, {have} in the payload": (count, have) for count, have in (
        (0, 1), (2, 1), (1, 2), (9, 1), (255, 1), (0xFFFFFFFF, 1), (100, 100),
    )}  # fmt: skip
    return each(target, cases, act)


@check(SECTION, protocol=ACK)
def bad_table_while_running(target: Target) -> str:
    """A table that fails at its second region while rings run: the old one stays, or the connection ends."""
    with target.guest() as guest:
        target.driving.exchange(guest)
        table = (FIRST, SECOND._replace(size=1 << 40))
        verdict = say(guest.frontend, R.SET_MEM_TABLE, table, guest.regions[1])
        if verdict is Verdict.CLOSED:
            return verdict
        if verdict is Verdict.DONE:
            raise Failed("it is acknowledged as done")
        for index in range(len(guest.queues)):
            guest.kick(index)
        return f"{verdict}, {settled(guest.frontend)}"


@check(SECTION)
def memory_goes_while_running(target: Target) -> str:
    """The memory of running rings is taken out of the table."""
    with target.guest() as guest:
        target.driving.exchange(guest)
        (_, second), (_, fd) = guest.regions
        verdict = say(guest.frontend, R.SET_MEM_TABLE, (second,), [fd])
        if verdict is Verdict.CLOSED:
            return verdict
        for index in range(len(guest.queues)):
            guest.kick(index)
        return f"{verdict}, {settled(guest.frontend)}"


def _slots_guest(target: Target, *, running: bool) -> Guest:
    return target.guest(protocol=BASIC_PROTOCOL | v.mask(*SLOTS), running=running)


@check("vhost-user, Front-end message types: ADD_MEM_REG", protocol=(*ACK, *SLOTS))
def wrong_slots(target: Target) -> str:
    """A region that overlaps, is larger than its file or overflows is not added."""
    cases = {
        "the same again": FIRST,
        "guest addresses overlap": SECOND._replace(guest_addr=A + PAGE),
        "user addresses overlap": SECOND._replace(user_addr=A_USER + PAGE),
        "larger than the file": SECOND._replace(size=1 << 40),
        "no bytes": SECOND._replace(size=0),
        "overflow": SECOND._replace(guest_addr=END - PAGE),
    }

    def act(region: Region) -> str:
        with _slots_guest(target, running=False) as guest:
            (first, _), (fd, second_fd) = guest.regions
            guest.frontend.add_region(first, fd)
            return refusal(guest.frontend, R.ADD_MEM_REG, region, [second_fd])

    return each(target, cases, act)


@check("vhost-user, Front-end message types: ADD_MEM_REG", protocol=(*ACK, *SLOTS))
def too_many_slots(target: Target) -> str:
    """One region more than GET_MAX_MEM_SLOTS tells is refused; as many as it tells are taken."""
    with _slots_guest(target, running=False) as guest:
        most = min(int(guest.frontend.request(R.GET_MAX_MEM_SLOTS)), 1024)
        fd = guest.regions[1][0]
        for number in range(most):
            region = Region(A + number * 2 * PAGE, PAGE, A_USER + number * 2 * PAGE, 0)
            guest.frontend.add_region(region, fd)
        one_more = Region(A + most * 2 * PAGE, PAGE, A_USER + most * 2 * PAGE, 0)
        return f"{most} taken, the next one {refusal(guest.frontend, R.ADD_MEM_REG, one_more, [fd])}"


@check("vhost-user, Front-end message types: REM_MEM_REG", protocol=SLOTS)
def slot_goes_while_running(target: Target) -> str:
    """The region with the running rings is removed."""
    with _slots_guest(target, running=True) as guest:
        target.driving.exchange(guest)
        verdict = say(guest.frontend, R.REM_MEM_REG, FIRST)
        if verdict is Verdict.CLOSED:
            return verdict
        for index in range(len(guest.queues)):
            guest.kick(index)
        return f"{verdict}, {settled(guest.frontend)}"
