class InflightRegion:
    num_queues: int
    queue_size: int
    size: int
    def __init__(
        self, fd: int, size: int, offset: int, num_queues: int, queue_size: int, packed: bool = False
    ) -> None: ...
    @property
    def lost(self) -> bool: ...

class InflightQueue:
    def __init__(self, region: InflightRegion, index: int, num: int, packed: bool) -> None: ...

def inflight_bytes(num_queues: int, queue_size: int, packed: bool) -> int: ...
