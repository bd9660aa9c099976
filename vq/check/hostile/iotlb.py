"""Translations that are none, and addresses that nobody knows."""

from __future__ import annotations

from vq.check.cases import each
from vq.check.devices import poll_ring
from vq.check.guest import A_BYTES, GAP, A
from vq.check.iommu_guest import FEATURES, PROTOCOL, IommuGuest
from vq.check.outcome import Failed, Skipped
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import refusal
from vq.check.waiting import until
from vq.iommu import ACCESS_FAIL, INVALIDATE, MISS, PAGE, UPDATE
from vq.message import Request
from vq.payload import Iotlb

SECTION = "vhost-user, IOMMU support"
END = 1 << 64
FLOOD = 6000
MISSES_A_SECOND = 2000  # more is no question any more


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def impossible(target: Target) -> str:
    """An UPDATE that is empty, overflows, permits nothing or too much, or lies outside all memory, is refused."""
    user = 0x7E12_0000_0000
    rows = {
        "size 0": Iotlb(A, 0, user, 3, UPDATE),
        "iova past 2^64": Iotlb(END - PAGE, 2 * PAGE, user, 3, UPDATE),
        "address past 2^64": Iotlb(A, PAGE, END - 1, 3, UPDATE),
        "before a region": Iotlb(A, PAGE, user - 1, 3, UPDATE),
        "past a region": Iotlb(A, PAGE, user + A_BYTES - PAGE + 1, 3, UPDATE),
        "larger than a region": Iotlb(A, END - 1 - user, user, 3, UPDATE),
        "address 0": Iotlb(A, PAGE, 0, 3, UPDATE),
        "permission 0": Iotlb(A, PAGE, user, 0, UPDATE),
        "permission 255": Iotlb(A, PAGE, user, 255, UPDATE),
        "MISS": Iotlb(A, 0, 0, 3, MISS),
        "ACCESS_FAIL": Iotlb(A, PAGE, user, 3, ACCESS_FAIL),
        "type 0": Iotlb(A, PAGE, user, 3, 0),
        "type 255": Iotlb(A, PAGE, user, 3, 255),
    }

    def act(entry: Iotlb) -> str:
        # With a ring that asks, our own answers would come in between.
        with IommuGuest(target, running=False) as guest:
            return refusal(guest.frontend, Request.IOTLB_MSG, entry)

    end = each(target, rows, act)
    target.works()
    return end


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def without_the_feature(target: Target) -> str:
    """An UPDATE without ACCESS_PLATFORM is refused."""
    with target.guest() as guest:
        entry = Iotlb(A, PAGE, guest.memory.regions[0][2], 3, UPDATE)
        return refusal(guest.frontend, Request.IOTLB_MSG, entry)


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def flood(target: Target) -> str:
    """Thousands of UPDATEs that are of no use to anybody, with rings running; the work goes on."""
    if target.device == "any":
        raise Skipped("for --type net and blk")
    with IommuGuest(target) as guest:
        target.driving.exchange(guest)
        user = guest.memory.regions[0][2]
        for number in range(FLOOD):
            guest.iommu.update(GAP + 2 * number * PAGE, PAGE, user + number % 512 * PAGE, 3)
        target.driving.exchange(guest)
        guest.iommu.invalidate(0, 0)
        target.driving.exchange(guest)
    return f"{FLOOD} updates"


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def nobody_answers(target: Target) -> str:
    """Buffers whose addresses nobody ever tells: questions are few, and the ring can be stopped."""
    if target.device == "any":
        raise Skipped("for --type net and blk")
    with IommuGuest(target) as guest:
        target.driving.exchange(guest)
        guest.iommu.missed.clear()
        queue = guest.queues[guest.victim]
        for number in range(8):
            queue.add([(0x6666_0000_0000 + number * 64 * PAGE, 64 * PAGE)], [1])
        queue.publish()
        guest.kick(guest.victim)
        until(lambda: poll_ring(guest, guest.victim), 1.0)
        count = len(guest.iommu.missed)
        if count > MISSES_A_SECOND:
            raise Failed(f"{count} misses in a second")
        guest.stop_all()
    target.works()
    return f"{count} misses"


@check(SECTION, features=FEATURES, protocol=PROTOCOL)
def a_channel_that_ends(target: Target) -> None:
    """The channel for misses is closed while they are due; a fresh connection works."""
    with IommuGuest(target) as guest:
        guest.iommu.answering = False
        guest.frontend.request(Request.IOTLB_MSG, Iotlb(0, 0, 0, 0, INVALIDATE))
        assert guest.frontend.channel is not None
        guest.frontend.channel.close()
        guest.kick(guest.victim)
        until(lambda: False, 0.1)
    target.works()
