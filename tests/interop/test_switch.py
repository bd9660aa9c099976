"""Three ports make a learning switch: two guests, one of them on packed rings, and a TAP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from interop.features import PACKED, assert_packed
from interop.guest import Guest
from interop.host import Host, Station
from interop.rig import Rig
from interop.traffic import assert_ping, await_path, send_bulk

pytestmark = pytest.mark.guest


class Net(NamedTuple):
    """Everything at the switch."""

    host: Host
    first: Guest
    second: Guest

    def others(self, *those: Station) -> Station:
        """Give the one station that is not among these."""
        (other,) = (station for station in self if station not in those)
        return other


@pytest.fixture(scope="module")
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    """Boot two guests at a switch of three ports."""
    with Rig(request.config.getoption("--backend"), "switch") as rig:
        if "switch" in rig.backend_class.lacks:
            pytest.skip("the stand-in has no switch")
        host = rig.host()
        rig.backend(f"vhost:{rig.sock('a')}", f"vhost:{rig.sock('b')}", "tap:vq0", host=host)
        first = rig.guest(rig.sock("a"), boot=False)
        second = rig.guest(rig.sock("b"), boot=False, properties=PACKED)
        for number, station in enumerate((host, first.wait_booted(), second.wait_booted()), 1):
            station.configure(number)
        assert_packed(first, False)
        assert_packed(second, True)
        yield Net(host, first, second)


@pytest.mark.parametrize("ends", [("first", "second"), ("second", "host"), ("host", "first")], ids="-".join)
def test_everybody_reaches_everybody(net: Net, ends: tuple[str, str]) -> None:
    source, target = (getattr(net, name) for name in ends)
    assert_ping(source, target, count=100)
    assert_ping(source, target, count=20, size=20000)


@pytest.mark.parametrize("ends", [("first", "second"), ("second", "host")], ids="-".join)
def test_what_is_for_one_goes_to_no_other(net: Net, ends: tuple[str, str]) -> None:
    source, target = (getattr(net, name) for name in ends)
    third = net.others(source, target)
    await_path(source, target)
    before = third.counters()["rx_packets"]
    send_bulk(source, target, mib=8)
    leaked = third.counters()["rx_packets"] - before
    # ARP and neighbour discovery are flooded; 8 MiB are a thousand packets and more.
    assert leaked < 30, f"{third.name} saw {leaked} packets of a transfer that it has no part in"


def test_broadcast_reaches_all(net: Net) -> None:
    # Without an answer from anybody the address stays unknown, so each echo request asks for it by broadcast.
    before = [station.counters()["rx_packets"] for station in (net.host, net.second)]
    net.first.run("/bin/ping -q -n -c 3 -i 1 -W 1 192.0.2.99", 15)
    after = [station.counters()["rx_packets"] for station in (net.host, net.second)]
    assert all(now - then >= 3 for now, then in zip(after, before, strict=True)), (before, after)


def test_a_station_that_moves_is_found_again(net: Net) -> None:
    """The address of a guest appears on another port: what is for it follows."""
    for station in (net.first, net.second, net.host):
        await_path(station, net.others(station, net.first if station is not net.first else net.second))
    mac = net.first.mac
    net.first.check("ip link set eth0 down")
    try:
        net.second.check(f"ip link set eth0 down; ip link set eth0 address {mac}")
        net.second.configure(2)
        # The moved address speaks first, as it does after a migration.
        assert_ping(net.second, net.host, count=20)
        assert_ping(net.host, net.second, count=20)
    finally:
        net.second.check(f"ip link set eth0 down; ip link set eth0 address {net.second.mac}")
        net.second.configure(3)
        net.first.configure(2)
        net.host.check("ip neigh flush all")
    assert_ping(net.host, net.first, count=20)
    assert_ping(net.first, net.second, count=20)
