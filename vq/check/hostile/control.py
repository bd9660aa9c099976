"""Commands on the control queue of a network device that lie, or are none."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from vq import virtio as v
from vq.check.cases import each, over_layouts
from vq.check.control_guest import CONTROL, ERR, UNTOUCHED, ControlGuest
from vq.check.guest import DATA, GAP, PAGE
from vq.check.outcome import Failed
from vq.check.raw_ring import NEXT, WRITE, Row
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 5.1.6.5"
NUM = 64
ACK = DATA + PAGE
MAC = bytes.fromhex("525400123456")


def _refused(target: Target, cases: Mapping[str, bytes]) -> str:
    def act(case: tuple[bytes, str]) -> str:
        command, layout = case
        with ControlGuest(target, layout=layout) as guest:
            return guest.expect(ERR, *([command] if command else []))

    return each(target, over_layouts(target, cases), act)


def judge(rows: list[Row], used: int | None, ack: int) -> None:
    """Insist that what was written of a chain that is no command goes with what the chain offers.

    Parameters
    ----------
    rows
        The chain.
    used
        Its used length; None: it was not used.
    ack
        What stands at `ACK`, where `UNTOUCHED` stood.

    Raises
    ------
    Failed
        The device wrote where it may not, anything but VIRTIO_NET_ERR, or says that it wrote what it did not.
    """
    if ack == UNTOUCHED:
        if used:
            raise Failed(f"the used length is {used}, and no ack is written")
        return
    if not any(addr == ACK and length and flags & WRITE for addr, length, flags in rows):
        raise Failed("an ack is written where no descriptor has room for it")
    if ack != ERR:
        raise Failed(f"the ack is {ack:#x}; what is no command is answered ERR, which is 1")
    if used not in (None, 1):
        raise Failed(f"the used length is {used}; the ack is 1 byte")


@check(SECTION, device="net", features=CONTROL)
def shapes(target: Target) -> str:
    """Chains without an ack, with one that cannot be written or stands in front, and outside memory."""
    cases: dict[str, list[Row]] = {
        "no ack": [(DATA, 3, 0)],
        "ack not writable": [(DATA, 3, 0), (ACK, 1, 0)],
        "ack of no bytes": [(DATA, 3, 0), (ACK, 0, WRITE)],
        "nothing": [(DATA, 0, 0)],
        "ack in front": [(ACK, 1, WRITE), (DATA, 3, 0)],
        "command outside": [(GAP + PAGE, 3, 0), (ACK, 1, WRITE)],
        "ack outside": [(DATA, 3, 0), (GAP + PAGE, 1, WRITE)],
        "command of 2^32 - 1 bytes": [(DATA, 0xFFFFFFFF, 0), (ACK, 1, WRITE)],
        "end overflows": [((1 << 64) - 1, 3, 0), (ACK, 1, WRITE)],
    }

    def act(case: tuple[list[Row], str]) -> str:
        rows, layout = case
        with ControlGuest(target, layout=layout, num=NUM) as guest:
            place = guest.memory.view(ACK, 1)
            place[0] = UNTOUCHED
            ring = guest.raw()
            ring.chain(rows)
            end = guest.aftermath(ring)
            judge(rows, ring.used_length if ring.used else None, place[0])
            return end

    return each(target, over_layouts(target, cases), act)


@check("VIRTIO 1.3, 2.7.5", device="net", features=CONTROL)
def endless_chain(target: Target) -> str:
    """A command's chain has more descriptors than the queue."""

    def act(case: tuple[int, str]) -> str:
        length, layout = case
        with ControlGuest(target, layout=layout, num=NUM) as guest:
            ring = guest.raw()
            if ring.packed:
                ring.slots([(DATA, length, NEXT)] * NUM)
                return guest.aftermath(ring)
            for index in range(NUM):
                ring.put(index, (DATA, length, NEXT), (index + 1) % NUM)
            ring.offer(0)
            return guest.aftermath(ring)

    return each(target, over_layouts(target, {f"of {length} bytes": length for length in (0, 1)}), act)


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

    def act(case: tuple[int | None, str]) -> str:
        count, layout = case
        with ControlGuest(target, layout=layout, multiqueue=True) as guest:
            return guest.expect(ERR, b"\4\0", struct.pack("<H", guest.pairs + 1 if count is None else count))

    counts = {"0": 0, "one too many": None, "0x8000": 0x8000, "0xffff": 0xFFFF}
    return each(target, over_layouts(target, counts), act)


@check(SECTION, device="net", features=CONTROL)
def short_headers(target: Target) -> str:
    """No header, and half a one, are answered ERR."""
    return _refused(target, {"nothing": b""} | {f"class {number}": bytes([number]) for number in range(6)})


@check(SECTION, device="net", features=CONTROL)
def short_data(target: Target) -> str:
    """Commands with less data than they have are answered ERR."""
    cases = {
        "receive mode": (v.VIRTIO_NET_F_CTRL_RX, b"\0\0"),
        "extra receive mode": (v.VIRTIO_NET_F_CTRL_RX_EXTRA, b"\0\2"),
        "MAC table": (v.VIRTIO_NET_F_CTRL_RX, b"\1\0"),
        "MAC address": (v.VIRTIO_NET_F_CTRL_MAC_ADDR, b"\1\1" + MAC[:5]),
        "VLAN to add": (v.VIRTIO_NET_F_CTRL_VLAN, b"\2\0\1"),
        "VLAN to remove": (v.VIRTIO_NET_F_CTRL_VLAN, b"\2\1"),
        "offloads": (v.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, b"\5\0" + bytes(7)),
    }
    return _refused(target, {n: command for n, (needed, command) in cases.items() if v.has(target.features, needed)})


@check(SECTION, device="net", features=CONTROL)
def flood(target: Target) -> str:
    """Unknown commands that fill the queue, again and again, are all answered."""

    def act(case: tuple[int, str]) -> str:
        count, layout = case
        with ControlGuest(target, layout=layout, num=NUM) as guest:
            for _ in range(8):
                if any(ack != ERR for ack in guest.flood([(b"\x7f\0\0",)] * count)):
                    raise Failed("a command that is none is answered OK")
        return f"{8 * count} commands"

    return each(target, over_layouts(target, {f"{NUM // 2} at once": NUM // 2}), act)
