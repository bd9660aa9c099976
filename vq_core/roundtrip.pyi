"""What Python sees of roundtrip.pyx."""

from numpy import float64
from numpy.typing import NDArray

from vq_core.driver import DriverQueue

class RoundTrip:
    def __init__(
        self,
        transmitq: DriverQueue,
        receiveq: DriverQueue,
        size: int = 64,
        *,
        samples: int = 4_000_000,
        poll: str = "busy",
        pause: float = 0.0,
        cpu: int | None = None,
        patience: float = 1.0,
    ) -> None: ...
    def run(self, duration: float = 1.0) -> None: ...
    def stop(self) -> None: ...
    def forget(self) -> None: ...
    @property
    def counters(self) -> dict[str, int]: ...
    @property
    def nanoseconds(self) -> NDArray[float64]: ...
