"""Rings in places where no ring can be."""

from __future__ import annotations

from vq import virtio as v
from vq.check.cases import each
from vq.check.guest import A_BYTES, A_USER, B_USER, GAP, PAGE, A, Guest
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import Verdict, say
from vq.message import Request
from vq.payload import VringAddr, VringState

SECTION = "vhost-user, A vring address description"
R = Request
NUM = 64
END = 1 << 64
A_END = A_USER + A_BYTES


def _start(guest: Guest, addr: VringAddr, *, num: int = NUM) -> str:
    """Try to start the victim with such addresses; whatever the back-end says, its ring is kicked."""
    index = guest.victim
    queue = guest.queues[index]
    base = 0x80008000 if queue.layout == "packed" else 0
    refused = ""
    for request, payload, fds in (
        (R.SET_VRING_NUM, VringState(index, num), []),
        (R.SET_VRING_BASE, VringState(index, base), []),
        (R.SET_VRING_CALL, index, [queue.call_fd]),
        (R.SET_VRING_ERR, index, [guest.err_fd]),
        (R.SET_VRING_ADDR, addr, []),
        (R.SET_VRING_KICK, index, [queue.kick_fd]),
        (R.SET_VRING_ENABLE, VringState(index, 1), []),
    ):
        verdict = say(guest.frontend, request, payload, fds)
        if verdict is Verdict.CLOSED:
            return verdict
        if verdict is Verdict.REFUSED:
            refused = verdict
    return refused or guest.aftermath(guest.raw())


def _cases(guest_desc: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    desc, avail, used = guest_desc
    return {
        "all at 0": (0, 0, 0),
        "all in no region": (GAP, GAP + PAGE, GAP + 2 * PAGE),
        "guest addresses": (A, A + PAGE, A + 2 * PAGE),
        "all at one address": (desc, desc, desc),
        "desc ends behind its region": (A_END - 16, avail, used),
        "avail ends behind its region": (desc, A_END - 2, used),
        "used ends behind its region": (desc, avail, A_END - 4),
        "desc in front of its region": (A_USER - 16, avail, used),
        "used in front of its region": (desc, avail, A_USER - 4),
        "desc at the end of all addresses": (END - 16, avail, used),
        "avail at the end of all addresses": (desc, END - 2, used),
        "used at the end of all addresses": (desc, avail, END - 4),
        "desc in another region's end": (B_USER + 16 * PAGE - 32, avail, used),
        "desc misaligned": (desc + 8, avail, used),
        "avail misaligned": (desc, avail + 1, used),
        "used misaligned": (desc, avail, used + 2),
    }


def _placed(target: Target, layout: str) -> str:
    with target.guest(layout=layout, running=False, num=NUM) as guest:
        cases = _cases(guest.queues[guest.victim].addresses)

    def act(parts: tuple[int, int, int]) -> str:
        with target.guest(layout=layout, running=False, num=NUM) as guest:
            guest.share()
            for index in range(len(guest.queues)):
                if index != guest.victim:
                    guest.start(index)
            desc, avail, used = parts
            return _start(guest, VringAddr(guest.victim, 0, desc, used, avail, 0))

    return each(target, cases, act)


@check(SECTION)
def split(target: Target) -> str:
    """Parts of a split ring outside memory, over the end of a region, misaligned."""
    return _placed(target, "split")


@check(SECTION, features=(v.VIRTIO_F_RING_PACKED,))
def packed(target: Target) -> str:
    """Parts of a packed ring outside memory, over the end of a region, misaligned."""
    return _placed(target, "packed")


@check("vhost-user, Front-end message types: SET_VRING_NUM")
def grown_afterwards(target: Target) -> str:
    """A ring at the end of its region whose size grows after its addresses were taken."""
    with target.guest(running=False, num=NUM) as guest:
        guest.share()
        index = guest.victim
        _, avail, used = guest.queues[index].addresses
        addr = VringAddr(index, 0, A_END - NUM * 16, used, avail, 0)
        verdict = say(guest.frontend, R.SET_VRING_NUM, VringState(index, NUM))
        if verdict is not Verdict.CLOSED:
            verdict = say(guest.frontend, R.SET_VRING_ADDR, addr)
        return verdict if verdict is Verdict.CLOSED else _start(guest, addr, num=32768)


@check("vhost-user, Ring states")
def nothing_set_up(target: Target) -> str:
    """A kick fd for a ring without memory, without a size, without addresses."""

    def act(missing: str) -> str:
        with target.guest(running=False) as guest:
            if missing != "memory":
                guest.share()
            index, queue = guest.victim, guest.queues[guest.victim]
            desc, avail, used = queue.addresses
            steps = [(R.SET_VRING_KICK, index, [queue.kick_fd]), (R.SET_VRING_ENABLE, VringState(index, 1), [])]
            if missing != "addresses":
                steps.insert(0, (R.SET_VRING_ADDR, VringAddr(index, 0, desc, used, avail, 0), []))
            if missing != "size":
                steps.insert(0, (R.SET_VRING_NUM, VringState(index, NUM), []))
            verdict = Verdict.DONE
            for request, payload, fds in steps:
                verdict = say(guest.frontend, request, payload, fds)
                if verdict is Verdict.CLOSED:
                    return verdict
            return guest.aftermath(guest.raw())

    return each(target, {f"without {what}": what for what in ("memory", "size", "addresses")}, act)
