"""How much is logged of what a peer can have us log without end."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["REPEAT_S", "WARNINGS_MAX", "Throttle"]

WARNINGS_MAX: Final = 10  # of one device at once; one more each second
REPEAT_S: Final = 30.0  # until the same words are logged again: QEMU reconnects each second, with the same mistake


class Throttle:
    """Says which lines are logged: beyond `WARNINGS_MAX` at once one a second, the same twice only after `REPEAT_S`.

    Notes
    -----
    Threading: the control thread.
    """

    def __init__(self) -> None:
        self._left = float(WARNINGS_MAX)  # that may be logged now
        self._at = time.monotonic()
        self._unsaid = 0
        self._said = ("", 0.0)  # the last line, and when

    def passes(self, text: str) -> str | None:
        """Ask for one line.

        Returns
        -------
        str or None
            None: not now. Else what to put behind it, which tells how many were not logged meanwhile.
        """
        now = time.monotonic()
        self._left = min(WARNINGS_MAX, self._left + now - self._at)
        self._at = now
        last, when = self._said
        if self._left < 1 or (text == last and now - when < REPEAT_S):
            self._unsaid += 1
            return None
        self._left -= 1
        self._said = (text, now)
        more = f" unsaid={self._unsaid}" if self._unsaid else ""
        self._unsaid = 0
        return more
