from collections.abc import Callable
from typing import Any

from numpy import uint8, uint16, uint32
from numpy.typing import NDArray

ABI: int
PASS: int
REFLECT: int
DROP: int
HEADS_MAX: int
SIGNATURE: str

class Program:
    name: str
    def bound(self) -> Program: ...

class NativeProgram(Program):
    def __init__(self, function: Any, *, abi: int, state: int = 0, name: str = "") -> None: ...

class PythonProgram(Program):
    error: BaseException | None
    def __init__(self, function: Callable[[Burst], Any], name: str = "") -> None: ...

class Burst:
    count: int
    def __len__(self) -> int: ...
    @property
    def lengths(self) -> NDArray[uint32]: ...
    @property
    def verdicts(self) -> NDArray[uint16]: ...
    def heads(self, size: int) -> NDArray[uint8]: ...
