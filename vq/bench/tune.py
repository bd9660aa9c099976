"""Settings for this machine: what is tried, against the defaults, in alternation, and when a difference counts.

Two things keep noise from being called a gain. The defaults are also measured against themselves: the spread of that is
what this machine makes of no difference at all. And each try is paired with a run of the defaults right beside it, so
that what drifts hits both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from vq.bench.distance import MIXED
from vq.bench.measure import Ended, Run, measure
from vq.bench.settings import Settings
from vq.bench.target import Target
from vq.errors import BackendError, UsageError

__all__ = [
    "BETTER",
    "FEW",
    "PAIRS_LEAST",
    "SAME",
    "WORSE",
    "Refused",
    "Trial",
    "Verdict",
    "combine",
    "how_to_set",
    "judge",
    "make_tries",
    "run_trials",
]

BETTER: Final = "better"
WORSE: Final = "worse"
SAME: Final = "no difference"
FEW: Final = "too few pairs"
PAIRS_LEAST: Final = 3  # with one or two of them "all pairs agree" is chance, and so is their noise

# Where a setting is made, by its axis.
HOW: Final = {
    "poll": "vq pump ... --poll {value}",
    "sub_burst": "vq pump ... --sub-burst {value}",
    "ring": "in the guest's device: rx_queue_size={value},tx_queue_size={value} (QEMU takes up to 1024)",
    "layout": "in the guest's device: packed={packed}",
    "queues": "vhost:PATH,queues={value} and a worker for each: --cpu LIST; in the guest's device: mq=on",
    "driver": "in the guest: busy polling of its driver ({value})",
    "window": "in the guest: packets under way ({value})",
    "descriptors": "in the guest's driver: {value}",
    "event_idx": "in the guest's device: event_idx={value}",
    "mergeable": "in the guest's device: mrg_rxbuf={value}",
    "in_order": "in the guest's device: in_order={value}",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One pair of runs, the defaults and a try.

    Parameters
    ----------
    name
        What was tried, such as "ring=1024"; "defaults" when they were measured against themselves.
    settings
        The settings tried.
    ratio
        How many times better than the defaults beside it; above 1 is better, whatever was measured.
    base, tried
        Both figures: packets a second, or nanoseconds.
    tag
        Of the distance of the processors, over both runs.
    ok
        Nothing was wrong with any packet.
    """

    name: str
    settings: Settings
    ratio: float
    base: float
    tried: float
    tag: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A try that the back-end does not offer, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the trials of one try say.

    Parameters
    ----------
    name, settings
        What was tried.
    trials
        Pairs that counted.
    ratio, low, high
        Median, smallest and largest.
    tried
        Median of the figures.
    verdict
        "better" or "worse" when all pairs agree and the median is beyond the noise; else "no difference". "too few
        pairs" when fewer than three count, of the try or of the defaults against themselves.
    """

    name: str
    settings: Settings
    trials: int
    ratio: float
    low: float
    high: float
    tried: float
    verdict: str


def _figure(run: Run) -> float:
    return run.latency.get("p99", 0.0) if run.measure == "latency" else run.rate


def run_trials(
    target: Target,
    base: Settings,
    tries: Sequence[tuple[str, Settings]],
    kind: str,
    *,
    seconds: float,
    repeat: int,
    ended: Callable[[], bool] = lambda: False,
) -> Iterator[Trial | Refused]:
    """Pair each try with the defaults, `repeat` times, beginning with the defaults themselves.

    Parameters
    ----------
    target
        The back-end.
    base
        The defaults.
    tries
        Names and settings.
    kind
        "throughput", by packets a second, or "latency", by the 99th percentile.
    seconds
        Counted seconds of a run.
    repeat
        Pairs of each try.
    ended
        Asked now and then.

    Yields
    ------
    Trial or Refused
        Each one as it is done.
    """
    refused: set[str] = set()
    for _ in range(repeat):
        for name, settings in [("defaults", base), *tries]:
            if name in refused:
                continue
            try:
                first = measure(target, base, kind, seconds, ended)
                second = measure(target, settings, kind, seconds, ended)
            except Ended:
                return
            except (BackendError, UsageError) as error:
                if name == "defaults" or getattr(error, "request", "") not in ("", "GET_FEATURES", "GET_QUEUE_NUM"):
                    raise
                refused.add(name)
                yield Refused(name, str(error))
                continue
            yield _trial(name, first, second)


def _trial(name: str, first: Run, second: Run) -> Trial:
    base, tried = _figure(first), _figure(second)
    better = (base / tried if tried else 0.0) if first.measure == "latency" else (tried / base if base else 0.0)
    tag = first.tag if first.tag == second.tag else MIXED
    return Trial(name, second.settings, better, base, tried, tag, first.ok and second.ok)


def judge(trials: Iterable[Trial]) -> tuple[float, list[Verdict]]:
    """Say of each try whether it is better.

    Returns
    -------
    tuple of (float, list of Verdict)
        The noise: the largest deviation from 1 that the defaults showed against themselves. And the verdicts, best
        first. Pairs in which the cores' distance changed count only where there are no others.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.name, []).append(trial)
    clean = {name: [t for t in group if t.tag != MIXED] or group for name, group in groups.items()}
    own = clean.pop("defaults", [])
    noise = max((abs(trial.ratio - 1) for trial in own), default=0.0)
    firm = len(own) >= PAIRS_LEAST
    found = [_verdict(name, group, noise, firm=firm) for name, group in clean.items()]
    return noise, sorted(found, key=lambda verdict: -verdict.ratio)


def _verdict(name: str, trials: Sequence[Trial], noise: float, *, firm: bool) -> Verdict:
    ratios = [trial.ratio for trial in trials]
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    word = BETTER if low > 1 and median > 1 + noise else WORSE if high < 1 and median < 1 - noise else SAME
    if not firm or len(trials) < PAIRS_LEAST:
        word = FEW
    return Verdict(
        name, trials[0].settings, len(trials), median, low, high, statistics.median(t.tried for t in trials), word
    )


def combine(base: Settings, verdicts: Sequence[Verdict], axes: Sequence[str]) -> Settings:
    """All that is better, put together: of each setting the best value.

    Parameters
    ----------
    base
        The defaults.
    verdicts
        Best first, of tries that change one setting each.
    axes
        The settings that were tried.
    """
    changes: dict[str, Any] = {}
    for verdict in verdicts:
        if verdict.verdict == BETTER:
            for name in axes:
                value = getattr(verdict.settings, name)
                if value != getattr(base, name):
                    changes.setdefault(name, value)
    return replace(base, **changes)


def how_to_set(base: Settings, best: Settings) -> list[str]:
    """Where to write what differs from the defaults."""
    lines = []
    for name, form in HOW.items():
        value = getattr(best, name)
        if value != getattr(base, name):
            lines.append(f"{name}={value}: " + form.format(value=value, packed="on" if value == "packed" else "off"))
    return lines


def make_tries(base: Settings, axes: Mapping[str, Sequence[int | str]]) -> list[tuple[str, Settings]]:
    """One try for each value that is not the default.

    Raises
    ------
    UsageError
        An axis that is no setting but what is measured, or nothing left to try.
    """
    tries = []
    for name, values in axes.items():
        if name not in HOW:
            raise UsageError(f"{name}= is what is measured, no setting to tune; use {', '.join(HOW)}, or --size")
        changes: list[dict[str, Any]] = [{name: value} for value in values if value != getattr(base, name)]
        tries += [(f"{name}={change[name]}", replace(base, **change)) for change in changes]
    if not tries:
        raise UsageError("every value given is the default already; nothing to try")
    return tries
