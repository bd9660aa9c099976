from vq_core.port import Port

def frame(size: int) -> bytes: ...

class GenPort(Port):
    def __init__(
        self, name: str, size: int = 64, count: int | None = None, rate: int | None = None, endpoints: int = 1
    ) -> None: ...
