"""What the tests of whole pumps share: a pump in a thread, and guests of our own driver on its sockets."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pytest

from vq import virtio as v
from vq.frontend import Frontend, RingSetup
from vq.payload import Region
from vq.pump import Pump
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.traffic import Exchange
from waiting import wait_for

PLAIN = v.mask(v.VIRTIO_F_VERSION_1)
USUAL = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_F_EVENT_IDX)
PACKED = v.mask(v.VIRTIO_F_RING_PACKED)
every_layout = pytest.mark.parametrize("layout", [0, PACKED], ids=["split", "packed"])
PROTOCOL = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ,
    v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    v.VHOST_USER_PROTOCOL_F_RARP,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    v.VHOST_USER_PROTOCOL_F_MTU,
    v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
)
CLEAN = {"lost": 0, "duplicated": 0, "reordered": 0, "changed": 0}


def faults(traffic: Exchange) -> dict[str, int]:
    """What an exchange found to be wrong."""
    return {name: traffic.counters[name] for name in CLEAN}


def mapped(what: str = "memfd:vq-guest-memory") -> int:
    """How many mappings of this process are of a file so called."""
    with open("/proc/self/maps") as maps:
        return sum(what in line for line in maps)


class Guest:
    """A front-end with guest memory and queue pairs of our own driver.

    Parameters
    ----------
    path
        The back-end's socket.
    features
        What is wanted; what is agreed is in `features`.
    pairs, size
        Queue pairs, and entries of each ring.
    memory_bytes
        Of the first region.
    listen
        Wait for the back-end to connect.
    running
        How many pairs are started at once; None: all.
    heir_of
        Take over memory and queues of another guest, which a crash of the back-end has left.
    memory
        Use this in place of a new one; it is closed with the guest.
    """

    def __init__(
        self,
        path: str,
        features: int = USUAL,
        *,
        pairs: int = 1,
        size: int = 256,
        memory_bytes: int = 8 << 20,
        guest_addr: int = 0x4000_0000,
        listen: bool = False,
        running: int | None = None,
        heir_of: Guest | None = None,
        memory: GuestMemory | None = None,
        protocol: int = PROTOCOL,
    ) -> None:
        self.frontend = Frontend.listen(path, timeout=60) if listen else Frontend.connect(path, timeout=60)
        self.features = self.frontend.negotiate(features, protocol)
        self.frontend.set_features(self.features)
        self.heir = heir_of is not None
        if heir_of is not None:
            self.memory, self.receiveqs, self.transmitqs = heir_of.memory, heir_of.receiveqs, heir_of.transmitqs
        else:
            self.memory = memory or GuestMemory(memory_bytes, guest_addr=guest_addr)
            self.receiveqs = [DriverQueue(self.memory, size, features=self.features) for _ in range(pairs)]
            self.transmitqs = [DriverQueue(self.memory, size, features=self.features) for _ in range(pairs)]
        self.share()
        for pair in range(pairs if running is None else running):
            self.start(pair)

    def share(self) -> None:
        """Send the memory table as it stands."""
        regions = self.memory.regions
        self.frontend.set_mem_table([Region(*row[:4]) for row in regions], [row[4] for row in regions])

    def queue(self, index: int) -> DriverQueue:
        """The queue by its virtio index."""
        return (self.transmitqs if index & 1 else self.receiveqs)[index // 2]

    def ring(self, index: int, *, logged: bool = False) -> RingSetup:
        """What is said about a ring: it goes on at the used index, or, packed, as QEMU says it after a crash."""
        driver = self.queue(index)
        base = 0x8000 if self.heir and driver.layout == "packed" else driver.used_idx
        return RingSetup(
            index,
            driver.size,
            *driver.addresses,
            base,
            driver.kick_fd,
            driver.call_fd,
            None,
            driver.guest_addresses[2],
            v.VHOST_VRING_F_LOG if logged else 0,
        )

    def start(self, pair: int = 0, *, enable: bool = True) -> None:
        """Enable and start both rings of a pair, in this order: a started ring drops packets until it is enabled."""
        for index in (2 * pair, 2 * pair + 1):
            self.frontend.enable_ring(index, enable)
            self.frontend.start_ring(self.ring(index), enable=False)

    def stop(self, pair: int = 0) -> list[int]:
        """Stop both rings of a pair; the bases, of which a packed ring has two that are the same."""
        bases = [self.frontend.stop_ring(index) for index in (2 * pair, 2 * pair + 1)]
        if v.has(self.features, v.VIRTIO_F_RING_PACKED):
            assert [base >> 16 for base in bases] == [base & 0xFFFF for base in bases]
        return [base & 0xFFFF for base in bases]

    def enable(self, pair: int, enabled: bool) -> None:
        """Enable or disable a pair."""
        for index in (2 * pair, 2 * pair + 1):
            self.frontend.enable_ring(index, enabled)

    def streams(self, other: Guest | None = None) -> list[tuple[DriverQueue, DriverQueue]]:
        """(transmitq, receiveq) of each pair, for an Exchange with `other` (ourselves: an echo)."""
        return list(zip(self.transmitqs, (other or self).receiveqs, strict=True))

    def send(self, data: bytes, header: bytes | None = None, pair: int = 0) -> None:
        """Send one packet and kick."""
        self.transmitqs[pair].add([(header or bytes(12)) + data])
        self.transmitqs[pair].kick()

    def post(self, length: int, count: int = 1, pair: int = 0) -> None:
        """Give receive buffers of `length` payload bytes."""
        for _ in range(count):
            self.receiveqs[pair].add(writable=[12 + length])
        self.receiveqs[pair].kick()

    def receive(self, seconds: float = 60.0, pair: int = 0) -> tuple[bytes, bytes]:
        """Header and payload of the next packet."""
        assert self.receiveqs[pair].wait(seconds), "no packet came"
        ((token, length),) = self.receiveqs[pair].poll(1)
        data = token.written(length)
        return data[:12], data[12:]

    def close(self) -> None:
        """Go without a word, as a process that dies."""
        self.frontend.close()
        self.memory.close()
        for driver in (*self.receiveqs, *self.transmitqs):
            driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def pump_process(*ports: str) -> Iterator[subprocess.Popen[bytes]]:
    """A pump in a process of its own, which is killed without mercy at the end of the block."""
    child = subprocess.Popen([sys.executable, "-m", "vq", "pump", *ports], stdout=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@contextmanager
def pumping(
    *ports: str | Sequence[str], cpus: Sequence[int] | None = None, poll: str = "adaptive", program: Any = None
) -> Iterator[Pump]:
    """A pump whose control loop runs in a thread of its own, which ends with the block."""
    box: queue.Queue[Pump | BaseException] = queue.Queue()

    def loop() -> None:
        try:
            with Pump(ports, cpus=cpus, poll=poll, program=program) as pump:
                box.put(pump)
                pump.run()
        except BaseException as problem:
            box.put(problem)

    thread = threading.Thread(target=loop, name="test-pump", daemon=True)
    thread.start()
    pump = box.get(timeout=60)
    if isinstance(pump, BaseException):
        raise pump
    try:
        yield pump
    finally:
        pump.request_stop()
        thread.join(60)
        assert not thread.is_alive(), "the pump does not end"
        if not box.empty():
            problem = box.get()
            assert isinstance(problem, BaseException)
            raise problem


def two_cpus() -> list[int]:
    """Processors for two workers; the same one twice where there is no other."""
    cpus = sorted(os.sched_getaffinity(0))
    return (cpus * 2)[:2]


def port_counters(pump: Pump, number: int) -> dict[str, Any]:
    """The snapshot of a port by its place."""
    ports: dict[str, Any] = pump.snapshot()["ports"]
    result: dict[str, Any] = ports[pump.ports[number].name]
    return result


class Background:
    """An exchange in a thread, to be stopped and looked at in the end."""

    def __init__(self, streams: list[Any], sizes: Any = (64, 1514), **options: Any) -> None:
        self.traffic = Exchange(streams, sizes, **({"poll": "sleep", "patience": 3} | options))
        self.problem: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.traffic.run(duration=60)
        except BaseException as problem:
            self.problem = problem

    def goes_on(self, packets: int = 50) -> None:
        """Wait until more packets have come back."""
        before = self.traffic.counters["verified"]
        wait_for(lambda: self.problem or self.traffic.counters["verified"] >= before + packets)
        assert self.problem is None

    def finish(self, **wrong: int) -> dict[str, int]:
        self.traffic.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert self.problem is None
        assert faults(self.traffic) == CLEAN | wrong
        return self.traffic.counters
