"""How many packets are published at once where both ends are rings of guests."""

from __future__ import annotations

from typing import Final

from vq.errors import UsageError

__all__ = ["SUB_BURST", "SUB_BURST_MAX", "check_sub_burst"]

SUB_BURST: Final = 16
SUB_BURST_MAX: Final = 32  # a whole burst


def check_sub_burst(value: int, name: str = "sub_burst") -> None:
    """Refuse a number of packets that no worker can publish at once.

    Parameters
    ----------
    value
        Packets.
    name
        What the caller calls it, for the error.

    Raises
    ------
    UsageError
        It is outside 1 to 32.
    """
    if not 1 <= value <= SUB_BURST_MAX:
        raise UsageError(f"{name} is {value}; write 1 to {SUB_BURST_MAX} packets")
