"""Kinds of guests: what their virtio-net driver is allowed to negotiate."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from interop.guest import Guest
from interop.host import Station

SEGMENTATION = (
    "gso",
    *(f"{side}_{kind}" for side in ("guest", "host") for kind in ("tso4", "tso6", "ecn", "ufo")),
    *("guest_uso4", "guest_uso6", "host_uso"),
)
CHECKSUM = ("csum", "guest_csum")

# Feature bits; VIRTIO 1.3, 5.1.3 (net) and 6 (of all devices)
CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MRG_RXBUF = 0, 1, 7, 8, 11, 12, 15
INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED = 28, 29, 32, 34
OFFLOADS = {CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6}
WANTED = OFFLOADS | {MRG_RXBUF, INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED}
PACKED: dict[str, str | int] = {"packed": "on"}  # QEMU's default is off


class Kind(NamedTuple):
    """One kind of guest.

    Parameters
    ----------
    properties : dict
        Properties of QEMU's virtio-net-pci.
    absent : Set of int
        Feature bits, out of ``WANTED``, that such a guest cannot have; it has all the others. RING_PACKED follows the
        properties.
    """

    properties: dict[str, str | int]
    absent: Set[int] = frozenset()

    @property
    def negotiates(self) -> Set[int]:
        """The feature bits out of ``WANTED`` that such a guest has."""
        return WANTED - self.absent - (set() if "packed" in self.properties else {RING_PACKED})

    def on_packed_rings(self) -> Kind:
        """The same kind of guest with packed rings."""
        return Kind(self.properties | PACKED, self.absent)

    @property
    def segments(self) -> bool:
        """Whether packets longer than the MTU may travel in both directions."""
        return HOST_TSO4 not in self.absent


def _off(*names: str) -> dict[str, str | int]:
    return dict.fromkeys(names, "off")


_TSO = OFFLOADS - {CSUM, GUEST_CSUM}
KINDS = {
    "defaults": Kind({}),
    "no_offloads": Kind(_off(*SEGMENTATION, *CHECKSUM), OFFLOADS),
    "checksum_only": Kind(_off(*SEGMENTATION), _TSO),
    "not_mergeable": Kind(_off("mrg_rxbuf"), {MRG_RXBUF}),
    "no_indirect": Kind(_off("indirect_desc"), {INDIRECT_DESC}),
    "no_event_idx": Kind(_off("event_idx"), {EVENT_IDX}),
    "plain": Kind(
        _off(*SEGMENTATION, *CHECKSUM, "mrg_rxbuf", "indirect_desc", "event_idx"),
        OFFLOADS | {MRG_RXBUF, INDIRECT_DESC, EVENT_IDX},
    ),
    "long_rings": Kind({"rx_queue_size": 1024, "tx_queue_size": 1024}),
    # Whatever makes a driver use one descriptor, and events instead of flags, is missing: a long packet takes a chain
    # of the ring's own descriptors, in both directions. A receive buffer takes 19 of them.
    "chains": Kind(
        _off("mrg_rxbuf", "indirect_desc", "event_idx") | {"rx_queue_size": 1024, "tx_queue_size": 1024},
        {MRG_RXBUF, INDIRECT_DESC, EVENT_IDX},
    ),
}
KINDS |= {f"packed_{name}": kind.on_packed_rings() for name, kind in KINDS.items()}


def negotiated(guest: Guest) -> set[int]:
    """Read the feature bits that the guest's driver and the device agreed on."""
    text = guest.check("cat /sys/class/net/eth0/device/features").strip()
    return {bit for bit, value in enumerate(text) if value == "1"}


def assert_kind(guest: Guest, kind: Kind) -> None:
    """Check that the driver really runs with what this kind of guest stands for."""
    found = negotiated(guest) & WANTED
    assert found == kind.negotiates, f"negotiated {sorted(found)}, expected {sorted(kind.negotiates)}"


def assert_packed(guest: Guest, packed: bool) -> None:
    """Check that the driver really runs with the layout that is meant."""
    assert (RING_PACKED in negotiated(guest)) == packed


def kernel_mtu(station: Station) -> int:
    """Read the MTU of a station's interface."""
    return int(station.check(f"cat /sys/class/net/{station.interface}/mtu"))
