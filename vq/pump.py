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
from vq.errors import GuestError, UsageError
from vq.open_port import OpenPort, open_port
from vq.plan import Flow, make_flows, spread
from vq.ports import PortSpec, parse_ports
from vq_core.switch import Switch
from vq_core.worker import Plan, Worker

__all__ = ["Pump"]

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks for ports that have ended by themselves
DRAIN_S = 0.1  # what a finished source handed over is through when no counter has moved for so long


class Pump:
    """Moves packets between ports: echo on one, patch of two, learning switch of three and more.

    Parameters
    ----------
    ports
        PORT arguments of the command line, parsed or not.
    cpus
        A worker for each of these processors; None: one worker, wherever the kernel puts it.
    poll
        "adaptive": workers sleep when there is nothing to do. "busy": never.

    Raises
    ------
    UsageError, ResourceError
        A port cannot be opened; those opened before are closed again.

    Notes
    -----
    Threading: one control thread calls `start`, `run` and `stop`; `request_stop` and `snapshot` may come from any
    thread, `request_stop` from a signal handler too.
    """

    def __init__(
        self, ports: Sequence[PortSpec | str], *, cpus: Sequence[int] | None = None, poll: str = "adaptive"
    ) -> None:
        if isinstance(ports, str):
            raise UsageError(f"ports is a string; write a list: [{ports!r}]")
        if poll not in ("adaptive", "busy"):
            raise UsageError(f"poll is {poll!r}; adaptive and busy are possible")
        specs = list(parse_ports(ports))
        echoes = [spec for spec in specs if spec.kind == "echo"]
        if echoes and (len(specs) != 2 or len(echoes) != 1):
            raise UsageError(
                f"echo: reflects one other port, and this pump has {len(specs) - len(echoes)}; give exactly one"
            )
        specs = [spec for spec in specs if spec.kind != "echo"]
        if cpus is not None:
            for cpu in cpus:
                if cpu not in os.sched_getaffinity(0):
                    allowed = sorted(os.sched_getaffinity(0))
                    raise UsageError(f"cpu {cpu} is not among the processors of this process: {allowed}")
        self.ports: list[OpenPort] = []
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._report_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._replan = True
        self._started: float | None = None
        self._threads: list[threading.Thread] = []
        self._told: set[str] = set()
        self._closed = False
        self.workers = [Worker(cpu, poll) for cpu in cpus] if cpus else [Worker(None, poll)]
        self._shares: list[list[Flow]] = [[] for _ in self.workers]
        lanes = max((spec.number("queues") for spec in specs if spec.kind in ("vhost", "tap")), default=1)
        try:
            for spec in specs:
                port = open_port(spec, lanes=lanes, report_fd=self._report_fd, changed=self._changed)
                self.ports.append(port)
                if port.backend is not None:
                    self._epoll.register(port.backend.fileno(), select.EPOLLIN)
            self._by_fd: dict[int, Backend] = {
                p.backend.fileno(): p.backend for p in self.ports if p.backend is not None
            }
            self._switch = Switch(len(self.ports)) if len(self.ports) > 2 else None
            for fd in (self._wake_fd, self._report_fd):
                self._epoll.register(fd, select.EPOLLIN)
        except BaseException:
            self.stop()
            raise

    def _changed(self) -> None:
        self._replan = True

    # -- life --

    def start(self) -> None:
        """Start the workers."""
        if self._threads:
            return
        self._started = time.monotonic()
        for number, worker in enumerate(self.workers):
            thread = threading.Thread(target=worker.run, name=f"vq-worker-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        self._plan()

    def stop(self) -> None:
        """Stop the workers, close all connections and ports; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._publish([[] for _ in self.workers])
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
        os.close(self._wake_fd)
        os.close(self._report_fd)

    def request_stop(self) -> None:
        """Make `run` return soon."""
        self._stopping = True
        if not self._closed:
            os.eventfd_write(self._wake_fd, 1)

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
    ) -> dict[str, Any]:
        """Serve all connections until `request_stop`, the end of `duration`, or until all sources have finished.

        Parameters
        ----------
        duration
            Seconds; None: without end.
        interval
            Seconds between two calls of `on_interval`.
        on_interval
            Gets a snapshot each time.

        Returns
        -------
        dict
            The last snapshot.
        """
        if self._closed:
            raise UsageError("the pump was stopped; make a new one")
        if (duration is not None and duration < 0) or interval <= 0:
            raise UsageError(f"duration {duration} and interval {interval} are seconds, and cannot be negative")
        self.start()
        self._replan = True
        begin = time.monotonic()
        end = None if duration is None else begin + duration
        tick = begin + interval
        finite = all(port.kind not in ("vhost", "tap") for port in self.ports)
        while not self._stopping:
            now = time.monotonic()
            if end is not None and now >= end:
                break
            if on_interval is not None and now >= tick:
                on_interval(self.snapshot())
                tick = max(tick + interval, time.monotonic())
            if finite and all(port.finished for port in self.ports) and self._drained():
                break
            self._look_for_errors()
            waits = [tick - now] if on_interval is not None else []
            waits += [end - now] if end is not None else []
            waits += [DRAIN_S] if finite else []
            waits += [LOOK_S] if any(port.backend is None or port.backend.watch() for port in self.ports) else []
            self.dispatch(max(0.0, min(waits)) if waits else None)
        # Without workers every port has written out what it was given, and its counters are final.
        self._publish([[] for _ in self.workers])
        return self.snapshot()

    def _look_for_errors(self) -> None:
        """Say once what a port found wrong with its file or interface."""
        for port in self.ports:
            if port.error is not None and port.name not in self._told:
                self._told.add(port.name)
                logger.error("port=%s error=%r", port.name, port.error)

    def dispatch(self, timeout: float | None = 0.0) -> None:
        """Wait up to `timeout` seconds (None: until something comes) and serve what is there."""
        for fd, _ in self._epoll.poll(-1 if timeout is None else timeout):
            if fd in self._by_fd:
                self._by_fd[fd].dispatch()
            else:
                os.eventfd_read(fd)
                if fd == self._report_fd:
                    self._report()
        if self._replan:
            self._plan()

    def _report(self) -> None:
        """Say which guests broke a queue, and end the connections whose memory is gone."""
        for port in self.ports:
            if port.backend is None:
                continue
            for queue in port.backend.device.queues:
                report = queue.poll_report()
                if report is not None:
                    head, cause, section = report
                    error = GuestError(queue.index, head, f"({queue.name}) {cause}", section)
                    port.backend.warn(str(error))
                    self._replan = True
            port.backend.check_memory()

    def _drained(self) -> bool:
        before = [port.port.snapshot() for port in self.ports]
        time.sleep(DRAIN_S)
        return before == [port.port.snapshot() for port in self.ports]

    # -- flows --

    def _plan(self) -> None:
        self._replan = False
        flows = make_flows([port.port for port in self.ports], self._switch)
        self._publish(spread(flows, len(self.workers)))
        if len(self.ports) == 2:
            for port, peer in (self.ports, reversed(self.ports)):
                port.follow(carrier=peer.backend is None or bool(peer.port.targets))

    def _publish(self, shares: list[list[Flow]]) -> None:
        """Give each worker its flows. What changes hands is taken from its old worker before its new one gets it."""
        moved = self._moved(shares)
        if moved:
            for worker, share in zip(self.workers, self._shares, strict=True):
                kept = [flow for flow in share if not moved & {(id(port), index) for port, index in flow.endpoints}]
                if len(kept) < len(share):
                    worker.set_plan(Plan(kept))
        for worker, share in zip(self.workers, shares, strict=True):
            worker.set_plan(Plan(share))
        self._shares = shares

    def _moved(self, shares: list[list[Flow]]) -> set[tuple[int, int]]:
        """Endpoints that another worker has at the moment."""
        owner = {
            (id(port), index): number
            for number, share in enumerate(self._shares)
            for flow in share
            for port, index in flow.endpoints
        }
        return {
            key
            for number, share in enumerate(shares)
            for flow in share
            for key in ((id(port), index) for port, index in flow.endpoints)
            if owner.get(key, number) != number
        }

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
