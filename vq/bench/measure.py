"""One run: packets for a while, each of them verified."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypedDict

from vq.bench.distance import tag_of
from vq.bench.link import Pairs, open_link
from vq.bench.settings import Settings
from vq.bench.target import Opened, Target, Work
from vq.demo import PATIENCE_S
from vq.errors import BackendError
from vq_core.driver import BrokenRingError
from vq_core.roundtrip import RoundTrip
from vq_core.traffic import Exchange

__all__ = ["PERCENTILES", "WARM_UP", "Ended", "Run", "drive", "measure"]

PERCENTILES: Final = {"p50": 50.0, "p99": 99.0, "p99_9": 99.9}
WARM_UP: Final = 0.2  # of the counted seconds
LOOK_S: Final = 0.05  # between two looks whether to end
MEASURES: Final = ("throughput", "latency")


class Ended(Exception):
    """The run was ended before it had counted anything."""


class Driving(Protocol):
    """What drives the queues: runs in a thread of its own and can be told to stop."""

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Run:
    """What one run found.

    Parameters
    ----------
    settings, measure
        What was measured: "throughput" or "latency".
    packets, seconds
        Packets that came back and were right, and how long that took.
    lost, duplicated, reordered, changed
        Packets that did not.
    rate
        Verified packets a second.
    latency
        Nanoseconds of a round trip: mean, p50, p99, p99_9, max; empty for throughput.
    busy
        Share of the waking time of our back-end's workers in rounds that moved packets, 0 to 1; None: not ours.
    cycles
        Busy cycles of these workers for each packet (in and out); None: not ours.
    sleeps
        How often they slept, times a second; None: not ours.
    distances, tag
        Nanoseconds between the processors before and after, and the tag made of both.
    """

    settings: Settings
    measure: str
    packets: int
    seconds: float
    lost: int
    duplicated: int
    reordered: int
    changed: int
    rate: float
    latency: dict[str, float]
    busy: float | None
    cycles: float | None
    sleeps: float | None
    distances: tuple[float | None, float | None]
    tag: str

    @property
    def ok(self) -> bool:
        """Packets came back, and nothing was wrong with any."""
        return self.packets > 0 and not any((self.lost, self.duplicated, self.reordered, self.changed))


def measure(
    target: Target, settings: Settings, kind: str, seconds: float, ended: Callable[[], bool] = lambda: False
) -> Run:
    """Run once.

    Parameters
    ----------
    target
        The back-end.
    settings
        The point.
    kind
        "throughput": as many packets as go. "latency": one packet under way, each round trip timed.
    seconds
        Counted seconds; some more go by for warming up.
    ended
        Asked now and then whether to end.

    Raises
    ------
    Ended
        `ended` said so.
    BackendError, ResourceError
        The back-end is not there, lacks something, or broke the protocol.
    """
    before = target.places.distance()
    with target.open(settings) as opened:
        once = _latency if kind == "latency" else _throughput
        found = once(target, opened, settings, seconds, ended)
    after = target.places.distance()
    return Run(settings=settings, measure=kind, distances=(before, after), tag=tag_of(before, after), **found)


class _Spent(TypedDict):
    """The fields of `Run` about our workers."""

    busy: float | None
    cycles: float | None
    sleeps: float | None


class _Found(_Spent):
    """The fields of `Run` that a run itself finds."""

    packets: int
    seconds: float
    lost: int
    duplicated: int
    reordered: int
    changed: int
    rate: float
    latency: dict[str, float]


def _throughput(
    target: Target, opened: Opened, settings: Settings, seconds: float, ended: Callable[[], bool]
) -> _Found:
    def make(pairs: Pairs, receive_bytes: int) -> Exchange:
        return Exchange(
            pairs,
            settings.size,
            window=settings.window or None,
            receive_bytes=receive_bytes,
            descriptors=1 if settings.descriptors == "1" else 2,
            indirect=settings.descriptors == "indirect",
            poll=settings.driver,
            cpu=target.places.driver,
            patience=PATIENCE_S,
        )

    with open_link(opened.path, settings, make) as exchange:
        drive(exchange, lambda: exchange.run(duration=seconds * WARM_UP), ended)
        begin, started, work = exchange.counters, exchange.seconds, opened.work()
        drive(exchange, lambda: exchange.run(duration=seconds), ended)
        counters, passed = exchange.counters, exchange.seconds - started
        packets = counters["verified"] - begin["verified"]
        return {
            "packets": packets, "seconds": passed, "rate": packets / max(passed, 1e-9), "latency": {},
            "lost": counters["lost"], "duplicated": counters["duplicated"], "reordered": counters["reordered"],
            "changed": counters["changed"], **_spent(work, opened.work(), passed),
        }  # fmt: skip


def _latency(target: Target, opened: Opened, settings: Settings, seconds: float, ended: Callable[[], bool]) -> _Found:
    def make(pairs: Pairs, receive_bytes: int) -> RoundTrip:
        (pair,) = pairs
        return RoundTrip(
            *pair, settings.size, poll=settings.driver, pause=settings.pause / 1e6, cpu=target.places.driver,
            patience=PATIENCE_S,
        )  # fmt: skip

    with open_link(opened.path, settings, make) as trips:
        drive(trips, lambda: trips.run(seconds * WARM_UP), ended)
        trips.forget()
        work = opened.work()
        drive(trips, lambda: trips.run(seconds), ended)
        counters, nanoseconds = trips.counters, trips.nanoseconds
    packets = counters["verified"]
    passed = float(nanoseconds.sum()) / 1e9 + packets * settings.pause / 1e6
    return {
        "packets": packets, "seconds": passed, "rate": packets / max(passed, 1e-9),
        "lost": counters["lost"], "changed": counters["changed"], "duplicated": 0, "reordered": 0,
        "latency": _distribution(nanoseconds), **_spent(work, opened.work(), passed),
    }  # fmt: skip


def _distribution(nanoseconds: object) -> dict[str, float]:
    import numpy

    values = numpy.asarray(nanoseconds)
    if not values.size:
        return {}
    cuts = numpy.percentile(values, list(PERCENTILES.values()))
    found = dict(zip(PERCENTILES, map(float, cuts), strict=True))
    return {"mean": float(values.mean()), **found, "max": float(values.max())}


def _spent(before: Work | None, after: Work | None, seconds: float) -> _Spent:
    """What the workers of our back-end did between two looks."""
    if before is None or after is None:
        return {"busy": None, "cycles": None, "sleeps": None}
    busy, idle = after.busy - before.busy, after.idle - before.idle
    packets = after.packets - before.packets
    return {
        "busy": busy / (busy + idle) if busy + idle else 0.0,
        "cycles": busy / packets if packets else None,
        "sleeps": (after.sleeps - before.sleeps) / max(seconds, 1e-9),
    }


def drive(engine: Driving, run: Callable[[], None], ended: Callable[[], bool]) -> None:
    """Run the driver in a thread of its own, and look now and then whether to end."""
    problems: list[BaseException] = []

    def body() -> None:
        try:
            run()
        except BaseException as problem:  # handed over to the caller's thread
            problems.append(problem)

    thread = threading.Thread(target=body, name="vq-driver")
    thread.start()
    stopped = False
    try:
        while thread.is_alive():
            thread.join(LOOK_S)
            if ended():
                stopped = True
                engine.stop()
    finally:
        engine.stop() if thread.is_alive() else None
        thread.join()
    for problem in problems:
        if isinstance(problem, BrokenRingError):
            raise BackendError("ring", "used element", problem.value, str(problem), fatal=True) from problem
        raise problem
    if stopped:
        raise Ended
