"""``vq bench peers``: DPDK's back-end and ours side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from vq.cli.arguments import Whole, parse_cpus
from vq.cli.bench_options import Output, check_repeat
from vq.cli.bench_report import Stop, print_table, progress, save_csv
from vq.cli.output import check_output, write_json
from vq.cli.signals import ending_signals
from vq.errors import ResourceError, UsageError
from vq.stats import encode

if TYPE_CHECKING:
    from vq.bench.cells import Cell
    from vq.bench.facts import Facts
    from vq.bench.peers import Pair, PeerRow

__all__ = ["peer_records", "peers"]


def peers(
    *,
    cells: Annotated[
        str | None,
        Parameter(help="What to measure, with commas, such as io-split-64; see below. Default: all."),
    ] = None,
    repeat: Annotated[Whole, Parameter(help="Pairs of each cell.")] = 6,
    seconds: Annotated[Whole, Parameter(help="Counted seconds of a run.")] = 2,
    settle: Annotated[Whole, Parameter(help="Seconds at the beginning of a run that do not count.")] = 1,
    cpu: Annotated[str | None, Parameter(help="Back-end's processor, front-end's. Default: first two.")] = None,
    front_args: Annotated[
        str, Parameter(help="More arguments of net_virtio_user, such as mrg_rxbuf=0.", show_default=False)
    ] = "",
    busy_cycles: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Also the back-ends' busy cycles a packet (testpmd --record-core-cycles).",
        ),
    ] = False,
    program: Annotated[
        str | None, Parameter(help="A program in our back-end, as vq pump --program; DPDK's has none.")
    ] = None,
    output: Output | None = None,
) -> int:
    """DPDK's net_vhost and vq pump under the same front-end, DPDK's virtio-user, in alternated pairs.

    Rates are read at the front-end. The cores' distance is measured before and after each run, and only pairs of one
    tag (near, far) are put together. Where it changes every few seconds, take short runs and many pairs. Needs testpmd,
    root and 512 free hugepages of 2 MiB.
    """
    from vq.bench.cells import parse_cells

    output = output or Output()
    output.check()
    wanted = parse_cells(cells)
    check_repeat(repeat)
    for name, value, low, high in (("--seconds", seconds, 1, 3600), ("--settle", settle, 0, 60)):
        if not low <= value <= high:
            raise UsageError(f"{name} {value}: write {low} to {high} seconds")
    cpus = _two(parse_cpus(cpu))
    if program is not None:
        from vq.program import load_program

        load_program(program)
    stop = Stop()
    pairs: list[Pair] = []
    problems: list[tuple[Cell, ResourceError]] = []
    with ending_signals(stop):
        from vq.bench.facts import command_line, gather
        from vq.bench.peers import Rig, peer_rows, run_pairs

        facts = gather(command_line())
        rig = Rig(cpus, seconds, settle, front_args, busy_cycles, program or "")
        with progress(len(wanted) * repeat, quiet=output.json) as step:
            for pair in run_pairs(rig, wanted, repeat, stop.asked, lambda cell, error: problems.append((cell, error))):
                pairs.append(pair)
                step(f"{pair.cell}: {pair.dpdk / 1e6:.1f} / {pair.vq / 1e6:.1f} Mpps, {pair.tag}")
                if output.json:
                    write_json(encode({"pair": {**asdict(pair), "ratio": pair.ratio}}))
        _show(facts, peer_rows(pairs), pairs, problems, output, early=stop.asked())
    if problems and not pairs:
        told = _failures(problems)
        raise ResourceError(told[0] if len(told) == 1 else "nothing was measured: every cell failed, as told above")
    return stop.code(ok=not problems, measured=bool(pairs))


def _two(cpus: Sequence[int] | None) -> tuple[int, int]:
    if cpus is None:
        import os

        cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) != 2:
        raise UsageError(f"--cpu {','.join(map(str, cpus))}: two are needed, the back-end's and the front-end's")
    return cpus[0], cpus[1]


def _failures(problems: Sequence[tuple[Cell, ResourceError]]) -> list[str]:
    """What went wrong, each once: a cell often fails in all its pairs for the same reason."""
    return list(dict.fromkeys(f"{cell} failed: {error}" for cell, error in problems))


def peer_records(facts: Facts, rows: Sequence[PeerRow]) -> list[dict[str, Any]]:
    """Rows for a CSV; the version has another name than in `Facts`, since a row has a rate of that name."""
    more = {"vq_version" if name == "vq" else name: value for name, value in asdict(facts).items()}
    return [{**asdict(row), **more} for row in rows]


def _show(
    facts: Facts,
    rows: Sequence[PeerRow],
    pairs: Sequence[Pair],
    problems: Sequence[tuple[Cell, ResourceError]],
    output: Output,
    *,
    early: bool,
) -> None:
    failures = _failures(problems)
    lines = [(line, "red") for line in failures]
    lines += _across(rows, pairs)
    save_csv(output, peer_records(facts, rows))
    if output.json:
        record = {
            "facts": asdict(facts),
            "rows": [asdict(row) for row in rows],
            "pairs": [{**asdict(pair), "ratio": pair.ratio} for pair in pairs],
            "problems": [f"{cell}: {error}" for cell, error in problems],
        }
        write_json(encode(record, final=True))
        return
    if not pairs and len(failures) == 1:
        return  # the error at the end of the program tells it
    if not rows:
        with check_output():
            print("\n".join(text for text, _ in lines) or "ended before a pair was done", flush=True)
        return
    lines += [("ended early, with what was measured until then", "yellow")] if early else []
    lines += [(line, "dim") for line in facts.lines()]
    spare = ["pairs", "min-max"]
    if len({row.tag for row in rows}) == 1:  # else it tells the two rows of a cell apart
        spare.append("cores")
    print_table(_table(rows), lines, spare)


def _across(rows: Sequence[PeerRow], pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Lines about the pairs that count nowhere."""
    from vq.bench.distance import FAR, NEAR

    across = [pair for pair in pairs if pair.tag not in (NEAR, FAR)]
    counted = {row.cell for row in rows}
    missing = dict.fromkeys(pair.cell for pair in across if pair.cell not in counted)
    lines = [(f"{cell}: no pair inside one tag; run it again", "yellow") for cell in missing]
    if across:
        what = f"not counted, {len(across)} of {len(pairs)} pairs: the distance changed (before-after, DPDK / vq)"
        lines.append((what, "yellow"))
    for pair in across:
        a, b, c, d = pair.distances
        rates = f"{pair.dpdk / 1e6:.2f} / {pair.vq / 1e6:.2f} Mpps, {pair.ratio:.2f}"
        lines.append((f"  {pair.cell}: {rates}, {a:.0f}-{b:.0f} / {c:.0f}-{d:.0f} ns", "dim"))
    return lines


def _table(rows: Sequence[PeerRow]) -> Any:
    from rich.table import Table

    table = Table(title="packets a second at the front-end, DPDK's back-end and ours", title_justify="left")
    cycles = any(row.dpdk_cycles is not None or row.vq_cycles is not None for row in rows)
    # In two lines, so that a terminal of 80 columns has room for all that is left without what is spare.
    names = ["cell", "cores", "DPDK\nMpps", "vq\nMpps", "vq /\nDPDK", "min-max", "pairs"]
    names += ["DPDK\ncycles", "vq\ncycles"] if cycles else []
    trip = any(row.cell.startswith("rtt") for row in rows)
    names += ["round trip ns,\nDPDK / vq"] if trip else []
    for name in names:
        table.add_column(name, justify="left" if name == "cell" else "right", no_wrap=True)
    for row in rows:
        words = [row.cell, f"{row.tag} {row.distance:.0f} ns", f"{row.dpdk / 1e6:.2f}", f"{row.vq / 1e6:.2f}"]
        words += [f"{row.ratio:.2f}", f"{row.low:.2f}-{row.high:.2f}", str(row.pairs)]
        words += [_cycles(row.dpdk_cycles), _cycles(row.vq_cycles)] if cycles else []
        words += [f"{1e9 / row.dpdk:.0f} / {1e9 / row.vq:.0f}" if row.cell.startswith("rtt") else ""] if trip else []
        table.add_row(*words)
    return table


def _cycles(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
