"""A network device with its control queue behind a socket: what a driver asks for shows in the packets it gets."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from control_rig import (
    ANNOUNCE_ACK,
    BROADCAST,
    CONTROL,
    ERR,
    GROUP,
    MAC,
    OK,
    OTHER,
    Reference,
    frame,
    mac_address,
    mac_table,
    mode,
    offloads,
    pairs,
    vlan,
)
from pump_rig import Background, Guest, every_layout, port_counters, pumping
from vhost_rig import open_fds
from vq import virtio as v
from vq.devices.net import ControlledNetDevice, derived_mac
from vq.errors import BackendError, UsageError, VqError
from vq.message import Request
from vq.payload import Config
from vq.pump import Pump
from vq_core.driver import DriverQueue
from waiting import wait_for

CONFIG = v.mask(v.VHOST_USER_PROTOCOL_F_CONFIG, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ)
CHANGED = struct.pack("=III", 2, 9, 0)
GUEST_OFFLOADS = v.mask(v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_GUEST_TSO4)


class ControlGuest(Guest):
    """A guest whose driver has a control queue, behind a front-end that passes it on.

    Parameters
    ----------
    channel
        The front-end gives a back-end channel.
    """

    def __init__(
        self,
        path: str,
        features: int = CONTROL,
        *,
        pairs: int = 1,
        offered: int = 2,
        channel: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(path, features, pairs=pairs, running=0, **more)
        self.frontend.request(Request.SET_PROTOCOL_FEATURES, self.frontend.protocol_features | CONFIG)
        self.frontend.protocol_features |= CONFIG
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(60)
        if channel:
            self.frontend.request(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
        theirs.close()
        self.control = DriverQueue(self.memory, 16, features=self.features)
        self.control_index = 2 * offered if v.has(self.features, v.VIRTIO_NET_F_MQ) else 2
        for pair in range(pairs):
            self.start(pair)
        self.start_control()

    def queue(self, index: int) -> DriverQueue:
        return self.control if index == self.control_index else super().queue(index)

    def start_control(self) -> None:
        self.frontend.start_ring(self.ring(self.control_index))

    def ask(self, command: bytes, room: int = 1) -> Any:
        """Send a command; it is answered later."""
        token = self.control.add([command], [room] if room else [])
        self.control.kick()
        return token

    def do(self, command: bytes) -> bytes:
        """Send a command, and wait for its ack."""
        token = self.ask(command)
        assert self.control.wait(60), "the command was not answered"
        ((done, length),) = self.control.poll()
        assert done is token
        return bytes(token.written(length))

    def must(self, *commands: bytes) -> None:
        for command in commands:
            assert self.do(command) == OK

    @property
    def config(self) -> v.NetConfig:
        return v.NetConfig.unpack(self.frontend.get_config(0, v.VIRTIO_NET_CONFIG_SIZE))

    def told(self) -> None:
        """Be told of a changed configuration space, and acknowledge that."""
        assert self.ours.recv(len(CHANGED)) == CHANGED
        self.ours.send(struct.pack("=IIIQ", 2, 5, 8, 0))

    def close(self) -> None:
        self.ours.close()
        super().close()
        self.control.close()


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [str(tmp_path / f"{name}.sock") for name in "ab"]


@pytest.fixture
def pump(paths: list[str]) -> Iterator[Pump]:
    """A patch between a guest with a control queue and a plain one."""
    with pumping(f"vhost:{paths[0]},control,mac=52:54:00:12:34:56,queues=2", f"vhost:{paths[1]},queues=2") as pump:
        yield pump


def control_state(pump: Pump) -> dict[str, Any]:
    state: dict[str, Any] = port_counters(pump, 0)["control"]
    return state


def _has_filtered(pump: Pump, count: int) -> bool:
    return bool(port_counters(pump, 0)["to_guest"]["dropped"].get("filtered", 0) == count)


# ---- what is offered ----


def test_without_the_option_nothing_of_it_is_offered(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]}"), Guest(paths[0]) as guest:
        own = CONTROL & ~v.mask(v.VIRTIO_NET_F_MQ, v.VIRTIO_NET_F_GUEST_ANNOUNCE, v.VIRTIO_F_VERSION_1)
        assert guest.frontend.offered_features & own == 0
        assert not v.has(guest.frontend.offered_protocol_features, v.VHOST_USER_PROTOCOL_F_CONFIG)
        assert guest.frontend.queue_num() == 8


@pytest.mark.shows(
    "VHOST_USER_PROTOCOL_F_CONFIG", "GET_CONFIG", "VIRTIO_NET_F_STATUS", "VIRTIO_NET_F_MAC", "VIRTIO_NET_F_MTU",
    "VIRTIO_NET_F_SPEED_DUPLEX", "VIRTIO_NET_F_CTRL_VQ",
)  # fmt: skip
def test_configuration_space(paths: list[str]) -> None:
    with (
        pumping(f"vhost:{paths[0]},control,mac=52:54:00:12:34:56,queues=2,mtu=1400,speed=25000"),
        ControlGuest(paths[0]) as guest,
    ):
        assert guest.frontend.queue_num() == 5
        assert guest.frontend.offered_features & CONTROL == CONTROL
        assert v.has(guest.frontend.offered_features, v.VIRTIO_NET_F_MTU)
        expected = v.NetConfig(MAC, v.VIRTIO_NET_S_LINK_UP, 2, 1400, 25000, 1)
        assert guest.config == expected
        assert guest.frontend.get_config(8, 4) == struct.pack("<HH", 2, 1400)
        assert guest.frontend.get_config(0, 60)[28:] == bytes(32)


def test_defaults_of_the_configuration_space(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]},control"), ControlGuest(paths[0], offered=8) as guest:
        assert guest.config == v.NetConfig(derived_mac(f"vhost:{paths[0]}"), 1, 8, 0, 0xFFFFFFFF, 1)
        assert guest.config.mac[0] & 3 == 2
        assert not v.has(guest.frontend.offered_features, v.VIRTIO_NET_F_MTU)


@pytest.mark.parametrize(
    "port",
    [
        "vhost:a,control,queues=128", "vhost:a,control,postcopy", "vhost:a,mac=52:54:00:12:34:56", "vhost:a,speed=5",
        "vhost:a,control,mac=53:54:00:12:34:56", "vhost:a,control,mac=52:54:00:12:34",
        "vhost:a,control,mac=00:00:00:00:00:00",
    ],
)  # fmt: skip
def test_impossible_options(port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(open_fds())
    with pytest.raises(UsageError):
        Pump([port])
    assert set(open_fds()) == before


# ---- filters ----


@every_layout
@pytest.mark.shows("VIRTIO_NET_F_CTRL_RX", "VIRTIO_NET_F_CTRL_VLAN", "VIRTIO_NET_F_CTRL_RX_EXTRA")
def test_filters_between_guests(paths: list[str], pump: Pump, layout: int) -> None:
    """Each packet arrives, or is counted as filtered, as the specification says."""
    packets = [frame(to, tag) for to in (MAC, OTHER, GROUP, BROADCAST) for tag in (None, 0, 5, 6)]
    steps = (
        [], [mode("promisc", False)], [vlan(5)], [mac_table([OTHER], [GROUP])], [vlan(5, add=False)],
        [mode("nomulti")], [mode("nobcast")], [mode("nouni")], [mode("promisc")],
        [mode("promisc", False), mode("nouni", False), mode("alluni"), vlan(6)],
        [mode("alluni", False), mac_table([], []), mac_address(OTHER)],
    )  # fmt: skip
    wanted = Reference()
    with ControlGuest(paths[0], CONTROL | layout) as guest, Guest(paths[1], CONTROL | layout) as other:
        wait_for(lambda: pump.ports[0].port.targets)
        filtered = 0
        for commands in steps:
            guest.must(*commands)
            for command in commands:
                if command[0] == 0:
                    wanted.set_mode(("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")[command[1]],
                                    bool(command[2]))  # fmt: skip
                elif command[:2] == b"\x01\x01":
                    wanted.mac = command[2:]
                elif command[0] == 1:
                    wanted.unicast, wanted.multicast = ([OTHER], [GROUP]) if OTHER in command else ([], [])
                else:
                    number = struct.unpack("<H", command[2:])[0]
                    (wanted.vlans.discard if command[1] else wanted.vlans.add)(number)
            expected = [packet for packet in packets if wanted.receives(packet)]
            filtered += len(packets) - len(expected)
            guest.post(128, len(packets))
            for packet in packets:
                other.send(packet)
            assert [guest.receive()[1] for _ in expected] == expected
            wait_for(partial(_has_filtered, pump, filtered))
            assert port_counters(pump, 0)["to_guest"]["dropped"] == ({"filtered": filtered} if filtered else {})
        assert control_state(pump)["filtering"] is True
        assert control_state(pump)["mac"] == OTHER.hex()
        assert guest.config.mac == OTHER
        # The other way nothing is filtered.
        other.post(128, 1)
        guest.send(frame(OTHER))
        assert other.receive()[1] == frame(OTHER)


def test_filters_hold_while_packets_flow(paths: list[str], pump: Pump) -> None:
    """Commands change what passes while both directions are busy; nothing is lost that is wanted."""
    with (
        ControlGuest(paths[0], memory_bytes=16 << 20) as guest,
        Guest(paths[1], CONTROL, memory_bytes=16 << 20) as other,
    ):
        traffic = Background([*guest.streams(other), *other.streams(guest)], (64, 1514))
        traffic.goes_on()
        for number in range(100):
            guest.must(vlan(number), mode("alluni"), mode("allmulti"), mode("promisc", number % 2 == 0))
            if number % 20 == 0:
                traffic.goes_on()
        assert traffic.finish()["verified"] > 300


# ---- pairs ----


@every_layout
@pytest.mark.shows("VIRTIO_NET_F_MQ")
def test_number_of_pairs_changes_under_traffic(paths: list[str], pump: Pump, layout: int) -> None:
    with (
        ControlGuest(paths[0], CONTROL | layout, pairs=2, memory_bytes=16 << 20) as guest,
        Guest(paths[1], CONTROL | layout, pairs=2, memory_bytes=16 << 20) as other,
    ):
        port = pump.ports[0].port
        wait_for(lambda: port.targets == [0])
        assert all(queue["enabled"] for queue in port_counters(pump, 0)["queues"])
        traffic = Background(guest.streams(other)[:1], (64, 1514))
        traffic.goes_on()
        for count in (2, 1, 2, 1, 2):
            assert guest.do(pairs(count)) == OK
            assert port.targets == list(range(count)), "the plan is made before the ack"
            traffic.goes_on()
        assert guest.do(pairs(3)) == guest.do(pairs(0)) == ERR
        traffic.finish()
        assert control_state(pump)["pairs"] == 2
    with (
        ControlGuest(paths[0], CONTROL | layout, pairs=2, memory_bytes=16 << 20) as guest,
        Guest(paths[1], CONTROL | layout, pairs=2, memory_bytes=16 << 20) as other,
    ):
        guest.must(pairs(2))
        traffic = Background([*guest.streams(other), *other.streams(guest)], (64, 1514))
        traffic.goes_on(500)
        traffic.finish()


def test_pairs_out_of_use_take_and_give_nothing(paths: list[str], pump: Pump) -> None:
    with ControlGuest(paths[0], pairs=2) as guest, Guest(paths[1], CONTROL, pairs=2) as other:
        wait_for(lambda: pump.ports[0].port.targets == [0])
        for pair in (0, 1):
            guest.post(128, 4, pair)
            other.post(128, 4, pair)
        other.send(frame(), pair=1)
        assert guest.receive()[1] == frame(), "both pairs of the other side go to the one in use"
        guest.send(frame(OTHER), pair=1)
        wait_for(lambda: port_counters(pump, 0)["from_guest"]["dropped"] == {"disabled": 1})
        guest.must(pairs(2))
        other.send(frame(), pair=1)
        assert guest.receive(pair=1)[1] == frame()
        guest.send(frame(OTHER), pair=1)
        assert other.receive(pair=1)[1] == frame(OTHER)


def test_without_multiqueue_the_control_queue_is_the_third(paths: list[str], pump: Pump) -> None:
    features = CONTROL & ~v.mask(v.VIRTIO_NET_F_MQ)
    with ControlGuest(paths[0], features) as guest:
        assert guest.control_index == 2
        guest.must(mode("promisc", False))
        assert guest.do(pairs(1)) == ERR
    with ControlGuest(paths[0]) as guest:
        assert guest.control_index == 4
        guest.must(mode("promisc", False), pairs(2))


# ---- offloads ----


@pytest.mark.shows("VIRTIO_NET_F_CTRL_GUEST_OFFLOADS")
def test_guest_offloads_change_under_traffic(paths: list[str], pump: Pump) -> None:
    """A long TCP segment arrives whole, or in pieces with complete checksums, as the driver has it at the moment."""
    features = CONTROL | GUEST_OFFLOADS | v.mask(v.VIRTIO_NET_F_MRG_RXBUF)
    sender = v.mask(v.VIRTIO_NET_F_CSUM, v.VIRTIO_NET_F_HOST_TSO4, v.VIRTIO_F_VERSION_1)
    data = bytes(n % 251 for n in range(4000))
    packet = bytes(
        Ether(dst=MAC.hex(":"), src=OTHER.hex(":"), type=0x0800) / IP(src="10.0.0.1", dst="10.0.0.2")
        / TCP(sport=1, dport=2, flags="A", chksum=0) / data
    )  # fmt: skip
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)
    with ControlGuest(paths[0], features) as guest, Guest(paths[1], sender) as other:
        wait_for(lambda: pump.ports[0].port.targets)
        for bits, sizes in (
            (None, [4054]),
            ((v.VIRTIO_NET_F_GUEST_CSUM,), [1054] * 4),
            ((), [1054] * 4),
            ((v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_GUEST_TSO4), [4054]),
        ):
            if bits is not None:
                guest.must(offloads(*bits))
            guest.post(5000, len(sizes))
            other.send(packet, header)
            received = [guest.receive() for _ in sizes]
            assert [len(payload) for _, payload in received] == sizes
            assert b"".join(payload[54:] for _, payload in received) == data
            for head, payload in received:
                asks = bool(head[0] & 1)
                assert bits is None or v.VIRTIO_NET_F_GUEST_CSUM in bits or not asks
                if not asks:
                    tcp = Ether(payload)[TCP]
                    checksum = tcp.chksum
                    del tcp.chksum
                    assert Ether(bytes(tcp.underlayer.underlayer))[TCP].chksum == checksum
        assert guest.do(offloads(v.VIRTIO_NET_F_GUEST_TSO6)) == ERR


# ---- lives ----


@pytest.mark.shows("RESET_DEVICE")
def test_a_reset_forgets_all(paths: list[str], pump: Pump) -> None:
    with ControlGuest(paths[0], pairs=2) as guest:
        first = control_state(pump)
        ours = [mode("promisc", False), vlan(5), mac_address(OTHER), pairs(2), offloads(), mac_table([OTHER], [GROUP])]
        guest.must(*ours)
        assert control_state(pump) != first
        guest.frontend.request(Request.RESET_DEVICE)
        assert control_state(pump) == first
        guest.control.reset()
        guest.start_control()
        guest.must(*ours)
        changed = control_state(pump)
        # A ring that goes on is the same driver's; one at its very beginning is a new one's.
        guest.frontend.stop_ring(guest.control_index)
        guest.start_control()
        guest.must(vlan(5))
        assert control_state(pump) == changed
        guest.frontend.stop_ring(guest.control_index)
        guest.control.reset()
        guest.start_control()
        guest.must(vlan(7))
        assert control_state(pump) == first | {"vlans": [7]}
    with ControlGuest(paths[0]):
        assert control_state(pump) == first


def test_commands_that_wait_are_served_at_the_start(paths: list[str], pump: Pump) -> None:
    with ControlGuest(paths[0]) as guest:
        for stop in (
            lambda: guest.frontend.stop_ring(guest.control_index),
            lambda: guest.frontend.enable_ring(guest.control_index, False),
        ):
            stop()
            token = guest.control.add([vlan(1)], [1])
            guest.control.publish()  # no kick
            assert not guest.control.wait(0.1)
            if port_counters(pump, 0)["queues"][-1]["started"]:
                guest.frontend.enable_ring(guest.control_index, True)
            else:
                guest.start_control()
            assert guest.control.wait(60)
            assert guest.control.poll() == [(token, 1)]


def test_set_config_writes_only_an_address_that_cannot_be_commanded(paths: list[str], pump: Pump) -> None:
    with ControlGuest(paths[0]) as guest, pytest.raises(BackendError):
        guest.frontend.request(Request.SET_CONFIG, Config(0, 0, OTHER))
    with ControlGuest(paths[0], CONTROL & ~v.mask(v.VIRTIO_NET_F_CTRL_MAC_ADDR)) as guest:
        for at, byte in enumerate(OTHER):
            guest.frontend.request(Request.SET_CONFIG, Config(at, 0, bytes([byte])))
        assert guest.config.mac == OTHER
        with pytest.raises(BackendError):
            guest.frontend.request(Request.SET_CONFIG, Config(5, 0, bytes(2)))


@pytest.mark.shows("SET_DEVICE_STATE_FD", "VHOST_USER_PROTOCOL_F_DEVICE_STATE")
@pytest.mark.parametrize("features_first", [True, False])
def test_a_saved_state_goes_on_elsewhere(features_first: bool) -> None:
    here, there = ControlledNetDevice("here", pairs=2, mac=MAC), ControlledNetDevice("there", pairs=4, mac=OTHER)
    features = CONTROL | GUEST_OFFLOADS
    here.set_features(features)
    for command in (mode("promisc", False), vlan(5), pairs(2), offloads(), mac_table([OTHER], [GROUP])):
        here.control.execute(command, len(command))
    if features_first:
        there.set_features(features)
    there.load_state(here.save_state())
    if not features_first:
        assert there.control.filter is None
        there.set_features(features)
    assert there.control.save() == here.control.save() | {"announce": True}
    assert there.port.pairs_in_use == 2
    assert there.config.mac == MAC
    assert there.config.status & v.VIRTIO_NET_S_ANNOUNCE
    here.control.vlans.add(5000)
    before = there.control.save()
    with pytest.raises(VqError):
        there.load_state(here.save_state())
    assert there.control.save() == before
    here.close()
    there.close()


# ---- what the driver is told ----


@pytest.mark.shows("BACKEND_CONFIG_CHANGE_MSG", "SET_BACKEND_REQ_FD", "VHOST_USER_PROTOCOL_F_BACKEND_REQ")
def test_the_link_follows_the_other_guest(paths: list[str], pump: Pump) -> None:
    with ControlGuest(paths[0], channel=True) as guest:
        assert guest.config.status == 0
        guest.told()
        with Guest(paths[1], CONTROL):
            guest.told()
            assert guest.config.status == v.VIRTIO_NET_S_LINK_UP
        guest.told()
        assert guest.config.status == 0


def test_whoever_cannot_be_told_has_a_link(paths: list[str], pump: Pump) -> None:
    with ControlGuest(paths[0]) as guest:
        assert guest.config.status == v.VIRTIO_NET_S_LINK_UP


@pytest.mark.shows("VIRTIO_NET_F_GUEST_ANNOUNCE", "SEND_RARP")
def test_a_guest_is_asked_to_announce_itself(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]},control,queues=2"), ControlGuest(paths[0], channel=True) as guest:
        guest.frontend.request(Request.SEND_RARP, int.from_bytes(MAC, "little"))
        guest.told()
        assert guest.config.status == v.VIRTIO_NET_S_LINK_UP | v.VIRTIO_NET_S_ANNOUNCE
        guest.must(ANNOUNCE_ACK)
        assert guest.config.status == v.VIRTIO_NET_S_LINK_UP


# ---- hostile ----


@every_layout
@pytest.mark.checklist(40)
def test_a_command_without_room_for_its_ack_breaks_its_ring_alone(paths: list[str], pump: Pump, layout: int) -> None:
    with ControlGuest(paths[0], CONTROL | layout) as guest, Guest(paths[1], CONTROL | layout) as other:
        guest.ask(mode("promisc", False), room=0)
        wait_for(lambda: port_counters(pump, 0)["queues"][-1]["broken"])
        assert control_state(pump)["modes"]["promisc"], "it was not executed"
        guest.post(128)
        other.send(frame())
        assert guest.receive()[1] == frame()
        guest.frontend.stop_ring(guest.control_index)
        guest.control.reset()
        guest.start_control()
        guest.must(mode("promisc", False))


@every_layout
@pytest.mark.checklist(40)
def test_commands_in_any_pieces(paths: list[str], pump: Pump, layout: int) -> None:
    command = mac_table([OTHER], [])
    features = CONTROL | layout | v.mask(v.VIRTIO_F_INDIRECT_DESC)
    with ControlGuest(paths[0], features) as guest:
        for indirect in (False, True):
            pieces = [bytes([byte]) for byte in command] if indirect else [command[:1], command[1:7], command[7:]]
            for room in ([1], [7, 3], [1000]):
                token = guest.control.add(pieces, room, indirect=indirect)
                guest.control.kick()
                assert guest.control.wait(60)
                assert guest.control.poll() == [(token, 1)]
                assert token.written(1) == OK
        for wrong in (command[:-1], b"", b"\x01", b"\x09\x09" * 3000, vlan(1) + bytes(70_000)):
            token = guest.control.add([wrong] if wrong else [], [1])
            guest.control.kick()
            assert guest.control.wait(60)
            assert [answer.written(length) for answer, length in guest.control.poll()] == [ERR]


@pytest.mark.checklist(40, 43)
def test_a_flood_of_commands_delays_nobody_else(paths: list[str], pump: Pump) -> None:
    with ControlGuest(paths[0], pairs=2) as guest, Guest(paths[1], CONTROL) as other:
        stop = threading.Event()
        done = [0]

        def flood() -> None:
            number = 0
            while not stop.is_set():
                while guest.control.free >= 2:
                    guest.control.add([pairs(1 + number % 2) if number % 3 else vlan(number % 4096)], [1])
                    number += 1
                guest.control.kick()
                done[0] += len(guest.control.poll())

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            wait_for(lambda: done[0] > 100)
            for _ in range(20):
                other.frontend.request(Request.GET_FEATURES)  # answered within its timeout
                guest.frontend.request(Request.GET_FEATURES)
        finally:
            stop.set()
            thread.join(60)
        assert not thread.is_alive()


def test_nothing_leaks(paths: list[str]) -> None:
    before = set(open_fds())
    for _ in range(3):
        with pumping(f"vhost:{paths[0]},control"), ControlGuest(paths[0], offered=8, channel=True) as guest:
            guest.must(mode("promisc", False), vlan(1))
    assert wait_for(lambda: set(open_fds()) == before)
    device = ControlledNetDevice("net", pairs=1)
    device.close()
    device.close()
    assert set(open_fds()) == before
