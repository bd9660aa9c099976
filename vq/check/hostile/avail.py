"""The available ring, and heads in it."""

from __future__ import annotations

from vq.check.cases import each
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 2.7.6"
NUM = 64


@check(SECTION)
def index(target: Target) -> str:
    """An available index further ahead than the ring has entries, or behind where it was."""

    def act(value: int) -> str:
        with target.guest(num=NUM) as guest:
            ring = guest.raw()
            for slot in range(NUM):
                ring.put(slot, guest.target.driving.request(guest)[0] if slot == 0 else (0, 0, 0))
            ring.jump(value)
            return guest.aftermath(ring)

    return each(target, {f"{value}": value for value in (NUM + 1, 2 * NUM, 32768, 65535)}, act)


@check(SECTION)
def head(target: Target) -> str:
    """A head outside the descriptor table."""

    def act(head: int) -> str:
        with target.guest(num=NUM) as guest:
            ring = guest.raw()
            ring.offer(head)
            return guest.aftermath(ring)

    return each(target, {f"{head}": head for head in (NUM, NUM + 1, 255, 32768, 65535)}, act)


@check(SECTION)
def same_head(target: Target) -> str:
    """The same head in every entry."""
    with target.guest(num=NUM) as guest:
        ring = guest.raw()
        ring.chain(target.driving.request(guest))
        ring.offer(*[0] * (NUM - 1))
        return guest.aftermath(ring)


@check("VIRTIO 1.3, 2.7.8")
def used_ring(target: Target) -> str:
    """The driver overwrites the used ring, which is the device's."""
    with target.guest(num=NUM) as guest:
        ring = guest.raw()
        guest.queues[guest.victim].used_head[1] = 12345
        ring.chain(target.driving.request(guest))
        return guest.aftermath(ring)
