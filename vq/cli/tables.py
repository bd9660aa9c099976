"""Snapshots as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vq.cli.lines import plain_lines, scaled, short
from vq.queue_stats import QueueWork, queue_works
from vq.stats import flows, loads, queue_words

__all__ = ["pump_view"]

TABLE_COLUMNS: Final = 90  # of a terminal; on a narrower one the columns of the table would be folded into each other
WIDE_COLUMNS: Final = 105  # and from here on a queue needs one line only
FRAME_LINES: Final = 14  # of the live view without its rows: titles, headings, frames, workers
QUEUES_LEAST: Final = 2  # are shown on the lowest of terminals
BARS: Final = "▁▂▃▄▅▆▇█"


def pump_view(
    before: Mapping[str, Any] | None,
    now: Mapping[str, Any],
    *,
    width: int,
    height: int | None = None,
    bars: bool = True,
    final: bool = False,
) -> RenderableType:
    """Ports with rates and drops, then what queues cost, then queues that do not run, then workers.

    Parameters
    ----------
    before, now
        Two snapshots; without the first one rates are since the start.
    width
        Columns of the terminal.
    height
        Its lines: the busiest queues are shown that fit. None: all of them.
    bars
        Whether its encoding has the characters of a histogram.
    final
        Whether it is the report of the whole run.
    """
    title = f"vq pump, {now['uptime']:.0f} s" + (" in all" if final else "")
    workers = []
    for number, load in enumerate(loads(before, now)):
        where = "" if load.cpu is None else f" on cpu {load.cpu}"
        workers.append(f"worker {number}{where}: {load.busy:.0%} busy while awake, {load.sleep_rate:.0f} sleeps/s")
    last = Text("; ".join(workers))
    if width < TABLE_COLUMNS:
        return Group(Text(title), *map(Text, plain_lines(before, now, everything=final)), last)
    ports = _table(before, now, title)
    works = queue_works(before, now)
    shown = works if height is None else _busiest(works, height - FRAME_LINES - ports.row_count)
    parts: list[RenderableType] = [ports]
    if shown:
        parts.append(_queue_table(shown, wide=width >= WIDE_COLUMNS, bars=bars))
    if len(shown) < len(works):
        parts.append(Text(f"and {len(works) - len(shown)} queues that moved less", style="dim"))
    for name, port in now["ports"].items():
        parts += [Text(f"{name} {words}", style="yellow") for words in queue_words(port)]
    return Group(*parts, last)


def _busiest(works: Sequence[QueueWork], most: int) -> Sequence[QueueWork]:
    """Those that moved most packets, in the order in which they came."""
    ranked = sorted(range(len(works)), key=lambda i: works[i].packets, reverse=True)
    return [works[i] for i in sorted(ranked[: max(most, QUEUES_LEAST)])]


def _queue_table(works: Sequence[QueueWork], *, wide: bool, bars: bool) -> Table:
    table = Table(title="queues", title_justify="left")
    table.add_column("port", overflow="fold", min_width=8)
    table.add_column("queue", no_wrap=True)
    table.add_column("ring")
    bars &= wide
    between = " " if wide else "\n"
    batch = "batch" if bars else "batch,\nlargest"
    for name in ("cycles\n/packet", batch, "empty\npolls/s", "calls\n/s", "suppressed\n/s"):
        table.add_column(name, justify="right", no_wrap=True)
    port = None
    for work in works:
        table.add_row(
            Text(work.port if work.port != port else ""),
            work.queue,
            work.ring.replace(" ", between),
            "" if work.cycles is None else f"{work.cycles:,.1f}",
            f"{_histogram(work.batches)} {work.median:>5}" if bars else _in_words(work).replace(" ", between),
            "" if work.empty_rate is None else short(work.empty_rate),
            short(work.call_rate),
            short(work.suppressed_rate),
            style="" if work.packets else "dim",
        )
        port = work.port
    return table


def _in_words(work: QueueWork) -> str:
    return ", ".join(dict.fromkeys(size for size in (work.median, work.largest) if size))


def _histogram(counts: Sequence[int]) -> str:
    """A bar for each size, a dot where there was none; the tallest stands for the most frequent size."""
    most = max(counts)
    return "".join(BARS[(count * len(BARS) - 1) // most] if count else "·" for count in counts)


def _table(before: Mapping[str, Any] | None, now: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("port", overflow="fold", min_width=8)
    table.add_column("state", no_wrap=True)
    table.add_column("direction", no_wrap=True)
    for name in ("packets/s", "bits/s", "packets"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("dropped", overflow="fold", min_width=7)
    port = None
    for flow in flows(before, now):
        table.add_row(
            *((Text(flow.port), flow.state) if flow.port != port else ("", "")),
            flow.direction,
            scaled(flow.packet_rate, "pps"),
            scaled(flow.bit_rate, "bit/s"),
            f"{flow.packets:,}",
            Text(flow.drops, style="red"),
        )
        port = flow.port
    return table
