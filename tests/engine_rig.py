"""What the engine's tests share: a guest of our own driver on a VhostPort, without a socket; scattered memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.plan import Plan
from vq_core.ports.vhost import VhostPort
from vq_core.worker import Worker

PAGE = 4096
CANARY = 0xCC
CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF = 1, 2, 1 << 7, 1 << 11, 1 << 15
INDIRECT, EVENT_IDX, VERSION_1, RING_PACKED, IN_ORDER = 1 << 28, 1 << 29, 1 << 32, 1 << 34, 1 << 35
PACKED = VERSION_1 | RING_PACKED
every_layout = pytest.mark.parametrize("layout", [VERSION_1, PACKED], ids=["split", "packed"])


_PATTERN = bytes(1 + (i * 11 + (i >> 7)) % 127 for i in range(4096 + 66000))


def pattern(length: int, seed: int) -> bytes:
    """Bytes that never equal the canary nor zero, so that each one that is written shows."""
    return _PATTERN[seed * 37 % 4096 :][:length]


def signals(fd: int) -> int:
    """Take how often an eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class Arena:
    """Guest memory of one region a page: adjacent for the guest, scattered in every other address space."""

    def __init__(self, memory: GuestMemory, pages: int = 64, start: int = 0x9000_0000) -> None:
        self.memory, self.start, self.size = memory, start, pages * PAGE
        for page in range(pages):
            place = page * 29 % 64 if pages == 64 else pages - 1 - page
            memory.add_region(PAGE, guest_addr=start + page * PAGE, user_addr=0x7E90_0000_0000 + place * 2 * PAGE)
        self._views = [memory.view(start + page * PAGE, PAGE) for page in range(pages)]

    def pieces(self, addr: int, length: int) -> Iterator[memoryview]:
        """The parts of a range, a region each."""
        while length:
            piece = min(length, PAGE - addr % PAGE)
            yield self._views[(addr - self.start) // PAGE][addr % PAGE : addr % PAGE + piece]
            addr += piece
            length -= piece

    def poke(self, addr: int, data: bytes) -> None:
        """Write over the borders of regions."""
        for view in self.pieces(addr, len(data)):
            view[:] = data[: len(view)]
            data = data[len(view) :]

    def peek(self, addr: int, length: int) -> bytes:
        """Read over the borders of regions."""
        return b"".join(self.pieces(addr, length))

    def clean(self) -> None:
        """Fill everything with the canary."""
        for view in self._views:
            view[:] = bytes([CANARY]) * PAGE

    def place(self, at: int, lengths: Sequence[int], gaps: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
        """Lay parts out one after the other from offset `at`: their (address, length), and the offset behind them."""
        parts = []
        for length, gap in zip(lengths, gaps, strict=True):
            at += gap
            parts.append((self.start + at, length))
            at += length
        assert at <= self.size, "the arena is too small for this test"
        return parts, at


class Guest:
    """A pair of our driver's queues, and the port whose pair 0 serves them.

    Parameters
    ----------
    features
        Negotiated virtio features.
    size
        Entries of both rings.
    base
        Position that both rings start at; None: their very beginning. Bits of a packed one that name no slot are left
        out.
    memory
        Guest memory; by default a MiB of its own.
    mtu
        As for VhostPort.configure.
    """

    def __init__(
        self,
        features: int = VERSION_1,
        *,
        size: int = 64,
        base: int | None = None,
        memory: GuestMemory | None = None,
        mtu: int | None = None,
        name: str = "guest",
        start: bool = True,
    ) -> None:
        self.features = features
        self.memory = memory if memory is not None else GuestMemory(1 << 20)
        self.map = MemoryMap(self.memory.regions)
        if base is not None and features & RING_PACKED:
            base = base & 0x8000 | (base & 0x7FFF) % size
        self.receiveq = DriverQueue(self.memory, size, features=features, base=base)
        self.transmitq = DriverQueue(self.memory, size, features=features, base=base)
        self.port = VhostPort(name, 1)
        self.port.configure(features, mtu)
        self.header_bytes = 12 if features & (VERSION_1 | MRG_RXBUF) else 10
        if start:
            self.start(base=base)

    @property
    def rings(self) -> list[tuple[Any, DriverQueue]]:
        return list(zip(self.port.queues, (self.receiveq, self.transmitq), strict=True))

    def start(self, *, base: int | None = None, enabled: bool = True, **options: Any) -> None:
        if base is None:
            base = 0x8000 if self.features & RING_PACKED else 0
        for queue, driver in self.rings:
            queue.start(
                self.map,
                driver.size,
                *driver.addresses,
                base,
                self.features,
                kick_fd=driver.kick_fd,
                call_fd=driver.call_fd,
                enabled=enabled,
                **options,
            )

    def stop(self) -> list[int]:
        """Stop both rings; their bases, of which a packed ring has two that are the same."""
        bases = [queue.stop() for queue, _ in self.rings]
        if self.features & RING_PACKED:
            assert [base >> 16 for base in bases] == [base & 0xFFFF for base in bases]
        return [base & 0xFFFF for base in bases]

    def send(self, data: bytes, header: bytes | None = None) -> Any:
        """Add one packet to the transmitq in a descriptor of its own; not published."""
        return self.transmitq.add(readable=[(header or bytes(self.header_bytes)) + data])

    def post(self, length: int, count: int = 1) -> None:
        """Add receive buffers of `length` payload bytes; not published."""
        for _ in range(count):
            self.receiveq.add(writable=[self.header_bytes + length])

    def received(self) -> list[bytes]:
        """Packets that came into buffers of their own, without their headers."""
        return [token.written(length)[self.header_bytes :] for token, length in self.receiveq.poll()]

    @property
    def to_guest(self) -> dict[str, Any]:
        result: dict[str, Any] = self.port.snapshot()["to_guest"]
        return result

    @property
    def from_guest(self) -> dict[str, Any]:
        result: dict[str, Any] = self.port.snapshot()["from_guest"]
        return result


@contextmanager
def running(*workers: Worker) -> Iterator[tuple[Worker, ...]]:
    """Run workers in threads of their own; stop and join them in the end."""
    threads = [
        threading.Thread(target=worker.run, name=f"test-worker-{i}", daemon=True) for i, worker in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        yield workers
    finally:
        for worker in workers:
            worker.set_plan(Plan())
            worker.stop()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


def asleep(worker: Worker, seconds: float = 60.0) -> None:
    """Wait until a worker sleeps: its rounds stand still."""
    end = time.monotonic() + seconds
    before = -1
    while (rounds := worker.snapshot()["rounds"]) != before:
        before = rounds
        assert time.monotonic() < end, "the worker does not go to sleep"
        time.sleep(0.02)


def send_chain(guest: Guest, data: bytes, descriptors: int) -> None:
    """A packet in so many descriptors: the header shares the first one."""
    data = bytes(guest.header_bytes) + data
    cuts = [guest.header_bytes + 1 + i for i in range(descriptors - 1)]
    guest.transmitq.add([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)])
