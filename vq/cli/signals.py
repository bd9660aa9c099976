"""The signals that ask a command to end in order."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

__all__ = ["AskedTwice", "Ending", "ending_signals", "handling"]

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S: Final = 0.5


class AskedTwice(KeyboardInterrupt):
    """A second signal while a command ends in order: it ends at once.

    Parameters
    ----------
    number
        Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Ending:
    """Remembers the signal that asked a command to end in order.

    ``timeout`` sends its signal to the command and then to the command's group: what follows within half a second is
    the same request. Asked for again later, the command ends at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif now - self._since > AGAIN_S:
            raise AskedTwice(number)


@contextmanager
def ending_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give SIGINT, SIGTERM and SIGHUP to `handler`; SIGHUP stays ignored where it was (``nohup``)."""
    numbers = [n for n in ENDING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def handling(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give one signal to `handler`."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
