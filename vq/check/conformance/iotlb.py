"""Translations of an IOMMU: asked for, told, taken away."""

from __future__ import annotations

from vq import virtio as v
from vq.check.devices import poll_ring
from vq.check.guest import GAP, A, B
from vq.check.iommu_guest import FEATURES, PROTOCOL, IommuGuest
from vq.check.outcome import Failed, Skipped
from vq.check.raw_ring import WRITE as DESC_WRITE
from vq.check.registry import check
from vq.check.target import Target
from vq.check.waiting import until
from vq.iommu import PAGE, READ, WRITE

SECTION = "vhost-user, IOMMU support"
END = 1 << 64
QUIET_S = 0.3  # in which a back-end that wants to use something void has done it


def _needs_a_type(target: Target) -> None:
    if target.device == "any":
        raise Skipped("for --type net and blk")


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def updates(target: Target) -> None:
    """UPDATE and INVALIDATE are acknowledged: asked for or not, known or not, and up to 2^64 exactly."""
    with IommuGuest(target, running=False) as guest:
        iommu, user = guest.iommu, guest.memory.regions[0][2]
        for iova, size, perm in ((A, PAGE, READ), (A, 4 * PAGE, READ | WRITE), (0, PAGE, WRITE), (END - PAGE, PAGE, 3)):
            iommu.update(iova, size, user, perm)
        for iova, size in ((A + PAGE, PAGE), (B, PAGE), (GAP, END - GAP), (0xFEF0_0000, END - 0xFEF0_0000), (0, 0)):
            iommu.invalidate(iova, size)


def _all_is_asked_for(target: Target, layout: str) -> str:
    _needs_a_type(target)
    with IommuGuest(target, layout=layout) as guest:
        target.driving.exchange(guest)
        target.driving.exchange(guest)
        for index, queue in enumerate(guest.queues):
            # Without an echo nobody looks into the receiveq.
            if index == guest.victim and not any(guest.asked(place, 1, 3) for place in queue.guest_addresses):
                raise Failed(f"ring {index} runs, and no page of it was asked for")
        return f"{len(guest.iommu.missed)} misses"


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def everything_is_asked_for(target: Target) -> str:
    """With nothing known at first, all that a device needs is asked for, and used when it is told."""
    return _all_is_asked_for(target, "split")


@check(SECTION, features=(*FEATURES, v.VIRTIO_F_RING_PACKED), protocol=PROTOCOL)
def everything_is_asked_for_packed(target: Target) -> str:
    """The same with packed rings."""
    return _all_is_asked_for(target, "packed")


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def a_ring_waits(target: Target) -> None:
    """A ring that starts without a translation is asked for; until it comes the ring can be stopped, at its base."""
    with IommuGuest(target, running=False) as guest:
        guest.iommu.answering = False
        guest.start_all()
        index = guest.victim
        places = guest.queues[index].guest_addresses
        if not until(lambda: any(guest.asked(place, 1, 3) for place in places), target.timeout):
            raise Failed(f"nothing of ring {index} is asked for within {target.timeout:g} s")
        expected = [guest.setup(number).base for number in range(len(guest.queues))]
        if (bases := guest.stop_all()) != expected:
            raise Failed(f"rings that never ran stand at {bases}, and began at {expected}")


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def a_buffer_waits(target: Target) -> None:
    """A buffer of no known address is asked for, stays the device's, and is used when it is told, without a kick."""
    _needs_a_type(target)
    with IommuGuest(target) as guest:
        target.driving.exchange(guest)
        _swallow(guest)
        page = guest.block(bytes(PAGE), PAGE).guest_addr
        kept = guest.iommu.pages.pop(page // PAGE)
        rows = [(page, size, flags) for _, size, flags in target.driving.request(guest)][:1]
        _offer(guest, [rows[0], *target.driving.request(guest)[1:]])
        if not until(lambda: guest.asked(page, PAGE, READ), target.timeout):
            raise Failed(f"the buffer is not asked for within {target.timeout:g} s")
        if until(lambda: poll_ring(guest, guest.victim), QUIET_S):
            raise Failed("the buffer was used before its address was known")
        guest.iommu.pages[page // PAGE] = kept
        guest.tell(page, PAGE)
        if not until(lambda: poll_ring(guest, guest.victim), target.timeout):
            raise Failed(f"the buffer is not used within {target.timeout:g} s of the UPDATE")


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def nothing_is_used_after_invalidate(target: Target) -> None:
    """After the answer to INVALIDATE nothing is read or written through what was known; with new UPDATEs it goes on."""
    _needs_a_type(target)
    with IommuGuest(target) as guest:
        target.driving.exchange(guest)
        _swallow(guest)
        guest.iommu.answering = False
        guest.iommu.invalidate(0, 0)
        _offer(guest, target.driving.request(guest))
        if until(lambda: poll_ring(guest, guest.victim), QUIET_S):
            raise Failed("a buffer was used through translations that are void")
        guest.iommu.answering = True
        for iova, size, *_ in guest.memory.regions:
            guest.tell(iova, size)
        if not until(lambda: poll_ring(guest, guest.victim), target.timeout):
            raise Failed(f"the buffer is not used within {target.timeout:g} s of the UPDATEs")


@check(SECTION, device="blk", features=FEATURES, protocol=PROTOCOL)
def a_page_moves(target: Target) -> None:
    """A page that lies elsewhere after INVALIDATE and UPDATE is written there, and where it was nothing changes."""
    with IommuGuest(target) as guest:
        target.driving.exchange(guest)
        old, new = guest.block(b"\x11" * PAGE, PAGE), guest.block(b"\x22" * PAGE, PAGE)
        for place in (old, new):
            guest.iommu.invalidate(old.guest_addr, PAGE)
            guest.iommu.pages[old.guest_addr // PAGE] = (place.user_addr, READ | WRITE)
            head, _, status = target.driving.request(guest)
            _offer(guest, [head, (old.guest_addr + 512, 512, DESC_WRITE), status])
            before = bytes(old if place is new else new)
            if not until(lambda: poll_ring(guest, 0), target.timeout):
                raise Failed(f"a read does not complete within {target.timeout:g} s")
            if bytes(old if place is new else new) != before:
                raise Failed("data went to where the page does not lie")
            if bytes(place)[512:1024] == (b"\x11" if place is old else b"\x22") * 512:
                raise Failed("no data went to where the page lies")


def _swallow(guest: IommuGuest) -> None:
    """Take what is still to come."""
    until(lambda: poll_ring(guest, guest.victim), 0.02)


def _offer(guest: IommuGuest, rows: list[tuple[int, int, int]]) -> None:
    queue = guest.queues[guest.victim]
    readable = [(addr, size) for addr, size, flags in rows if not flags & DESC_WRITE]
    queue.add(readable, [(addr, size) for addr, size, flags in rows if flags & DESC_WRITE])
    queue.publish()
    guest.kick(guest.victim)
