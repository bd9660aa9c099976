"""Commands on the control queue of a network device."""

from __future__ import annotations

import struct

from vq import virtio as v
from vq.check.cases import each, over_layouts
from vq.check.control_guest import CONTROL, ERR, OK, ControlGuest
from vq.check.registry import check
from vq.check.target import Target

SECTION = "VIRTIO 1.3, 5.1.6.5"
MAC = bytes.fromhex("525400123456")
GROUP = bytes.fromhex("01005e0000fb")
BASIC_MODES = {"promiscuous": 0, "all multicast": 1}
EXTRA_MODES = {"all unicast": 2, "no multicast": 3, "no unicast": 4, "no broadcast": 5}


def _all_ok(target: Target, cases: dict[str, bytes], layout: str = "split") -> str:
    def act(command: bytes) -> str:
        with ControlGuest(target, layout=layout) as guest:
            return guest.expect(OK, command[:2], command[2:]) if command[2:] else guest.expect(OK, command)

    return each(target, cases, act)


def _modes(modes: dict[str, int]) -> dict[str, bytes]:
    return {f"{name} {on}": bytes([0, mode, on]) for name, mode in modes.items() for on in (0, 1)}


@check("VIRTIO 1.3, 5.1.6.5.1", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_RX))
def receive_modes(target: Target) -> str:
    """Receive modes are switched on and off."""
    return _all_ok(target, _modes(BASIC_MODES))


@check("VIRTIO 1.3, 5.1.6.5.1", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_RX_EXTRA))
def extra_receive_modes(target: Target) -> str:
    """The extra receive modes are switched on and off."""
    return _all_ok(target, _modes(EXTRA_MODES))


@check("VIRTIO 1.3, 5.1.6.5.2", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_RX))
def mac_table(target: Target) -> str:
    """A MAC table is taken: empty, and with addresses of both kinds."""
    one = struct.pack("<I", 1)
    return _all_ok(target, {"empty": b"\1\0" + bytes(8), "one of each": b"\1\0" + one + MAC + one + GROUP})


@check("VIRTIO 1.3, 5.1.6.5.2", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_MAC_ADDR))
def mac_address(target: Target) -> str:
    """The device's address is set."""
    return _all_ok(target, {"address": b"\1\1" + MAC})


@check("VIRTIO 1.3, 5.1.6.5.3", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_VLAN))
def vlans(target: Target) -> str:
    """VLANs are added and removed, from the first to the last."""
    numbers = (1, 4094)
    return _all_ok(target, {
        f"{name} {number}": struct.pack("<BBH", 2, command, number)
        for command, name in enumerate(("add", "remove")) for number in numbers
    })  # fmt: skip


@check("VIRTIO 1.3, 5.1.6.5.4", device="net", features=(*CONTROL, v.VIRTIO_NET_F_GUEST_ANNOUNCE))
def announce_ack(target: Target) -> str:
    """An announcement is acknowledged."""
    return _all_ok(target, {"ack": b"\3\0"})


@check(
    "VIRTIO 1.3, 5.1.6.5.5",
    device="net",
    features=(*CONTROL, v.VIRTIO_NET_F_MQ),
    protocol=(v.VHOST_USER_PROTOCOL_F_CONFIG,),
)
def pairs(target: Target) -> str:
    """All pairs are taken into use, then one alone, which carries packets."""
    with ControlGuest(target, multiqueue=True) as guest:
        for count in (guest.pairs, 1):
            guest.expect(OK, b"\4\0", struct.pack("<H", count))
        target.driving.exchange(guest)
        return f"{guest.pairs} pairs"


@check("VIRTIO 1.3, 5.1.6.5.6", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS))
def guest_offloads(target: Target) -> str:
    """Guest offloads that were acknowledged are switched off."""
    return _all_ok(target, {"none": b"\5\0" + bytes(8)})


@check(SECTION, device="net", features=CONTROL)
def unknown(target: Target) -> str:
    """A class or a command that is none is answered ERR, and the next command is served."""

    def act(case: tuple[bytes, str]) -> str:
        command, layout = case
        with ControlGuest(target, layout=layout) as guest:
            guest.expect(ERR, command)
            return guest.expect(ERR, command)

    cases = {"class 127": b"\x7f\0\0", "class 255": b"\xff\xff\0", "receive mode 99": b"\0\x63\1", "MAC 99": b"\1\x63"}
    return each(target, over_layouts(target, cases), act)


def _layouts(target: Target, layout: str) -> str:
    def act(parts: tuple[bytes, ...]) -> str:
        with ControlGuest(target, layout=layout) as guest:
            return guest.expect(OK, *parts)

    whole = b"\1\0" + struct.pack("<I", 1) + MAC + bytes(4)
    cases = {
        "one descriptor": (whole,),
        "header and data": (whole[:2], whole[2:]),
        "header, two tables": (whole[:2], whole[2:12], whole[12:]),
        "a descriptor a byte": tuple(bytes([byte]) for byte in whole),
    }
    return each(target, cases, act)


@check("VIRTIO 1.3, 2.7.4", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_RX))
def any_layout(target: Target) -> str:
    """A command lies in any number of descriptors."""
    return _layouts(target, "split")


@check("VIRTIO 1.3, 2.8.4", device="net", features=(*CONTROL, v.VIRTIO_NET_F_CTRL_RX, v.VIRTIO_F_RING_PACKED))
def any_layout_packed(target: Target) -> str:
    """The same on a packed ring."""
    return _layouts(target, "packed")
