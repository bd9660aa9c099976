"""Snapshots as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vq.stats import flows, loads, queue_words

__all__ = ["pump_view"]


def pump_view(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> RenderableType:
    """Ports with rates and drops, then queues that do not run, then workers.

    Parameters
    ----------
    before, now
        Two snapshots; without the first one rates are since the start.
    """
    table = Table(title=f"vq pump, {now['uptime']:.0f} s", title_justify="left")
    for name in ("port", "state", "direction"):
        table.add_column(name, overflow="fold")
    for name in ("Mpps", "Gbit/s", "packets"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("dropped", overflow="fold")
    last = None
    for flow in flows(before, now):
        table.add_row(
            *((Text(flow.port), flow.state) if flow.port != last else ("", "")),
            flow.direction,
            f"{flow.packet_rate / 1e6:.3f}",
            f"{flow.bit_rate / 1e9:.3f}",
            f"{flow.packets:,}",
            Text(flow.drops, style="red"),
        )
        last = flow.port
    parts: list[RenderableType] = [table]
    for name, port in now["ports"].items():
        parts += [Text(f"{name} {words}", style="yellow") for words in queue_words(port)]
    workers = []
    for number, load in enumerate(loads(before, now)):
        where = "" if load.cpu is None else f" on cpu {load.cpu}"
        workers.append(f"worker {number}{where}: {load.busy:.0%} busy while awake, {load.sleep_rate:.0f} sleeps/s")
    parts.append(Text("; ".join(workers)))
    return Group(*parts)
