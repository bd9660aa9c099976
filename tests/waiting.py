"""Waiting, in tests: until something is so, with an end."""

import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until `condition` gives something true, and give that."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.0005)
    return result
