"""What Python sees of compiled.pyx."""

from typing import TypedDict, type_check_only

@type_check_only
class Compiled(TypedDict):
    compiler: str
    flags: str
    baseline: str
    optimized: bool

def compiled() -> Compiled: ...
