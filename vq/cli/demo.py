"""``vq demo``: the main job without a virtual machine, every packet verified."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vq.cli.arguments import parse_cpus, positive_seconds
from vq.stats import encode

if TYPE_CHECKING:
    from vq.demo import DemoResult

__all__ = ["demo"]


def demo(
    *,
    size: Annotated[int, Parameter(help="Bytes of a packet, 64 to 65535.")] = 64,
    duration: Annotated[float, Parameter(help="Seconds.")] = 5.0,
    layout: Annotated[Literal["split"], Parameter(help="Ring layout.")] = "split",
    cpu: Annotated[str | None, Parameter(help="Processors of the engine and of the driver, such as 0,1.")] = None,
    json: Annotated[bool, Parameter(negative="", help="Report as JSON, one object a line.")] = False,
) -> int:
    """Run our driver and the engine in one process, through a real socket and shared memory.

    Each packet carries a sequence number and a checksum and is verified on its return; the exit code is 1 if one was
    lost, doubled, changed or came back in another order.
    """
    positive_seconds("--duration", duration)
    cpus = parse_cpus(cpu)
    # As SIGINT: the run ends in order, and its socket goes away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from vq.demo import run_demo

    with _progress(json, duration) as progress:
        result = run_demo(size=size, duration=duration, layout=layout, cpus=cpus, on_progress=progress)
    if json:
        _json(result, final=True)
    else:
        _print_summary(result)
    return 0 if result.ok else 1


def _rates(result: DemoResult) -> tuple[float, float]:
    """Mpps and Gbit/s of verified packets."""
    return result.rate / 1e6, result.rate * result.size * 8 / 1e9


def _json(result: DemoResult, *, final: bool = False) -> None:
    sys.stdout.buffer.write(encode(asdict(result), final=final))
    sys.stdout.buffer.flush()


@contextmanager
def _progress(json: bool, duration: float) -> Iterator[Callable[[DemoResult], None]]:
    """Give what reports a run under way: JSON lines, or a line on a terminal that is gone afterwards."""
    if json:
        yield _json
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("starting", total=duration)

        def show(result: DemoResult) -> None:
            mpps, gbits = _rates(result)
            bar.update(task, completed=result.seconds, description=f"{mpps:6.2f} Mpps {gbits:6.2f} Gbit/s verified")

        yield show


def _print_summary(result: DemoResult) -> None:
    from rich.console import Console
    from rich.table import Table

    mpps, gbits = _rates(result)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "packets verified": f"{result.packets:,}",
        "bytes": f"{result.bytes:,}",
        "Mpps": f"{mpps:.2f}",
        "Gbit/s": f"{gbits:.2f}",
        **{name: f"{getattr(result, name):,}" for name in ("lost", "duplicated", "reordered", "changed")},
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(f"vq demo: {result.layout} ring, {result.size} bytes, {result.seconds:.1f} s", highlight=False)
    console.print(table)
    if result.ok:
        console.print("every packet came back once, in order and unchanged", style="green")
    else:
        console.print("not every packet came back once, in order and unchanged", style="bold red")
