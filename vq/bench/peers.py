"""Peers side by side: DPDK's back-end and ours under the same front-end, in alternation.

The front-end is DPDK's testpmd with virtio-user on one processor, the back-end has another one. Rates are read at the
front-end, so that both are judged by the same eye. A pair is one run of each, and every other pair begins with ours.

On a virtual machine the distance of the processors changes every few seconds. So it is measured right before and right
after the counted seconds of each run, while both programs stand still, and a pair counts when all four are near or all
four are far: what happened while programs started does not matter. A stop in the middle of a round would count as work
of that round, though; where cycles are asked for, only the back-end is stopped, before the front-end comes and after it
went.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vq.bench.cells import Cell
from vq.bench.child import Child, halted
from vq.bench.distance import FAR, NEAR, core_distance, tag_of
from vq.bench.measure import Ended
from vq.bench.summary import known_median
from vq.bench.testpmd import back_command, check_dpdk, cycles_per_packet, front_command, rates
from vq.errors import ResourceError

__all__ = ["Pair", "PeerRow", "Rig", "peer_rows", "run_pairs"]

OPEN_S: Final = 20.0  # until the sockets are there
SLACK_S: Final = 15.0  # of a run over its seconds: start of testpmd, features, link
LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each back-end.

    Parameters
    ----------
    cell
        Name of the cell.
    distances, tag
        Nanoseconds between the processors before and after DPDK's run, before and after ours; the tag made of them.
    dpdk, vq
        Packets a second at the front-end.
    dpdk_cycles, vq_cycles
        Busy cycles of the back-end for each packet; None: not asked for, or not reported.
    """

    cell: str
    distances: tuple[float, float, float, float]
    tag: str
    dpdk: float
    vq: float
    dpdk_cycles: float | None
    vq_cycles: float | None

    @property
    def ratio(self) -> float:
        """Ours divided by DPDK's."""
        return self.vq / self.dpdk


@dataclass(frozen=True, slots=True)
class PeerRow:
    """Pairs of one cell and one tag: medians, and smallest and largest ratio."""

    cell: str
    tag: str
    pairs: int
    dpdk: float
    vq: float
    ratio: float
    low: float
    high: float
    dpdk_cycles: float | None
    vq_cycles: float | None
    distance: float


@dataclass(frozen=True, slots=True)
class Rig:
    """How pairs are measured.

    Parameters
    ----------
    cpus
        Processor of the back-end, processor of the front-end.
    seconds
        Counted seconds of a run.
    settle
        First seconds that are not counted.
    front_args
        Further arguments of net_virtio_user.
    cycles
        Whether to ask for busy cycles; testpmd then reads the clock once more a burst.
    program
        For `vq pump --program`; empty: none.
    """

    cpus: tuple[int, int]
    seconds: int = 2
    settle: int = 1
    front_args: str = ""
    cycles: bool = False
    program: str = ""


def run_pairs(
    rig: Rig,
    cells: Sequence[Cell],
    repeat: int,
    ended: Callable[[], bool] = lambda: False,
    failed: Callable[[Cell, ResourceError], None] | None = None,
) -> Iterator[Pair]:
    """Measure pair after pair, all cells once, then all of them again.

    Parameters
    ----------
    rig
        How.
    cells
        Which.
    repeat
        Pairs of each cell.
    ended
        Asked now and then; the pair under way is given up then.
    failed
        Gets what went wrong in a pair, and the others go on; None: it is raised.

    Yields
    ------
    Pair
        Each one as it is done.

    Raises
    ------
    ResourceError
        DPDK is missing or does not run.
    """
    check_dpdk()
    with tempfile.TemporaryDirectory(prefix="vqpeer") as name:
        for number in range(repeat):
            for cell in cells:
                try:
                    yield _pair(rig, cell, Path(name), ended, ours_first=bool(number % 2))
                except Ended:
                    return
                except ResourceError as error:
                    if failed is None:
                        raise
                    failed(cell, error)


@dataclass(frozen=True, slots=True)
class _Half:
    """One run: packets a second, busy cycles a packet, the distances before and after."""

    rate: float
    cycles: float | None
    distances: tuple[float, float]


def _pair(rig: Rig, cell: Cell, folder: Path, ended: Callable[[], bool], *, ours_first: bool) -> Pair:
    sides = [_Dpdk(rig, cell, folder), _Ours(rig, cell, folder)]
    halves = [_run(rig, cell, folder, side, ended) for side in (reversed(sides) if ours_first else sides)]
    dpdk, ours = reversed(halves) if ours_first else halves
    distances = (*dpdk.distances, *ours.distances)
    return Pair(str(cell), distances, tag_of(*distances), dpdk.rate, ours.rate, dpdk.cycles, ours.cycles)


class _Dpdk:
    """DPDK's back-end: how it is started, and what its output says."""

    name = "DPDK"

    def __init__(self, rig: Rig, cell: Cell, folder: Path) -> None:
        self.sockets = [folder / f"{number}.sock" for number in range(cell.way.guests)]
        self.command = back_command(cell, self.sockets, rig.cpus[0], cycles=rig.cycles)

    def cycles(self, output: str) -> float | None:
        return cycles_per_packet(output)


class _Ours(_Dpdk):
    """`vq pump`, as users start it."""

    name = "vq"

    def __init__(self, rig: Rig, cell: Cell, folder: Path) -> None:
        super().__init__(rig, cell, folder)
        guests = [f"vhost:{path},queues=1" for path in self.sockets]
        ports = {"sink": [*guests, "null:copy"], "gen": [f"gen:size={cell.size}", *guests]}.get(cell.direction, guests)
        self._key = "to_guest" if cell.direction == "gen" else "from_guest"
        self.command = [sys.executable, "-m", "vq", "pump", *ports, "--cpu", str(rig.cpus[0]), "--poll", "busy"]
        self.command += ["--program", rig.program] if rig.program else []
        self.command += ["--json", "--interval", "3600"]  # nothing on the way: only the counters of the end

    def cycles(self, output: str) -> float | None:
        import msgspec

        lines = [line for line in output.splitlines() if line.startswith("{")]
        if not lines:
            return None
        final: dict[str, Any] = msgspec.json.decode(lines[-1])
        packets = sum(port[self._key]["packets"] for port in final["ports"].values() if self._key in port)
        busy = sum(worker["busy_cycles"] for worker in final["workers"])
        return busy / packets if packets else None


def _run(rig: Rig, cell: Cell, folder: Path, side: _Dpdk, ended: Callable[[], bool]) -> _Half:
    """One back-end under the front-end."""
    for path in side.sockets:
        path.unlink(missing_ok=True)
    with Child(f"the back-end of {side.name}", side.command, folder) as back:
        _await(lambda: all(path.exists() for path in side.sockets), OPEN_S, [back], "opened no socket", ended)
        before = _distance(rig, [back])
        with Child("the front-end", front_command(cell, side.sockets, rig.cpus[1], rig.front_args), folder) as front:

            def reports(count: int) -> list[int]:
                """The reports of the front-end, once there are so many."""
                _await(
                    lambda: len(rates(front.output(), cell)) >= count,
                    count + SLACK_S,
                    [front, back],
                    "reported too few seconds",
                    ended,
                )
                return rates(front.output(), cell)

            # The report before the first second is dropped as well: it counts from the start of the program.
            skipped = 1 + rig.settle
            if not rig.cycles:
                reports(skipped)
                before = _distance(rig, [front, back])
                skipped = len(rates(front.output(), cell)) + 1  # the second with the stop does not count either
            kept = reports(skipped + rig.seconds)[skipped : skipped + rig.seconds]
            after = None if rig.cycles else _distance(rig, [front, back])
            if not statistics.median(kept):
                raise back.failure("moved no packets")
        after = _distance(rig, [back]) if after is None else after
        back.end()
        return _Half(statistics.median(kept), side.cycles(back.output()) if rig.cycles else None, (before, after))


def _distance(rig: Rig, children: Sequence[Child]) -> float:
    """How far apart the processors are, while what runs there stands still."""
    with halted(children):
        return core_distance(*rig.cpus)


def _await(
    done: Callable[[], bool], seconds: float, children: Sequence[Child], what: str, ended: Callable[[], bool]
) -> None:
    end = time.monotonic() + seconds
    while not done():
        if ended():
            raise Ended
        for child in children:
            child.check()
        if time.monotonic() > end:
            raise children[0].failure(f"{what} in {seconds:g} s")
        time.sleep(LOOK_S)


def peer_rows(pairs: Iterable[Pair]) -> list[PeerRow]:
    """Medians of the pairs of one cell and one tag; pairs across tags count nowhere."""
    groups: dict[str, dict[str, list[Pair]]] = {}
    for pair in pairs:
        groups.setdefault(pair.cell, {}).setdefault(pair.tag, []).append(pair)
    return [_row(cell, tag, tags[tag]) for cell, tags in groups.items() for tag in (NEAR, FAR) if tag in tags]


def _row(cell: str, tag: str, pairs: Sequence[Pair]) -> PeerRow:
    ratios = [pair.ratio for pair in pairs]
    return PeerRow(
        cell=cell,
        tag=tag,
        pairs=len(pairs),
        dpdk=statistics.median(pair.dpdk for pair in pairs),
        vq=statistics.median(pair.vq for pair in pairs),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        dpdk_cycles=known_median(pair.dpdk_cycles for pair in pairs),
        vq_cycles=known_median(pair.vq_cycles for pair in pairs),
        distance=statistics.median(ns for pair in pairs for ns in pair.distances),
    )
