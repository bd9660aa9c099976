"""``vq bench blk``: requests a second of a block back-end, ours or another's, or both side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from vq.bench.blk_settings import BLK_AXES, BlkSettings, check_blk_settings
from vq.bench.settings import combinations, parse_axes
from vq.cli.bench_options import BlkOptions
from vq.cli.bench_report import Stop, draw, print_table, progress, save_csv
from vq.cli.help_text import listing
from vq.cli.lines import scaled
from vq.cli.output import check_output, write_json
from vq.cli.signals import ending_signals
from vq.errors import ResourceError, UsageError
from vq.stats import encode

if TYPE_CHECKING:
    from rich.table import Table

    from vq.bench.blk_backends import BlkBackend
    from vq.bench.blk_measure import BlkRow, BlkRun, Ratio
    from vq.bench.facts import Facts

__all__ = ["BLK_EPILOGUE", "blk_bench"]

USUAL: Final = "disk=null,tmpfs"
AXES_HELP: Final = {
    axis.name: axis.help + (f": {', '.join(axis.choices)}" if axis.choices else "") for axis in BLK_AXES.values()
}
SPARE: Final = ("requests", "runs", "wrong", "Gbit/s", "min-max")
BLK_EPILOGUE: Final = f"""\
AXIS=VALUES is a setting with values, or a range whose numbers double: depth=1,32 or depth=1..256. Several axes make \
every combination; the first one is the x axis of a plot.

{listing(AXES_HELP)}

The first 256 MiB of the disk are used. With --socket, writes=N destroys what is there. What to make of the figures: \
docs/blk.md.
"""


def blk_bench(
    *axes: Annotated[str, Parameter(name="AXIS=VALUES", help=f"What to vary; see below. Default: {USUAL}.")],
    options: BlkOptions | None = None,
) -> int:
    """Requests a second of a block device at random places, 4096 bytes each, 32 under way.

    The back-end is vq blk, started for each run, or with --socket whoever listens there; with --peer QEMU's storage
    daemon is measured beside it, and the ratio is that of pairs. All threads of a back-end share one processor, our
    driver has another one.
    """
    options = options or BlkOptions()
    options.check()
    points = _points(axes, options)
    cpus = options.cpus()
    stop = Stop()
    runs: list[BlkRun] = []
    problems: list[tuple[str, Exception]] = []
    with ending_signals(stop):
        from vq.bench.blk_measure import run_blk
        from vq.bench.facts import command_line, gather
        from vq.bench.target import Places

        places = Places.choose(cpus)
        backends = _backends(options, places.workers[0] if places.workers else None)
        facts = gather(command_line())

        def failed(what: str, error: Exception) -> None:
            problems.append((what, error))

        with progress(len(points) * options.repeat * len(backends), quiet=options.json) as step:
            for run in run_blk(
                backends,
                points,
                places,
                seconds=options.seconds,
                repeat=options.repeat,
                ended=stop.asked,
                failed=failed if len(backends) > 1 else None,
            ):
                runs.append(run)
                step(f"{run.backend}: {run.settings.words() or 'defaults'}: {scaled(run.rate, 'requests/s')}")
                if options.json:
                    write_json(encode({"run": {**asdict(run), "ok": run.ok}}))
        _show(facts, [backend.name for backend in backends], runs, problems, options, early=stop.asked())
    if problems and not runs:
        raise ResourceError(f"nothing was measured: {'; '.join(_failures(problems))}")
    return stop.code(ok=all(run.ok for run in runs), measured=bool(runs))


def _points(given: Sequence[str], options: BlkOptions) -> list[BlkSettings]:
    axes = parse_axes(given, BLK_AXES)
    if options.socket is None:
        axes.setdefault("disk", ["null", "tmpfs"])
    elif "disk" in axes or "poll" in axes:
        name = "disk" if "disk" in axes else "poll"
        raise UsageError(f"{name}= is for a back-end that is started here; another one is told on its own command line")
    base = BlkSettings(disk="null" if options.socket is None else "socket")
    axes = dict(sorted(axes.items(), key=lambda item: len(item[1]) == 1))
    return [check_blk_settings(replace(base, **values)) for values in combinations(axes)]


def _backends(options: BlkOptions, cpu: int | None) -> list[BlkBackend]:
    from vq.bench.blk_backends import OwnBlk, SocketBlk, StorageDaemon

    if options.socket is not None:
        return [SocketBlk(options.socket)]
    return [OwnBlk(cpu), *([StorageDaemon(cpu, options.peer_options)] if options.peer is not None else [])]


def _failures(problems: Sequence[tuple[str, Exception]]) -> list[str]:
    """What went wrong, each once."""
    return list(dict.fromkeys(f"{what}: {error}" for what, error in problems))


def _show(
    facts: Facts,
    names: Sequence[str],
    runs: Sequence[BlkRun],
    problems: Sequence[tuple[str, Exception]],
    options: BlkOptions,
    *,
    early: bool,
) -> None:
    from vq.bench.blk_measure import blk_rows, ratios

    rows = blk_rows(runs)
    found = ratios(runs, *names) if len(names) == 2 else []
    if options.json:
        record = {
            "facts": asdict(facts),
            "rows": [asdict(row) for row in rows],
            "ratios": [asdict(ratio) for ratio in found],
            "runs": [{**asdict(run), "ok": run.ok} for run in runs],
            "problems": _failures(problems),
            "ok": bool(runs) and all(run.ok for run in runs),
        }
        write_json(encode(record, final=True))
    elif rows:
        print_table(_table(rows, found, names[0]), _below(facts, rows, problems, early=early), SPARE)
    elif not problems:
        with check_output():
            print("ended before anything was measured", flush=True)
    save_csv(options, [_flat(row, facts) for row in rows])
    if options.plot is not None and rows:
        fixed = rows[0].settings.words(but=_varying(rows))
        title = "requests a second" + (f" ({fixed})" if fixed else "")
        draw(options.plot, [_panel(rows)], title, facts.lines())


def _flat(row: BlkRow, facts: Facts) -> dict[str, Any]:
    record = asdict(row)
    return {**record.pop("settings"), **record, "bits": row.bits, **asdict(facts)}


def _varying(rows: Sequence[BlkRow]) -> list[str]:
    """Names of the settings that differ between rows."""
    return [f.name for f in fields(BlkSettings) if len({getattr(row.settings, f.name) for row in rows}) > 1]


def _table(rows: Sequence[BlkRow], found: Sequence[Ratio], first: str) -> Table:
    from rich.table import Table

    varying = _varying(rows)
    fixed = rows[0].settings.words(but=varying)
    by_point = {(ratio.settings, ratio.tag): ratio for ratio in found}

    def ratio_of(row: BlkRow) -> str:
        ratio = by_point.get((row.settings, row.tag))
        if ratio is None or row.backend != first:
            return ""
        return f"{ratio.ratio:.2f} ({ratio.low:.2f}-{ratio.high:.2f}, {ratio.pairs})"

    columns: dict[str, Callable[[BlkRow], str]] = {name: _setting(name) for name in varying or ["disk"]}
    columns["back-end"] = lambda row: row.backend
    columns["k requests/s"] = lambda row: f"{row.rate / 1e3:.1f}"
    columns["min-max"] = lambda row: f"{row.low / 1e3:.1f}-{row.high / 1e3:.1f}"
    if found:
        columns["ratio (min-max, pairs)"] = ratio_of
    columns["Gbit/s"] = lambda row: f"{row.bits / 1e9:.2f}"
    columns["cores"] = lambda row: row.tag + (f" {row.distance:.0f} ns" if row.distance is not None else "")
    columns["runs"] = lambda row: str(row.runs)
    columns["requests"] = lambda row: f"{row.requests:,}"
    columns["wrong"] = lambda row: f"{row.wrong:,}"
    title = f"requests of {rows[0].settings.block} bytes" if "block" not in varying else "requests"
    table = Table(title=title + (f": {fixed}" if fixed else ""), title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "back-end" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()), style="bold red" if row.wrong else "")
    return table


def _setting(name: str) -> Callable[[BlkRow], str]:
    return lambda row: str(getattr(row.settings, name))


def _below(
    facts: Facts, rows: Sequence[BlkRow], problems: Sequence[tuple[str, Exception]], *, early: bool
) -> list[tuple[str, str]]:
    """Lines under the table."""
    lines = [(line, "red") for line in _failures(problems)]
    if len({row.tag for row in rows}) > 1:
        lines.append(("the cores' distance changed meanwhile: compare rows of one tag only", "yellow"))
    if any(row.wrong for row in rows):
        lines.append(("not every request was done, and right", "bold red"))
    else:
        verified = all(row.settings.verify == "on" for row in rows)
        lines.append((f"every request was done{', and what was read was right' if verified else ''}", "green"))
    lines += [("ended early, with what was measured until then", "yellow")] if early else []
    return lines + [(line, "dim") for line in facts.lines()]


def _panel(rows: Sequence[BlkRow]) -> Any:
    """Rows as curves over the first axis that varies, one for each back-end and combination of the others."""
    from vq.bench.curves import Curve, Panel

    varying = _varying(rows) or ["disk"]
    axis = next(
        (name for row in rows for name in varying if getattr(row.settings, name) != getattr(rows[0].settings, name)),
        varying[0],
    )
    lines: dict[str, list[BlkRow]] = {}
    for row in rows:
        words = [row.backend, *(f"{n} {getattr(row.settings, n)}" for n in varying if n != axis), row.tag]
        lines.setdefault(", ".join(words), []).append(row)
    curves = []
    for label, part in lines.items():
        xs = [str(getattr(row.settings, axis)) for row in part]
        ys, lows, highs = ([getattr(row, of) / 1e3 for row in part] for of in ("rate", "low", "high"))
        curves.append(Curve(label, xs, ys, lows, highs, None))
    unit = BLK_AXES[axis].unit
    xs = list(dict.fromkeys(str(getattr(row.settings, axis)) for row in rows))
    return Panel(f"{axis} ({unit})" if unit else axis, "thousand requests a second", axis, xs, curves)
