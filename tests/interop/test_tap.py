"""A guest and its host over a TAP, for every kind of guest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from interop.backend import Backend
from interop.features import KINDS, OFFLOADS, Kind, assert_kind
from interop.guest import Guest
from interop.host import Host
from interop.rig import Rig
from interop.traffic import FRAME_BYTES, PacketSizes, assert_ping, await_path, send_bulk, stream

pytestmark = pytest.mark.guest
# Both layouts as QEMU has them by default, and with all that makes a difference in a ring; offloads know no layout.
GUESTS = [
    *("defaults", "no_offloads", "not_mergeable", "no_indirect", "no_event_idx", "plain", "long_rings"),
    *("packed_defaults", "packed_checksum_only", "packed_chains"),
]
FULL_BULK = ("defaults", "no_offloads", "packed_defaults")  # 8 MiB wrap the rings of the others often enough


class Link(NamedTuple):
    """The parts of one set-up."""

    rig: Rig
    name: str
    kind: Kind
    host: Host
    guest: Guest
    backend: Backend

    @property
    def mib(self) -> int:
        return 64 if self.name in FULL_BULK else 8


@pytest.fixture(scope="module", params=GUESTS)
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    """Boot one guest of each kind, with a TAP on the other side."""
    name = request.param
    with Rig(request.config.getoption("--backend"), f"tap[{name}]") as rig:
        host = rig.host()
        backend = rig.backend(f"vhost:{rig.sock()}", "tap:vq0", host=host)
        guest = rig.guest(rig.sock(), properties=KINDS[name].properties)
        host.configure(1)
        guest.configure(2)
        yield Link(rig, name, KINDS[name], host, guest, backend)


def test_negotiates_what_the_guest_may(link: Link) -> None:
    link.backend.requires("TAP offloads")
    assert_kind(link.guest, link.kind)
    if link.name == "long_rings":
        assert "1024" in link.guest.check("ethtool -g eth0")


def test_ping_without_loss(link: Link) -> None:
    assert_ping(link.guest, link.host)
    assert_ping(link.host, link.guest)


@pytest.mark.parametrize("size", [1472, 8000, 20000, 65000])
def test_big_ping(link: Link, size: int) -> None:
    assert_ping(link.guest, link.host, count=20, size=size)
    assert_ping(link.host, link.guest, count=20, size=size)


def test_tcp_to_host(link: Link) -> None:
    if OFFLOADS - link.kind.absent:
        link.backend.requires("TAP offloads")
    await_path(link.guest, link.host)
    with PacketSizes(link.host) as sizes:
        seconds = send_bulk(link.guest, link.host, mib=link.mib)
    link.rig.note(f"guest to host {link.mib} MiB in {seconds:.1f} s, {sizes.received:.0f} bytes a packet")
    if link.kind.segments:
        # Without TSO no packet is longer than a frame, so neither is their mean. What is sent in small writes may go
        # out a segment at a time in spite of it, where the guest is slower than we are.
        with PacketSizes(link.host) as sizes:
            stream(link.guest, link.host)
        assert sizes.received > FRAME_BYTES, "TSO was negotiated, but the packets on the TAP have one segment each"
    else:
        assert sizes.received <= FRAME_BYTES


def test_tcp_to_guest(link: Link) -> None:
    if OFFLOADS - link.kind.absent:
        link.backend.requires("TAP offloads")
    await_path(link.host, link.guest)
    with PacketSizes(link.guest) as sizes:
        seconds = send_bulk(link.host, link.guest, mib=link.mib)
    link.rig.note(f"host to guest {link.mib} MiB in {seconds:.1f} s, {sizes.received:.0f} bytes a packet")
    if link.kind.segments:
        assert sizes.received > FRAME_BYTES, "TSO was negotiated, but the guest received one segment at a time"
    else:
        assert sizes.received <= FRAME_BYTES


def test_tcp_over_ipv6(link: Link) -> None:
    if OFFLOADS - link.kind.absent:
        link.backend.requires("TAP offloads")
    await_path(link.guest, link.host)
    send_bulk(link.guest, link.host, mib=4, ipv6=True)
    send_bulk(link.host, link.guest, mib=4, ipv6=True)


def test_counters_agree_with_both_sides(link: Link) -> None:
    await_path(link.guest, link.host)
    before, guest_before, host_before = link.backend.counters(), link.guest.counters(), link.host.counters()
    assert_ping(link.guest, link.host, count=100)
    after, guest_after, host_after = link.backend.counters(), link.guest.counters(), link.host.counters()
    names = (("from_guest", "tx_packets", "rx_packets"), ("to_guest", "rx_packets", "tx_packets"))
    for direction, guest_name, host_name in names:
        counted = getattr(after[0], direction) - getattr(before[0], direction)
        guest_counted = guest_after[guest_name] - guest_before[guest_name]
        host_counted = host_after[host_name] - host_before[host_name]
        # Neighbour discovery may fall between the readings; a lost or doubled class of packets is a hundred.
        assert counted >= 100 and abs(counted - guest_counted) <= 5 and abs(counted - host_counted) <= 5, direction
    assert after[0].dropped == before[0].dropped
