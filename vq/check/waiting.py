"""Waiting that always ends."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["until"]


def until(condition: Callable[[], object], seconds: float) -> bool:
    """Look again and again; tell whether the condition came true before the time was over."""
    end = time.monotonic() + seconds
    pause = 0.0001
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(pause)
        pause = min(0.005, pause * 1.5)
    return True
