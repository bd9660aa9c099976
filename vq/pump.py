"""The pump: ports, workers and the control loop that joins them."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from vq.backend import Backend
from vq.errors import ResourceError, UsageError
from vq.groups import PortArgument, parse_groups
from vq.limits import ensure_open_files
from vq.open_port import OpenPort, descriptors, lanes_of, open_port
from vq.planner import Planner
from vq.ports import PortSpec
from vq.program import as_program
from vq.sub_burst import SUB_BURST, check_sub_burst
from vq.waker import Waker
from vq_core.port import Port
from vq_core.program import Burst, Program
from vq_core.worker import Worker

__all__ = ["Pump"]

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks for ports that have ended by themselves
DRAIN_S = 0.1  # what a finished source handed over is through when no counter has moved for so long


class Pump:
    """Moves packets between ports: echo on one, patch of two, learning switch of three and more.

    Parameters
    ----------
    ports
        PORT arguments of the command line, parsed or not, and ports that are open: those of a class of your own,
        which stay yours to close, after the pump. Several groups, each joined for itself, are written with
        the word ``+`` between them, or as a sequence of sequences: ``[["vhost:a", "vhost:b"], ["vhost:c"]]``.
    cpus
        A worker for each of these processors; None: one worker, wherever the kernel puts it.
    poll
        "adaptive": workers sleep when there is nothing to do. "busy": never.
    sub_burst
        Packets published at once where both ends are rings of guests, 1 to 32. Few: the other side gets the first ones
        sooner. Many: fewer transfers of cache lines and fewer notifications.
    program
        Looks at each burst on its way, and says what becomes of its packets: a `vq.Program`, or a Python function that
        is called with a `vq.Burst`.

    Raises
    ------
    UsageError, ResourceError
        A port cannot be opened; those opened before are closed again. Or the process may not have as many open files
        as the ports need; the soft limit (RLIMIT_NOFILE) is raised as far as that takes.

    Notes
    -----
    Threading: one control thread calls `start`, `run` and `stop`; `request_stop` and `snapshot` may come from any
    thread, `request_stop` from a signal handler too.
    """

    def __init__(
        self,
        ports: Sequence[PortArgument | Sequence[PortArgument]],
        *,
        cpus: Sequence[int] | None = None,
        poll: str = "adaptive",
        sub_burst: int = SUB_BURST,
        program: Program | Callable[[Burst], Any] | None = None,
    ) -> None:
        if isinstance(ports, str):
            raise UsageError(f"ports is a string; write a list: [{ports!r}]")
        if poll not in ("adaptive", "busy"):
            raise UsageError(f"poll is {poll!r}; adaptive and busy are possible")
        check_sub_burst(sub_burst)
        self.program = as_program(program)
        groups = parse_groups(ports)
        for cpu in cpus or ():
            if cpu not in os.sched_getaffinity(0):
                allowed = sorted(os.sched_getaffinity(0))
                raise UsageError(f"cpu {cpu} is not among the processors of this process: {allowed}")
        counts = [descriptors(spec) for group in groups for spec in group if isinstance(spec, PortSpec)]
        ensure_open_files(sum(needed for needed, _ in counts), sum(wanted for _, wanted in counts))
        self.ports: list[OpenPort] = []
        self._epoll = select.epoll()
        self._waker = Waker()
        self._report_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._replan = True
        self._started: float | None = None
        self._threads: list[threading.Thread] = []
        self._told: set[str] = set()
        self._closed = False
        self._by_fd: dict[int, Backend] = {}
        self._visited: list[Backend] = []  # those that have had a connection; the others can have no news
        self._fixed: list[OpenPort] = []  # those without a back-end
        self._patches: list[list[OpenPort]] = []
        self.workers = [Worker(cpu, poll) for cpu in cpus] if cpus else [Worker(None, poll)]
        self._planner = Planner(self.workers, sub_burst)
        try:
            for group in groups:
                self._join(group)
            for fd in (self._waker.fileno(), self._report_fd):
                self._epoll.register(fd, select.EPOLLIN)
        except BaseException:
            self.stop()
            raise

    def _join(self, specs: Sequence[PortSpec | Port]) -> None:
        """Open the ports of a group."""
        lanes = max(map(lanes_of, specs), default=1)
        group = []
        for spec in specs:
            port = open_port(spec, lanes=lanes, report_fd=self._report_fd, changed=self._changed)
            self.ports.append(port)
            group.append(port)
            if port.backend is None:
                self._fixed.append(port)
            else:
                port.backend.before_reply = self._settle
                self._by_fd[port.backend.fileno()] = port.backend
                self._epoll.register(port.backend.fileno(), select.EPOLLIN)
        self._planner.join([port.port for port in group], self.program)
        if len(group) == 2:
            self._patches.append(group)

    def _changed(self) -> None:
        self._replan = True

    def _settle(self) -> None:
        if self._replan:
            self.replan()

    # -- life --

    def start(self) -> None:
        """Start the workers.

        Raises
        ------
        ResourceError
            There is no room for a thread more; the pump is stopped.
        """
        if self._threads:
            return
        self._started = time.monotonic()
        for number, worker in enumerate(self.workers):
            thread = threading.Thread(target=worker.run, name=f"vq-worker-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self.stop()
                remedy = "see ulimit -u, and the limit of tasks of the service"
                raise ResourceError(f"worker {number} gets no thread ({error})", remedy=remedy) from error
            self._threads.append(thread)
        self.replan()

    def stop(self) -> None:
        """Stop the workers, close all connections and ports; may be called twice.

        Raises
        ------
        UsageError
            A program of this pump calls it, which would wait for its own end: `request_stop` is for those.
        """
        if self._closed:
            return
        self._refuse_workers()
        self._closed = True
        self._planner.clear()
        for port in self.ports:
            try:
                port.close()
            except OSError as error:
                logger.error("port=%s error=%r", port.name, f"data may be missing: {error}")
        for worker in self.workers:
            worker.stop()
        for thread in self._threads:
            thread.join()
        for worker in self.workers:
            worker.close()
        self._epoll.close()
        self._waker.close()
        os.close(self._report_fd)

    def _refuse_workers(self) -> None:
        if threading.current_thread() in self._threads:
            raise UsageError("a program cannot stop or run its own pump; call request_stop")

    def request_stop(self) -> None:
        """Make `run` return soon."""
        self._stopping = True
        self._waker.wake()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- control loop --

    def run(
        self,
        duration: float | None = None,
        interval: float = 1.0,
        on_interval: Callable[[dict[str, Any]], None] | None = None,
        alive: Callable[[], float] | None = None,
    ) -> dict[str, Any]:
        """Serve all connections until `request_stop`, the end of `duration`, or until all sources have finished.

        A pump whose guests all came as connected sockets ends with the last of them.

        Parameters
        ----------
        duration
            Seconds; None: without end.
        interval
            Seconds between two calls of `on_interval`.
        on_interval
            Gets a snapshot each time.
        alive
            Called in each turn of the loop; gives the seconds until it wants to be called again.

        Returns
        -------
        dict
            The last snapshot.
        """
        if self._closed:
            raise UsageError("the pump was stopped; make a new one")
        self._refuse_workers()
        # Said so that not-a-number, which is in no order with anything, is refused as well.
        if not (duration is None or duration >= 0) or not interval > 0:
            raise UsageError(f"duration {duration} and interval {interval} are seconds, and cannot be negative")
        self.start()
        self._replan = True
        begin = time.monotonic()
        end = None if duration is None else begin + duration
        tick = begin + interval
        finite = all(port.kind not in ("vhost", "tap") for port in self.ports)
        guests = [port.backend for port in self.ports if port.backend is not None]
        leaving = bool(guests) and all(backend.one_connection for backend in guests)
        while not self._stopping:
            now = time.monotonic()
            if end is not None and now >= end:
                break
            if on_interval is not None and now >= tick:
                on_interval(self.snapshot())
                tick = max(tick + interval, time.monotonic())
            if finite and all(port.finished for port in self.ports) and self._drained():
                break
            if leaving and all(backend.state == "closed" for backend in guests):
                break  # whoever passed connected sockets started us for these guests alone
            waits = [tick - now] if on_interval is not None else []
            waits += [end - now] if end is not None else []
            waits += [DRAIN_S] if finite else []
            waits += [LOOK_S] if self._look_again() else []
            waits += [alive()] if alive is not None else []
            self.dispatch(max(0.0, min(waits)) if waits else None)
        # Without workers every port has written out what it was given, and its counters are final.
        self._planner.clear()
        return self.snapshot()

    def _look_again(self) -> bool:
        """Look at what nobody reports, and say once what is wrong with it; whether to look again in a while."""
        for port in self._fixed:
            if port.error is not None and port.name not in self._told:
                self._told.add(port.name)
                logger.error("port=%s error=%r", port.name, port.error)
        watched = [backend.watch() for backend in self._visited]
        return bool(self._fixed) or any(watched)

    def dispatch(self, timeout: float | None = 0.0) -> None:
        """Wait up to `timeout` seconds (None: until something comes) and serve what is there."""
        for fd, _ in self._epoll.poll(-1 if timeout is None else timeout):
            if fd in self._by_fd:
                self._by_fd[fd].dispatch()
            else:
                os.eventfd_read(fd)
                if fd == self._report_fd:
                    self._report()
        self._settle()

    def _report(self) -> None:
        """Say which guests broke a queue, end connections that cannot go on, and plan without what is done."""
        self._replan = True
        for backend in self._visited:
            backend.report()

    def _drained(self) -> bool:
        before = [port.port.snapshot() for port in self.ports]
        time.sleep(DRAIN_S)
        return before == [port.port.snapshot() for port in self.ports]

    # -- flows --

    def replan(self) -> None:
        """Make the flows as the ports stand now; `dispatch` and `run` do so whenever rings start or stop."""
        self._replan = False
        self._visited = [backend for backend in self._by_fd.values() if backend.connections]
        self._planner.update()
        for patch in self._patches:
            for port, peer in (patch, reversed(patch)):
                port.follow(carrier=peer.backend is None or bool(peer.port.targets))

    # -- looking --

    def snapshot(self) -> dict[str, Any]:
        """Counters since the start.

        Returns
        -------
        dict
            ``{"time", "uptime", "ports": {name: {...}}, "workers": [...]}``; see docs/pump.md.
        """
        return {
            "time": time.time(),
            "uptime": 0.0 if self._started is None else time.monotonic() - self._started,
            "ports": {port.name: port.snapshot() for port in self.ports},
            "workers": [worker.snapshot() for worker in self.workers],
        }
