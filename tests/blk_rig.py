"""What the tests of the block device share: a disk, its worker, and a guest of our own driver, without a socket."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine_rig import RING_PACKED, VERSION_1
from vq_core.blk_worker import BlkWorker
from vq_core.disk import Disk
from vq_core.driver import Buffer, DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.queue import Queue

SECTOR = 512
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2


def header(kind: int, sector: int = 0, reserved: int = 0) -> bytes:
    """The first 16 bytes of a request (VIRTIO 1.3, 5.2.6)."""
    return struct.pack("<IIQ", kind, reserved, sector)


def ranges(*wanted: tuple[int, int, int]) -> bytes:
    """Segments of DISCARD and WRITE_ZEROES: sector, number of sectors, flags."""
    return b"".join(struct.pack("<QII", *one) for one in wanted)


def content(length: int, seed: int = 1) -> bytes:
    """Bytes that differ from sector to sector."""
    return b"".join(struct.pack("<II", seed, i) * (SECTOR // 8) for i in range(length // SECTOR))


class BlkGuest:
    """One request queue of our own driver on a worker, which runs in threads as in a device.

    Parameters
    ----------
    disk
        It is closed in the end.
    features
        Negotiated virtio features.
    size
        Entries of the ring.
    """

    def __init__(
        self,
        disk: Disk,
        features: int = VERSION_1,
        *,
        size: int = 64,
        memory: GuestMemory | None = None,
        start: bool = True,
        **options: Any,
    ) -> None:
        self.disk = disk
        self.features = features
        self.memory = memory if memory is not None else GuestMemory(4 << 20)
        self.map = MemoryMap(self.memory.regions)
        self.driver = DriverQueue(self.memory, size, features=features)
        self.queue = Queue(0, "requestq0")
        self.worker = BlkWorker(disk, [self.queue])
        self.threads = [threading.Thread(target=self.worker.run, daemon=True)]
        self.threads += [threading.Thread(target=self.worker.pool.serve, daemon=True) for _ in range(4)]
        for thread in self.threads:
            thread.start()
        if start:
            self.start(**options)

    def start(self, *, base: int | None = None, **options: Any) -> None:
        if base is None:
            base = 0x8000 if self.features & RING_PACKED else 0
        fds = {"kick_fd": self.driver.kick_fd, "call_fd": self.driver.call_fd}
        options = {"enabled": True, "in_order": False, **fds, **options}
        self.queue.start(self.map, self.driver.size, *self.driver.addresses, base, self.features, **options)

    def close(self) -> None:
        """Stop everything, in the order in which a device does."""
        if self.queue.started:
            self.queue.stop()
        self.worker.stop()
        self.threads[0].join(60)
        self.worker.pool.stop()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        self.worker.close()
        self.disk.close()

    # -- requests --

    def add(self, readable: Sequence[Any], writable: Sequence[Any], *, indirect: bool = False) -> Buffer:
        return self.driver.add(readable, writable, indirect=indirect)

    def go(self) -> None:
        """Make what was added available."""
        self.driver.publish()
        self.driver.kick()

    def wait(self, count: int = 1, seconds: float = 60) -> list[tuple[Buffer, int]]:
        """Wait until so many requests are used."""
        done: list[tuple[Buffer, int]] = []
        end = time.monotonic() + seconds
        while len(done) < count:
            done += self.driver.poll()
            assert time.monotonic() < end, f"{len(done)} of {count} requests are done; queue: {self.queue.broken}"
            time.sleep(0.0002)
        return done

    def ask(
        self, kind: int, sector: int = 0, data: bytes = b"", size: int = 0, *, indirect: bool = False
    ) -> tuple[int, bytes, int]:
        """One request, from beginning to end: its status, what was read, and the used length."""
        readable = [header(kind, sector)] + ([data] if data else [])
        buffer = self.add(readable, [*([size] if size else []), 1], indirect=indirect)
        self.go()
        ((done, length),) = self.wait()
        assert done is buffer
        written = b"".join(bytes(part) for part in buffer.writable)
        return written[-1], written[:-1], length

    def broken(self, seconds: float = 60) -> str:
        """Wait until the queue is broken, and say why."""
        end = time.monotonic() + seconds
        while self.queue.broken is None:
            assert time.monotonic() < end, "the queue goes on"
            time.sleep(0.001)
        return self.queue.broken


@contextmanager
def blk_guest(
    path: Path | None, features: int = VERSION_1, *, read_only: bool = False, **options: Any
) -> Iterator[BlkGuest]:
    """A guest on a file; None is the null disk of 1 MiB."""
    disk = Disk(None, read_only, size=1 << 20) if path is None else Disk(path, read_only)
    guest = BlkGuest(disk, features, **options)
    try:
        yield guest
    finally:
        guest.close()


def make_file(path: Path, size: int = 1 << 20) -> bytes:
    """Write a file of known content."""
    data = content(size)
    path.write_bytes(data)
    os.sync()
    return data
