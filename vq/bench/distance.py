"""How far apart two processors are: everything that shares rings is 1.5 to 3 times slower between far ones.

On a virtual machine the distance changes under a running program, so it is measured before and after each run, and only
runs of one tag are compared.
"""

from __future__ import annotations

import os
import statistics
import threading
from typing import Final

__all__ = ["FAR", "MIXED", "NEAR", "NEAR_NS", "UNKNOWN", "core_distance", "tag_of"]

NEAR_NS: Final = 200  # a round trip of a cache line: under one cache about 60 to 150, between two above 300
NEAR: Final = "near"
FAR: Final = "far"
MIXED: Final = "mixed"  # the distance changed on the way
UNKNOWN: Final = "unknown"  # the threads are not bound to two processors


def core_distance(first: int, second: int) -> float:
    """Throw a cache line to and fro between two processors.

    Parameters
    ----------
    first, second
        Processors, two different ones that this process may use.

    Returns
    -------
    float
        Nanoseconds of a round trip, the median of some samples; takes about 20 ms.
    """
    from vq_core.pingpong import PingPong

    game = PingPong()
    ready = threading.Event()
    problems: list[OSError] = []

    def catch() -> None:
        try:
            os.sched_setaffinity(0, {second})
        except OSError as problem:
            problems.append(problem)
            return
        finally:
            ready.set()
        game.catch()

    found: list[float] = []

    def throw() -> None:
        try:
            os.sched_setaffinity(0, {first})
        except OSError as problem:
            problems.append(problem)
        # Thrown even from elsewhere, since the catcher waits for it; the problem is raised afterwards.
        found.extend(game.throw())

    catcher = threading.Thread(target=catch, name="vq-catch")
    catcher.start()
    ready.wait()
    if not problems:
        thrower = threading.Thread(target=throw, name="vq-throw")
        thrower.start()
        thrower.join()
    catcher.join()
    for problem in problems:
        raise problem
    return statistics.median(found)


def tag_of(*distances: float | None) -> str:
    """The tag of a run from the distances around it: near, far, mixed, or unknown when there is none."""
    tags = {UNKNOWN if ns is None else NEAR if ns < NEAR_NS else FAR for ns in distances}
    return tags.pop() if len(tags) == 1 else MIXED
