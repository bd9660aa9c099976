"""``vq demo``: the main job without a virtual machine, every packet verified."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from vq.cli.arguments import Whole, parse_cpus, positive_seconds
from vq.cli.lines import scaled
from vq.cli.output import check_output, write_json
from vq.cli.signals import Ending, ending_signals
from vq.stats import encode

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vq.demo import DemoResult

__all__ = ["HELP", "demo"]

# One line a paragraph: the terminal wraps them.
HELP: Final = """\
Send numbered packets through a vhost-user socket and shared memory, and check every one.

Our driver and the engine run in one process and know each other only by the socket. Each packet carries a number and \
a checksum and is verified on its return; the exit code is 1 if one was lost, doubled, changed or came back in another \
order. SIGINT (Ctrl-C), SIGTERM and SIGHUP end it early with the result so far, and exit codes 130, 143 and 129.
"""
LOOK_S: Final = 0.1  # between two looks whether a signal came
REPORT_S: Final = 1.0


def demo(
    *,
    size: Annotated[Whole, Parameter(help="Bytes of a packet, 64 to 65535.")] = 64,
    duration: Annotated[float, Parameter(help="End after this many seconds.")] = 5.0,
    layout: Annotated[Literal["split", "packed"], Parameter(help="Ring layout.")] = "split",
    cpu: Annotated[
        str | None, Parameter(help="Processors of the driver and of the engine, such as 0,1. Default: first two.")
    ] = None,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Report as JSON, one object a line.")
    ] = False,
) -> int:
    """Run our driver and the engine in one process, through a real socket and shared memory; see `HELP`."""
    positive_seconds("--duration", duration)
    cpus = parse_cpus(cpu)
    watch = _Watch()
    with ending_signals(watch):
        from vq.demo import run_demo

        with _progress(json, duration) as watch.show:
            try:
                result = run_demo(
                    size=size, duration=duration, layout=layout, cpus=cpus, on_progress=watch.look, interval=LOOK_S
                )
            except _EndedEarly as early:
                result = early.result
    with check_output():
        if json:
            _json(result, final=True)
        else:
            _print_summary(result, early=bool(watch.signal))
    if watch.signal and not _wrong(result):
        return 128 + watch.signal
    return 0 if result.ok else 1


class _EndedEarly(Exception):
    """A signal came; carries what was verified until then."""

    def __init__(self, result: DemoResult) -> None:
        super().__init__()
        self.result = result


class _Watch(Ending):
    """Looks at a run under way: shows it once in a while, and ends it when a signal came."""

    def __init__(self) -> None:
        super().__init__()
        self.show: Callable[[DemoResult], None] = _json
        self._shown = (0, 0.0)  # packets, seconds of the last report

    def look(self, result: DemoResult) -> None:
        if self.signal:
            raise _EndedEarly(replace(result, rate=result.packets / max(result.seconds, 1e-9)))
        packets, seconds = self._shown
        if result.seconds - seconds >= REPORT_S:
            self._shown = (result.packets, result.seconds)
            self.show(replace(result, rate=(result.packets - packets) / (result.seconds - seconds)))


def _wrong(result: DemoResult) -> bool:
    return any((result.lost, result.duplicated, result.reordered, result.changed))


def _rates(result: DemoResult) -> tuple[float, float]:
    """Mpps and Gbit/s of verified packets."""
    return result.rate / 1e6, result.rate * result.size * 8 / 1e9


def _json(result: DemoResult, *, final: bool = False) -> None:
    write_json(encode(asdict(result), final=final))


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
            now = f"now {scaled(result.rate, 'pps')}, {scaled(result.rate * result.size * 8, 'bit/s')}"
            bar.update(task, completed=result.seconds, description=f"{result.packets:,} packets verified, {now}")

        yield show


def _print_summary(result: DemoResult, *, early: bool) -> None:
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
    # Not printed by rich, which takes a reader that went away for exit code 1, here a failed verification.
    with console.capture() as text:
        _print_verdict(console, table, result, early=early)
    print(text.get(), end="", flush=True)


def _print_verdict(console: Console, table: Table, result: DemoResult, *, early: bool) -> None:
    console.print(f"vq demo: {result.layout} ring, {result.size} bytes, {result.seconds:.1f} s", highlight=False)
    console.print(table)
    if early and not _wrong(result):
        console.print("ended early; every packet so far came back once, in order and unchanged", style="yellow")
    elif result.ok:
        console.print("every packet came back once, in order and unchanged", style="green")
    else:
        console.print("not every packet came back once, in order and unchanged", style="bold red")
