from os import PathLike

from vq_core.port import Port

FAULTS: tuple[str, ...]
MAGIC_MICRO: int
MAGIC_NANO: int

class PcapPort(Port):
    path: str
    write: bool
    def __init__(
        self,
        name: str,
        path: str | PathLike[str],
        *,
        write: bool = False,
        snaplen: int | None = None,
        speed: float = 0.0,
        loop: int = 1,
    ) -> None: ...
    def close(self) -> None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def cut_packets(self) -> int: ...
