"""``vq bench tune``: settings for this machine, against the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Parameter

from vq.bench.settings import Settings, parse_axes, points
from vq.cli.arguments import Whole, parse_cpus, positive_seconds
from vq.cli.bench_options import Output, check_repeat
from vq.cli.bench_report import Stop, print_table, progress, save_csv
from vq.cli.output import check_output, write_json
from vq.cli.signals import ending_signals
from vq.stats import encode

if TYPE_CHECKING:
    from vq.bench.facts import Facts
    from vq.bench.tune import Refused, Trial, Verdict

__all__ = ["tune"]

USUAL: Final = ("poll=busy", "sub_burst=8,32", "ring=128,512,1024", "layout=packed", "queues=2")
MANY: Final = ("sub_burst", "queues")  # nothing to one packet under way
WRONG: Final = "not every packet came back once, in order and unchanged"
COLOURS: Final = {"better": "green", "worse": "red", "too few pairs": "dim"}
USUAL_PAIRS: Final = 5


def tune(
    *axes: Annotated[
        str, Parameter(name="AXIS=VALUES", help=f"What to try, one setting at a time. Default: {' '.join(USUAL)}.")
    ],
    size: Annotated[Whole, Parameter(help="Bytes of a packet.")] = 64,
    measure: Annotated[
        Literal["throughput", "latency"], Parameter(help="What is to be better: packets a second, or p99.")
    ] = "throughput",
    cpu: Annotated[
        str | None, Parameter(help="Processors of the workers, and last the driver's, such as 0,1. Default: first two.")
    ] = None,
    seconds: Annotated[float, Parameter(help="Counted seconds of a run.")] = 0.4,
    repeat: Annotated[Whole, Parameter(help="Pairs of each try; a verdict takes 3.")] = USUAL_PAIRS,
    output: Output | None = None,
) -> int:
    """Try settings against the defaults of vq pump (adaptive polling, a ring of 256), and propose what is better.

    Each try is paired with the defaults beside it; the defaults are also measured against themselves, and only what is
    beyond that noise in every pair is called better, of three or more. At the end all that is better is tried together.
    """
    from vq.bench.settings import AXES

    output = output or Output()
    output.check()
    positive_seconds("--seconds", seconds)
    check_repeat(repeat)
    cpus = parse_cpus(cpu)
    usual = [text for text in USUAL if measure == "throughput" or not text.startswith(MANY)]
    asked = parse_axes(axes or usual)
    (base,) = points(Settings(size=int(AXES["size"].read(str(size))), poll="adaptive"), {})
    stop = Stop()
    with ending_signals(stop):
        from vq.bench.facts import command_line, gather
        from vq.bench.target import Places, Target
        from vq.bench.tune import Trial, combine, how_to_set, judge, make_tries, run_trials

        tries = make_tries(base, asked)
        target = Target(None, Places.choose(cpus))
        facts = gather(command_line())
        trials: list[Trial] = []
        refused: list[Refused] = []
        with progress((len(tries) + 2) * repeat, quiet=output.json) as step:

            def follow(more: Sequence[tuple[str, Settings]]) -> None:
                found = run_trials(target, base, more, measure, seconds=seconds, repeat=repeat, ended=stop.asked)
                for item in found:
                    if isinstance(item, Trial):
                        trials.append(item)
                        step(f"{item.name}: {item.ratio:.2f}")
                        if output.json:
                            write_json(encode({"trial": asdict(item)}))
                    else:
                        refused.append(item)

            follow(tries)
            _, verdicts = judge(trials)
            best = combine(base, verdicts, list(asked))
            changes = sum(getattr(best, name) != getattr(base, name) for name in asked)
            if changes > 1 and not stop.asked():
                follow([("all of these", best)])
        noise, verdicts = judge(trials)
        wrong = list(dict.fromkeys(trial.name for trial in trials if not trial.ok))
        _show(facts, measure, noise, verdicts, refused, how_to_set(base, best), wrong, output, early=stop.asked())
    return stop.code(ok=all(trial.ok for trial in trials), measured=bool(trials))


def _show(
    facts: Facts,
    measure: str,
    noise: float,
    verdicts: Sequence[Verdict],
    refused: Sequence[Refused],
    proposal: Sequence[str],
    wrong: Sequence[str],
    output: Output,
    *,
    early: bool,
) -> None:
    flat = [{"try": v.name, **{k: x for k, x in asdict(v).items() if k not in ("name", "settings")}} for v in verdicts]
    save_csv(output, [{**record, "measure": measure, "noise": noise, **asdict(facts)} for record in flat])
    if output.json:
        record: dict[str, Any] = {"facts": asdict(facts), "measure": measure, "noise": noise}
        record |= {"verdicts": [asdict(v) for v in verdicts], "refused": [asdict(r) for r in refused]}
        write_json(encode({**record, "proposal": list(proposal), "wrong": list(wrong)}, final=True))
        return
    if not verdicts:
        with check_output():
            print("ended before a try was done", flush=True)
        return
    from rich.table import Table

    from vq.bench.tune import FEW, PAIRS_LEAST

    table = Table(title=f"{measure}: how many times better than the defaults", title_justify="left")
    for name in ("try", "better by", "min-max", "figure", "pairs", "verdict"):
        table.add_column(name, justify="left" if name in ("try", "verdict") else "right", no_wrap=True)
    for v in verdicts:
        figure = f"p99 {v.tried / 1000:.2f} µs" if measure == "latency" else f"{v.tried / 1e6:.2f} Mpps"
        spread = f"{v.low - 1:+.0%} to {v.high - 1:+.0%}"
        style = COLOURS.get(v.verdict, "")
        table.add_row(v.name, f"{v.ratio - 1:+.0%}", spread, figure, str(v.trials), v.verdict, style=style)
    lines = [(f"noise: the defaults against themselves differ by up to {noise:.0%}", "")]
    lines += [(f"{item.name} was not tried: {item.why}", "yellow") for item in refused]
    few = [v.name for v in verdicts if v.verdict == FEW]
    if few:
        lines.append((f"{FEW} for a verdict: take --repeat {PAIRS_LEAST} or more, {USUAL_PAIRS} by default", "yellow"))
    if proposal:
        lines += [("propose:", "bold"), *((f"  {line}", "green") for line in proposal)]
    elif len(few) < len(verdicts):
        lines.append(("propose: keep the defaults; nothing was better beyond the noise", "bold"))
    lines += [(f"{WRONG}, in pairs of: {', '.join(wrong)}", "bold red")] if wrong else []
    lines += [("ended early: fewer pairs than asked for", "yellow")] if early else []
    print_table(table, [*lines, *((line, "dim") for line in facts.lines())], ("pairs", "figure", "min-max"))
