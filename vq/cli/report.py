"""How a running pump reports: a live table on a terminal, plain lines, or JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vq.cli.lines import plain_lines
from vq.cli.output import check_output, write_json
from vq.stats import encode

__all__ = ["Report", "reports"]

Snapshot = dict[str, Any]


class Report:
    """Shows snapshots, each with the rates since the one before it.

    Parameters
    ----------
    show
        Gets the snapshot before (None: since the start), the present one, and whether it is the last.
    """

    def __init__(self, show: Callable[[Snapshot | None, Snapshot, bool], None]) -> None:
        self._show = show
        self._before: Snapshot | None = None

    def interval(self, now: Snapshot) -> None:
        """Report an interval."""
        self._show(self._before, now, False)
        self._before = now

    def final(self, now: Snapshot) -> None:
        """Report the end, with the rates of the whole run."""
        self._show(None, now, True)


def _json(before: Snapshot | None, now: Snapshot, final: bool) -> None:
    write_json(encode(now, final=final))


def _plain(before: Snapshot | None, now: Snapshot, final: bool) -> None:
    lines = plain_lines(before, now, everything=final)
    with check_output():
        print("\n".join(["in all:", *lines] if final else lines), flush=True)


@contextmanager
def reports(json: bool) -> Iterator[Report]:
    """Choose the form: `json` if asked for, a live table on a terminal, plain lines elsewhere."""
    if json:
        yield Report(_json)
    elif not sys.stdout.isatty():
        yield Report(_plain)
    else:
        from rich.live import Live

        from vq.cli.tables import pump_view

        with Live(auto_refresh=False) as live:

            def show(before: Snapshot | None, now: Snapshot, final: bool) -> None:
                console = live.console
                view = pump_view(
                    before,
                    now,
                    width=console.width,
                    height=None if final else console.height,
                    bars=not console.options.ascii_only,
                    final=final,
                )
                live.update(view, refresh=True)

            yield Report(show)
