"""What Python sees of blk_load.pyx."""

from collections.abc import Sequence

from vq_core.driver import DriverQueue

def blk_load_memory_bytes(ring: int, depth: int, size: int, *, queues: int = 1) -> int: ...

class BlkLoad:
    def __init__(
        self,
        queues: Sequence[DriverQueue],
        blocks: int,
        size: int = 4096,
        *,
        depth: int = 32,
        writes: int = 0,
        indirect: bool = False,
        verify: bool = False,
        poll: str = "busy",
        cpu: int | None = None,
        patience: float = 5.0,
        seed: int = 1,
    ) -> None: ...
    def run(self, duration: float = 1.0) -> None: ...
    def stop(self) -> None: ...
    @property
    def counters(self) -> dict[str, int]: ...
    @property
    def seconds(self) -> float: ...
