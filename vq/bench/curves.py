"""Rows as curves: what is x, what is y, which lines, and where each one has its knee. Both kinds of plot draw these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Final

from vq.bench.distance import UNKNOWN
from vq.bench.settings import AXES, Settings
from vq.bench.summary import KNEE, Row, knee

__all__ = ["Curve", "Panel", "knee_lines", "panels_of", "varying"]

LATENCIES: Final = {"p50": "p50", "p99": "p99", "p99.9": "p99_9"}  # as people write them, and as `Row` does
PACKETS: Final = "million packets a second"
SHORT: Final = {PACKETS: "Mpps"}  # in a sentence
KNEE_POINTS: Final = 3  # a knee of fewer points is only a step


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot.

    Parameters
    ----------
    label
        What distinguishes it from the other lines; empty if there is only one.
    xs
        Values of the axis, as written.
    ys, lows, highs
        Median and spread of each.
    knee
        Index of the first point that reaches 90 % of the best; None: there is none to see.
    knees
        Indices of the first and the last point that it may be within the spread.
    limited
        Whether the best point is the driver's or the window's, not the back-end's.
    """

    label: str
    xs: list[str]
    ys: list[float]
    lows: list[float]
    highs: list[float]
    knee: int | None
    knees: tuple[int, int] = (0, 0)
    limited: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over one axis.

    Parameters
    ----------
    x, y
        What stands at the axes, with units.
    axis
        Name of the setting along x.
    xs
        Every value that a line has, in order.
    curves
        The lines.
    logarithmic
        Whether y spans magnitudes.
    """

    x: str
    y: str
    axis: str
    xs: list[str]
    curves: list[Curve]
    logarithmic: bool = False


def varying(rows: Sequence[Row]) -> list[str]:
    """Names of the settings that differ between rows, in the order of `Settings`."""
    return [f.name for f in fields(Settings) if len({getattr(row.settings, f.name) for row in rows}) > 1]


def _axis(rows: Sequence[Row]) -> str:
    """The setting along x: the one that changes from the first row to the next point."""
    names = varying(rows)
    for row in rows:
        for name in names:
            if getattr(row.settings, name) != getattr(rows[0].settings, name):
                return name
    return "size"


def _lines(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """Rows by what distinguishes their line."""
    others = [name for name in varying(rows) if name != axis]
    tags = {row.tag for row in rows}
    found: dict[str, list[Row]] = {}
    for row in rows:
        words = [f"{name} {getattr(row.settings, name)}" for name in others]
        words += [row.tag] if len(tags) > 1 and row.tag != UNKNOWN else []
        found.setdefault(", ".join(words), []).append(row)
    return found


def _curve(label: str, rows: Sequence[Row], axis: str, scale: Callable[[Row], float], *, bends: bool) -> Curve:
    ys, lows, highs = ([getattr(row, of) * scale(row) for row in rows] for of in ("rate", "low", "high"))
    return Curve(
        label,
        [str(getattr(row.settings, axis)) for row in rows],
        ys,
        lows,
        highs,
        knee(ys) if bends and len(rows) >= KNEE_POINTS else None,
        _knees(ys, lows, highs),
        rows[ys.index(max(ys))].limited_by_driver,
    )


def _knees(ys: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> tuple[int, int]:
    """The first point that now and then comes near the best, and the first that always does."""
    enough = KNEE * max(ys)
    last = len(ys) - 1
    return (
        next((i for i, high in enumerate(highs) if high >= enough), last),
        next((i for i, low in enumerate(lows) if low >= enough), last),
    )


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """Make curves of rows of one kind of measurement; none of no rows.

    Packets a second over any axis; over packet sizes also bits a second, which have the knee there. Latencies are
    percentiles along x, one line for each point.
    """
    if not rows:
        return []
    if rows[0].measure == "latency":
        return [_latency_panel(rows)]
    axis = _axis(rows)
    meaning = AXES[axis]
    x = f"{axis} ({meaning.unit})" if meaning.unit else axis
    xs = list(dict.fromkeys(str(getattr(row.settings, axis)) for row in rows))
    lines = _lines(rows, axis)
    numbers = not (meaning.choices or meaning.words) and axis != "size"
    packets = [_curve(label, part, axis, lambda row: 1e-6, bends=numbers) for label, part in lines.items()]
    panels = [Panel(x, PACKETS, axis, xs, packets)]
    if axis == "size":
        bits = [_curve(n, part, axis, lambda row: row.settings.size * 8e-9, bends=True) for n, part in lines.items()]
        panels.append(Panel(x, "Gbit/s", axis, xs, bits))
    return panels


def _latency_panel(rows: Sequence[Row]) -> Panel:
    curves = []
    for label, group in _lines(rows, "").items():
        row = group[0]
        ys = [row.latency[name] / 1000 for name in LATENCIES.values() if row.firm(name)] if row.latency else []
        curves.append(Curve(label, list(LATENCIES)[: len(ys)], ys, ys, ys, None))
    return Panel("percentile", "round trip (µs)", "percentile", list(LATENCIES), curves, logarithmic=True)


def knee_lines(rows: Sequence[Row]) -> list[str]:
    """What the knees say, for people."""
    found = []
    for panel in panels_of(rows):
        for curve in panel.curves:
            if curve.knee is not None:
                where = f" ({curve.label})" if curve.label else ""
                first, last = curve.knees
                within = f"; within the spread it may be {curve.xs[first]} to {curve.xs[last]}" if first < last else ""
                found.append(
                    f"knee: {panel.axis}={curve.xs[curve.knee]} is the first to reach {KNEE:.0%} of the best"
                    f" {SHORT.get(panel.y, panel.y)}{where}{within}"
                    + ("; it is the driver's or the window's (*)" if curve.limited else "")
                )
    return found
