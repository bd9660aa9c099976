"""Receive filters: every packet against a readable reference, in any segments, and the counters behind them."""

from __future__ import annotations

from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control_rig import BROADCAST, GROUP, MAC, OTHER, Reference, frame
from engine_rig import Guest, every_layout
from vq_core.guest_memory import GuestMemory
from vq_core.receive_filter import ReceiveFilter

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FIRST = 0x525400000000
stations = st.integers(0, 300).map(lambda n: (FIRST + n).to_bytes(6, "big"))
groups = st.integers(0, 300).map(lambda n: b"\x33\x33" + n.to_bytes(4, "big"))
anybody = st.one_of(stations, groups, st.just(BROADCAST), st.just(MAC), st.binary(min_size=6, max_size=6))
tags = st.one_of(st.none(), st.sampled_from([0, 1, 5, 0x2005, 0xE000, 4095, 0x1FFF]), st.integers(0, 65535))


@st.composite
def references(draw: st.DrawFn) -> Reference:
    """What a driver may have asked for; without promisc, for which there is no filter."""
    result = Reference(by_vlan=draw(st.booleans()))
    result.modes = set(draw(st.lists(st.sampled_from(["allmulti", "alluni", "nomulti", "nouni", "nobcast"]))))
    result.unicast = draw(st.lists(stations, max_size=64))
    result.multicast = draw(st.lists(groups, max_size=64))
    result.vlans = set(draw(st.lists(st.sampled_from([0, 1, 5, 31, 32, 4095]))))
    return result


def filter_of(wanted: Reference) -> ReceiveFilter:
    modes = wanted.modes
    return ReceiveFilter(
        unicast="none" if "nouni" in modes else "all" if "alluni" in modes else "listed",
        multicast="none" if "nomulti" in modes else "all" if "allmulti" in modes else "listed",
        broadcast="none" if "nobcast" in modes else "all",
        macs=[wanted.mac, *wanted.unicast, *wanted.multicast],
        vlans=wanted.vlans if wanted.by_vlan else None,
    )


@every_layout
@many
@given(data=st.data())
def test_packets_that_are_wanted_arrive(harness: ModuleType, layout: int, data: st.DataObject) -> None:
    wanted = data.draw(references())
    guest, feed = Guest(layout, size=64), harness.Feed("feed")
    guest.port.set_filter(filter_of(wanted))
    packets = [
        frame(data.draw(anybody), data.draw(tags), size=data.draw(st.sampled_from([60, 100])))
        for _ in range(data.draw(st.integers(1, 32)))
    ]
    for packet in packets:
        cuts = sorted(data.draw(st.lists(st.integers(1, 20), max_size=3, unique=True)))
        feed.add(packet, segments=[b - a for a, b in zip([0, *cuts], [*cuts, len(packet)], strict=True)])
    guest.post(128, 40)
    guest.receiveq.publish()
    assert harness.move(feed, 0, guest.port, 0) == (len(packets), len(packets))
    expected = [packet for packet in packets if wanted.receives(packet)]
    assert guest.received() == expected
    refused = len(packets) - len(expected)
    assert guest.to_guest == {
        "packets": len(expected),
        "bytes": sum(map(len, expected)),
        "dropped": {"filtered": refused} if refused else {},
    }


def test_without_room_the_rest_waits(harness: ModuleType) -> None:
    guest, feed = Guest(), harness.Feed("feed")
    guest.port.set_filter(ReceiveFilter(macs=[MAC]))
    for to in (MAC, OTHER, MAC, OTHER, MAC, MAC):
        feed.add(frame(to))
    guest.post(128, 2)
    guest.receiveq.publish()
    assert harness.move(feed, 0, guest.port, 0) == (6, 4), "the fifth has no buffer, and is none of the filter's"
    assert guest.to_guest["packets"] == 2
    assert guest.to_guest["dropped"] == {"filtered": 2}


def test_nobody_there_is_no_matter_of_the_filter(harness: ModuleType) -> None:
    guest, feed = Guest(start=False), harness.Feed("feed")
    guest.port.set_filter(ReceiveFilter(macs=[MAC]))
    feed.add(frame(OTHER))
    harness.move(feed, 0, guest.port, 0)
    assert guest.to_guest["dropped"] == {"not_connected": 1}


def test_a_filter_can_be_taken_away(harness: ModuleType) -> None:
    guest, feed = Guest(), harness.Feed("feed")
    guest.post(128, 4)
    guest.receiveq.publish()
    for filter, expected in ((ReceiveFilter(macs=[MAC]), 0), (None, 1), (ReceiveFilter(unicast="all"), 1)):
        guest.port.set_filter(filter)
        feed.add(frame(OTHER))
        harness.move(feed, 0, guest.port, 0)
        assert len(guest.received()) == expected


def test_a_short_frame_is_compared_as_far_as_it_goes(harness: ModuleType) -> None:
    guest, feed = Guest(), harness.Feed("feed")
    guest.port.set_filter(ReceiveFilter(macs=[MAC], vlans=[]))
    guest.post(128, 4)
    guest.receiveq.publish()
    for data in (MAC, MAC + OTHER + b"\x81", MAC[:5], b"\x52"):
        feed.add(data)
    harness.move(feed, 0, guest.port, 0)
    assert guest.received() == [MAC, MAC + OTHER + b"\x81"]


def test_a_full_table_still_ends_each_search(harness: ModuleType) -> None:
    macs = [(FIRST + 7 * n).to_bytes(6, "big") for n in range(ReceiveFilter.MACS_MAX)]
    guest, feed = Guest(), harness.Feed("feed")
    guest.port.set_filter(ReceiveFilter(macs=macs))
    guest.post(128, 4)
    guest.receiveq.publish()
    for to in (macs[0], OTHER, macs[-1], GROUP):
        feed.add(frame(to))
    harness.move(feed, 0, guest.port, 0)
    assert [packet[:6] for packet in guest.received()] == [macs[0], macs[-1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"macs": [b"12345"]}, "5 bytes"),
        ({"macs": [n.to_bytes(6, "big") for n in range(129)]}, "129 addresses"),
        ({"vlans": [4096]}, "VLAN 4096"),
        ({"vlans": [-1]}, "VLAN -1"),
    ],
)
def test_impossible_filters_are_refused(arguments: dict[str, list[bytes]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReceiveFilter(**arguments)  # type: ignore[arg-type]


def test_pairs_out_of_use_take_and_give_nothing(harness: ModuleType) -> None:
    guest = Guest()
    settled: list[list[int]] = []
    wide = type(guest.port)("wide", 4)
    wide.use_pairs(2, lambda: settled.append(wide.targets))
    assert [queue.live or queue.enabled for queue in wide.queues] == [False] * 8
    wide.use_pairs(2, lambda: settled.append([]))
    wide.use_pairs(4, lambda: settled.append(wide.targets))
    assert len(settled) == 2
    for count in (0, 5, -1):
        with pytest.raises(ValueError, match="1 to 4 can be in use"):
            wide.use_pairs(count)


@every_layout
def test_endless_chains_end_a_burst_that_is_filtered_too(harness: ModuleType, layout: int) -> None:
    """A driver whose tables are as long as may be: each packet between two refused ones is a push of its own."""
    guest, feed = Guest(layout, size=4096, memory=GuestMemory(16 << 20)), harness.Feed("feed")
    guest.port.set_filter(ReceiveFilter(macs=[MAC]))
    buffer = guest.memory.alloc(2048)
    for _ in range(16):
        guest.receiveq.add([], [(buffer.guest_addr, 0)] * 4000 + [(buffer.guest_addr, 2048)], indirect=True)
    guest.receiveq.publish()
    for _ in range(32):
        feed.add(frame(OTHER))
        feed.add(frame(MAC))
    for _ in range(2):
        assert harness.move(feed, 0, guest.port, 0) == (32, 11), "five chains, and the refused packets before them"
    assert len(guest.receiveq.poll()) == 10
