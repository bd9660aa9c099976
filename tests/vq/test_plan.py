"""Which flows a pump makes of its ports, and how they are shared out among workers."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from vq.plan import Flow, make_flows, spread
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.port import Port
from vq_core.ports.gen import GenPort
from vq_core.ports.null import NullPort
from vq_core.ports.vhost import VhostPort
from vq_core.switch import Switch, SwitchLane

VERSION_1 = 1 << 32


class Host:
    """Vhost ports whose rings are really started, on one memory."""

    def __init__(self) -> None:
        self.memory = GuestMemory(4 << 20)
        self.map = MemoryMap(self.memory.regions)
        self.drivers: list[DriverQueue] = []

    def port(self, name: str, pairs: int, enabled: Sequence[bool] = ()) -> VhostPort:
        """A port with `pairs` pairs, of which the first are started: enabled or not."""
        port = VhostPort(name, pairs)
        for index, flag in enumerate(enabled):
            for queue in port.queues[2 * index : 2 * index + 2]:
                driver = DriverQueue(self.memory, 8)
                self.drivers.append(driver)
                queue.start(self.map, 8, *driver.addresses, 0, VERSION_1, enabled=flag)
        return port


def named(flows: Sequence[Flow]) -> list[tuple[str, int, str, int]]:
    return [(f.source.name, f.source_index, f.target.name, f.target_index) for f in flows if isinstance(f.target, Port)]


def test_one_port_is_an_echo() -> None:
    host = Host()
    assert named(make_flows([host.port("a", 4)], None)) == []  # idle: in nobody's way
    assert named(make_flows([host.port("a", 4, [True, False, True])], None)) == [("a", i, "a", i) for i in range(3)]


def test_what_is_announced_needs_no_ring() -> None:
    host = Host()
    a, b = host.port("a", 2), host.port("b", 1)
    a.announce(bytes.fromhex("525400123456"))
    assert named(make_flows([a, b], None)) == [("a", 0, "b", 0)]
    lanes: dict[int, SwitchLane] = {}
    (flow,) = make_flows([a, b, NullPort("c")], Switch(3), lanes)
    assert flow.source is a
    assert [member and member[0].name for member in lanes[0].members] == ["a", None, "c"]


def test_two_ports_are_a_patch() -> None:
    host = Host()
    a, b = host.port("a", 4, [True] * 3), host.port("b", 2, [True] * 2)
    assert named(make_flows([a, b], None)) == [
        ("a", 0, "b", 0),
        ("a", 1, "b", 1),
        ("a", 2, "b", 0),
        ("b", 0, "a", 0),
        ("b", 1, "a", 1),
    ]


def test_packets_go_to_pairs_that_take_them() -> None:
    host = Host()
    a, b = host.port("a", 3, [True] * 3), host.port("b", 3, [True, False, True])
    flows = named(make_flows([a, b], None))
    assert flows[:3] == [("a", 0, "b", 0), ("a", 1, "b", 2), ("a", 2, "b", 0)]
    assert flows[3:] == [("b", 0, "a", 0), ("b", 1, "a", 1), ("b", 2, "a", 2)]  # emptied, so that it can be dropped
    nobody = host.port("c", 2)
    assert named(make_flows([a, nobody], None))[:3] == [("a", i, "c", 0) for i in range(3)]  # where it is counted


def test_interchangeable_endpoints_follow_the_others() -> None:
    host = Host()
    a = host.port("a", 4, [True] * 3)
    source, sink = GenPort("gen", endpoints=4), NullPort("null", endpoints=4)
    assert named(make_flows([source, a], None)) == [("gen", i, "a", i) for i in range(3)] + [
        ("a", i, "gen", i) for i in range(3)
    ]
    assert named(make_flows([a, sink], None)) == [("a", i, "null", i) for i in range(3)]
    assert named(make_flows([source, sink], None)) == [("gen", i, "null", i) for i in range(4)]
    assert named(make_flows([source, host.port("b", 2)], None))[:1] == [("gen", 0, "b", 0)]


def test_three_ports_are_a_switch() -> None:
    host = Host()
    ports = [host.port("a", 2, [True] * 2), host.port("b", 1, [True]), NullPort("null", endpoints=2)]
    flows = make_flows(ports, switch := Switch(3))
    assert [(f.source.name, f.source_index, f.target_index) for f in flows] == [("a", 0, 0), ("a", 1, 0), ("b", 0, 1)]
    first, second, third = (f.target for f in flows)
    assert first is third  # one lane for one number of endpoints
    assert [[(port.name, index) for port, index in lane.members] for lane in (first, second)] == [
        [("a", 0), ("b", 0), ("null", 0)],
        [("a", 1), ("b", 0), ("null", 1)],
    ]
    assert first.switch is second.switch is switch


def test_idle_ports_are_in_no_lane() -> None:
    host = Host()
    ports = [host.port("a", 2, [True]), host.port("b", 2), host.port("c", 1, [False]), host.port("d", 1, [True])]
    lanes: dict[int, SwitchLane] = {}
    switch = Switch(4)
    flows = make_flows(ports, switch, lanes)
    assert [(flow.source.name, flow.source_index, flow.target_index) for flow in flows] == [
        ("a", 0, 0),
        ("c", 0, 2),
        ("d", 0, 3),
    ]
    lane = lanes[0]
    assert [member and (member[0].name, member[1]) for member in lane.members] == [("a", 0), None, ("c", 0), ("d", 0)]
    assert make_flows(ports, switch, lanes) == flows  # with the same lane, so that a worker need not be asked
    ports[3].queues[1].stop()
    ports[3].queues[0].stop()
    (first, second) = make_flows(ports, switch, lanes)
    assert first.target is second.target is lanes[0] is not lane


shapes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20)


@given(shapes, st.integers(1, 4))
@settings(deadline=None)
def test_flows_are_shared_out_and_kept_together(pairs: list[tuple[int, int]], workers: int) -> None:
    ports = [NullPort(f"p{i}", endpoints=6) for i in range(2)]
    flows = [Flow(ports[0], a, ports[1], b) for a, b in pairs]
    shares = spread(flows, workers)
    assert len(shares) == workers
    assert sorted(named([flow for share in shares for flow in share])) == sorted(named(flows))
    owners: dict[tuple[int, int], int] = {}
    for number, share in enumerate(shares):
        for flow in share:
            for port, index in flow.endpoints:
                assert owners.setdefault((id(port), index), number) == number
    assert spread(flows, workers) == shares
    assert spread(flows, workers, owners) == shares  # nobody moves


def test_flows_stay_where_they_are_while_that_is_fair() -> None:
    port = NullPort("p", endpoints=6)
    flows = [Flow(port, i, port, i) for i in range(6)]

    def placed(numbers: Sequence[int], owners: dict[int, int]) -> list[list[int]]:
        known = {(id(port), index): place for index, place in owners.items()}
        return [[f.source_index for f in share] for share in spread([flows[i] for i in numbers], 2, known)]

    assert placed([0, 1, 2, 3], {}) == [[0, 2], [1, 3]]
    assert placed([0, 2, 3], {0: 0, 1: 1, 2: 0, 3: 1}) == [[0, 2], [3]]  # 1 has gone, and nobody moves for it
    assert placed([0, 2, 3, 4], {0: 0, 2: 0, 3: 1}) == [[0, 2], [3, 4]]
    assert placed([0, 2], {0: 0, 2: 0}) == [[0], [2]]
    assert placed([0, 1, 2, 3, 4, 5], dict.fromkeys(range(6), 1)) == [[3, 4, 5], [0, 1, 2]]


def test_independent_flows_go_to_different_workers() -> None:
    port = NullPort("p", endpoints=4)
    flows = [Flow(port, i, port, i) for i in range(4)]
    assert [len(share) for share in spread(flows, 2)] == [2, 2]
    assert [len(share) for share in spread(flows, 5)] == [1, 1, 1, 1, 0]
