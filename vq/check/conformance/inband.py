"""In-band notifications: kicks and calls by messages."""

from __future__ import annotations

from dataclasses import replace

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL, Guest
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.message import BackendRequest, Message
from vq_core.driver import DriverQueue

INBAND = (v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,)
PROTOCOL = BASIC_PROTOCOL | v.mask(*INBAND, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ)
SECTION = "vhost-user, Front-end message types: VRING_KICK"


@check(SECTION, device="net", protocol=INBAND)
def kick_and_call(target: Target) -> None:
    """A ring is started and kicked by VRING_KICK, and called by VRING_CALL, without a single descriptor."""
    calls: list[int] = []

    def called(message: Message) -> None:
        calls.append(message.payload.ring)

    with target.guest(protocol=PROTOCOL, running=False) as guest:
        guest.frontend.open_channel({BackendRequest.VRING_CALL: called})
        guest.share()
        _start(guest)
        queue = guest.queues[1]
        for number in range(3):
            queue.arm()
            queue.add([bytes(12) + bytes([number]) * 60])
            queue.publish()
            guest.frontend.kick_ring(1)
            if not guest.frontend.serve(lambda: _used(calls, queue)):
                raise Failed("no VRING_CALL came for a used buffer of the transmitq")
        guest.stop_all()


def _used(calls: list[int], queue: DriverQueue) -> bool:
    """Look into the transmitq if it was called; one call too many does no harm."""
    if 1 not in calls:
        return False
    calls.clear()
    return len(queue.poll()) == 1


@check(SECTION, protocol=INBAND)
def eventfd_wins(target: Target) -> None:
    """With INBAND_NOTIFICATIONS descriptors can be used all the same, and nothing is told twice."""
    with target.guest(protocol=PROTOCOL, running=False) as guest:
        channel = guest.frontend.open_channel()
        guest.share()
        guest.start_all()
        target.driving.exchange(guest)
        guest.frontend.serve(lambda: channel.refused > 0, 0.05)
        if channel.refused:
            raise Failed("VRING_CALL came although there is a call fd")


def _start(guest: Guest) -> None:
    for index in range(len(guest.queues)):
        guest.frontend.start_ring(replace(guest.setup(index), inband=True))
    guest.frontend.set_status(0xF)
