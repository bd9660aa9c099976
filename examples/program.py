"""Programs between ports, in Python: vq pump gen:size=64 null: --duration 1 --program examples/program.py:no_ipv6."""

from __future__ import annotations

from typing import Any

import numpy as np

import vq
from vq_core.program import DROP, REFLECT


def no_ipv6(burst: vq.Burst) -> Any:
    """Let everything pass but IPv6."""
    found = burst.field(12, ">u2") == 0x86DD
    if not found.any():
        return None
    return np.where(found, DROP, 0)


def mirror(burst: vq.Burst) -> Any:
    """Send back what is longer than a full Ethernet frame, and let the rest pass."""
    return np.where(burst.lengths > 1518, REFLECT, 0)
