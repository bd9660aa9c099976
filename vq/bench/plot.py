"""Plots into a file, by matplotlib; and what may stand behind ``--plot``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vq.bench.files import check_writable
from vq.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from vq.bench.curves import Panel

__all__ = ["TERMINAL", "check_plot", "save_plot"]

TERMINAL: Final = "terminal"
SUFFIXES: Final = (".png", ".svg", ".pdf")
CAPTION_CHARS: Final = 150  # of a line


def check_plot(where: str) -> None:
    """Refuse, before anything is measured, what could not be drawn afterwards.

    Raises
    ------
    UsageError
        Neither a file of a known kind nor ``terminal``.
    ResourceError
        The library is not installed, or the file cannot be written.
    """
    library = "plotext" if where == TERMINAL else "matplotlib"
    if where != TERMINAL:
        path = Path(where)
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"--plot {where}: write a file that ends in {', '.join(SUFFIXES)}, or {TERMINAL}")
        check_writable(path)
    if importlib.util.find_spec(library) is None:
        raise ResourceError(f"--plot {where} needs {library}", remedy="run: pip install 'vq[plots]'")


def save_plot(where: str, panels: Sequence[Panel], title: str, caption: Sequence[str]) -> None:
    """Draw panels side by side into a file.

    Parameters
    ----------
    where
        File; its suffix decides the kind.
    panels
        At least one.
    title
        What was measured.
    caption
        Lines below: machine, build, date.

    Raises
    ------
    ResourceError
        The file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The same input gives the same file: ids of an SVG are otherwise made of random numbers.
    with rc_context({"svg.hashsalt": "vq", "font.size": 9}):
        figure = Figure(figsize=(max(6.5, 5.5 * len(panels)), 4.8), layout="constrained")
        for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            places = {x: place for place, x in enumerate(panel.xs)}
            for curve in panel.curves:
                at = [places[x] for x in curve.xs]
                spread = [
                    [y - low for y, low in zip(curve.ys, curve.lows, strict=True)],
                    [high - y for y, high in zip(curve.ys, curve.highs, strict=True)],
                ]
                (line, *_) = axes.errorbar(at, curve.ys, yerr=spread, marker="o", capsize=3, label=curve.label)
                if curve.knee is not None:
                    # The line's own colour: each curve has its own knee.
                    spot = (at[curve.knee], curve.ys[curve.knee])
                    axes.axvline(spot[0], color=line.get_color(), linestyle=":", linewidth=1)
                    axes.annotate(f"knee: {curve.xs[curve.knee]}", spot, (4, -14), textcoords="offset points")
            axes.set_xticks(range(len(panel.xs)), panel.xs)
            axes.set_xlabel(panel.x)
            axes.set_ylabel(panel.y)
            axes.grid(alpha=0.3)
            if panel.logarithmic:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            if any(curve.label for curve in panel.curves):
                axes.legend(fontsize=7, loc="upper left" if panel.logarithmic else "best")
        figure.suptitle(title)
        short = [line if len(line) <= CAPTION_CHARS else line[: CAPTION_CHARS - 3] + "..." for line in caption]
        figure.supxlabel("\n".join(short), fontsize=6, ha="left", x=0.01)
        try:
            figure.savefig(where, metadata={"Date": None} if where.lower().endswith(".svg") else None)
        except OSError as error:
            raise ResourceError("the plot cannot be written", errno=error.errno or 0, path=where) from error
