"""What it costs that an adaptive back-end sleeps: the wake-up after a pause, and the rate under load.

Both are comparisons with a back-end that polls all the time, at settings that are the same otherwise, among runs of one
tag.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vq.bench.distance import MIXED
from vq.bench.measure import Run
from vq.bench.settings import Settings
from vq.bench.summary import Row

__all__ = ["LoadRatio", "WakeUp", "load_ratios", "sleeping_lines", "wake_ups"]

ASLEEP: Final = 0.5  # of the round trips: from here on their median is that of a back-end that slept
SHOWN: Final = ("p50", "p99")


@dataclass(frozen=True, slots=True)
class WakeUp:
    """What waking up adds to a round trip.

    Parameters
    ----------
    settings, tag
        Of the row in which the back-end slept.
    share
        How often it slept for each round trip: 1 if it did so before every one; above 1 if more than once.
    asleep, awake
        p50 and p99 of the round trip, nanoseconds: of the back-end that slept, and of one that polls all the time;
        `awake` is empty if that was not measured. Each is left out where a row has too few round trips for it.
    added
        The difference of both: the wake latency.
    """

    settings: Settings
    tag: str
    share: float
    asleep: Mapping[str, float]
    awake: Mapping[str, float]
    added: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LoadRatio:
    """The rate of an adaptive back-end, as a share of the rate of one that polls all the time.

    Parameters
    ----------
    settings, tag
        Of the adaptive runs.
    pairs
        How many: an adaptive run and the busy one of the same turn.
    ratio, low, high
        Median, and the quartiles; with fewer than four pairs the smallest and the largest.
    """

    settings: Settings
    tag: str
    pairs: int
    ratio: float
    low: float
    high: float


def wake_ups(rows: Iterable[Row]) -> list[WakeUp]:
    """One for each row of latencies with pauses in which the back-end fell asleep."""
    latencies = [row for row in rows if row.measure == "latency" and row.latency]
    busy = {(row.settings, row.tag): row for row in latencies if row.settings.poll == "busy"}
    found = []
    for row in latencies:
        share = (row.sleeps or 0.0) / row.rate if row.rate else 0.0
        if row.settings.poll == "busy" or not row.settings.pause or share < ASLEEP:
            continue
        other = busy.get((replace(row.settings, poll="busy"), row.tag))
        names = [name for name in SHOWN if row.firm(name) and (other is None or other.firm(name))]
        if not names:
            continue
        asleep = {name: row.latency[name] for name in names}
        awake = {name: other.latency[name] for name in names} if other else {}
        added = {name: asleep[name] - ns for name, ns in awake.items()}
        found.append(WakeUp(row.settings, row.tag, share, asleep, awake, added))
    return found


def load_ratios(runs: Iterable[Run]) -> list[LoadRatio]:
    """Pair the runs of each point that differ in polling only, in the order in which they were done."""
    turns: dict[Settings, list[Run]] = {}
    for run in runs:
        if run.measure == "throughput":
            turns.setdefault(run.settings, []).append(run)
    found = []
    for settings, adaptive in turns.items():
        if settings.poll == "busy":
            continue
        ratios: dict[str, list[float]] = {}
        for mine, other in zip(adaptive, turns.get(replace(settings, poll="busy"), ()), strict=False):
            if other.rate and mine.tag == other.tag != MIXED:
                ratios.setdefault(mine.tag, []).append(mine.rate / other.rate)
        found += [_ratio(settings, tag, values) for tag, values in ratios.items()]
    return found


def _ratio(settings: Settings, tag: str, values: Sequence[float]) -> LoadRatio:
    low, high = min(values), max(values)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return LoadRatio(settings, tag, len(values), statistics.median(values), low, high)


def sleeping_lines(rows: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    """Both for people."""
    lines = []
    for wake in wake_ups(rows):
        figures = []
        for name, asleep in wake.asleep.items():
            figure = f"{asleep / 1000:.2f} µs asleep"
            if wake.awake:
                added, awake = wake.added[name] / 1000, wake.awake[name] / 1000
                figure = f"{added:+.2f} µs ({asleep / 1000:.2f} asleep, {awake:.2f} awake)"
            figures.append(f"{name} {figure}")
        where = _where(wake.settings, wake.tag)
        lines.append(f"wake latency, {where}: {', '.join(figures)}; it slept before {min(wake.share, 1):.0%}")
    for load in load_ratios(runs):
        spread = f"{load.low:.3f} to {load.high:.3f}, {load.pairs} pair{'s' if load.pairs > 1 else ''}"
        lines.append(f"adaptive / busy under load, {_where(load.settings, load.tag)}: {load.ratio:.3f} ({spread})")
    return lines


def _where(settings: Settings, tag: str) -> str:
    return " ".join(word for word in (settings.words(but=("poll",)), tag) if word)
