"""Runs of block back-ends in alternation, and rows made of them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vq.bench.blk_backends import BlkBackend, memory_file
from vq.bench.blk_link import open_blk_link
from vq.bench.blk_settings import BlkSettings
from vq.bench.child import halted
from vq.bench.distance import MIXED, tag_of
from vq.bench.measure import WARM_UP, Ended, drive
from vq.bench.summary import ORDER, known_median
from vq.bench.target import Places
from vq.errors import VqError

__all__ = ["BlkRow", "BlkRun", "Ratio", "blk_rows", "ratios", "run_blk"]


@dataclass(frozen=True, slots=True)
class BlkRun:
    """What one run found.

    Parameters
    ----------
    settings, backend
        What was measured, and of whom.
    round
        Runs of the same round and settings are a pair.
    reads, writes, seconds
        Requests that were done, and how long that took.
    failed, changed, lost
        Requests that failed; that gave other data or another length than they should; that never came back.
    rate
        Requests a second.
    distances, tag
        Nanoseconds between the processors before and after, and the tag made of both.
    """

    settings: BlkSettings
    backend: str
    round: int
    reads: int
    writes: int
    seconds: float
    failed: int
    changed: int
    lost: int
    rate: float
    distances: tuple[float | None, float | None]
    tag: str

    @property
    def ok(self) -> bool:
        """Requests were done, and nothing was wrong with any."""
        return self.reads + self.writes > 0 and not any((self.failed, self.changed, self.lost))


@dataclass(frozen=True, slots=True)
class BlkRow:
    """Runs of one point, one back-end and one tag: rates are median, smallest and largest."""

    settings: BlkSettings
    backend: str
    tag: str
    runs: int
    rate: float
    low: float
    high: float
    requests: int
    wrong: int
    distance: float | None

    @property
    def bits(self) -> float:
        """Bits of data a second."""
        return self.rate * self.settings.block * 8


@dataclass(frozen=True, slots=True)
class Ratio:
    """Pairs of one point and one tag: the first back-end's rate divided by the second's, and its spread."""

    settings: BlkSettings
    tag: str
    pairs: int
    ratio: float
    low: float
    high: float


def run_blk(
    backends: Sequence[BlkBackend],
    points: Sequence[BlkSettings],
    places: Places,
    *,
    seconds: float,
    repeat: int,
    ended: Callable[[], bool] = lambda: False,
    failed: Callable[[str, VqError], None] | None = None,
) -> Iterator[BlkRun]:
    """Measure every point of every back-end once, then all of them again; every other round begins with the last one.

    Parameters
    ----------
    backends
        One, or two side by side.
    points
        In the order of the table.
    places
        Processors of back-end and driver.
    seconds
        Counted seconds of a run.
    repeat
        Rounds.
    ended
        Asked now and then; when it says so, the series ends with what has been measured.
    failed
        Gets what went wrong in a run, and the others go on; None: it is raised.

    Yields
    ------
    BlkRun
        Each one as it is done.
    """
    with tempfile.TemporaryDirectory(prefix="vqblk") as name, memory_file(points) as file:
        for number in range(repeat):
            for point in points:
                for backend in reversed(backends) if number % 2 else backends:
                    try:
                        yield _run(backend, point, places, number, Path(name), file, seconds, ended)
                    except Ended:
                        return
                    except VqError as error:
                        if failed is None:
                            raise
                        failed(f"{backend.name}: {point.words() or 'defaults'}", error)


def _run(
    backend: BlkBackend,
    settings: BlkSettings,
    places: Places,
    number: int,
    folder: Path,
    file: Path | None,
    seconds: float,
    ended: Callable[[], bool],
) -> BlkRun:
    with ExitStack() as stack:
        disk = file if settings.disk == "tmpfs" else None
        path, children = stack.enter_context(backend.open(settings, disk, folder, ended))
        load = stack.enter_context(open_blk_link(path, settings, places.driver))
        with halted(children):
            before = places.distance()
        drive(load, lambda: load.run(seconds * WARM_UP), ended)
        begin, started = load.counters, load.seconds
        drive(load, lambda: load.run(seconds), ended)
        counters, passed = load.counters, load.seconds - started
        with halted(children):
            after = places.distance()
        found = {name: counters[name] - begin[name] for name in ("reads", "writes")}
        if not sum(found.values()) and children:
            raise children[0].failure("did no request")
        return BlkRun(
            settings=settings, backend=backend.name, round=number, **found, seconds=passed, failed=counters["failed"],
            changed=counters["changed"], lost=counters["lost"], rate=sum(found.values()) / max(passed, 1e-9),
            distances=(before, after), tag=tag_of(before, after),
        )  # fmt: skip


def _grouped(runs: Iterable[BlkRun]) -> dict[BlkSettings, dict[str, list[BlkRun]]]:
    """Runs by point and tag; runs whose tag changed on the way only where a point has no others."""
    groups: dict[BlkSettings, dict[str, list[BlkRun]]] = {}
    for run in runs:
        groups.setdefault(run.settings, {}).setdefault(run.tag, []).append(run)
    for settings, tags in groups.items():
        clean = {tag: group for tag, group in tags.items() if tag != MIXED} or tags
        groups[settings] = dict(sorted(clean.items(), key=lambda item: ORDER.index(item[0])))
    return groups


def blk_rows(runs: Sequence[BlkRun]) -> list[BlkRow]:
    """Medians of the runs of one point, one back-end and one tag; back-ends in the order of the first round."""
    found = []
    names = dict.fromkeys(run.backend for run in runs)
    for tags in _grouped(runs).values():
        for tag, group in tags.items():
            by_name = {name: [run for run in group if run.backend == name] for name in names}
            found += [_row(tag, part) for part in by_name.values() if part]
    return found


def _row(tag: str, runs: Sequence[BlkRun]) -> BlkRow:
    rates = [run.rate for run in runs]
    return BlkRow(
        settings=runs[0].settings, backend=runs[0].backend, tag=tag, runs=len(runs), rate=statistics.median(rates),
        low=min(rates), high=max(rates), requests=sum(run.reads + run.writes for run in runs),
        wrong=sum(run.failed + run.changed + run.lost for run in runs),
        distance=known_median(ns for run in runs for ns in run.distances),
    )  # fmt: skip


def ratios(runs: Sequence[BlkRun], first: str, second: str) -> list[Ratio]:
    """What the pairs of one point and one tag say; pairs across tags count nowhere, unless a point has no others."""
    by_pair: dict[tuple[BlkSettings, int], dict[str, BlkRun]] = {}
    for run in runs:
        by_pair.setdefault((run.settings, run.round), {})[run.backend] = run
    groups: dict[BlkSettings, dict[str, list[float]]] = {}
    for (settings, _), pair in by_pair.items():
        if first in pair and second in pair and pair[second].rate:
            tag = tag_of(*pair[first].distances, *pair[second].distances)
            groups.setdefault(settings, {}).setdefault(tag, []).append(pair[first].rate / pair[second].rate)
    found = []
    for settings, tags in groups.items():
        clean = {tag: values for tag, values in tags.items() if tag != MIXED} or tags
        for tag, values in sorted(clean.items(), key=lambda item: ORDER.index(item[0])):
            found.append(Ratio(settings, tag, len(values), statistics.median(values), min(values), max(values)))
    return found
