"""What Python sees of compiled.pyx."""

from typing import TypedDict

class Compiled(TypedDict):
    compiler: str
    flags: str
    baseline: str
    optimized: bool

def compiled() -> Compiled: ...
