"""The commands of a control queue: what each does, and that nothing a driver sends does anything else."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_rig import (
    ANNOUNCE_ACK,
    CONTROL,
    GROUP,
    MAC,
    MODES,
    OTHER,
    TABLE_MAX,
    Reference,
    frame,
    mac_address,
    mac_table,
    mode,
    offloads,
    pairs,
    vlan,
)  # fmt: skip
from vq import virtio as v
from vq.devices.net_control import COMMAND_MAX, MACS_MAX, Change, CommandError, NetControl

PAIRS = 4
CSUM, TSO4, TSO6 = v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_GUEST_TSO4, v.VIRTIO_NET_F_GUEST_TSO6
OFFLOADS = v.mask(CSUM, TSO4)


def control(features: int = CONTROL | OFFLOADS) -> NetControl:
    result = NetControl(MAC, PAIRS)
    result.set_features(features)
    return result


def execute(target: NetControl, command: bytes) -> Change:
    return target.execute(command[:COMMAND_MAX], len(command))


def refuses(target: NetControl, command: bytes, why: str) -> None:
    before = target.save()
    with pytest.raises(CommandError, match=why):
        execute(target, command)
    assert target.save() == before


def test_a_new_driver_receives_everything() -> None:
    target = control()
    assert target.filter is None
    assert (target.pairs, target.mac, target.offloads, target.announce) == (1, MAC, OFFLOADS, False)
    assert target.effective_features == target.features


def test_without_a_control_queue_all_pairs_are_in_use() -> None:
    assert control(v.mask(v.VIRTIO_NET_F_MQ)).pairs == PAIRS
    assert control(CONTROL & ~v.mask(v.VIRTIO_NET_F_MQ)).pairs == PAIRS


@pytest.mark.shows("VIRTIO_NET_F_CTRL_RX", "VIRTIO_NET_F_CTRL_RX_EXTRA")
def test_receive_modes() -> None:
    target = control()
    for name in MODES:
        for on in (True, False):
            assert execute(target, mode(name, on)) == Change.FILTER
            assert target.modes[name] == on
    assert target.filter == {
        "unicast": "listed", "multicast": "listed", "broadcast": "all", "macs": [MAC], "vlans": [],
    }  # fmt: skip
    for name, field, value in (
        ("nouni", "unicast", "none"), ("nomulti", "multicast", "none"), ("nobcast", "broadcast", "none"),
    ):  # fmt: skip
        for other in ("alluni", "allmulti"):
            execute(target, mode(other))
        execute(target, mode(name))
        assert target.filter is not None
        assert target.filter[field] == value


def test_what_was_not_negotiated_is_refused() -> None:
    for feature, command in {
        v.VIRTIO_NET_F_CTRL_RX: mode("promisc"),
        v.VIRTIO_NET_F_CTRL_RX_EXTRA: mode("alluni"),
        v.VIRTIO_NET_F_CTRL_VLAN: vlan(1),
        v.VIRTIO_NET_F_CTRL_MAC_ADDR: mac_address(OTHER),
        v.VIRTIO_NET_F_GUEST_ANNOUNCE: ANNOUNCE_ACK,
        v.VIRTIO_NET_F_MQ: pairs(2),
        v.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: offloads(),
    }.items():
        execute(control(), command)
        refuses(control(CONTROL & ~v.mask(feature)), command, "was not negotiated")
        refuses(control(CONTROL & ~v.mask(v.VIRTIO_NET_F_CTRL_VQ)), command, "was not negotiated")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (b"", "0 bytes"),
        (b"\x00", "1 bytes"),
        (b"\x00\x06\x01", "unknown"),
        (b"\x06\x00" + bytes(8), "unknown"),
        (b"\xff\xff", "unknown"),
        (b"\x04\x01" + bytes(50), "unknown"),  # RSS
        (b"\x04\x02" + bytes(50), "unknown"),  # hashes
        (mode("promisc") + b"\0", "2 bytes"),
        (mode("promisc")[:2], "0 bytes"),
        (b"\x00\x00\x02", "0 is off"),
        (b"\x01\x00", "0 bytes are left"),
        (b"\x01\x00\x01\x00\x00", "3 bytes are left"),
        (b"\x01\x00" + struct.pack("<I", 2) + MAC + bytes(4), "2 addresses take 16 bytes, 14 are left"),
        (b"\x01\x00" + struct.pack("<I", 0xFFFFFFFF) + MAC * 2, "4294967295 addresses"),
        (b"\x01\x00" + struct.pack("<I", 0x2AAAAAAB) + MAC * 2, "715827883 addresses"),  # times 6 is 2 modulo 2^32
        (mac_table([MAC], [])[:-1], "3 bytes are left"),
        (mac_table([MAC], [GROUP]) + b"\0", "1 bytes behind its end"),
        (mac_address(MAC[:5]), "5 bytes"),
        (mac_address(GROUP), "group address"),
        (vlan(4096), "VLAN 4096"),
        (vlan(65535, add=False), "VLAN 65535"),
        (b"\x02\x00\x01", "1 bytes"),
        (ANNOUNCE_ACK + b"\0", "it has none"),
        (pairs(0), "0 queue pairs"),
        (pairs(PAIRS + 1), "5 queue pairs"),
        (pairs(1) + b"\0", "3 bytes"),
        (offloads(TSO6), "GUEST_TSO6 was not negotiated"),
        (offloads(63), "was not negotiated"),
        (offloads()[:9], "7 bytes"),
        (vlan(1) + bytes(COMMAND_MAX), "at most 4096"),
    ],
)
@pytest.mark.checklist(40)
def test_wrong_commands_change_nothing(command: bytes, why: str) -> None:
    refuses(control(), command, why)


@pytest.mark.shows("VIRTIO_NET_F_CTRL_MAC_ADDR", "VIRTIO_NET_F_MAC")
def test_addresses() -> None:
    target = control()
    execute(target, mode("promisc", False))
    execute(target, mac_table([OTHER], [GROUP]))
    assert target.filter is not None
    assert target.filter["macs"] == [MAC, OTHER, GROUP]
    execute(target, mac_address(OTHER))
    assert target.filter["macs"] == [OTHER, OTHER, GROUP]
    target.reset()
    assert target.mac == MAC


@pytest.mark.parametrize("count", [MACS_MAX, MACS_MAX + 1, 600, 700, 10_000])
def test_a_table_that_is_too_long_lets_all_pass(count: int) -> None:
    target = control()
    execute(target, mode("promisc", False))
    many = [n.to_bytes(6, "big") for n in range(count)]
    kept = "listed" if count <= MACS_MAX else "all"
    for unicast, multicast in ((many, [GROUP]), ([OTHER], many)):
        execute(target, mac_table(unicast, multicast))
        assert target.filter is not None
        seen = len(mac_table(unicast, multicast)) <= COMMAND_MAX
        assert target.filter["unicast"] == ("all" if not seen else kept if unicast is many else "listed")
        assert target.filter["multicast"] == ("all" if not seen else kept if multicast is many else "listed")
    execute(target, mac_table([], []))
    assert target.filter["unicast"] == target.filter["multicast"] == "listed"


def test_an_address_that_nobody_told_us_is_no_reason_to_drop() -> None:
    target = control(CONTROL & ~v.mask(v.VIRTIO_NET_F_MAC))
    execute(target, mode("promisc", False))
    assert target.filter is not None
    assert target.filter["unicast"] == "all"
    execute(target, mac_address(OTHER))
    assert target.filter["unicast"] == "listed"


@pytest.mark.shows("VIRTIO_NET_F_CTRL_VLAN")
def test_vlans() -> None:
    target = control()
    for number in (0, 5, 4095, 5):
        assert execute(target, vlan(number)) == Change.FILTER
    assert execute(target, vlan(5, add=False)) == execute(target, vlan(7, add=False)) == Change.FILTER
    assert target.filter is None, "promiscuous"
    execute(target, mode("promisc", False))
    assert target.filter is not None
    assert target.filter["vlans"] == [0, 4095]
    alone = control(v.mask(v.VIRTIO_NET_F_CTRL_VQ, v.VIRTIO_NET_F_CTRL_VLAN))
    assert alone.filter == {"unicast": "all", "multicast": "all", "broadcast": "all", "vlans": []}


def test_pairs_offloads_and_announcement() -> None:
    target = control()
    assert execute(target, pairs(PAIRS)) == Change.PAIRS
    assert target.pairs == PAIRS
    assert execute(target, offloads(CSUM)) == Change.OFFLOADS
    assert target.effective_features == target.features & ~v.mask(TSO4)
    target.announce = True
    assert execute(target, ANNOUNCE_ACK) == Change.NONE
    assert not target.announce


macs = st.binary(min_size=6, max_size=6)
commands = st.one_of(
    st.builds(mode, st.sampled_from(MODES), st.booleans()),
    st.builds(mac_table, st.lists(macs, max_size=70), st.lists(macs, max_size=70)),
    st.builds(mac_address, macs),
    st.builds(vlan, st.integers(0, 5000), add=st.booleans()),
    st.builds(pairs, st.integers(0, 6)),
    st.builds(offloads, st.sampled_from([CSUM, TSO4, TSO6])),
    st.binary(max_size=40),
    st.builds(lambda head, rest: bytes(head) + rest, st.tuples(st.integers(0, 6), st.integers(0, 6)), st.binary()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(commands, max_size=20))
@pytest.mark.checklist(40)
def test_any_commands_keep_the_state_in_order(sent: list[bytes]) -> None:
    target = control()
    for command in sent:
        before = target.save()
        try:
            execute(target, command)
        except CommandError:
            assert target.save() == before
        assert 1 <= target.pairs <= PAIRS
        assert target.offloads & ~OFFLOADS == 0
        assert all(0 <= number < 4096 for number in target.vlans)
        assert len(target.mac) == 6
        assert not target.mac[0] & 1
        for table in (target.unicast, target.multicast):
            assert table is None or len(table) <= MACS_MAX
    saved: dict[str, Any] = json.loads(json.dumps(target.save()))
    other = control()
    other.load(saved)
    assert other.save() == target.save()
    assert other.filter == target.filter


@settings(max_examples=300, deadline=None)
@given(st.lists(commands, max_size=12), st.one_of(macs, st.just(MAC)), st.one_of(st.none(), st.integers(0, 4095)))
def test_the_filter_is_what_the_specification_says(sent: list[bytes], to: bytes, tag: int | None) -> None:
    target, wanted = control(), Reference()
    for command in sent:
        try:
            execute(target, command)
        except CommandError:
            continue
        _follow(wanted, command)
    packet = frame(to, tag)
    assert _lets_through(target.filter, packet) == wanted.receives(packet)


def _follow(wanted: Reference, command: bytes) -> None:
    """Do in the reference what a good command says."""
    what, data = (command[0], command[1]), command[2:]
    if what[0] == 0:
        wanted.set_mode(MODES[what[1]], bool(data[0]))
    elif what == (1, 0):
        count = int.from_bytes(data[:4], "little")
        first, second = data[4 : 4 + 6 * count], data[8 + 6 * count :]
        wanted.unicast, wanted.multicast = ([t[n : n + 6] for n in range(0, len(t), 6)] for t in (first, second))
        # A table that is not kept lets all of its kind pass, and lists nobody of the other.
        wanted.unicast = wanted.unicast if len(wanted.unicast) <= TABLE_MAX else [b""] * (TABLE_MAX + 1)
        wanted.multicast = wanted.multicast if len(wanted.multicast) <= TABLE_MAX else [b""] * (TABLE_MAX + 1)
    elif what == (1, 1):
        wanted.mac = data
    elif what[0] == 2:
        (wanted.vlans.discard if what[1] else wanted.vlans.add)(int.from_bytes(data, "little"))


def _lets_through(wanted: dict[str, Any] | None, packet: bytes) -> bool:
    """What vq_core makes of the arguments; tests/vq_core/test_receive_filter.py shows that it does."""
    if wanted is None:
        return True
    number = int.from_bytes(packet[14:16], "big") & 0xFFF
    if wanted["vlans"] is not None and packet[12:14] == b"\x81\x00" and number and number not in wanted["vlans"]:
        return False
    kind = "broadcast" if packet[:6] == b"\xff" * 6 else "multicast" if packet[0] & 1 else "unicast"
    return bool(wanted[kind] == "all" or (wanted[kind] == "listed" and packet[:6] in wanted["macs"]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"mac": "5254"}, {"mac": 5}, {"default_mac": "52"}, {"mac": GROUP.hex()}, {"pairs": 9}, {"modes": {}},
        {"unicast": ["52"]}, {"unicast": 7}, {"multicast": [5]}, {"vlans": [4096]}, {"vlans": ["x"]}, {"vlans": [-1]},
        {"offloads": 1 << 40}, {"offloads": -1}, {"pairs": None}, {"pairs": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_saved_state_is_not_believed(wrong: dict[str, Any]) -> None:
    target = control()
    execute(target, vlan(7))
    before = target.save()
    with pytest.raises(CommandError):
        target.load(before | wrong)
    with pytest.raises(CommandError):
        target.load({key: value for key, value in before.items() if key not in wrong})
    assert target.save() == before
