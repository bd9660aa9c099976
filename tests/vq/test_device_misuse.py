"""What careless code of an embedder does to devices, their chains and their arrays: an error, and no harm."""

from __future__ import annotations

import logging
import select
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vq
from vhost_rig import open_fds
from vq.testing import Guest
from vq_core.chain_worker import ChainWorker
from vq_core.queue import Queue
from vq_core.worker import Worker
from waiting import wait_for

Connect = Callable[..., Guest]
pytest_plugins = ["vq.testing.plugin"]

# Makes what can be made of nothing, or of a wrong argument, and looks at it. In a process of its own: what is wrong
# here ends it, or closes its standard input.
MAKE_ALL = """
import gc, importlib, os, pkgutil
import vq, vq_core

before = os.fstat(0)
found = [importlib.import_module("vq_core." + module.name) for module in pkgutil.iter_modules(vq_core.__path__)]
values = [getattr(module, name) for module in [vq, *found] for name in dir(module)]
for kind in {value for value in values if isinstance(value, type) and value.__module__.startswith("vq_core.")}:
    try:
        kind(no_such_argument=1)
    except (TypeError, ValueError, OSError):
        pass
from vq_core.guest_memory import Block
from vq_core.traffic import Traffic

for kind in [*(getattr(vq, name) for name in vq.__all__), Block, Traffic]:
    if not isinstance(kind, type) or not kind.__module__.startswith("vq_core."):
        continue
    try:
        made = kind()
    except TypeError:
        continue
    repr(made)
    for name in dir(kind):
        if not callable(getattr(kind, name)):
            try:
                getattr(made, name)
            except (ValueError, AttributeError, NotImplementedError, RuntimeError):
                pass
gc.collect()
after = os.fstat(0)
assert (after.st_dev, after.st_ino) == (before.st_dev, before.st_ino), "standard input was closed"
"""


def test_objects_that_nothing_was_given_harm_nobody() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", MAKE_ALL], stdin=subprocess.PIPE, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("kind", [vq.DeviceChain, vq.DeviceBurst])
def test_chains_come_from_their_queue_alone(kind: Any) -> None:
    with pytest.raises(TypeError, match="made by their queue alone"):
        kind()


class Act(vq.Device):
    """Does what the test wants with its queue, once, and notes what that raises."""

    def __init__(self, act: Callable[[vq.DeviceQueue], object]) -> None:
        self.act: Callable[[vq.DeviceQueue], object] | None = act
        self.errors: list[Exception] = []

    def handle(self, queue: vq.DeviceQueue) -> None:
        act, self.act = self.act, None
        if act is not None:
            act(queue)
        for chain in queue:
            chain.write(b"late"[: chain.writable_bytes])
            chain.complete()

    def on_error(self, queue: vq.DeviceQueue | None, error: Exception) -> None:
        self.errors.append(error)


def test_a_chain_is_completed_once_whatever_tells_its_length(vq_guest: Connect) -> None:
    class Length:
        def __init__(self, chain: vq.DeviceChain) -> None:
            self.chain = chain

        def __int__(self) -> int:
            self.chain.complete(1)
            return 2

    outstanding: list[int] = []

    def act(queue: vq.DeviceQueue) -> None:
        chain = queue.pop()
        assert chain is not None
        with pytest.raises(ValueError, match="completed already"):
            chain.complete(Length(chain))  # type: ignore[arg-type]
        outstanding.append(queue.outstanding)

    device = Act(act)
    guest = vq_guest(device)
    assert len(guest.ask(b"x", 4)) == 1
    assert outstanding == [0]
    assert guest.ask(b"x", 4) == b"late"


def test_who_looks_at_a_chain_again_and_again_fills_no_memory(vq_guest: Connect) -> None:
    peaks: list[int] = []

    def act(queue: vq.DeviceQueue) -> None:
        chain = queue.pop()
        assert chain is not None
        (kept,) = chain.readable
        tracemalloc.start()
        total = sum(chain.readable[0][i] for i in range(3000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == 3000
        chain.complete()
        with pytest.raises(ValueError, match="released"):
            kept[0]

    device = Act(act)
    vq_guest(device).ask(b"\1" * 3000)
    assert not device.errors
    assert peaks[0] < 100_000


def test_arrays_of_a_burst_cannot_be_resized_under_it(vq_guest: Connect) -> None:
    def act(queue: vq.DeviceQueue) -> None:
        burst = queue.pull()
        assert burst is not None
        for array in (burst.heads(16), burst.field(0, ">u2")):
            with pytest.raises(ValueError, match="does not own its data"):
                array.resize(1 << 20, refcheck=False)
        burst.complete()

    device = Act(act)
    vq_guest(device).ask(b"x" * 20)
    assert not device.errors


def test_rows_are_taken_as_they_are(vq_guest: Connect) -> None:
    """A subclass of ndarray may say anything of itself."""

    class Lying(np.ndarray[Any, Any]):
        shape = (1, 1 << 40)  # type: ignore[assignment]

    def act(queue: vq.DeviceQueue) -> None:
        assert queue.push(np.zeros((1, 3), np.uint8).view(Lying)) == 1

    device = Act(act)
    assert vq_guest(device).ask(b"", 8) == bytes(3)
    assert not device.errors


# -- ending what is in use --

HOOKS = ("handle", "on_features", "on_stop", "on_reset", "changed")


class Ending(vq.Device):
    """Calls a method of its back-end in one of its hooks, once."""

    def __init__(self, hook: str, method: str) -> None:
        self.hook = hook
        self.method = method
        self.backend: vq.Backend | None = None
        self.problem: Exception | None = None

    def _reached(self, hook: str) -> None:
        if hook == self.hook and self.backend is not None:
            self.hook = ""
            try:
                getattr(self.backend, self.method)()
            except vq.UsageError as problem:
                self.problem = problem

    def handle(self, queue: vq.DeviceQueue) -> None:
        for chain in queue:
            self._reached("handle")
            if chain.alive:
                chain.write(b"yes")
                chain.complete()

    def on_features(self, features: int) -> None:
        self._reached("on_features")

    def on_stop(self, queue: vq.DeviceQueue) -> None:
        self._reached("on_stop")

    def on_reset(self) -> None:
        self._reached("on_reset")

    def changed(self) -> None:
        self._reached("changed")


def use(guest_of: Callable[[], Guest], served: threading.Event) -> None:
    """A guest that asks once, and does not mind when it is hung up on."""
    try:
        with guest_of() as guest:
            guest.send(b"x", 3)
            while not guest.drivers[0].poll(1) and not served.is_set():
                guest.drivers[0].wait(0.01)
            guest.stop(0)
    except (vq.VqError, OSError):
        pass


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("method", ["close", "disconnect", "dispatch"])
def test_a_hook_may_end_its_back_end_and_not_dispatch_it(
    tmp_path: Path, hook: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = open_fds()
    device = Ending(hook, method)
    path = tmp_path / "s"
    backend = vq.Backend(device, path=path, changed=device.changed)
    device.backend = backend
    served = threading.Event()
    guest = threading.Thread(target=use, args=(lambda: Guest(path), served))
    guest.start()
    with caplog.at_level(logging.ERROR):
        while guest.is_alive():
            if backend.state == "closed":
                guest.join()
            elif select.select([backend.fileno()], [], [], 0.01)[0]:
                backend.dispatch()
            if not device.hook:
                served.set()
        while backend.state not in ("closed", "listening"):
            backend.dispatch()
    assert not device.hook
    assert backend.state == ("closed" if method == "close" else "listening")
    assert (device.problem is not None) == (method == "dispatch")
    assert not caplog.records
    assert not any(queue.started for queue in device.queues)
    backend.close()
    device.close()
    wait_for(lambda: open_fds() == before)  # sockets are closed by a thread


# -- workers --


def test_a_call_that_calls_again_leaves_others_their_turn(tmp_path: Path) -> None:
    with vq.Server(Act(lambda queue: None), path=tmp_path / "s") as server:
        calls: list[int] = []

        def again() -> None:
            calls.append(1)
            assert len(calls) < 100
            server.call(again)

        again()
        for turn in range(2, 5):
            server.dispatch()
            assert len(calls) == turn


@pytest.mark.parametrize("make", [Worker, lambda: ChainWorker([Queue(0, "queue0")])])
def test_a_worker_runs_in_one_thread(make: Callable[[], Any]) -> None:
    worker = make()
    thread = threading.Thread(target=worker.run)
    thread.start()
    wait_for(lambda: worker.snapshot()["rounds"])
    with pytest.raises(ValueError, match="runs already"):
        worker.run()
    with pytest.raises(ValueError, match="stop it first"):
        worker.close()
    worker.stop()
    thread.join()
    worker.close()
