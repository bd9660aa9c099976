"""Hosting one device: its back-end, its threads, and the loop that serves both until somebody asks for the end."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

from vq.backend import Backend
from vq.closing import Closing
from vq.errors import UsageError
from vq.hosted_device import HostedDevice, check_hosted
from vq.stopping import Stop
from vq.waker import Waker

__all__ = ["Server", "serve"]


class Server(Closing):
    """One device behind one socket, with a loop of its own; the device is closed with it.

    Parameters
    ----------
    device
        It is started before the first front-end comes.
    path, client, fd, mode
        As for `vq.backend.Backend`.

    Raises
    ------
    UsageError
        The device is a class, not an object of it, or something else.
    UsageError, ResourceError
        The socket cannot be made; the device is closed then.

    Notes
    -----
    Threading: one control thread; `request_stop` and `call` may come from any thread and from signal handlers.
    """

    def __init__(
        self,
        device: HostedDevice,
        *,
        path: str | os.PathLike[str] | None = None,
        client: bool = False,
        fd: int | None = None,
        mode: int | None = None,
    ) -> None:
        check_hosted(device)
        self.device = device
        self.backend: Backend | None = None
        self._stopping = False
        self._closed = False
        self._calls: list[Callable[[], object]] = []
        self._epoll = select.epoll()
        self._waker = Waker()
        try:
            self.device.start()
            self.backend = Backend(device, path=path, client=client, fd=fd, mode=mode)
            for watched in (self._waker.fileno(), self.backend.fileno(), device.report_fd):
                if watched is not None:
                    self._epoll.register(watched, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection, stop the device's threads, release everything; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self.disconnect()
        self.device.close()
        self._epoll.close()
        self._waker.close()

    def disconnect(self) -> None:
        """End the connection and stop listening; the device is still there."""
        if self.backend is not None:
            self.backend.close()

    def request_stop(self) -> None:
        """Make `run` return soon."""
        self._stopping = True
        self._waker.wake()

    def call(self, action: Callable[[], object]) -> None:
        """Have `run` call this in the control thread, soon."""
        self._calls.append(action)
        self._waker.wake()

    def run(
        self,
        duration: float | None = None,
        *,
        changed: Callable[[], None] = lambda: None,
        alive: Callable[[], float] | None = None,
    ) -> None:
        """Serve until `request_stop`, the end of `duration` seconds, or the end of an inherited connection.

        Parameters
        ----------
        duration
            Seconds; None: without end.
        changed
            Called after each turn of the loop: the state of the connection may have changed.
        alive
            Called in each turn of the loop; gives the seconds until it wants to be called again.
        """
        if self._closed or self.backend is None:
            raise UsageError("the server was closed; make a new one")
        end = None if duration is None else time.monotonic() + duration
        while not self._stopping and self.backend.state != "closed":
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            waits = [wait for wait in (left, None if alive is None else alive()) if wait is not None]
            self.dispatch(min(waits, default=None))
            changed()

    def dispatch(self, timeout: float | None = 0.0) -> None:
        """Wait up to `timeout` seconds (None: until something comes) and serve what is there."""
        assert self.backend is not None
        for fd, _ in self._epoll.poll(-1 if timeout is None else timeout):
            if fd == self.backend.fileno():
                self.backend.dispatch()
                continue
            os.eventfd_read(fd)
            if fd == self.device.report_fd:
                self.backend.report()
        for _ in range(len(self._calls)):  # one that calls again has its next turn after everybody else's
            self._calls.pop(0)()


def serve(
    device: HostedDevice,
    *,
    socket_path: str | os.PathLike[str] | None = None,
    client: bool = False,
    fd: int | None = None,
    mode: int | None = None,
    duration: float | None = None,
) -> None:
    """Host a device until SIGINT or SIGTERM, and close it.

    Parameters
    ----------
    device
        A `vq.Device`, or another `vq.HostedDevice`.
    socket_path, client, fd, mode
        As `path`, `client`, `fd` and `mode` of `vq.Backend`.
    duration
        Seconds, then it returns by itself.

    Raises
    ------
    UsageError, ResourceError
        The socket cannot be made.

    Notes
    -----
    Signals are handled in the main thread only, and as before when it returns; elsewhere use `vq.Server`.
    """
    stop = Stop()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in ((signal.SIGINT, signal.SIGTERM) if main else ())}
    try:
        with Server(device, path=socket_path, client=client, fd=fd, mode=mode) as server:
            stop.attach(server)
            server.run(duration)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
