"""What a service manager is told: that the pump is ready, how its guests are, that it stops (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

__all__ = ["Service"]

WAIT_S: Final = 1.0  # for a service manager that does not read; a pump without one is better than none


class Service:
    """The service manager that started us, if one did (NOTIFY_SOCKET); else nobody is told."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._status = ""

    def ready(self, now: Mapping[str, Any]) -> None:
        """Say that the sockets listen and the workers run, with a first status."""
        self._tell("READY=1", *self._news(now))

    def status(self, now: Mapping[str, Any]) -> None:
        """Say how the guests are, when that has changed since the last time."""
        news = self._news(now)
        if news:
            self._tell(*news)

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._tell("STOPPING=1")

    def _news(self, now: Mapping[str, Any]) -> list[str]:
        status = guests(now)
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


def guests(now: Mapping[str, Any]) -> str:
    """The states of the guests of a snapshot in one line: ``3 ports; guests: 1 listening, 2 running``."""
    ports = now["ports"].values()
    states = Counter(port["state"] for port in ports if port["kind"] == "vhost")
    text = f"{len(ports)} port{'' if len(ports) == 1 else 's'}"
    return f"{text}; guests: {', '.join(f'{states[state]} {state}' for state in sorted(states))}" if states else text
