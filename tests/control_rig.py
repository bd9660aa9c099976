"""What the tests of the control queue of a network device share: commands, and what a driver should then receive."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from vq import virtio as v

OK, ERR = b"\0", b"\1"
MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("525400abcdef")
GROUP = bytes.fromhex("01005e0000fb")
BROADCAST = b"\xff" * 6
MODES = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")
TABLE_MAX = 64
CONTROL = v.mask(
    v.VIRTIO_NET_F_CTRL_VQ, v.VIRTIO_NET_F_CTRL_RX, v.VIRTIO_NET_F_CTRL_RX_EXTRA, v.VIRTIO_NET_F_CTRL_VLAN,
    v.VIRTIO_NET_F_CTRL_MAC_ADDR, v.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, v.VIRTIO_NET_F_MAC, v.VIRTIO_NET_F_STATUS,
    v.VIRTIO_NET_F_MQ, v.VIRTIO_NET_F_GUEST_ANNOUNCE, v.VIRTIO_F_VERSION_1,
)  # fmt: skip


def mode(name: str, on: bool = True) -> bytes:
    return bytes([0, MODES.index(name), on])


def mac_table(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    tables = (struct.pack("<I", len(macs)) + b"".join(macs) for macs in (unicast, multicast))
    return b"\x01\x00" + b"".join(tables)


def mac_address(mac: bytes) -> bytes:
    return b"\x01\x01" + mac


def vlan(number: int, *, add: bool = True) -> bytes:
    return struct.pack("<BBH", 2, not add, number)


def pairs(count: int) -> bytes:
    return struct.pack("<BBH", 4, 0, count)


def offloads(*bits: int) -> bytes:
    return struct.pack("<BBQ", 5, 0, v.mask(*bits))


ANNOUNCE_ACK = b"\x03\x00"


def frame(to: bytes = MAC, tag: int | None = None, size: int = 64, sender: bytes = OTHER) -> bytes:
    head = to + sender + (b"" if tag is None else struct.pack(">HH", 0x8100, tag)) + b"\x88\xb5"
    return head + bytes(n % 251 for n in range(size - len(head)))


@dataclass
class Reference:
    """What a driver has asked for and therefore receives, as the specification tells it (VIRTIO 1.3, 5.1.6.5)."""

    mac: bytes = MAC
    by_vlan: bool = True
    modes: set[str] = field(default_factory=lambda: {"promisc"})
    unicast: list[bytes] = field(default_factory=list)
    multicast: list[bytes] = field(default_factory=list)
    vlans: set[int] = field(default_factory=set)

    def set_mode(self, name: str, on: bool) -> None:
        (self.modes.add if on else self.modes.discard)(name)

    def receives(self, packet: bytes) -> bool:
        if "promisc" in self.modes:
            return True
        if self.by_vlan and packet[12:14] == b"\x81\x00":
            number = int.from_bytes(packet[14:16], "big") % 4096
            if number and number not in self.vlans:
                return False
        to = packet[:6]
        if to == BROADCAST:
            return "nobcast" not in self.modes
        if to[0] % 2:
            if "nomulti" in self.modes:
                return False
            return "allmulti" in self.modes or len(self.multicast) > TABLE_MAX or to in self.unicast + self.multicast
        if "nouni" in self.modes:
            return False
        if "alluni" in self.modes or len(self.unicast) > TABLE_MAX:
            return True
        return to == self.mac or to in self.unicast + self.multicast
