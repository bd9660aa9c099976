from collections.abc import Iterable
from typing import Any

from vq_core.port import Port

class Plan:
    owned: list[tuple[Port, int]]
    def __init__(self, flows: Iterable[tuple[Any, ...]] = (), *, sub_burst: int = 16) -> None: ...
