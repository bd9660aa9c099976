"""The control queue of a network device without its ring: commands in, acks and a changed state out.

Everything here is plain data. `NetControl.execute` parses one command, changes the state, and tells which part of it
has changed; the device (vq/devices/net.py) makes the data plane obey before it answers.

Spec: VIRTIO 1.3, 5.1.6.5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Flag, auto
from typing import Any, ClassVar, Final

from vq import virtio as v

__all__ = ["COMMAND_MAX", "MACS_MAX", "Change", "CommandError", "NetControl"]

COMMAND_MAX: Final = 4096  # bytes: a MAC table of 680 addresses; of a longer one nothing is kept
MACS_MAX: Final = 64  # that are kept of each table; with more, all addresses of that kind pass
VLANS: Final = 4096

GUEST_OFFLOADS: Final = v.mask(
    v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_GUEST_TSO4, v.VIRTIO_NET_F_GUEST_TSO6, v.VIRTIO_NET_F_GUEST_ECN,
    v.VIRTIO_NET_F_GUEST_UFO, v.VIRTIO_NET_F_GUEST_USO4, v.VIRTIO_NET_F_GUEST_USO6,
)  # fmt: skip

_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class Change(Flag):
    """A part of the state that the data plane has to follow."""

    NONE = 0
    FILTER = auto()
    PAIRS = auto()
    OFFLOADS = auto()


class CommandError(Exception):
    """A command that is answered with VIRTIO_NET_ERR; the state is what it was."""


class NetControl:
    """What a driver has asked for by its control queue.

    Parameters
    ----------
    mac
        The device's address, until the driver sets another.
    max_pairs
        Queue pairs that there are.

    Attributes
    ----------
    features : int
        What the driver has acknowledged; commands of other features fail.
    mac : bytes
    pairs : int
        Queue pairs in use.
    modes : dict of str to bool
        "promisc", "allmulti", "alluni", "nomulti", "nouni" and "nobcast".
    unicast, multicast : tuple of bytes, or None
        The MAC table; None: it is too long to be kept, and all addresses of its kind pass.
    vlans : set of int
    offloads : int
        Those of the acknowledged guest offloads that are switched on, as feature bits.
    announce : bool
        The driver has been asked to announce itself, and has not acknowledged that.
    """

    def __init__(self, mac: bytes, max_pairs: int) -> None:
        self.default_mac = mac
        self.max_pairs = max_pairs
        self.features = 0
        self.reset()

    def reset(self) -> None:
        """Go back to what a driver finds after a reset; the features stay."""
        self.forget()
        self.announce = False

    def forget(self) -> None:
        """Forget what a driver has asked for; what it is asked for stays."""
        self.mac = self.default_mac
        self.pairs = 1 if self.serves(v.VIRTIO_NET_F_MQ) else self.max_pairs
        self.modes = dict.fromkeys(_RECEIVE_MODES.values(), False) | {"promisc": True}
        self.unicast: tuple[bytes, ...] | None = ()
        self.multicast: tuple[bytes, ...] | None = ()
        self.vlans: set[int] = set()
        self.offloads = self.features & GUEST_OFFLOADS

    def set_features(self, features: int) -> None:
        """Take over other features, with which nothing has been asked for yet."""
        self.features = features
        self.reset()

    def serves(self, feature: int) -> bool:
        """Whether commands of a feature may come: it and the control queue were acknowledged."""
        return v.has(self.features, v.VIRTIO_NET_F_CTRL_VQ) and v.has(self.features, feature)

    # -- what follows from the state --

    @property
    def filter(self) -> dict[str, Any] | None:
        """Arguments of `vq_core.receive_filter.ReceiveFilter`; None: everything passes."""
        by_address, by_vlan = self.serves(v.VIRTIO_NET_F_CTRL_RX), self.serves(v.VIRTIO_NET_F_CTRL_VLAN)
        vlans = sorted(self.vlans) if by_vlan else None
        modes = self.modes
        if not by_address:
            everything = {"unicast": "all", "multicast": "all", "broadcast": "all"}
            return everything | {"vlans": vlans} if by_vlan else None
        if modes["promisc"]:
            return None
        # A driver that was not told its address, and has told none, has one that nobody knows.
        unknown = self.mac == self.default_mac and not v.has(self.features, v.VIRTIO_NET_F_MAC)
        return {
            "unicast": _passes(modes["nouni"], modes["alluni"] or unknown or self.unicast is None),
            "multicast": _passes(modes["nomulti"], modes["allmulti"] or self.multicast is None),
            "broadcast": "none" if modes["nobcast"] else "all",
            "macs": [self.mac, *(self.unicast or ()), *(self.multicast or ())],
            "vlans": vlans,
        }

    @property
    def effective_features(self) -> int:
        """The acknowledged features without the offloads that are switched off."""
        return self.features & ~GUEST_OFFLOADS | self.offloads

    # -- commands --

    def execute(self, command: bytes, size: int) -> Change:
        """Execute one command.

        Parameters
        ----------
        command
            Class, command and data, as copied.
        size
            Bytes that the driver has sent; more than there are in `command` when that was cut off.

        Returns
        -------
        Change
            What the data plane has to follow.

        Raises
        ------
        CommandError
            It is unknown, not negotiated, malformed, or asks for what there is not.
        """
        if size > len(command):
            return self._set_long_table(command, size)
        if len(command) < 2:
            raise CommandError(f"a command of {len(command)} bytes; class and command take 2")
        known = self._commands.get((command[0], command[1]))
        if known is None:
            raise CommandError(f"class {command[0]}, command {command[1]}: unknown")
        feature, run = known
        if not self.serves(feature):
            name = v.feature_names(v.mask(feature), v.DeviceId.NET)[0]
            raise CommandError(f"class {command[0]}, command {command[1]}: {name} was not negotiated")
        return run(self, command[1], command[2:])

    def _set_mode(self, command: int, data: bytes) -> Change:
        if len(data) != 1:
            raise CommandError(f"receive mode: {len(data)} bytes of data; it has 1")
        if data[0] > 1:
            raise CommandError(f"receive mode: {data[0]}; 0 is off, 1 is on")
        self.modes[_RECEIVE_MODES[command]] = bool(data[0])
        return Change.FILTER

    def _set_table(self, _: int, data: bytes) -> Change:
        unicast, rest = _read_macs(data)
        multicast, rest = _read_macs(rest)
        if rest:
            raise CommandError(f"MAC table: {len(rest)} bytes behind its end")
        self.unicast, self.multicast = _kept(unicast), _kept(multicast)
        return Change.FILTER

    def _set_long_table(self, command: bytes, size: int) -> Change:
        """A command that is longer than what is copied of it: only a MAC table can be, of more than is kept."""
        if command[:2] != _TABLE_SET or not self.serves(v.VIRTIO_NET_F_CTRL_RX):
            raise CommandError(f"a command of {size} bytes; at most {len(command)} are looked at")
        self.unicast = self.multicast = None
        return Change.FILTER

    def _set_mac(self, _: int, data: bytes) -> Change:
        if len(data) != 6:
            raise CommandError(f"MAC address of {len(data)} bytes; it has 6")
        if data[0] & 1:
            raise CommandError("a group address cannot be the device's own")
        self.mac = data
        return Change.FILTER

    def _add_vlan(self, _: int, data: bytes) -> Change:
        self.vlans.add(_read_vlan(data))
        return Change.FILTER

    def _remove_vlan(self, _: int, data: bytes) -> Change:
        self.vlans.discard(_read_vlan(data))
        return Change.FILTER

    def _acknowledge(self, _: int, data: bytes) -> Change:
        if data:
            raise CommandError(f"announcement acknowledged with {len(data)} bytes of data; it has none")
        self.announce = False
        return Change.NONE

    def _set_pairs(self, _: int, data: bytes) -> Change:
        if len(data) != 2:
            raise CommandError(f"number of pairs: {len(data)} bytes of data; it has 2")
        (pairs,) = _U16.unpack(data)
        if not 1 <= pairs <= self.max_pairs:
            raise CommandError(f"{pairs} queue pairs; there are 1 to {self.max_pairs}")
        self.pairs = pairs
        return Change.PAIRS

    def _set_offloads(self, _: int, data: bytes) -> Change:
        if len(data) != 8:
            raise CommandError(f"guest offloads: {len(data)} bytes of data; it has 8")
        (offloads,) = _U64.unpack(data)
        unknown = offloads & ~(self.features & GUEST_OFFLOADS)
        if unknown:
            names = ", ".join(v.feature_names(unknown, v.DeviceId.NET))
            raise CommandError(f"guest offloads: {names} was not negotiated")
        self.offloads = offloads
        return Change.OFFLOADS

    _commands: ClassVar[dict[tuple[int, int], tuple[int, Callable[[NetControl, int, bytes], Change]]]]

    # -- moving on --

    def save(self) -> dict[str, Any]:
        """The state as plain data, for a device that goes on elsewhere."""
        return {
            "mac": self.mac.hex(),
            "default_mac": self.default_mac.hex(),
            "pairs": self.pairs,
            "modes": dict(self.modes),
            "unicast": None if self.unicast is None else [mac.hex() for mac in self.unicast],
            "multicast": None if self.multicast is None else [mac.hex() for mac in self.multicast],
            "vlans": sorted(self.vlans),
            "offloads": self.offloads,
            "announce": self.announce,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `save` gave; the features are known already.

        Raises
        ------
        CommandError
            It is nothing that a driver with these features could have asked for; the state is what it was.
        """
        other = NetControl(self.default_mac, self.max_pairs)
        other.set_features(self.features)
        try:
            for name in ("mac", "default_mac"):
                other._set_mac(0, bytes.fromhex(saved[name]))
                setattr(other, name, other.mac)
            other.mac = bytes.fromhex(saved["mac"])
            if saved["pairs"] != other.pairs:
                other.execute(bytes([4, 0]) + _U16.pack(saved["pairs"]), 4)
            if set(saved["modes"]) != set(other.modes):
                raise CommandError(f"receive modes: {sorted(saved['modes'])}")
            other.modes = {mode: bool(on) for mode, on in saved["modes"].items()}
            other.unicast = _loaded_macs(saved["unicast"])
            other.multicast = _loaded_macs(saved["multicast"])
            other.vlans = {_read_vlan(_U16.pack(vlan)) for vlan in saved["vlans"]}
            if saved["offloads"] != other.offloads:
                other.execute(bytes([5, 0]) + _U64.pack(saved["offloads"]), 10)
            other.announce = bool(saved["announce"])
        except (KeyError, TypeError, ValueError, AttributeError, struct.error) as problem:
            raise CommandError(f"saved state of a control queue: {problem!r}") from problem
        self.__dict__.update(other.__dict__)


def _passes(none: bool, everything: bool) -> str:
    return "none" if none else "all" if everything else "listed"


def _split_macs(data: bytes) -> list[bytes]:
    return [data[at : at + 6] for at in range(0, len(data), 6)]


def _read_macs(data: bytes) -> tuple[list[bytes], bytes]:
    """Read a count and so many addresses; gives them and what follows."""
    if len(data) < 4:
        raise CommandError(f"MAC table: {len(data)} bytes are left where a count takes 4")
    end = 4 + 6 * int(_U32.unpack_from(data)[0])  # a Python integer: it does not overflow
    if end > len(data):
        raise CommandError(f"MAC table: {(end - 4) // 6} addresses take {end} bytes, {len(data)} are left")
    return _split_macs(data[4:end]), data[end:]


def _kept(macs: list[bytes]) -> tuple[bytes, ...] | None:
    return None if len(macs) > MACS_MAX else tuple(macs)


def _loaded_macs(macs: list[str] | None) -> tuple[bytes, ...] | None:
    if macs is None:
        return None
    found = [bytes.fromhex(mac) for mac in macs]
    if any(len(mac) != 6 for mac in found):
        raise ValueError("a MAC address has 6 bytes")
    return _kept(found)


def _read_vlan(data: bytes) -> int:
    if len(data) != 2:
        raise CommandError(f"VLAN: {len(data)} bytes of data; it has 2")
    vlan: int = _U16.unpack(data)[0]
    if vlan >= VLANS:
        raise CommandError(f"VLAN {vlan}; there are 0 to {VLANS - 1}")
    return vlan


_RECEIVE_MODES: Final = {0: "promisc", 1: "allmulti", 2: "alluni", 3: "nomulti", 4: "nouni", 5: "nobcast"}
_TABLE_SET: Final = bytes([1, 0])

# 5.1.6.5.1 to 5.1.6.5.6: (class, command) -> the feature that it belongs to, and what it does.
NetControl._commands = {
    (0, 0): (v.VIRTIO_NET_F_CTRL_RX, NetControl._set_mode),
    (0, 1): (v.VIRTIO_NET_F_CTRL_RX, NetControl._set_mode),
    (0, 2): (v.VIRTIO_NET_F_CTRL_RX_EXTRA, NetControl._set_mode),
    (0, 3): (v.VIRTIO_NET_F_CTRL_RX_EXTRA, NetControl._set_mode),
    (0, 4): (v.VIRTIO_NET_F_CTRL_RX_EXTRA, NetControl._set_mode),
    (0, 5): (v.VIRTIO_NET_F_CTRL_RX_EXTRA, NetControl._set_mode),
    (1, 0): (v.VIRTIO_NET_F_CTRL_RX, NetControl._set_table),
    (1, 1): (v.VIRTIO_NET_F_CTRL_MAC_ADDR, NetControl._set_mac),
    (2, 0): (v.VIRTIO_NET_F_CTRL_VLAN, NetControl._add_vlan),
    (2, 1): (v.VIRTIO_NET_F_CTRL_VLAN, NetControl._remove_vlan),
    (3, 0): (v.VIRTIO_NET_F_GUEST_ANNOUNCE, NetControl._acknowledge),
    (4, 0): (v.VIRTIO_NET_F_MQ, NetControl._set_pairs),
    (5, 0): (v.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, NetControl._set_offloads),
}
