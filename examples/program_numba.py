"""A program that numba compiles: vq pump gen:size=64 null: --program examples/program_numba.py:drop_short."""

from __future__ import annotations

import numba
from numba import types

import vq

PACKET = types.Record.make_c_struct(
    [
        ("data", types.uintp), ("more", types.uintp), ("head_bytes", types.uint32), ("length", types.uint32),
        ("more_count", types.uint32), ("wants", types.uint16), ("mark", types.uint16),
        ("header", types.NestedArray(dtype=types.uint8, shape=(12,))),
    ]
)  # fmt: skip
PROGRAM = types.uint32(types.voidptr, types.CPointer(PACKET), types.CPointer(types.uint16), types.uint32)


@numba.cfunc(PROGRAM)
def _drop_short(state, packets, verdicts, count):
    others = 0
    packet = numba.carray(packets, count)
    verdict = numba.carray(verdicts, count)
    for i in range(count):
        if packet[i].length < 60:
            verdict[i] = 0xFFFF
            others += 1
    return others


drop_short = vq.NativeProgram(_drop_short, abi=1, name="drop_short")
