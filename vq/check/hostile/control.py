"""Commands on the control queue of a network device that lie, or are none."""

from __future__ import annotations

import struct

from vq import virtio as v
from vq.check.cases import each
from vq.check.control_guest import CONTROL, ERR, ControlGuest
from vq.check.guest import DATA, GAP, PAGE
from vq.check.outcome import Failed
from vq.check.raw_ring import NEXT, WRITE, Row
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 5.1.6.5"
NUM = 64
ACK = DATA + PAGE
MAC = bytes.fromhex("525400123456")


def _refused(target: Target, cases: dict[str, bytes]) -> str:
    def act(command: bytes) -> str:
        with ControlGuest(target) as guest:
            return guest.expect(ERR, command)

    return each(target, cases, act)


@check(SECTION, device="net", features=CONTROL)
def shapes(target: Target) -> str:
    """Commands without an ack, with one that cannot be written, without anything, and outside memory."""
    cases: dict[str, list[Row]] = {
        "no ack": [(DATA, 3, 0)],
        "ack not writable": [(DATA, 3, 0), (ACK, 1, 0)],
        "ack of no bytes": [(DATA, 3, 0), (ACK, 0, WRITE)],
        "no command": [(ACK, 1, WRITE)],
        "nothing": [(DATA, 0, 0)],
        "ack in front": [(ACK, 1, WRITE), (DATA, 3, 0)],
        "command outside": [(GAP + PAGE, 3, 0), (ACK, 1, WRITE)],
        "ack outside": [(DATA, 3, 0), (GAP + PAGE, 1, WRITE)],
        "command of 2^32 - 1 bytes": [(DATA, 0xFFFFFFFF, 0), (ACK, 1, WRITE)],
        "end overflows": [((1 << 64) - 1, 3, 0), (ACK, 1, WRITE)],
    }

    def act(rows: list[Row]) -> str:
        with ControlGuest(target, num=NUM) as guest:
            ring = guest.raw()
            ring.chain(rows)
            return guest.aftermath(ring)

    return each(target, cases, act)


@check("VIRTIO 1.3, 2.7.5", device="net", features=CONTROL)
def endless_chain(target: Target) -> str:
    """A command's chain has more descriptors than the queue."""

    def act(length: int) -> str:
        with ControlGuest(target, num=NUM) as guest:
            ring = guest.raw()
            for index in range(NUM):
                ring.put(index, (DATA, length, NEXT), (index + 1) % NUM)
            ring.offer(0)
            return guest.aftermath(ring)

    return each(target, {f"of {length} bytes": length for length in (0, 1)}, act)


@check("VIRTIO 1.3, 5.1.6.5.2", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_RX))
def mac_tables(target: Target) -> str:
    """MAC tables with more entries than bytes are answered ERR."""
    count = struct.Struct("<I").pack
    return _refused(target, {
        "2^32 - 1 entries": b"\1\0" + count(0xFFFFFFFF) + MAC + count(0),
        "entries overflow": b"\1\0" + count(0x2AAAAAAB) + MAC + count(0),
        "one too many": b"\1\0" + count(2) + MAC + count(0),
        "second lies": b"\1\0" + count(0) + count(0xFFFFFFFF) + MAC,
        "no second": b"\1\0" + count(1) + MAC,
        "half a count": b"\1\0\0\0",
    })  # fmt: skip


@check(
    "VIRTIO 1.3, 5.1.6.5.5",
    device="net",
    features=(*CONTROL, v.VIRTIO_NET_F_MQ),
    protocol=(v.VHOST_USER_PROTOCOL_F_CONFIG,),
)
def pair_counts(target: Target) -> str:
    """No pairs, and more than there are, are answered ERR."""

    def act(count: int | None) -> str:
        with ControlGuest(target, multiqueue=True) as guest:
            return guest.expect(ERR, b"\4\0", struct.pack("<H", guest.pairs + 1 if count is None else count))

    return each(target, {"0": 0, "one too many": None, "0x8000": 0x8000, "0xffff": 0xFFFF}, act)


@check(SECTION, device="net", features=CONTROL)
def short_headers(target: Target) -> str:
    """Half a header is answered ERR."""
    return _refused(target, {f"class {number}": bytes([number]) for number in range(6)})


@check(SECTION, device="net", features=CONTROL)
def flood(target: Target) -> str:
    """Unknown commands that fill the queue, again and again, are all answered."""
    with ControlGuest(target, num=NUM) as guest:
        for _ in range(8):
            if any(ack != ERR for ack in guest.flood([(b"\x7f\0\0",)] * (NUM // 2))):
                raise Failed("a command that is none is answered OK")
    return f"{8 * NUM // 2} commands"
