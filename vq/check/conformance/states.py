"""Started and enabled: what a ring in each state does."""

from __future__ import annotations

import time

from vq import virtio as v
from vq.check.devices import frame, header_bytes, net, poll_ring
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.check.waiting import until
from vq.message import Request
from vq.payload import VringState

SECTION = "vhost-user, Ring states"
QUIET_S = 0.1
PF30 = (v.VHOST_USER_F_PROTOCOL_FEATURES,)


@check(SECTION, device="net", features=PF30)
def disabled_receiveq(target: Target) -> None:
    """A disabled receiveq gets no packet; enabled again, it does."""
    with target.guest() as guest:
        target.driving.exchange(guest)
        guest.frontend.enable_ring(0, False)
        net(target).post(guest)
        guest.queues[1].add([bytes(header_bytes(guest)) + frame(3)])
        guest.queues[1].publish()
        guest.kick(1)
        time.sleep(QUIET_S)
        if poll_ring(guest, 0):
            raise Failed("a packet came")
        guest.frontend.enable_ring(0, True)
        poll_ring(guest, 1)
        target.driving.exchange(guest)


@check(SECTION, features=PF30)
def enable_is_remembered(target: Target) -> None:
    """A ring that is enabled before it starts is enabled when it starts."""
    with target.guest(running=False) as guest:
        guest.share()
        for index in range(len(guest.queues)):
            guest.frontend.enable_ring(index, True)
        for index in range(len(guest.queues)):
            guest.start(index, enable=False)
        guest.frontend.set_status(0xF)
        target.driving.exchange(guest)


@check(SECTION)
def enabled_without_protocol_features(target: Target) -> None:
    """Without VHOST_USER_F_PROTOCOL_FEATURES all rings are enabled from the beginning."""
    with target.guest(running=False, protocol=0) as guest:
        guest.frontend.set_features(guest.frontend.features & ~v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES))
        guest.share()
        for index in range(len(guest.queues)):
            guest.start(index)
        target.driving.exchange(guest)


@check(SECTION, features=PF30)
def enable_again(target: Target) -> None:
    """A ring that is disabled and enabled, several times, works as before."""
    with target.guest() as guest:
        for _ in range(3):
            for enabled in (False, True):
                for index in range(len(guest.queues)):
                    guest.frontend.enable_ring(index, enabled)
        target.driving.exchange(guest)


@check(SECTION, device="net")
def stopped_is_left_alone(target: Target) -> None:
    """After the answer to GET_VRING_BASE the device touches the ring no more, whatever is kicked."""
    with target.guest() as guest:
        target.driving.exchange(guest)
        guest.stop_all()
        guest.queues[1].add([bytes(header_bytes(guest)) + frame(4)])
        guest.queues[1].publish()
        guest.kick(1)
        if until(lambda: poll_ring(guest, 1), QUIET_S):
            raise Failed("the stopped transmitq was used")


@check("vhost-user, Front-end message types: SET_VRING_ENABLE", features=PF30)
def features_disable_nothing(target: Target) -> None:
    """SET_FEATURES with VHOST_USER_F_PROTOCOL_FEATURES leaves the enable flags of running rings as they are."""
    with target.guest() as guest:
        guest.frontend.set_features(guest.frontend.features)
        guest.frontend.barrier()
        target.driving.exchange(guest)


@check(SECTION)
def base_twice(target: Target) -> None:
    """GET_VRING_BASE of a stopped ring answers the same again."""
    with target.guest() as guest:
        if target.device != "any":
            target.driving.exchange(guest)
        first = guest.frontend.get_vring_base(0)
        second = guest.frontend.request(Request.GET_VRING_BASE, VringState(0, 0)).num
        if first != second:
            raise Failed(f"{first:#x}, then {second:#x}")
