"""Runs against our own engine: short, real, every packet verified. No figure is judged, only what it is made of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import pytest

from vq import virtio as v
from vq.bench.dirty_log import DirtyLog
from vq.bench.distance import core_distance
from vq.bench.link import Pairs, open_link
from vq.bench.measure import Ended, measure
from vq.bench.series import run_series
from vq.bench.settings import Settings
from vq.bench.target import Places, Target
from vq.bench.tune import Refused, Trial, run_trials
from vq.errors import BackendError, ResourceError, UsageError
from vq.pump import Pump
from waiting import wait_for

SECONDS = 0.05
TWO = len(os.sched_getaffinity(0)) >= 2


def own() -> Target:
    return Target(None, Places.choose(None))


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(size=1518, ring=64),
        Settings(size=9000),  # merged from several receive buffers
        Settings(window=1),
        Settings(queues=2),
        Settings(descriptors="2"),
        Settings(descriptors="indirect"),
        Settings(event_idx="off"),
        Settings(mergeable="off", size=9000),
        Settings(in_order="on"),
        Settings(in_order="on", layout="packed", descriptors="2"),
        Settings(log="on", size=9000),
        Settings(poll="adaptive", driver="sleep"),
    ],
    ids=lambda settings: settings.words() or "defaults",
)
def test_throughput(settings: Settings) -> None:
    run = measure(own(), settings, "throughput", SECONDS)
    assert run.ok
    assert run.rate == pytest.approx(run.packets / run.seconds)
    assert run.latency == {}
    assert run.busy is not None and 0 < run.busy <= 1
    assert run.cycles is not None and run.cycles > 0
    assert (run.tag != "unknown") is TWO


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_the_log_is_written_and_taken_again_and_again(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[DirtyLog] = []

    class Kept(DirtyLog):
        def __enter__(self) -> Self:
            logs.append(self)
            return super().__enter__()

    monkeypatch.setattr("vq.bench.link.DirtyLog", Kept)
    assert measure(own(), Settings(log="on", layout=layout), "throughput", 0.5).ok
    assert logs[0].pages > 256 * 64 // 4096  # of one pass: each ring and all buffers


@pytest.mark.parametrize(
    ("settings", "there", "missing"),
    [
        (Settings(), {v.VIRTIO_F_EVENT_IDX, v.VIRTIO_NET_F_MRG_RXBUF}, {v.VIRTIO_F_IN_ORDER, v.VHOST_F_LOG_ALL}),
        (Settings(event_idx="off", mergeable="off"), set(), {v.VIRTIO_F_EVENT_IDX, v.VIRTIO_NET_F_MRG_RXBUF}),
        (Settings(in_order="on", log="on"), {v.VIRTIO_F_IN_ORDER, v.VHOST_F_LOG_ALL}, set()),
    ],
)
def test_features_are_those_of_the_settings(settings: Settings, there: set[int], missing: set[int]) -> None:
    found: list[int] = []

    def make(pairs: Pairs, receive_bytes: int) -> None:
        found.append(pairs[0][0].features)

    with own().open(settings) as opened, open_link(opened.path, settings, make):
        pass
    assert all(v.has(found[0], bit) for bit in there)
    assert not any(v.has(found[0], bit) for bit in missing)


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(poll="adaptive", pause=500), Settings(poll="adaptive", driver="sleep"), Settings(size=1518)],
    ids=lambda settings: settings.words() or "defaults",
)
def test_latency(settings: Settings) -> None:
    run = measure(own(), settings, "latency", SECONDS)
    assert run.ok
    latency = run.latency
    assert list(latency) == ["mean", "p50", "p99", "p99_9", "max"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["p99_9"] <= latency["max"]


def test_a_pause_lets_the_back_end_sleep() -> None:
    """What makes wake latency visible: without sleeps it would be that of a busy back-end."""
    run = measure(own(), Settings(poll="adaptive", pause=2000), "latency", 0.2)
    assert run.sleeps is not None and run.sleeps > 1


def test_the_socket_of_somebody_else(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with Pump([f"vhost:{path}"]) as pump:
        serving = threading.Thread(target=pump.run)
        serving.start()
        try:
            runs = [
                measure(Target(path, Places.choose(None)), Settings(), kind, SECONDS)
                for kind in ("throughput", "latency")
            ]
            seen = pump.snapshot()["ports"][f"vhost:{path}"]
        finally:
            pump.request_stop()
            serving.join()
    assert all(run.ok and run.busy is None and run.cycles is None for run in runs)
    assert seen["connections"] == 2
    assert seen["from_guest"]["packets"] >= sum(run.packets for run in runs)


def test_a_back_end_that_stands_still_for_a_second_has_lost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with subprocess.Popen([sys.executable, "-m", "vq", "pump", f"vhost:{path}"], stdout=subprocess.DEVNULL) as pump:
        try:
            wait_for(path.exists)
            stop = threading.Timer(0.3, pump.send_signal, [signal.SIGSTOP])
            go_on = threading.Timer(1.8, pump.send_signal, [signal.SIGCONT])
            stop.start()
            go_on.start()
            run = measure(Target(str(path), Places()), Settings(), "throughput", 2.0)
        finally:
            pump.send_signal(signal.SIGCONT)
            pump.terminate()
    assert run.ok, run


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vq.bench.measure.open_link", _impatient)
    with pytest.raises(ResourceError, match=r"none\.sock"):
        measure(Target(str(tmp_path / "none.sock"), Places()), Settings(), "throughput", SECONDS)


def _impatient(path, settings, make):  # type: ignore[no-untyped-def]
    from vq.bench.link import open_link

    return open_link(path, settings, make, timeout=0.2)


def test_more_pairs_than_there_are(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with Pump([f"vhost:{path},queues=1"]) as pump:
        serving = threading.Thread(target=pump.run)
        serving.start()
        try:
            with pytest.raises(BackendError, match=r"queues=3 needs as many|this needs MQ"):
                measure(Target(path, Places()), Settings(queues=3), "throughput", SECONDS)
        finally:
            pump.request_stop()
            serving.join()


def test_settings_that_do_not_fit_are_refused() -> None:
    # Two buffers of 4096 bytes for each packet, and the ring holds one.
    with pytest.raises(UsageError, match=r"size=6000.* receive buffers"):
        measure(own(), Settings(size=6000, ring=2, descriptors="2"), "throughput", SECONDS)


def test_a_series_alternates_and_can_be_ended() -> None:
    points = [Settings(size=64), Settings(size=128)]
    found = []
    for run in run_series(own(), points, "throughput", seconds=0.01, repeat=5, ended=lambda: len(found) >= 5):
        found.append(run)
    assert [run.settings.size for run in found] == [64, 128, 64, 128, 64]


def test_a_run_under_way_is_given_up() -> None:
    with pytest.raises(Ended):
        measure(own(), Settings(), "throughput", 60.0, lambda: True)


def test_trials_begin_with_the_defaults_and_name_what_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    tries = [("ring=64", Settings(ring=64)), ("queues=9", Settings(queues=9))]
    with Pump([f"vhost:{path},queues=1"]) as pump:
        serving = threading.Thread(target=pump.run)
        serving.start()
        try:
            target = Target(path, Places.choose(None))
            found = list(run_trials(target, Settings(), tries, "throughput", seconds=0.01, repeat=2))
        finally:
            pump.request_stop()
            serving.join()
    assert [item.name for item in found] == ["defaults", "ring=64", "queues=9", "defaults", "ring=64"]
    assert isinstance(found[2], Refused) and found[2].why
    for trial in (item for item in found if isinstance(item, Trial)):
        assert trial.ok
        assert trial.ratio == pytest.approx(trial.tried / trial.base)


@pytest.mark.skipif(not TWO, reason="two processors are needed")
def test_the_distance_of_two_processors() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    assert 1 < core_distance(first, second) < 100_000
    assert os.sched_getaffinity(0) >= {first, second}  # the caller's own is not changed


def test_a_processor_that_is_not_there_is_an_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        core_distance(0, 8000)
    with pytest.raises(OSError, match="Invalid argument"):
        core_distance(8000, 0)


def test_places() -> None:
    assert Places.choose([4, 5, 6]) == Places((4, 5), 6)
    with pytest.raises(UsageError, match="two are needed"):
        Places.choose([0])
    assert Places().distance() is None
