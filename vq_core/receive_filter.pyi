from collections.abc import Iterable
from typing import ClassVar, Literal

Passes = Literal["listed", "all", "none"]
PASSES: dict[str, int]

class ReceiveFilter:
    MACS_MAX: ClassVar[int]
    def __init__(
        self,
        *,
        unicast: Passes = "listed",
        multicast: Passes = "listed",
        broadcast: Passes = "all",
        macs: Iterable[bytes] = (),
        vlans: Iterable[int] | None = None,
    ) -> None: ...
