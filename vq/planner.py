"""Keeping the plans of the workers in step with the ports."""

from __future__ import annotations

from collections.abc import Sequence

from vq.errors import UsageError
from vq.plan import Flow, Key, make_flows, nodes, owned, spread
from vq.sub_burst import SUB_BURST
from vq_core.plan import Plan
from vq_core.port import Port
from vq_core.program import Program
from vq_core.switch import Switch, SwitchLane
from vq_core.worker import Worker

__all__ = ["Planner"]


class Group:
    """Ports that are joined: packets go from port to port of one group and to no other.

    Parameters
    ----------
    ports
        One: echo. Two: patch. Three and more: a learning switch of their own.
    program
        Looks at each burst between them.
    """

    def __init__(self, ports: Sequence[Port], program: Program | None = None) -> None:
        self._program = program
        self.ports = tuple(ports)
        try:
            self._switch = Switch(len(ports)) if len(ports) > 2 else None
        except ValueError as error:
            raise UsageError(f"{error}; join fewer ports, or make several groups of them") from error
        self._lanes: dict[int, SwitchLane] = {}

    def flows(self) -> list[Flow]:
        """What is to be moved as the ports stand at the moment."""
        return make_flows(self.ports, self._switch, self._lanes, self._program)


class Planner:
    """Makes flows of groups of ports, and gives each worker its share.

    Parameters
    ----------
    workers
        Those that move the packets. An endpoint is owned by one of them at a time.
    sub_burst
        Packets published at once where both ends are rings of guests, 1 to 32.

    Notes
    -----
    Threading: one control thread. Workers obey between two bursts; one whose share has not changed is not asked.
    """

    def __init__(self, workers: Sequence[Worker], sub_burst: int = SUB_BURST) -> None:
        self._workers = tuple(workers)
        self._sub_burst = sub_burst
        self._groups: list[Group] = []
        self._shares: list[list[Flow]] = [[] for _ in self._workers]

    def join(self, ports: Sequence[Port], program: Program | None = None) -> None:
        """Add a group of ports, and perhaps a program between them; `update` sets it going."""
        self._groups.append(Group(ports, program))

    def update(self) -> None:
        """Look at all ports, and change what has changed."""
        flows = [flow for group in self._groups for flow in group.flows()]
        self._publish(spread(flows, len(self._workers), self._owners()))

    def clear(self) -> None:
        """Take all flows from the workers: no endpoint belongs to any afterwards."""
        self._publish([[] for _ in self._workers])

    def _owners(self) -> dict[Key, int]:
        if len(self._workers) == 1:
            return {}
        return {key: number for number, share in enumerate(self._shares) for key in owned(share)}

    def _publish(self, shares: list[list[Flow]]) -> None:
        """Give each worker its flows. What changes hands is taken from its old worker before its new one gets it."""
        owners = self._owners()
        moved = {
            key
            for number, share in enumerate(shares)
            for key in (owned(share) if owners else ())
            if owners.get(key, number) != number
        }
        for number, worker in enumerate(self._workers):
            kept = _without(self._shares[number], moved)
            if len(kept) < len(self._shares[number]):
                worker.set_plan(Plan(kept, sub_burst=self._sub_burst))
                self._shares[number] = kept
        for number, worker in enumerate(self._workers):
            if shares[number] != self._shares[number]:
                worker.set_plan(Plan(shares[number], sub_burst=self._sub_burst))
                self._shares[number] = shares[number]


def _without(share: list[Flow], moved: set[Key]) -> list[Flow]:
    """The flows that touch no endpoint of `moved`, neither by themselves nor by their lane."""
    if not moved:
        return share
    touched = {key for keys in nodes(share) if not moved.isdisjoint(keys) for key in keys[:1]} | moved
    return [flow for flow in share if flow.key not in touched and flow.node not in touched]
