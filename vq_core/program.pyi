from collections.abc import Callable
from typing import Any

from numpy import dtype, uint16
from numpy.typing import NDArray

from vq_core.packet_arrays import PacketArrays

ABI: int
PASS: int
REFLECT: int
DROP: int
UINT16: dtype[uint16]

class Program:
    name: str
    def bound(self) -> Program: ...

def bind(program: Program) -> Program: ...

class NativeProgram(Program):
    def __init__(self, function: Any, *, abi: int, state: int = 0, name: str = "") -> None: ...

class PythonProgram(Program):
    error: BaseException | None
    def __init__(self, function: Callable[[Burst], Any], name: str = "") -> None: ...

class Burst(PacketArrays):
    @property
    def verdicts(self) -> NDArray[uint16]: ...
