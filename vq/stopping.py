"""The end of what runs, asked for by a signal."""

from __future__ import annotations

from types import FrameType
from typing import Protocol

__all__ = ["Stop"]


class Stoppable(Protocol):
    """What runs until somebody asks for its end."""

    def request_stop(self) -> None:
        """Ask for the end; from signal handlers too, and more than once."""


class Stop:
    """A signal handler that asks for the end, also of what is there only after the signal came.

    Who waits for a socket to appear may send a signal at once: the handler has to stand before the socket does.
    """

    def __init__(self) -> None:
        self._running: Stoppable | None = None
        self._asked = False

    def attach(self, running: Stoppable) -> None:
        """Name what runs; it is stopped at once if a signal came already."""
        self._running = running
        if self._asked:
            running.request_stop()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._running is not None:
            self._running.request_stop()
