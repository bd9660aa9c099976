"""In-flight regions by their bytes: what a back-end has recorded, and what one that has crashed could have left.

Spec: vhost-user, "Inflight I/O tracking".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any, Final

from vq.check.raw_ring import NEXT
from vq_core.driver import Buffer, DriverQueue

__all__ = ["leave_packed", "leave_split", "recorded"]

SPLIT: Final = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
SPLIT_ENTRY: Final = struct.Struct("<B5xHQ")  # inflight, next, counter
# ..., free_head, old_free_head, used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter
PACKED: Final = struct.Struct("<QHHHHHHBB10x")
PACKED_ENTRY: Final = struct.Struct("<BxHHHQHHIQ")  # inflight, next, last, num, counter, id, flags, len, addr


def recorded(fd: int, queue: DriverQueue) -> tuple[int, int, int]:
    """Version, number of entries, and how many are marked as in flight."""
    packed = queue.layout == "packed"
    head, entry = (PACKED, PACKED_ENTRY) if packed else (SPLIT, SPLIT_ENTRY)
    data = os.pread(fd, head.size + queue.size * entry.size, 0)
    _, version, entries, *_ = head.unpack_from(data)
    return version, entries, sum(row[0] != 0 for row in entry.iter_unpack(data[head.size :]))


def leave_split(fd: int, queue: DriverQueue, taken: Sequence[Buffer], exposed: Buffer) -> None:
    """Write what a crash leaves right after `exposed`, taken first of all, was given back and before that was noted.

    The slots of the available ring in which they all stood are made useless: nobody needs them any more.
    """
    marks = {exposed.id: 1, **{buffer.id: 3 + 2 * number for number, buffer in enumerate(taken)}}
    data = SPLIT.pack(0, 1, queue.size, exposed.id, 0)
    for head in range(queue.size):
        data += SPLIT_ENTRY.pack(head in marks, 0, marks.get(head, 0))
    os.pwrite(fd, data, 0)
    queue.avail[2 : 3 + len(taken)] = 0xFFFF
    queue.used[0] = (exposed.id, 0)
    queue.used_head[1] = 1


def leave_packed(fd: int, queue: DriverQueue, taken: Sequence[Buffer], slots: int) -> None:
    """Write what a crash leaves of a ring whose first requests, of `slots` descriptors each, are in flight.

    The addresses in the ring itself are made useless: a back-end has copied the descriptors.
    """
    rows: list[list[int]] = []
    for number, buffer in enumerate(taken):
        first = number * slots
        for slot in range(first, first + slots):
            desc: Any = queue.desc[slot]
            more = NEXT if slot + 1 < first + slots else 0
            row = [0, slot + 1, 0, 0, 0, buffer.id, int(desc["flags"]) & ~NEXT | more, int(desc["len"])]
            rows.append([*row, int(desc["addr"])])
        rows[first][0], rows[first][2:5] = 1, [first + slots - 1, slots, 3 + 2 * number]
        queue.desc["addr"][first : first + slots] = 1 << 60
    free = len(rows)
    rows += [[0, index + 1, 0, 0, 0, 0, 0, 0, 0] for index in range(free, queue.size)]
    data = PACKED.pack(0, 1, queue.size, free, free, 0, 0, 1, 1)
    os.pwrite(fd, data + b"".join(PACKED_ENTRY.pack(*row) for row in rows), 0)
