"""Many runs in alternation: whatever drifts while they last hits every point alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vq.bench.measure import Ended, Run, measure
from vq.bench.settings import Settings
from vq.bench.target import Target

__all__ = ["run_series"]


def run_series(
    target: Target,
    points: Sequence[Settings],
    kind: str,
    *,
    seconds: float,
    repeat: int,
    ended: Callable[[], bool] = lambda: False,
) -> Iterator[Run]:
    """Measure every point once, then all of them again.

    Parameters
    ----------
    target
        The back-end.
    points
        In the order of the table.
    kind
        "throughput" or "latency".
    seconds
        Counted seconds of a run.
    repeat
        Runs of each point.
    ended
        Asked now and then; when it says so, the series ends with what has been measured.

    Yields
    ------
    Run
        Each one as it is done.
    """
    for _ in range(repeat):
        for point in points:
            if ended():
                return
            try:
                yield measure(target, point, kind, seconds, ended)
            except Ended:
                return
