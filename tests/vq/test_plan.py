"""Which flows a pump makes of its ports, and how they are shared out among workers."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from vq.plan import Flow, make_flows, spread
from vq_core.driver import DriverQueue, GuestMemory
from vq_core.memory import MemoryMap
from vq_core.port import Port
from vq_core.ports.gen import GenPort
from vq_core.ports.null import NullPort
from vq_core.ports.vhost import VhostPort
from vq_core.switch import Switch

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
    assert named(make_flows([host.port("a", 4)], None)) == [("a", 0, "a", 0)]  # pair 0 announces, if nothing else
    assert named(make_flows([host.port("a", 4, [True, False, True])], None)) == [("a", i, "a", i) for i in range(3)]


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


def test_independent_flows_go_to_different_workers() -> None:
    port = NullPort("p", endpoints=4)
    flows = [Flow(port, i, port, i) for i in range(4)]
    assert [len(share) for share in spread(flows, 2)] == [2, 2]
    assert [len(share) for share in spread(flows, 5)] == [1, 1, 1, 1, 0]
