"""The memory maps of one connection that something still uses.

A chain or a burst that a device in Python has taken keeps the map in which its bytes lie, and a view of it does so too.
A front-end that changes its memory whenever it has made a chain available would have one map kept for each of them, up
to all mappings that a process may have.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakSet

from vq.errors import ResourceError
from vq_core.memory import MemoryMap

__all__ = ["MAPS_MAX", "MemoryMaps"]

MAPS_MAX: Final = 64  # of at most 509 regions each; a process may have 65530 mappings


class MemoryMaps:
    """Knows which maps there are, and keeps none of them."""

    def __init__(self) -> None:
        self._alive: WeakSet[MemoryMap] = WeakSet()

    def note(self, memory: MemoryMap | None) -> None:
        """There is another map; None: there is none."""
        if memory is not None:
            self._alive.add(memory)

    def check(self) -> None:
        """Insist that there is room for one more.

        Raises
        ------
        ResourceError
            Too many are in use.
        """
        if len(self._alive) >= MAPS_MAX:
            remedy = "the device completes what it has taken before them first"
            raise ResourceError(f"{MAPS_MAX} memory tables are in use by chains that the device holds", remedy=remedy)
