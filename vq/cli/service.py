"""What a service manager is told: that we are ready, how it goes, that we live and that we stop (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

__all__ = ["Service", "guests"]

WAIT_S: Final = 1.0  # for a service manager that does not read; a pump without one is better than none


class Service:
    """The service manager that started us, if one did (NOTIFY_SOCKET); else nobody is told."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._status = ""
        self._period = _watchdog_period() if self._address else None
        self._due = time.monotonic()

    def ready(self, status: str) -> None:
        """Say that the sockets listen and the workers run, with a first status."""
        self._tell("READY=1", *self._news(status))

    def status(self, status: str) -> None:
        """Say how the guests are, when that has changed since the last time."""
        news = self._news(status)
        if news:
            self._tell(*news)

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._tell("STOPPING=1")

    @property
    def alive(self) -> Callable[[], float] | None:
        """What the control loop calls in each of its turns if a watchdog waits for us: see `watchdog`."""
        return None if self._period is None else self.watchdog

    def watchdog(self) -> float:
        """Say that we live, when that is due; gives the seconds until it is due again."""
        assert self._period is not None
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._period
            self._tell("WATCHDOG=1")
        return self._due - now

    def _news(self, status: str) -> list[str]:
        if status == self._status:
            return []
        self._status = status
        return [f"STATUS={status}"]

    def _tell(self, *lines: str) -> None:
        if self._address[:1] not in ("/", "@"):
            return
        # An @ stands for the zero byte of an abstract name.
        address = self._address if self._address[0] == "/" else "\0" + self._address[1:]
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(WAIT_S)
            sock.sendto("\n".join(lines).encode(), address)


def _watchdog_period() -> float | None:
    """Seconds between two signs of life: half of what the service manager waits; None: it does not wait for us."""
    text = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not meant or not (text.isascii() and text.isdigit()) or int(text) == 0:
        return None
    return int(text) / 2e6


def guests(now: Mapping[str, Any]) -> str:
    """The states of the guests of a snapshot in one line: ``3 ports; guests: 1 listening, 2 running``."""
    ports = now["ports"].values()
    states = Counter(port["state"] for port in ports if port["kind"] == "vhost")
    text = f"{len(ports)} port{'' if len(ports) == 1 else 's'}"
    return f"{text}; guests: {', '.join(f'{states[state]} {state}' for state in sorted(states))}" if states else text
