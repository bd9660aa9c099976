"""What Python sees of traffic.pyx."""

from collections.abc import Iterable, Sequence

from vq_core.driver import DriverQueue

def traffic_memory_bytes(
    queue_size: int, size: int = 65535, *, pairs: int = 1, receive_bytes: int | None = None
) -> int: ...

class Traffic:
    running: bool
    def run(self, duration: float | None = None, packets: int | None = None) -> None: ...
    def stop(self) -> None: ...
    def resume(self) -> None: ...
    @property
    def counters(self) -> dict[str, int]: ...
    @property
    def seconds(self) -> float: ...
    @property
    def window(self) -> int: ...

class Exchange(Traffic):
    def __init__(
        self,
        pairs: Iterable[tuple[DriverQueue, DriverQueue]],
        sizes: int | Sequence[int] = 64,
        *,
        window: int | None = None,
        receive_bytes: int | None = None,
        descriptors: int = 1,
        indirect: bool = False,
        poll: str = "busy",
        cpu: int | None = None,
        patience: float = 1.0,
    ) -> None: ...

class Source(Traffic):
    def __init__(
        self,
        transmitqs: Iterable[DriverQueue],
        sizes: int | Sequence[int] = 64,
        *,
        descriptors: int = 1,
        indirect: bool = False,
        poll: str = "busy",
        cpu: int | None = None,
        patience: float = 1.0,
    ) -> None: ...

class Sink(Traffic):
    def __init__(
        self,
        receiveqs: Iterable[DriverQueue],
        largest: int = 1514,
        *,
        receive_bytes: int | None = None,
        verify: bool = False,
        descriptors: int = 1,
        indirect: bool = False,
        poll: str = "busy",
        cpu: int | None = None,
        patience: float = 1.0,
    ) -> None: ...
