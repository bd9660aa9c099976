"""``vq bench``: throughput and latency, sweeps, peers side by side, and settings for this machine."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import App, Parameter

from vq.bench.cells import DIRECTIONS
from vq.bench.settings import AXES, Settings, parse_axes, parse_axis, points
from vq.cli.bench_blk import BLK_EPILOGUE, blk_bench
from vq.cli.bench_options import Options
from vq.cli.bench_peers import peers
from vq.cli.bench_report import Stop, print_rows, progress, run_line
from vq.cli.bench_tune import tune
from vq.cli.help_text import listing, paragraphs
from vq.cli.output import write_json
from vq.cli.signals import ending_signals
from vq.errors import ConnectionClosed, UsageError
from vq.stats import encode

if TYPE_CHECKING:
    from vq.bench.measure import Run

__all__ = ["bench_app"]

# One line a paragraph: the terminal wraps them.
HELP: Final = """\
Measure a back-end with our own driver, every packet verified: without COMMAND its throughput over packet sizes, in \
less than half a minute.

The back-end is our engine in this process, or with --socket whoever listens there and echoes. Back-end and driver \
have a processor each; how far these are apart is measured around each run, and only runs of one tag (near, far) are \
put together. SIGINT (Ctrl-C) ends it early with what was measured until then.
"""
EPILOGUE: Final = """\
AXIS=VALUES is a setting with values, or a range whose numbers double: size=64,1518 or ring=64..4096. Several axes \
make every combination; {plot}.

{axes}

{more}What to make of the figures: docs/tuning.md.
"""
TUNE_EPILOGUE: Final = """\
AXIS=VALUES is a setting with the values to try, or a range whose numbers double: poll=busy or ring=64..1024. The \
default is not tried again.

{axes}

What to make of the figures: docs/tuning.md.
"""
PEERS_EPILOGUE: Final = """\
A cell is DIRECTION-LAYOUT-SIZE, such as io-split-64 or sink-packed-1518; DIRECTION is the way of a packet:

{directions}

LAYOUT is that of the rings, split or packed; SIZE is bytes of a packet, 64 to 1518. What to make of the figures: \
docs/tuning.md.
"""
MORE: Final = """\
Options of single commands: sweep --measure throughput|latency; peers --cells, --front-args, --busy-cycles, --settle; \
blk --peer, --peer-options; \
tune --size, --measure; see "vq bench COMMAND --help". """
SIZES: Final = "size=64,128,256,512,1024,1518,4096,9000"
LATENCIES: Final = ("pause=0,200", "poll=busy,adaptive", "driver=busy,sleep")
LATENCY_AXES: Final = (
    "size", "ring", "layout", "poll", "event_idx", "mergeable", "in_order", "log", "sub_burst", "program", "driver",
    "pause",
)  # fmt: skip
UNTUNED: Final = {"size", "pause", "log", "program"}  # what is measured, not how it is set
PARTS: Final = ("throughput", "latency", "sweep", "peers", "tune", "blk")
AXIS: Final = "AXIS=VALUES"


def bench_app() -> App:
    """Make the command with its parts."""
    app = App(
        name="bench",
        help=HELP,
        help_epilogue=_epilogue(AXES, more=MORE),
        usage="Usage: vq bench [COMMAND] [AXIS=VALUES...] [OPTIONS]",
    )
    app.default(throughput)
    for command, words, epilogue in (
        (throughput, "[AXIS=VALUES...] ", _epilogue(set(AXES) - {"pause"})),
        (latency, "[AXIS=VALUES...] ", _epilogue(LATENCY_AXES, plot="each is a line of a plot")),
        (sweep, "AXIS=VALUES... ", _epilogue(AXES)),
        (peers, "", PEERS_EPILOGUE.format(directions=listing({n: d.help for n, d in DIRECTIONS.items()}))),
        (tune, "[AXIS=VALUES...] ", TUNE_EPILOGUE.format(axes=_describe(set(AXES) - UNTUNED))),
    ):
        usage = f"Usage: vq bench {command.__name__} {words}[OPTIONS]"
        app.command(command, usage=usage, help=paragraphs(command.__doc__), help_epilogue=epilogue)
    usage = "Usage: vq bench blk [AXIS=VALUES...] [OPTIONS]"
    app.command(blk_bench, name="blk", usage=usage, help=paragraphs(blk_bench.__doc__), help_epilogue=BLK_EPILOGUE)
    return app


def _epilogue(names: Container[str], *, more: str = "", plot: str = "the first one is the x axis of a plot") -> str:
    return EPILOGUE.format(axes=_describe(names), more=more, plot=plot)


def _describe(names: Container[str]) -> str:
    """These axes for people."""
    axes = [axis for axis in AXES.values() if axis.name in names]
    return listing({axis.name: axis.help + (f": {', '.join(axis.choices)}" if axis.choices else "") for axis in axes})


def throughput(
    *axes: Annotated[str, Parameter(name=AXIS, help=f"What to vary; see below. Default: {SIZES}.")],
    options: Options | None = None,
) -> int:
    """Packets a second over packet sizes, as many under way as the ring holds."""
    near = difflib.get_close_matches(axes[0], PARTS, n=1, cutoff=0.75) if axes and "=" not in axes[0] else []
    if near:
        raise UsageError(f"{axes[0]!r} is no part of vq bench; did you mean vq bench {near[0]}?")
    return _run(_read([SIZES], axes), "throughput", options or Options())


def latency(
    *axes: Annotated[str, Parameter(name=AXIS, help=f"What to vary; see below. Default: {' '.join(LATENCIES)}.")],
    options: Options | None = None,
) -> int:
    """Round trips of one packet under way: p50, p99, p99.9; also with pauses in which the back-end falls asleep."""
    options = options or Options()
    # How another back-end waits is not ours to say.
    usual = [text for text in LATENCIES if options.socket is None or not text.startswith("poll=")]
    return _run(_read(usual, axes), "latency", options)


def sweep(
    *axes: Annotated[str, Parameter(name=AXIS, help="What to vary; see below.")],
    measure: Annotated[Literal["throughput", "latency"], Parameter(help="What to measure.")] = "throughput",
    options: Options | None = None,
) -> int:
    """Either measurement over any settings."""
    if not axes:
        raise UsageError(f"nothing to vary; write AXIS=VALUES, such as ring=64..4096; AXIS is {', '.join(AXES)}")
    return _run(_read([], axes), measure, options or Options())


def _read(usual: Sequence[str], given: Sequence[str]) -> dict[str, list[int | str]]:
    """The axes that were given, over those that are usual."""
    axes = parse_axes(given)
    for text in usual:
        name, values = parse_axis(text)
        axes.setdefault(name, values)
    # What was given once only is no axis but a setting, and must not be taken for the x axis.
    return dict(sorted(axes.items(), key=lambda item: len(item[1]) == 1))


def _check(found: Sequence[Settings], kind: str, options: Options) -> None:
    ours, usual = ("poll", "sub_burst", "program"), Settings()
    for name in ours if options.socket is not None else ():
        if any(getattr(point, name) != getattr(usual, name) for point in found):
            raise UsageError(f"{name}= is for our own back-end; another one is told on its own command line")
    for name in {point.program for point in found} - {"none"}:
        from vq.program import load_program

        load_program(name)  # what cannot be found is told before anything is measured
    if kind == "throughput" and any(point.pause for point in found):
        raise UsageError("pause= is for latencies only; use vq bench latency, or sweep --measure latency")
    if kind == "latency":
        for point in found:
            if point.queues != 1 or point.window not in (0, 1) or point.descriptors != "1" or point.size > 9216:
                raise UsageError(
                    f"{point.words()}: latency is that of one packet of up to 9216 bytes in one descriptor and one"
                    " pair; leave out what differs"
                )


@contextmanager
def _named(target: str) -> Iterator[None]:
    """Say who closed the connection: several back-ends may be about."""
    try:
        yield
    except ConnectionClosed as error:
        raise ConnectionClosed(f"{target}: {error}") from error


def _run(axes: Mapping[str, Sequence[int | str]], kind: str, options: Options) -> int:
    options.check()
    found = points(Settings(), axes)
    _check(found, kind, options)
    cpus = options.cpus()
    stop = Stop()
    runs: list[Run] = []
    with ending_signals(stop):
        from vq.bench.facts import command_line, gather
        from vq.bench.series import run_series
        from vq.bench.summary import rows_of
        from vq.bench.target import Places, Target

        target = Target(options.socket, Places.choose(cpus))
        facts = gather(command_line())
        with progress(len(found) * options.repeat, quiet=options.json) as step:
            series = run_series(
                target, found, kind, seconds=options.seconds, repeat=options.repeat, ended=stop.asked
            )
            with _named(target.name):
                for run in series:
                    runs.append(run)
                    step(run_line(run))
                    if options.json:
                        from vq.bench.records import run_record

                        write_json(encode(run_record(run)))
        rows = rows_of(runs)
        print_rows(facts, target.name, rows, runs, options, early=stop.asked())
    return stop.code(ok=all(run.ok for run in runs), measured=bool(runs))
