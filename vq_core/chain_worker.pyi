"""What Python sees of chain_worker.pyx."""

from collections.abc import Sequence
from typing import Literal

from vq_core.handover import Mailbox
from vq_core.queue import Queue

class ChainWorker:
    mailbox: Mailbox
    queues: tuple[Queue, ...]
    cpu: int | None
    def __init__(
        self,
        queues: Sequence[Queue],
        *,
        limit: int = 4096,
        cpu: int | None = None,
        poll: Literal["adaptive", "busy"] = "adaptive",
    ) -> None: ...
    @property
    def report_fd(self) -> int | None: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def snapshot(self) -> dict[str, int | None]: ...
