from numpy import uint8
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Buffer

LENGTH_MAX: int

class PacketRows:
    count: int
    def __init__(self, data: Buffer | NDArray[uint8], lengths: ArrayLike | None = None) -> None: ...
