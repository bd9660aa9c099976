"""``vq check``: conformance and hostile input, for any back-end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Parameter

from vq.cli.arguments import positive_seconds
from vq.cli.output import check_output, write_json
from vq.cli.signals import Ending, ending_signals
from vq.errors import UsageError
from vq.stats import encode

if TYPE_CHECKING:
    from vq.check.outcome import Result

__all__ = ["HELP", "check"]

# One line a paragraph: the terminal wraps them.
HELP: Final = """\
Check any vhost-user back-end as a front-end sees it: does it keep the protocol, and does it survive one who does not.

SOCKET is where the back-end listens; it should serve nobody else meanwhile. Each check is passed, failed, or skipped \
where the back-end does not offer what it is about; after each hostile one the back-end must still serve a fresh \
connection. The exit code is 1 if a check failed. Back-ends may die of this: use none whose guests you need. A block \
device is read, never written. SIGINT (Ctrl-C), SIGTERM and SIGHUP end it early, and exit codes 130, 143 and 129.
"""
STYLES: Final = {"pass": "green", "fail": "bold red", "skipped": "dim"}
WIDTH_LEAST: Final = 60


def check(
    socket: Annotated[str | None, Parameter(name="SOCKET", show=True, help="Where the back-end listens.")] = None,
    /,
    *,
    type: Annotated[
        Literal["any", "net", "blk"], Parameter(help="What the device is: says which checks apply.")
    ] = "any",
    only: Annotated[
        list[str] | None,
        Parameter(negative="", show_default=False, help="Checks or groups, such as rings.* or hostile; repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None, Parameter(negative="", show_default=False, help="What to leave out, as with --only.")
    ] = None,
    timeout: Annotated[float, Parameter(help="Seconds that any answer may take.")] = 2.0,
    start: Annotated[
        str | None, Parameter(help="Command that runs the back-end; run again when a check has ended it.")
    ] = None,
    list_: Annotated[
        bool, Parameter(name="--list", negative="", show_default=False, help="Only list the checks.")
    ] = False,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Report as JSON, one object a line.")
    ] = False,
) -> int:
    """Check a back-end; see `HELP`."""
    positive_seconds("--timeout", timeout)
    if list_:
        return _list(only or [], skip or [], json=json)
    if socket is None:
        raise UsageError("vq check needs the SOCKET on which the back-end listens")
    stop = _Stop()
    with ending_signals(stop):
        from vq.check import run, select

        total = len(select(only or [], skip or []))
        with _progress(total, json=json) as show, suppress(_EndedEarly):
            run(
                socket, device=type, only=only or [], skip=skip or [], timeout=timeout, start=start,
                on_result=lambda result: stop.note(result, show),
            )  # fmt: skip
    counts = {outcome: sum(result.outcome == outcome for result in stop.results) for outcome in STYLES}
    with check_output():
        if json:
            write_json(encode({**counts, "ok": not counts["fail"]}, final=True))
        else:
            _print(stop.results, counts, socket)
    if counts["fail"]:
        return 1
    return 128 + stop.signal if stop.signal else 0


class _EndedEarly(Exception):
    """A signal came between two checks."""


class _Stop(Ending):
    """Keeps what was found, and ends the run between two checks when a signal came."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Result] = []

    def note(self, result: Result, show: Callable[[Result], None]) -> None:
        self.results.append(result)
        show(result)
        if self.signal:
            raise _EndedEarly


def _record(result: Result) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, str) else value for name, value in asdict(result).items()}


@contextmanager
def _progress(total: int, *, json: bool) -> Iterator[Callable[[Result], None]]:
    """Give what reports a check: JSON lines, or a bar on a terminal that is gone afterwards."""
    if json:
        yield lambda result: write_json(encode(_record(result)))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("checking", total=total)
        yield lambda result: bar.update(task, advance=1, description=result.name)


def _list(only: Sequence[str], skip: Sequence[str], *, json: bool) -> int:
    from vq.check import select

    for row in select(only, skip):
        with check_output():
            if json:
                record = {"name": row.name, "group": str(row.group), "section": row.section, "title": row.title}
                write_json(encode(record | {"type": row.device or "any"}))
            else:
                print(f"{row.name}: {row.title} ({row.section})")
    return 0


def _print(results: Sequence[Result], counts: dict[str, int], socket: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=f"vq check {socket}", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was checked, and the reason", overflow="fold", min_width=WIDTH_LEAST // 2)
    group = None
    for result in results:
        if result.group != group:
            table.add_section()
            group = result.group
        words = Text(f"{result.title}; {result.section}" if result.outcome == "fail" else result.title)
        if result.reason:
            words.append(f"\n{result.reason}", style=STYLES[result.outcome])
        table.add_row(result.name, Text(result.outcome, style=STYLES[result.outcome]), words)
    # Not printed by rich, which takes a reader that went away for exit code 1, here a failed check.
    with console.capture() as text:
        console.print(table)
        style = STYLES["fail"] if counts["fail"] else STYLES["pass"]
        console.print(f"{counts['pass']} passed, {counts['fail']} failed, {counts['skipped']} skipped", style=style)
    print(text.get(), end="", flush=True)
