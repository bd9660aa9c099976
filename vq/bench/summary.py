"""From runs to rows: the median with its spread, only among runs of one tag; and where the knee is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vq.bench.distance import FAR, MIXED, NEAR, UNKNOWN
from vq.bench.measure import PERCENTILES, Run
from vq.bench.settings import Settings

__all__ = ["KNEE", "ORDER", "Row", "knee", "known_median", "rows_of"]

KNEE: Final = 0.9  # of the best: what lies behind costs more than it brings
ORDER: Final = (NEAR, UNKNOWN, FAR, MIXED)
DRIVER_LIMIT: Final = 0.8  # a back-end that works less than this share waits for its driver
BEYOND: Final = 10  # round trips: a percentile with fewer slower ones is the chance of a few


@dataclass(frozen=True, slots=True)
class Row:
    """Runs of one point and one tag.

    Parameters
    ----------
    settings, measure, tag
        As in `Run`.
    runs
        How many.
    rate, low, high
        Packets a second: median, smallest and largest.
    latency
        Medians of the percentiles, nanoseconds; empty for throughput.
    busy, cycles, sleeps
        Medians; None: not our back-end.
    distance
        Median of all core distances, nanoseconds; None: threads not bound.
    packets
        Verified, in all runs.
    wrong
        Packets lost, duplicated, reordered or changed, in all runs.
    """

    settings: Settings
    measure: str
    tag: str
    runs: int
    rate: float
    low: float
    high: float
    latency: dict[str, float]
    busy: float | None
    cycles: float | None
    sleeps: float | None
    distance: float | None
    packets: int
    wrong: int

    @property
    def bits(self) -> float:
        """Bits of the packets a second, without preamble and gap."""
        return self.rate * self.settings.size * 8

    @property
    def spread(self) -> float:
        """Distance from the smallest to the largest rate, as a share of the median."""
        return (self.high - self.low) / self.rate if self.rate else 0.0

    def firm(self, percentile: str) -> bool:
        """Whether enough round trips were slower than this percentile; p99.9 needs ten thousand in all."""
        return self.packets * (100 - PERCENTILES[percentile]) >= 100 * BEYOND - 1e-6

    @property
    def limited_by_driver(self) -> bool:
        """Whether our back-end had time left: then the figure is the driver's, or the window's."""
        return self.measure == "throughput" and self.busy is not None and self.busy < DRIVER_LIMIT


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Group runs by point and tag; points in the order in which they came, near before far.

    Runs whose tag changed on the way form rows of their own, where a point has no others.
    """
    groups: dict[Settings, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.settings, {}).setdefault(run.tag, []).append(run)
    found = []
    for tags in groups.values():
        clean = {tag: group for tag, group in tags.items() if tag != MIXED}
        found += [_row(tag, group) for tag, group in sorted((clean or tags).items(), key=lambda i: ORDER.index(i[0]))]
    return found


def _row(tag: str, runs: Sequence[Run]) -> Row:
    rates = [run.rate for run in runs]
    latencies = [run.latency for run in runs if run.latency]
    names = latencies[0] if latencies else {}
    return Row(
        settings=runs[0].settings,
        measure=runs[0].measure,
        tag=tag,
        runs=len(runs),
        rate=statistics.median(rates),
        low=min(rates),
        high=max(rates),
        latency={name: statistics.median(latency[name] for latency in latencies) for name in names},
        busy=known_median(run.busy for run in runs),
        cycles=known_median(run.cycles for run in runs),
        sleeps=known_median(run.sleeps for run in runs),
        distance=known_median(ns for run in runs for ns in run.distances),
        packets=sum(run.packets for run in runs),
        wrong=sum(run.lost + run.duplicated + run.reordered + run.changed for run in runs),
    )


def known_median(values: Iterable[float | None]) -> float | None:
    """The median of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def knee(values: Sequence[float], *, share: float = KNEE) -> int | None:
    """Where a curve reaches most of its best.

    Parameters
    ----------
    values
        Of a curve whose x grows; the more the better.
    share
        Of the best value.

    Returns
    -------
    int or None
        Index of the first value that reaches the share; None without values, or when the first one does already: then
        there is no knee to see.
    """
    if not values or max(values) <= 0:
        return None
    first = next(i for i, value in enumerate(values) if value >= share * max(values))
    return first or None
