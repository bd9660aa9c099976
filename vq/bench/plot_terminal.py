"""Plots of characters, by plotext."""

from __future__ import annotations

import itertools
import shutil
import string
from collections.abc import Sequence
from typing import Final

from vq.bench.curves import Panel

__all__ = ["draw_plot"]

HEIGHT: Final = 18
WIDTH_MAX: Final = 110
KNEE_MARK: Final = "*"
LETTERS: Final = string.ascii_uppercase


def draw_plot(panels: Sequence[Panel], title: str, caption: Sequence[str], *, colours: bool) -> str:
    """Draw panels below each other.

    Parameters
    ----------
    panels
        What to draw.
    title
        What was measured.
    caption
        Lines below: machine, build, date.
    colours
        Whether the terminal shows them.

    Returns
    -------
    str
        Lines for the terminal.
    """
    import plotext  # type: ignore[import-untyped, unused-ignore]

    figure = plotext.figure
    lines = []
    for panel in panels:
        figure.clear()
        if not colours:
            figure.theme("colorless")
        width = min(shutil.get_terminal_size().columns, WIDTH_MAX)
        figure.plot_size(width, HEIGHT)
        places = {x: place for place, x in enumerate(panel.xs, 1)}
        legend = []
        for letter, curve in zip(itertools.cycle(LETTERS), panel.curves, strict=False):
            at = [places[x] for x in curve.xs]
            # Several lines are drawn of letters, which need neither colours nor room for a legend inside.
            marker = letter if len(panel.curves) > 1 else None
            legend += [f"  {letter}  {curve.label}"] if marker else []
            if at:
                figure.draw(figure.signal(at, curve.ys, marker=marker).lines())
            if curve.knee is not None:
                figure.draw(figure.signal([at[curve.knee]], [curve.ys[curve.knee]], marker=KNEE_MARK))
        figure.ruler("x").ticks(list(places.values()), panel.xs)
        if panel.logarithmic:
            figure.ruler("y").scale("log")
        figure.title(f"{title}: {panel.y}")
        figure.label(panel.x, "x")
        built = figure.build()
        lines += [built.string(colorless=not colours), *legend]
    figure.clear()
    if any(curve.knee is not None for panel in panels for curve in panel.curves):
        lines.append(f"{KNEE_MARK}: the knee, where a line first reaches 90 % of its best")
    return "\n".join([*lines, *caption]) + "\n"
