"""Snapshots as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vq.cli.lines import plain_lines, scaled
from vq.stats import flows, loads, queue_words

__all__ = ["pump_view"]

TABLE_COLUMNS: Final = 90  # of a terminal; on a narrower one the columns of the table would be folded into each other


def pump_view(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], *, width: int, final: bool = False
) -> RenderableType:
    """Ports with rates and drops, then queues that do not run, then workers.

    Parameters
    ----------
    before, now
        Two snapshots; without the first one rates are since the start.
    width
        Columns of the terminal.
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
    parts: list[RenderableType] = [_table(before, now, title)]
    for name, port in now["ports"].items():
        parts += [Text(f"{name} {words}", style="yellow") for words in queue_words(port)]
    return Group(*parts, last)


def _table(before: Mapping[str, Any] | None, now: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("port", overflow="fold", min_width=12)
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
