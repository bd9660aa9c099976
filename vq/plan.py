"""Which packets go where, and which worker moves them.

A *flow* joins a source endpoint to a target: an endpoint of another port, or a switch lane. An endpoint (queue pair)
must belong to one worker, so flows that share one go to the same worker; everything else is spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vq_core.port import Port
from vq_core.switch import Switch, SwitchLane

__all__ = ["Flow", "make_flows", "spread"]

Endpoint = tuple[Port, int]


class Flow(NamedTuple):
    """One source and where its packets go; the arguments of `vq_core.worker.Plan`."""

    source: Port
    source_index: int
    target: Port | SwitchLane
    target_index: int

    @property
    def endpoints(self) -> list[Endpoint]:
        """All endpoints that the flow touches."""
        if isinstance(self.target, SwitchLane):
            return [(self.source, self.source_index), *(member for member in self.target.members if member is not None)]
        return [(self.source, self.source_index), (self.target, self.target_index)]


def _sources(port: Port, others: Sequence[Port]) -> list[int]:
    """Endpoints to pull from; of interchangeable ones only as many as there are targets."""
    sources: list[int] = port.sources
    if port.elastic:
        sources = sources[: max((len(other.targets) for other in others), default=1) or 1]
    return sources


def _target(port: Port, number: int) -> int:
    """The endpoint of `port` that serves source number `number`; endpoint 0 counts what nobody takes."""
    targets: list[int] = port.targets or [0]
    return targets[number % len(targets)]


def make_flows(ports: Sequence[Port], switch: Switch | None) -> list[Flow]:
    """The flows of a pump as its ports stand at the moment.

    Parameters
    ----------
    ports
        One: echo. Two: patch. Three and more: `switch` decides.
    switch
        The learning switch, for three ports and more.
    """
    if len(ports) == 1:
        (port,) = ports
        return [Flow(port, index, port, index) for index in port.sources]
    if switch is None:
        pairs = [(ports[0], ports[1]), (ports[1], ports[0])]
        return [
            Flow(source, index, target, _target(target, number))
            for source, target in pairs
            for number, index in enumerate(_sources(source, [target]))
        ]
    lanes: dict[int, SwitchLane] = {}
    flows = []
    for position, port in enumerate(ports):
        for number, index in enumerate(_sources(port, [other for other in ports if other is not port])):
            if number not in lanes:
                lanes[number] = SwitchLane(switch, [(other, _target(other, number)) for other in ports])
            flows.append(Flow(port, index, lanes[number], position))
    return flows


def spread(flows: Sequence[Flow], workers: int) -> list[list[Flow]]:
    """Share the flows out among `workers`, keeping those that touch a common endpoint together.

    Groups go to the worker with the fewest flows so far, in order, so that a plan is stable while ports do not change.
    """
    leader: dict[tuple[int, int], tuple[int, int]] = {}

    def find(key: tuple[int, int]) -> tuple[int, int]:
        leader.setdefault(key, key)
        while leader[key] != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    keys = [[(id(port), index) for port, index in flow.endpoints] for flow in flows]
    for first, *rest in keys:
        for other in rest:
            leader[find(other)] = find(first)
    groups: dict[tuple[int, int], list[Flow]] = {}
    for flow, (first, *_) in zip(flows, keys, strict=True):
        groups.setdefault(find(first), []).append(flow)
    shares: list[list[Flow]] = [[] for _ in range(workers)]
    for group in groups.values():
        min(shares, key=len).extend(group)
    return shares
