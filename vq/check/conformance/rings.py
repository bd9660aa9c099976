"""Rings that start and stop: sizes, bases, order of messages."""

from __future__ import annotations

from vq import virtio as v
from vq.check.cases import each
from vq.check.guest import Guest
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.frontend import Frontend
from vq.message import Request
from vq.payload import VRING_NOFD_MASK, VringAddr, VringState

STATES = "vhost-user, Ring states"
R = Request


@check(STATES)
def base_of_a_stopped_ring(target: Target) -> None:
    """GET_VRING_BASE of a ring that never ran answers what SET_VRING_BASE has set."""
    with target.guest(running=False) as guest:
        for base in (0, 77):
            guest.frontend.request(R.SET_VRING_BASE, VringState(0, base))
            found = guest.frontend.get_vring_base(0)
            if found != base:
                raise Failed(f"{found} instead of {base}")


def _moves_on(target: Target, layout: str) -> str:
    with target.guest(layout=layout) as guest:
        for _ in range(5):
            target.driving.exchange(guest)
        victim = guest.victim
        base = guest.frontend.stop_ring(victim) & 0xFFFF  # the available half, which counts for both layouts
        expected = guest.queues[victim].avail_idx
        if base != expected:
            raise Failed(f"ring {victim} stops at {base:#x}, its driver at {expected:#x}")
        return f"{base:#x}"


@check(STATES + ", VIRTIO 1.3, 2.7", device="net")
def base_moves_on(target: Target) -> str:
    """GET_VRING_BASE tells where the device stands once all is done (split)."""
    return _moves_on(target, "split")


@check(STATES + ", VIRTIO 1.3, 2.8", device="net", features=(v.VIRTIO_F_RING_PACKED,))
def packed_base_moves_on(target: Target) -> str:
    """GET_VRING_BASE tells where the device stands once all is done (packed: slot and wrap counter)."""
    return _moves_on(target, "packed")


def _restart(target: Target, layout: str) -> None:
    with target.guest(layout=layout) as guest:
        for _ in range(4):
            if target.device != "any":
                target.driving.exchange(guest)
            guest.stop_all()
            for index in range(len(guest.queues)):
                guest.start(index)


@check(STATES)
def restart(target: Target) -> None:
    """A ring that was stopped goes on where it stood (split)."""
    _restart(target, "split")


@check(STATES, features=(v.VIRTIO_F_RING_PACKED,))
def packed_restart(target: Target) -> None:
    """A ring that was stopped goes on where it stood (packed)."""
    _restart(target, "packed")


@check("VIRTIO 1.3, 2.7.6")
def indices_wrap(target: Target) -> None:
    """Indices run through 2^16: a ring may begin right before."""
    with target.guest(base=65534) as guest:
        for _ in range(4):
            if target.device == "any":
                break
            target.driving.exchange(guest)


@check("VIRTIO 1.3, 2.7 and 2.8")
def sizes(target: Target) -> str:
    """Ring sizes from small to large: powers of two, and any number with packed rings."""

    def act(case: tuple[int, str]) -> str:
        num, layout = case
        with target.guest(num=num, layout=layout) as guest:
            target.driving.exchange(guest)
        return "work"

    cases = {str(num): (num, "split") for num in (4, 64, 256, 1024)}
    if v.has(target.features, v.VIRTIO_F_RING_PACKED):
        cases |= {f"packed {num}": (num, "packed") for num in (7, 256, 1000)}
    return each(target, cases, act)


def _say(frontend: Frontend, guest: Guest, index: int, words: str) -> None:
    queue = guest.queues[index]
    desc, avail, used = queue.addresses
    for word in words.split():
        match word:
            case "num":
                frontend.request(R.SET_VRING_NUM, VringState(index, queue.size))
            case "base":
                frontend.request(R.SET_VRING_BASE, VringState(index, 0))
            case "addr":
                frontend.request(R.SET_VRING_ADDR, VringAddr(index, 0, desc, used, avail, 0))
            case "call":
                frontend.request(R.SET_VRING_CALL, index, [queue.call_fd])
            case "kick":
                frontend.request(R.SET_VRING_KICK, index, [queue.kick_fd])
            case "enable":
                frontend.enable_ring(index, True)


@check("vhost-user, Starting and stopping rings")
def order(target: Target) -> str:
    """A ring's messages come in the orders of QEMU, virtio-user and cloud-hypervisor."""

    def act(words: str) -> str:
        with target.guest(running=False) as guest:
            guest.share()
            for index in range(len(guest.queues)):
                _say(guest.frontend, guest, index, words)
            for index in range(len(guest.queues)):
                guest.kick(index)
            guest.frontend.set_status(0xF)
            target.driving.exchange(guest)
        return "work"

    cases = {
        "QEMU": "call num base addr kick call enable",
        "virtio-user": "call num base addr kick enable",
        "cloud-hypervisor": "num addr base call kick enable",
    }
    return each(target, cases, act)


@check("vhost-user, Starting and stopping rings")
def call_before_features(target: Target) -> None:
    """SET_VRING_CALL before SET_FEATURES and before there is memory, as QEMU and virtio-user send it."""
    with target.open() as frontend:
        agreed = frontend.negotiate(target.driving.features)
        for index in range(target.driving.rings):
            frontend.request(R.SET_VRING_CALL, index | VRING_NOFD_MASK)
        frontend.set_features(agreed)
        frontend.barrier()


@check("vhost-user, Communication")
def reconnect(target: Target) -> None:
    """After the connection has ended, with rings running, the next one starts anew."""
    for _ in range(5):
        with target.guest() as guest:
            target.driving.exchange(guest)
