"""The control queue under Linux's own driver, in a front-end that passes everything on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from control_rig import frame
from interop.backend import Pump
from interop.host import Host
from interop.process import wait_until
from interop.rig import Rig
from interop.traffic import assert_ping
from interop.uml import UmlGuest
from pump_rig import Guest as OurGuest
from vq import virtio as v

pytestmark = pytest.mark.guest
MAC = "52:54:00:76:73:01"
NOBODY = bytes.fromhex("0200deadbeef")
COUNT = 20  # frames of ours; the host's kernel chats with multicast only


class Cable:
    """A user-mode Linux and the host's namespace, joined by a TAP."""

    def __init__(self, pump: Pump, host: Host, guest: UmlGuest) -> None:
        self.pump, self.host, self.guest = pump, host, guest

    @property
    def port(self) -> dict[str, Any]:
        """The guest's port, now."""
        ports: dict[str, Any] = self.pump.fresh_record()["ports"]
        return next(port for port in ports.values() if port["kind"] == "vhost")

    @property
    def control(self) -> dict[str, Any]:
        state: dict[str, Any] = self.port["control"]
        return state

    def filtered(self) -> int:
        return int(self.port["to_guest"]["dropped"].get("filtered", 0))

    def await_control(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> None:
        wait_until(what, lambda: condition(self.control), 20, [self.pump.child])

    def send(self, packet: bytes) -> None:
        """Send frames from the host."""
        code = (
            "import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); "
            f's.bind(("{self.host.interface}", 0)); p = bytes.fromhex("{packet.hex()}"); '
            f"[s.send(p) for _ in range({COUNT})]"
        )
        self.host.check(f"{sys.executable} -c '{code}'")

    def received(self, interface: str = "eth0") -> int:
        return int(self.guest.check(f"cat /sys/class/net/{interface}/statistics/rx_packets"))


@pytest.fixture(scope="module")
def cable(request: pytest.FixtureRequest) -> Iterator[Cable]:
    if request.config.getoption("--backend") != "vq":
        pytest.skip("the stand-in keeps no control queue")
    with Rig("vq", "control queue") as rig:
        host = rig.host()
        port = f"vhost:{rig.sock()},control,queues=2,layout=split,mac={MAC},speed=40000"
        pump = rig.backend(port, "tap:vq0", host=host)
        assert isinstance(pump, Pump)
        guest = rig.uml_guest(rig.sock())
        host.configure(1)
        guest.configure(2)
        yield Cable(pump, host, guest)


@pytest.mark.shows(
    "VIRTIO_NET_F_CTRL_VQ", "VIRTIO_NET_F_CTRL_RX", "VIRTIO_NET_F_CTRL_VLAN", "VIRTIO_NET_F_CTRL_MAC_ADDR",
    "VIRTIO_NET_F_CTRL_GUEST_OFFLOADS", "VIRTIO_NET_F_MAC", "VIRTIO_NET_F_STATUS", "VIRTIO_NET_F_SPEED_DUPLEX",
    "GET_CONFIG",
)  # fmt: skip
def test_linux_negotiates_what_it_can(cable: Cable) -> None:
    assert_ping(cable.guest, cable.host, count=20)
    names = set(cable.port["features"])
    assert names >= {
        "CTRL_VQ", "CTRL_RX", "CTRL_VLAN", "CTRL_MAC_ADDR", "CTRL_GUEST_OFFLOADS", "MAC", "STATUS", "MQ",
        "SPEED_DUPLEX", "VERSION_1",
    }  # fmt: skip
    assert cable.guest.check("cat /sys/class/net/eth0/address").strip() == MAC
    settings = cable.guest.check("ethtool eth0")
    assert "Link detected: yes" in settings
    assert "Speed: 40000Mb/s" in settings
    assert "Duplex: Full" in settings


@pytest.mark.shows("VIRTIO_NET_F_CTRL_RX")
def test_linux_filters_by_address(cable: Cable) -> None:
    cable.await_control("a filter of Linux", lambda now: now["filtering"])
    before, seen = cable.filtered(), cable.received()
    cable.send(frame(NOBODY))
    wait_until("frames are filtered", lambda: cable.filtered() >= before + COUNT, 20)
    assert cable.received() < seen + COUNT
    cable.guest.check("ip link set eth0 promisc on")
    cable.await_control("promiscuous", lambda now: not now["filtering"])
    before, seen = cable.filtered(), cable.received()
    cable.send(frame(NOBODY))
    wait_until("frames arrive", lambda: cable.received() >= seen + COUNT, 20)
    assert cable.filtered() == before
    cable.guest.check("ip link set eth0 promisc off")
    cable.await_control("a filter of Linux", lambda now: now["filtering"])
    assert_ping(cable.guest, cable.host, count=20)


@pytest.mark.shows("VIRTIO_NET_F_CTRL_VLAN")
def test_linux_filters_by_vlan(cable: Cable) -> None:
    mac = bytes.fromhex(cable.control["mac"])
    before = cable.filtered()
    cable.send(frame(mac, 5))
    wait_until("frames are filtered", lambda: cable.filtered() >= before + COUNT, 20)
    cable.guest.check("ip link add link eth0 name eth0.5 type vlan id 5 && ip link set eth0.5 up")
    cable.await_control("VLAN 5", lambda now: 5 in now["vlans"])
    cable.send(frame(mac, 5))
    wait_until("frames arrive", lambda: cable.received("eth0.5") >= COUNT, 20)
    cable.guest.check("ip link delete eth0.5")
    cable.await_control("no VLAN 5", lambda now: 5 not in now["vlans"])
    assert_ping(cable.guest, cable.host, count=20)


@pytest.mark.shows("VIRTIO_NET_F_MQ")
def test_linux_chooses_its_pairs(cable: Cable) -> None:
    for pairs in (2, 1, 2):
        cable.guest.check(f"ethtool -L eth0 combined {pairs}")
        assert cable.control["pairs"] == pairs
        assert cable.guest.check("ethtool -l eth0").count(f"Combined:\t{pairs}") >= 1
        assert_ping(cable.guest, cable.host, count=20)
        assert_ping(cable.host, cable.guest, count=20)
    assert cable.guest.run("ethtool -L eth0 combined 3").code != 0


@pytest.mark.shows("VIRTIO_NET_F_CTRL_MAC_ADDR")
def test_linux_changes_its_address(cable: Cable) -> None:
    address = "52:54:00:76:73:99"
    cable.guest.check(f"ip link set eth0 down && ip link set eth0 address {address}")
    cable.guest.configure(2)
    assert cable.control["mac"] == address.replace(":", "")
    cable.host.check("ip neigh flush dev vq0")
    assert_ping(cable.host, cable.guest, count=20)
    before = cable.filtered()
    cable.send(frame(bytes.fromhex(MAC.replace(":", ""))))
    wait_until("frames to the old address are filtered", lambda: cable.filtered() >= before + COUNT, 20)


@pytest.mark.shows("VIRTIO_NET_F_CTRL_GUEST_OFFLOADS")
def test_linux_changes_its_offloads(cable: Cable) -> None:
    before = cable.control["offloads"]
    assert v.has(before, v.VIRTIO_NET_F_GUEST_TSO4)
    cable.guest.check("ethtool -K eth0 rx-gro-hw off || ethtool -K eth0 lro off")
    assert cable.control["offloads"] != before
    assert not v.has(cable.control["offloads"], v.VIRTIO_NET_F_GUEST_TSO4)
    assert_ping(cable.host, cable.guest, count=20)


@pytest.mark.shows("BACKEND_CONFIG_CHANGE_MSG", "VIRTIO_NET_F_STATUS")
def test_linux_sees_its_link_come_and_go(rig: Rig) -> None:
    pump = rig.backend(f"vhost:{rig.sock('a')},control,layout=split", f"vhost:{rig.sock('b')}")
    assert isinstance(pump, Pump)
    guest = rig.uml_guest(rig.sock("a"))
    guest.check("ip link set eth0 up")

    def carrier() -> str:
        return guest.check("cat /sys/class/net/eth0/carrier").strip()

    wait_until("no carrier", lambda: carrier() == "0", 20)
    with OurGuest(str(rig.sock("b"))):
        wait_until("a carrier", lambda: carrier() == "1", 20)
    wait_until("no carrier", lambda: carrier() == "0", 20)
