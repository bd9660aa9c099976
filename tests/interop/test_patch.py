"""Two guests joined by the pump: what one may send and the other cannot take, the pump completes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from interop.backend import Backend
from interop.features import KINDS, PACKED, assert_kind, kernel_mtu
from interop.guest import Guest
from interop.rig import Rig
from interop.traffic import FRAME_BYTES, PacketSizes, assert_ping, assert_whole, await_path, send_bulk

pytestmark = pytest.mark.guest
PAIRS = [
    ("defaults", "defaults"),
    ("packed_defaults", "packed_defaults"),
    ("packed_defaults", "no_offloads"),
    ("checksum_only", "packed_plain"),
    ("not_mergeable", "packed_defaults"),
    ("packed_chains", "no_event_idx"),
]
FULL_BULK = PAIRS[:2]


class Pair(NamedTuple):
    """Two guests and the back-end between them."""

    rig: Rig
    names: tuple[str, str]
    guests: tuple[Guest, Guest]
    backend: Backend


def _boot(rig: Rig, *properties: dict[str, str | int]) -> tuple[Backend, Guest, Guest]:
    """Start the pump and two guests with these properties; both boot at once."""
    backend = rig.backend(f"vhost:{rig.sock('a')}", f"vhost:{rig.sock('b')}")
    started = [rig.guest(rig.sock(n), boot=False, properties=p) for n, p in zip("ab", properties, strict=True)]
    first, second = (guest.wait_booted() for guest in started)
    first.configure(1)
    second.configure(2)
    return backend, first, second


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Boot two guests of the kinds that the parameter names."""
    names = request.param
    with Rig(request.config.getoption("--backend"), f"patch[{'-'.join(names)}]") as rig:
        backend, first, second = _boot(rig, *(KINDS[name].properties for name in names))
        yield Pair(rig, names, (first, second), backend)


@pytest.mark.shows(
    "VIRTIO_F_VERSION_1", "VIRTIO_F_RING_PACKED", "VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_EVENT_IDX",
    "VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_NET_F_CSUM", "VIRTIO_NET_F_GUEST_CSUM", "VIRTIO_NET_F_GUEST_TSO4",
    "VIRTIO_NET_F_GUEST_TSO6", "VIRTIO_NET_F_HOST_TSO4", "VIRTIO_NET_F_HOST_TSO6",
)  # fmt: skip
def test_negotiates_what_the_guests_may(pair: Pair) -> None:
    pair.backend.requires("TAP offloads")
    for guest, name in zip(pair.guests, pair.names, strict=True):
        assert_kind(guest, KINDS[name])


def test_ping_without_loss(pair: Pair) -> None:
    first, second = pair.guests
    assert_ping(first, second)
    assert_ping(second, first)


@pytest.mark.parametrize("size", [1472, 8000, 20000, 65000])
def test_big_ping(pair: Pair, size: int) -> None:
    assert_ping(*pair.guests, count=20, size=size)


@pytest.mark.parametrize("way", ["forth", "back"])
def test_tcp(pair: Pair, way: str) -> None:
    step = 1 if way == "forth" else -1
    source, target = pair.guests[::step]
    sender, receiver = (KINDS[name] for name in pair.names[::step])
    if sender.absent < receiver.absent:
        pair.backend.requires("software completion")
    await_path(source, target)
    mib = 64 if pair.names in FULL_BULK else 8
    with PacketSizes(source) as sent, PacketSizes(target) as received:
        seconds = send_bulk(source, target, mib=mib)
    pair.rig.note(
        f"{way} {mib} MiB in {seconds:.1f} s, {sent.sent:.0f} bytes a packet sent, {received.received:.0f} received"
    )
    if sender.segments:
        pair.backend.requires("TAP offloads")
        assert sent.sent > FRAME_BYTES, "the sender was not allowed to leave segmentation to us"
    if sender.segments and receiver.segments:
        assert received.received > FRAME_BYTES, "a packet for TSO was cut up although the receiver takes it whole"
    if not receiver.segments:
        assert received.received <= FRAME_BYTES, "the receiver got packets that it never agreed to"


def test_tcp_over_ipv6(pair: Pair) -> None:
    first, second = pair.guests
    if pair.names[0] != pair.names[1]:
        pair.backend.requires("software completion")
    await_path(first, second)
    send_bulk(first, second, mib=4, ipv6=True)
    send_bulk(second, first, mib=4, ipv6=True)


@pytest.mark.shows("VIRTIO_NET_F_MTU")
def test_packets_of_the_host_mtu(rig: Rig) -> None:
    """A 9000-byte MTU reaches the guests, and such packets pass unfragmented."""
    if "host_mtu" in rig.backend_class.lacks:
        pytest.skip("the stand-in has no host_mtu")
    _, first, second = _boot(rig, {"host_mtu": 9000}, {"host_mtu": 9000} | PACKED)
    assert kernel_mtu(first) == kernel_mtu(second) == 9000
    assert_whole(first, second, 8972)
    assert_ping(first, second, count=50, size=8972)
    send_bulk(first, second, mib=8)
