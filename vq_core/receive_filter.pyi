from collections.abc import Iterable
from typing import ClassVar, Literal

_Passes = Literal["listed", "all", "none"]
PASSES: dict[str, int]

class ReceiveFilter:
    MACS_MAX: ClassVar[int]
    def __init__(
        self,
        *,
        unicast: _Passes = "listed",
        multicast: _Passes = "listed",
        broadcast: _Passes = "all",
        macs: Iterable[bytes] = (),
        vlans: Iterable[int] | None = None,
    ) -> None: ...
