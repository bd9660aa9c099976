"""The attacked process as the kernel sees it, and the neighbour whose traffic must not notice anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import vq
from vq import virtio as v
from vq.frontend import Frontend, RingSetup
from vq.payload import Region
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.traffic import Exchange, traffic_memory_bytes

HERE = Path(__file__).resolve().parent
PATIENCE = 60.0
SECRET = b"hostile-tests-keep-this"


def wait_until(what: str, condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Look again and again; fail when the time is over."""
    end = time.monotonic() + timeout
    pause = 0.0002
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(pause)
        pause = min(0.01, pause * 1.5)


class Holdings(NamedTuple):
    """What a process holds of the system."""

    fds: int
    shared_maps: int  # of memory that came as an fd
    maps: int


class Program:
    """A pump in a process of its own.

    Parameters
    ----------
    command : list of str
        Arguments for the Python interpreter.
    folder : Path
        Where its log goes.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        paths = [str(Path(vq.__file__).resolve().parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.log = folder / f"program-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def messages(self) -> str:
        """What it has logged so far."""
        return self.log.read_text(errors="replace")

    def snapshot(self) -> dict[str, Any]:
        """Ask for the counters."""
        with self._lock:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        assert line, f"the program ended with {self.process.wait(60)}:\n{self.messages[-3000:]}"
        return dict(json.loads(line))

    def holdings(self) -> Holdings:
        """Count descriptors and mappings."""
        proc = Path(f"/proc/{self.process.pid}")
        lines = (proc / "maps").read_text().splitlines()
        shared = sum(
            " rw-s" in line and re.search(r"memfd:|/anon_hugepage|/dev/zero", line) is not None for line in lines
        )
        return Holdings(len(os.listdir(proc / "fd")), shared, len(lines))

    def settled(self) -> Holdings:
        """What it holds once nothing changes any more."""
        seen = [self.holdings()]

        def stable() -> bool:
            time.sleep(0.01)
            seen.append(self.holdings())
            return len(set(seen[-5:])) == 1 and len(seen) >= 5

        wait_until("descriptors and mappings stay as they are", stable)
        return seen[-1]

    def private_kilobytes(self) -> int:
        """Anonymous memory in use."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+)", status)
        assert found is not None
        return int(found[1])

    def cpu_seconds(self) -> float:
        """Processor time so far, all threads together."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> int:
        """End it; gives its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()


class Host(Program):
    """`host.py` with an attacked socket and the neighbour's."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "hostile.sock")
        self.neighbour_path = str(folder / "neighbour.sock")
        super().__init__([str(HERE / "host.py"), self.path, self.neighbour_path], folder)
        wait_until("both sockets are there", lambda: os.path.exists(self.path) and os.path.exists(self.neighbour_path))

    def port(self) -> dict[str, Any]:
        """The attacked port in a fresh snapshot."""
        return dict(self.snapshot()["ports"][f"vhost:{self.path}"])

    def queue(self, name: str) -> dict[str, Any]:
        """One queue of the attacked port; empty if it has never been started."""
        return next((queue for queue in self.port()["queues"] if queue["name"] == name), {})

    def wait_free(self) -> None:
        """Wait until nobody is connected to the attacked socket."""
        wait_until("the attacked socket listens again", lambda: self.port()["state"] == "listening")


class Neighbour:
    """An honest guest on the other socket: bursts of verified packets, all the time, never one lost or changed."""

    FEATURES = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_F_EVENT_IDX)
    BURST = 32
    SIZES = (64, 256, 1518)

    def __init__(self, path: str) -> None:
        self.bursts = 0
        self.failure: BaseException | None = None
        self.frontend = Frontend.connect(path, timeout=PATIENCE)
        features = self.frontend.negotiate(self.FEATURES, v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
        self.frontend.set_features(features)
        self.memory = GuestMemory(traffic_memory_bytes(64, max(self.SIZES)))
        share(self.frontend, self.memory)
        self.queues = [DriverQueue(self.memory, 64, features=features) for _ in range(2)]
        for index, queue in enumerate(self.queues):
            start(self.frontend, index, queue)
        receiveq, transmitq = self.queues
        self.before: Holdings | None = None
        self.exchange = Exchange([(transmitq, receiveq)], self.SIZES, poll="sleep", patience=PATIENCE / 2)
        self.quiet = False  # no packets for a while, so that the processor time of the process tells something
        self.slowest = 0.0  # seconds of the slowest burst since somebody set this to 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        sent = 0
        try:
            while not self._ending.wait(0.002):
                if self.quiet:
                    continue
                sent += self.BURST
                begin = time.monotonic()
                self.exchange.run(packets=sent)
                self.slowest = max(self.slowest, time.monotonic() - begin)
                counters = self.exchange.counters
                assert counters["verified"] == counters["sent"] == sent, counters
                assert not any(counters[kind] for kind in ("lost", "duplicated", "reordered", "changed")), counters
                self.bursts += 1
        except BaseException as failure:
            self.failure = failure

    def check(self, bursts: int = 2) -> None:
        """Insist that packets have been right so far, and that some more come and go now."""
        until = self.bursts + bursts
        wait_until("the neighbour's packets move", lambda: self.bursts >= until or self.failure)
        assert self.failure is None, f"the neighbour was harmed: {self.failure}"

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self.frontend.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()


def share(frontend: Frontend, memory: GuestMemory) -> None:
    """Send the memory table."""
    frontend.set_mem_table([Region(*row[:4]) for row in memory.regions], [row[4] for row in memory.regions])


def start(frontend: Frontend, index: int, queue: DriverQueue, *, err_fd: int | None = None, base: int = 0) -> None:
    """Start and enable a ring of the driver's."""
    desc, avail, used = queue.addresses
    frontend.start_ring(RingSetup(index, queue.size, desc, avail, used, base, queue.kick_fd, queue.call_fd, err_fd))
