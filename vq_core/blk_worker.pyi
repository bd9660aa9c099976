"""What Python sees of blk_worker.pyx."""

from collections.abc import Sequence
from typing import Any, Literal

from vq_core.disk import Disk
from vq_core.handover import Mailbox
from vq_core.pool import Pool
from vq_core.queue import Queue

class BlkWorker:
    RANGES_MAX: int
    DISCARD_SECTORS_MAX: int
    WRITE_ZEROES_SECTORS_MAX: int
    disk: Disk
    queues: tuple[Queue, ...]
    pool: Pool
    cpu: int | None
    mailbox: Mailbox
    def __init__(
        self,
        disk: Disk,
        queues: Sequence[Queue],
        cpu: int | None = None,
        poll: Literal["adaptive", "busy"] | str = "adaptive",
    ) -> None: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def snapshot(self) -> dict[str, Any]: ...
    def queue_snapshot(self, index: int) -> dict[str, int]: ...
