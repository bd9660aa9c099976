"""What Python sees of counters.pyx."""

from typing import Final

DROP_NAMES: Final[tuple[str, ...]]
BURST_NAMES: Final[tuple[str, ...]]
