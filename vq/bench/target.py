"""What is measured: a back-end of our own in this process, or whoever listens on a socket."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vq.bench.settings import Settings
from vq.errors import UsageError
from vq.program import load_program
from vq.pump import Pump

__all__ = ["Places", "Target", "Work"]


@dataclass(frozen=True, slots=True)
class Places:
    """Processors of the threads; empty and None when they are not bound.

    Parameters
    ----------
    workers
        Of our back-end's workers.
    driver
        Of the driver.
    """

    workers: tuple[int, ...] = ()
    driver: int | None = None

    @classmethod
    def choose(cls, cpus: Sequence[int] | None) -> Places:
        """Split a list of processors: workers, and the driver last.

        Parameters
        ----------
        cpus
            None: the first two that this process may use; nothing is bound where there is only one.

        Raises
        ------
        UsageError
            Fewer than two processors were named.
        """
        if cpus is None:
            cpus = sorted(os.sched_getaffinity(0))[:2]
            if len(cpus) < 2:
                return cls()
        if len(cpus) < 2:
            raise UsageError(f"--cpu {cpus[0]}: two are needed, the back-end's and the driver's, such as 0,1")
        return cls(tuple(cpus[:-1]), cpus[-1])

    def distance(self) -> float | None:
        """Nanoseconds between worker and driver, None when they are not bound."""
        if self.driver is None:
            return None
        from vq.bench.distance import core_distance

        return core_distance(self.workers[0], self.driver)


@dataclass(frozen=True, slots=True)
class Work:
    """What the workers of our back-end did so far.

    Parameters
    ----------
    busy, idle
        Cycles in rounds that moved packets, and in the others; without those asleep.
    sleeps
        How often a worker went to sleep.
    packets
        Packets from the guest.
    """

    busy: int
    idle: int
    sleeps: int
    packets: int


class Target:
    """Opens the back-end of a run.

    Parameters
    ----------
    socket
        Somebody's socket; None: a back-end of our own that echoes, made anew for each run.
    places
        Where our own threads run.
    """

    def __init__(self, socket: str | None, places: Places) -> None:
        self.socket = socket
        self.places = places

    @property
    def name(self) -> str:
        """What is measured, for people."""
        return "vq" if self.socket is None else self.socket

    @contextmanager
    def open(self, settings: Settings) -> Iterator[Opened]:
        """Give the back-end for one run."""
        if self.socket is not None:
            yield Opened(self.socket, None)
            return
        with tempfile.TemporaryDirectory(prefix="vq-bench-") as folder:
            path = str(Path(folder) / "echo.sock")
            ports = [f"vhost:{path},queues={settings.queues}"]
            workers = self.places.workers or None
            program = None if settings.program == "none" else load_program(settings.program)
            poll, sub_burst = settings.poll, settings.sub_burst
            with Pump(ports, cpus=workers, poll=poll, sub_burst=sub_burst, program=program) as pump:
                control = threading.Thread(target=pump.run, name="vq-control")
                control.start()
                try:
                    yield Opened(path, pump)
                finally:
                    pump.request_stop()
                    control.join()


class Opened:
    """A back-end that listens: its path, and a look inside when it is ours."""

    def __init__(self, path: str, pump: Pump | None) -> None:
        self.path = path
        self._pump = pump

    def work(self) -> Work | None:
        """What its workers did so far; None when it is not ours."""
        return None if self._pump is None else work_of(self._pump.snapshot())


def work_of(snapshot: dict[str, Any]) -> Work:
    """Add up what a pump's snapshot says about its workers."""
    workers, ports = snapshot["workers"], snapshot["ports"].values()
    return Work(
        busy=sum(worker["busy_cycles"] for worker in workers),
        idle=sum(worker["idle_cycles"] for worker in workers),
        sleeps=sum(worker["sleeps"] for worker in workers),
        packets=sum(port["from_guest"]["packets"] for port in ports if "from_guest" in port),
    )
