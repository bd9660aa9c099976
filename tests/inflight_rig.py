"""What the tests of the in-flight region share: the region, a ring of our own driver, and engines that come and go."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

import reference_inflight as reference
from engine_rig import RING_PACKED
from vq_core.driver import DriverQueue
from vq_core.inflight import InflightRegion, inflight_bytes

BEGINNING = {False: 0, True: 0x8000_8000}  # what QEMU says for a packed ring whose back-end is gone


class InflightFile:
    """The file of a region, as a front-end keeps it."""

    def __init__(self, features: int, queues: int = 1, size: int = 16) -> None:
        self.packed = bool(features & RING_PACKED)
        self.queues, self.size = queues, size
        self.bytes = inflight_bytes(queues, size, self.packed)
        self.fd = os.memfd_create("inflight")
        os.ftruncate(self.fd, self.bytes)

    def map(self) -> InflightRegion:
        """Map it, as a back-end does with what the front-end gives it."""
        return InflightRegion(self.fd, self.bytes, 0, self.queues, self.size, self.packed)

    def read(self, index: int = 0) -> bytes:
        """The part of a queue."""
        each = self.bytes // self.queues
        return os.pread(self.fd, each, index * each)

    def write(self, data: bytes, index: int = 0) -> None:
        """Overwrite the part of a queue."""
        os.pwrite(self.fd, data, index * (self.bytes // self.queues))

    def found(self, queue: DriverQueue, index: int = 0) -> reference.Found | None:
        """What the reference reads in it, beside the ring of this driver."""
        if self.packed:
            flags = [int(word) for word in queue.desc["flags"]]
            return reference.packed(self.read(index), self.size, queue.size, flags)
        return reference.split(self.read(index), self.size, queue.size, int(queue.used_head[1]))

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def waiting_ids(queue: DriverQueue, avail: int) -> list[int]:
    """Ids of the buffers that the ring has from position `avail` on, not taken yet; those of a packed ring by slot."""
    if queue.layout == "split":
        ring, idx = queue.avail[2:], int(queue.avail[1])
        return [int(ring[position % queue.size]) for position in range(avail, avail + (idx - avail) % 65536)]
    slot, wrap, ids = avail & 0x7FFF, avail >> 15, []
    for _ in range(queue.size):
        desc: Any = queue.desc[slot]
        flags = int(desc["flags"])
        if flags & (reference.AVAIL | reference.USED) != (reference.AVAIL if wrap else reference.USED):
            break
        if not flags & reference.NEXT:
            ids.append(int(desc["id"]))
        slot = (slot + 1) % queue.size
        wrap ^= slot == 0
    return ids
