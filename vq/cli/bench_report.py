"""What ``vq bench`` shows: a bar while it measures, then a table with what belongs to it, JSON, CSV and plots."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from vq.cli.lines import scaled
from vq.cli.output import check_output, write_json
from vq.cli.signals import Ending
from vq.errors import ResourceError
from vq.stats import encode

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from vq.bench.curves import Panel
    from vq.bench.facts import Facts
    from vq.bench.measure import Run
    from vq.bench.summary import Row
    from vq.cli.bench_options import Options, Output

__all__ = ["Stop", "draw", "fit", "print_rows", "print_table", "progress", "run_line", "save_csv"]

FEW: Final = "-"
NARROW: Final = 100  # columns of a table that nobody's terminal folds
# What a narrow terminal can do without, first what says least: wrong packets make their row red, and a line below.
SPARE: Final = (
    "verified", "runs", "wrong", "sleeps/s", "max µs", "cycles/packet", "Gbit/s", "back-end busy", "min-max"
)  # fmt: skip


class Stop(Ending):
    """The request to end a measurement, and what comes of it."""

    def asked(self) -> bool:
        """Whether to end."""
        return bool(self.signal)

    def code(self, *, ok: bool, measured: bool) -> int:
        """The exit code: something wrong says more than an early end."""
        if measured and not ok:
            return 1
        if self.signal:
            return 128 + self.signal
        return 0 if measured else 1


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show how far a measurement is; gives what counts one step, with words about it.

    The bar stands on standard error, and only on a terminal. It is drawn twice a second, since drawing takes time from
    the processors that are measured.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    off = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=off, refresh_per_second=2) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda words: bar.update(task, advance=1, description=words)


def run_line(run: Run) -> str:
    """A run in a few words, for the bar."""
    words = run.settings.words() or "defaults"
    if run.latency:
        return f"{words}: p50 {run.latency['p50'] / 1000:.2f} µs"
    return f"{words}: {scaled(run.rate, 'pps')}"


def fit(table: Table, width: int, spare: Sequence[str]) -> tuple[Table, list[str]]:
    """Leave out columns until a table fits.

    Parameters
    ----------
    table
        All of it.
    width
        Columns of the terminal.
    spare
        Headings that may be left out, the one that says least first.

    Returns
    -------
    tuple of (Table, list of str)
        The table, and the headings that it lacks.
    """
    left_out: list[str] = []
    headings = {str(column.header) for column in table.columns}
    for name in [name for name in spare if name in headings]:
        if _wide(table) <= width:
            break
        left_out.append(name)
        table = _without(table, name)
    return table, left_out


def _wide(table: Table) -> int:
    """The columns that a table takes when nothing of it is cut."""
    from rich.console import Console

    return Console(width=1000).measure(table).maximum


def _without(table: Table, heading: str) -> Table:
    from rich.table import Table

    columns = [column for column in table.columns if column.header != heading]
    found = Table(title=table.title, title_justify=table.title_justify)
    for column in columns:
        found.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap)
    for row, cells in zip(table.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
        found.add_row(*cells, style=row.style)
    return found


def _plain(table: Table) -> Group:
    """A table as lines, a row each: for a terminal so narrow that it would cut figures."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(str(table.title))]
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        pairs = zip((" ".join(str(column.header).split()) for column in table.columns), cells, strict=True)
        words = [f"{heading} {cell}" for heading, cell in pairs if cell]
        lines.append(Text(", ".join(words), style=row.style or ""))
    return Group(*lines)


def print_table(table: Table, lines: Sequence[tuple[str, str]], spare: Sequence[str] = ()) -> None:
    """Print a table and the lines below it, each with its style.

    On a narrow terminal the table lacks what is spare; where that is not enough its rows are lines.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 2 * NARROW)  # a file has no edge
    table, left_out = fit(table, console.width, spare)
    if left_out:
        lines = [(f"left out, the terminal is narrow: {', '.join(left_out)}; --json and --csv have all", "dim"), *lines]
    # Not printed by rich, which takes a reader that went away for exit code 1, here a failed verification.
    with check_output():
        with console.capture() as text:
            console.print(table if _wide(table) <= console.width else _plain(table))
            for line, style in lines:
                console.print(Text(line, style=style))
        # rich fills the line of a title up to the width of its table.
        print("\n".join(line.rstrip() for line in text.get().splitlines()), flush=True)


def _number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def _setting(name: str) -> Callable[[Row], str]:
    return lambda row: str(getattr(row.settings, name))


def _latency(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        if not row.latency:
            return ""
        return _number(row.latency[name] / 1000, ".2f") if name == "max" or row.firm(name) else FEW

    return show


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """Headings, and what stands below each."""
    from vq.bench.curves import varying
    from vq.bench.settings import AXES

    names = varying(rows) or ["size"]
    # The figures of latencies have a unit, and so has the pause beside them.
    found: dict[str, Callable[[Row], str]] = {
        f"{name} µs" if AXES[name].unit == "µs" else name: _setting(name) for name in names
    }
    if rows[0].measure == "latency":
        for name in ("p50", "p99", "p99_9", "max"):
            found[f"{name.replace('_', '.')} µs"] = _latency(name)
    else:
        found["Mpps"] = lambda row: f"{row.rate / 1e6:.2f}"
        found["min-max"] = lambda row: f"{row.low / 1e6:.2f}-{row.high / 1e6:.2f}"
        found["Gbit/s"] = lambda row: f"{row.bits / 1e9:.2f}"
    if any(row.busy is not None for row in rows):
        found["back-end busy"] = lambda row: _number(row.busy, ".0%") + ("*" if row.limited_by_driver else "")
        found["cycles/packet"] = lambda row: _number(row.cycles, ".0f")
        if any(row.sleeps for row in rows):
            found["sleeps/s"] = lambda row: _number(row.sleeps, ".0f")
    found["cores"] = lambda row: row.tag + (f" {row.distance:.0f} ns" if row.distance is not None else "")
    found["runs"] = lambda row: str(row.runs)
    found["verified"] = lambda row: f"{row.packets:,}"
    found["wrong"] = lambda row: f"{row.wrong:,}"
    return found


def print_rows(
    facts: Facts, target: str, rows: Sequence[Row], runs: Sequence[Run], options: Options, *, early: bool
) -> None:
    """Show what was measured in every form that was asked for."""
    from vq.bench.records import final_record, flat_rows

    if options.json:
        write_json(encode(final_record(facts, target, rows, runs), final=True))
    elif not rows:
        with check_output():
            print("ended before anything was measured", flush=True)
    else:
        print_table(_table(rows, target), _below(facts, rows, runs, early=early), SPARE)
    save_csv(options, flat_rows(facts, target, rows))
    if options.plot is not None and rows:
        _plot(options.plot, facts, target, rows)


def _table(rows: Sequence[Row], target: str) -> Table:
    from rich.table import Table

    from vq.bench.curves import varying

    fixed = rows[0].settings.words(but=varying(rows))
    table = Table(title=f"{rows[0].measure} of {target}" + (f": {fixed}" if fixed else ""), title_justify="left")
    columns = _columns(rows)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()), style="bold red" if row.wrong else "")
    return table


def _below(facts: Facts, rows: Sequence[Row], runs: Sequence[Run], *, early: bool) -> list[tuple[str, str]]:
    """Lines under a table: what to make of it, then what belongs to it."""
    from vq.bench.curves import knee_lines
    from vq.bench.measure import PERCENTILES
    from vq.bench.sleeping import sleeping_lines

    lines = [(line, "cyan") for line in (*knee_lines(rows), *sleeping_lines(rows, runs))]
    if any(row.limited_by_driver for row in rows):
        lines.append(("* our back-end had time left: this rate is that of the driver or the window", ""))
    if any(row.latency and not row.firm(name) for row in rows for name in PERCENTILES):
        lines.append((f"{FEW} too few round trips for this percentile: take more --seconds or --repeat", ""))
    if len({row.tag for row in rows}) > 1:
        lines.append(("the cores' distance changed meanwhile: compare rows of one tag only", "yellow"))
    if any(row.wrong for row in rows):
        lines.append(("not every packet came back once, in order and unchanged", "bold red"))
    else:
        lines.append(("every packet came back once, in order and unchanged", "green"))
    lines += [("ended early, with what was measured until then", "yellow")] if early else []
    return lines + [(line, "dim") for line in facts.lines()]


def save_csv(options: Output, records: Sequence[dict[str, Any]]) -> None:
    """Write the CSV file, if one was asked for; without a row the file of an earlier measurement stays."""
    if options.csv is None or not records:
        return
    from vq.bench.records import csv_text

    try:
        options.csv.write_text(csv_text(records))
    except OSError as error:
        raise ResourceError("the CSV cannot be written", errno=error.errno or 0, path=str(options.csv)) from error


def _plot(where: str, facts: Facts, target: str, rows: Sequence[Row]) -> None:
    from vq.bench.curves import panels_of, varying

    fixed = rows[0].settings.words(but=varying(rows))
    title = f"{rows[0].measure} of {target}" + (f" ({fixed})" if fixed else "")
    distances = [row.distance for row in rows if row.distance is not None]
    tags = ", ".join(dict.fromkeys(row.tag for row in rows))
    apart = f"cores {tags}" + (f", {min(distances):.0f} to {max(distances):.0f} ns" if distances else "")
    draw(where, panels_of(rows), title, [*facts.lines(), apart])


def draw(where: str, panels: Sequence[Panel], title: str, caption: Sequence[str]) -> None:
    """Draw panels into a file, or into the terminal."""
    from vq.bench.plot import TERMINAL, save_plot

    if where != TERMINAL:
        save_plot(where, panels, title, caption)
        return
    from vq.bench.plot_terminal import draw_plot

    with check_output():
        print(draw_plot(panels, title, caption, colours=sys.stdout.isatty()), end="", flush=True)
