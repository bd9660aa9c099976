"""Which packets go where, and which worker moves them.

A *flow* joins a source endpoint to a target: an endpoint of another port, or a switch lane. An endpoint (queue pair)
must belong to one worker, so flows that share one go to the same worker; everything else is spread. A port without a
started ring is a source of nothing and in no switch lane: it costs nothing on the way of a packet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vq_core.port import Port
from vq_core.program import Program
from vq_core.switch import Switch, SwitchLane

__all__ = ["Flow", "Key", "make_flows", "nodes", "owned", "spread"]

Endpoint = tuple[Port, int]
Key = tuple[int, int]  # an endpoint, as something that can be looked up: (id of the port, index)


class Flow(NamedTuple):
    """One source and where its packets go; the arguments of `vq_core.plan.Plan`."""

    source: Port
    source_index: int
    target: Port | SwitchLane
    target_index: int
    program: Program | None = None
    number: int = 0  # of the source among the ports of its group

    @property
    def key(self) -> Key:
        """Of the source."""
        return id(self.source), self.source_index

    @property
    def node(self) -> Key:
        """Of the target: an endpoint, or a lane as one with an index that no endpoint has."""
        return id(self.target), -1 if isinstance(self.target, SwitchLane) else self.target_index

    @property
    def endpoints(self) -> list[Endpoint]:
        """All endpoints that the flow touches."""
        if isinstance(self.target, SwitchLane):
            return [(self.source, self.source_index), *(member for member in self.target.members if member is not None)]
        return [(self.source, self.source_index), (self.target, self.target_index)]


def _sources(port: Port, wanted: int) -> list[int]:
    """Endpoints to pull from; of interchangeable ones only `wanted`, and at least one."""
    sources: list[int] = port.sources
    return sources[: wanted or 1] if port.elastic else sources


def _target(targets: Sequence[int], number: int) -> int:
    """The endpoint that serves source number `number`; endpoint 0 counts what nobody takes."""
    return targets[number % len(targets)] if targets else 0


def make_flows(
    ports: Sequence[Port],
    switch: Switch | None,
    lanes: dict[int, SwitchLane] | None = None,
    program: Program | None = None,
) -> list[Flow]:
    """The flows of ports that are joined, as these stand at the moment.

    Parameters
    ----------
    ports
        One: echo. Two: patch. Three and more: `switch` decides.
    switch
        The learning switch, for three ports and more.
    lanes
        Lanes of the last time, which are taken again where they have not changed; holds those of this time afterwards.
    program
        Looks at each burst of each flow.
    """
    if len(ports) == 1:
        (port,) = ports
        return [Flow(port, index, port, index, program) for index in port.sources]
    targets: list[list[int]] = [port.targets for port in ports]
    if switch is None:
        one, other = ports
        return [
            Flow(source, index, target, _target(taking, number), program, place)
            for place, source, target, taking in ((0, one, other, targets[1]), (1, other, one, targets[0]))
            for number, index in enumerate(_sources(source, len(taking)))
        ]
    # The most endpoints that take packets, and the most of any other port for the one that has these.
    second, most = sorted(map(len, targets))[-2:]
    widest = [most, second]
    sources = [_sources(port, widest[len(taking) == most]) for port, taking in zip(ports, targets, strict=True)]
    lanes = {} if lanes is None else lanes
    kept = dict(lanes)
    lanes.clear()
    for number in range(max(map(len, sources))):
        members = tuple(
            (port, _target(taking, number)) if taking or pulled else None
            for port, taking, pulled in zip(ports, targets, sources, strict=True)
        )
        same = number in kept and kept[number].members == members
        lanes[number] = kept[number] if same else SwitchLane(switch, members)
    return [
        Flow(port, index, lanes[number], position, program, position)
        for position, port in enumerate(ports)
        for number, index in enumerate(sources[position])
    ]


def nodes(flows: Sequence[Flow]) -> Iterator[list[Key]]:
    """What must go together: source and target of each flow, and the members of each lane, once."""
    seen: set[int] = set()
    for flow in flows:
        yield [flow.key, flow.node]
        if isinstance(flow.target, SwitchLane) and id(flow.target) not in seen:
            seen.add(id(flow.target))
            yield [flow.node, *((id(member[0]), member[1]) for member in flow.target.members if member is not None)]


def owned(flows: Sequence[Flow]) -> set[Key]:
    """All endpoints that the flows touch, and their lanes as `Flow.node` names them."""
    return {key for keys in nodes(flows) for key in keys}


def spread(flows: Sequence[Flow], workers: int, owners: Mapping[Key, int] | None = None) -> list[list[Flow]]:
    """Share the flows out among `workers`, keeping those that touch a common endpoint together.

    Parameters
    ----------
    flows
        Flows of started rings, so that idle ports have no part in the shares.
    workers
        How many.
    owners
        The worker that has an endpoint at the moment. Flows stay with their worker as long as that leaves no worker
        with more than another by what could be moved, since what moves stands still for a moment; new ones go to the
        worker with the fewest.

    Returns
    -------
    list of list of Flow
        By worker; equal for equal arguments.
    """
    if workers == 1:
        return [list(flows)]
    leader: dict[Key, Key] = {}

    def find(key: Key) -> Key:
        leader.setdefault(key, key)
        while leader[key] != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    for first, *rest in nodes(flows):
        for other in rest:
            leader[find(other)] = find(first)
    groups: dict[Key, list[Flow]] = {}
    for flow in flows:
        groups.setdefault(find(flow.key), []).append(flow)
    sizes = [len(group) for group in groups.values()]
    places = _places(sizes, [_owner(group, owners or {}) for group in groups.values()], workers)
    shares: list[list[Flow]] = [[] for _ in range(workers)]
    for group, place in zip(groups.values(), places, strict=True):
        shares[place].extend(group)
    return shares


def _owner(group: Sequence[Flow], owners: Mapping[Key, int]) -> int | None:
    """The worker that has a group, or had the first part of it that anybody had."""
    return next((owners[flow.key] for flow in group if flow.key in owners), None)


def _places(sizes: Sequence[int], before: Sequence[int | None], workers: int) -> list[int]:
    """The worker of each group, by the sizes of the groups and the workers that they have had."""
    loads = [0] * workers
    places = [-1 if place is None else place for place in before]
    for size, place in zip(sizes, places, strict=True):
        if place >= 0:
            loads[place] += size
    for number, size in enumerate(sizes):
        if places[number] < 0:
            places[number] = loads.index(min(loads))
            loads[places[number]] += size
    while True:
        most, least = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[most] - loads[least]
        fitting = [number for number, place in enumerate(places) if place == most and sizes[number] < gap]
        if not fitting:
            return places
        # The one that comes nearest to half of the gap; of equals the last.
        best = max(fitting, key=lambda number: (-abs(gap - 2 * sizes[number]), number))
        places[best] = least
        loads[most] -= sizes[best]
        loads[least] += sizes[best]
