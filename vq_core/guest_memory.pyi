"""What Python sees of guest_memory.pyx."""

from types import TracebackType
from typing import Self

class Region:
    guest_addr: int
    user_addr: int
    size: int
    mmap_offset: int
    fd: int
    def __init__(
        self, size: int, guest_addr: int, user_addr: int, *, mmap_offset: int = 0, hugepages: bool = False
    ) -> None: ...
    def close(self) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Block:
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    guest_addr: int
    size: int
    @property
    def user_addr(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class GuestMemory:
    def __init__(
        self,
        size: int,
        *,
        guest_addr: int = 0x4000_0000,
        user_addr: int = 0x7E12_0000_0000,
        mmap_offset: int = 0,
        hugepages: bool = False,
    ) -> None: ...
    def add_region(
        self,
        size: int,
        *,
        guest_addr: int | None = None,
        user_addr: int | None = None,
        mmap_offset: int = 0,
        hugepages: bool = False,
    ) -> Region: ...
    @property
    def regions(self) -> list[tuple[int, int, int, int, int]]: ...
    def alloc(self, size: int, align: int = 64) -> Block: ...
    def view(self, guest_addr: int, length: int) -> memoryview: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None: ...
