"""The traffic engine and the real device side in one process: every layout, ring size and shape of buffers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from driver_rig import EVENT_IDX, LAYOUTS, every_layout
from engine_rig import running
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.plan import Plan
from vq_core.ports.vhost import VhostPort
from vq_core.traffic import Exchange, traffic_memory_bytes
from vq_core.worker import Worker

INDIRECT, MRG_RXBUF = 1 << 28, 1 << 15
SIZES = (64, 1514, 600, 67)
CLEAN = {"lost": 0, "duplicated": 0, "reordered": 0, "changed": 0}


@contextmanager
def echoed(features: int, size: int, base: int | None = None) -> Iterator[tuple[DriverQueue, DriverQueue]]:
    """A transmitq and a receiveq of one device whose worker sends everything back; stopped in the end."""
    with GuestMemory(traffic_memory_bytes(size, max(SIZES))) as memory:
        receiveq, transmitq = (DriverQueue(memory, size, features=features, base=base) for _ in range(2))
        port = VhostPort("guest", 1)
        port.configure(features, None)
        for queue, driver in zip(port.queues, (receiveq, transmitq), strict=True):
            fds = {"kick_fd": driver.kick_fd, "call_fd": driver.call_fd}
            position = driver.avail_idx | driver.used_idx << 16 if driver.layout == "packed" else driver.avail_idx
            queue.start(MemoryMap(memory.regions), size, *driver.addresses, position, features, enabled=True, **fds)
        with running(Worker()) as (worker,):
            worker.set_plan(Plan([(port, 0, port, 0)]))
            yield transmitq, receiveq
        for queue in port.queues:
            assert queue.broken is None, queue.broken
            queue.stop()
        transmitq.close()
        receiveq.close()


def check(engine: Exchange, packets: int) -> None:
    end = threading.Timer(20, engine.stop)  # a device that broke its ring takes nothing any more
    end.start()
    try:
        engine.run(packets=packets)
    finally:
        end.cancel()
    counters = engine.counters
    assert {name: counters[name] for name in CLEAN} == CLEAN
    assert counters["sent"] == counters["verified"] == packets


@every_layout
@pytest.mark.parametrize("features", [0, EVENT_IDX, MRG_RXBUF | EVENT_IDX])
@pytest.mark.parametrize("poll", ["busy", "sleep"])
def test_features(layout: str, features: int, poll: str) -> None:
    with echoed(LAYOUTS[layout] | features, 64) as queues:
        check(Exchange([queues], SIZES, poll=poll), 20_000)


@pytest.mark.parametrize(
    ("layout", "size"), [("split", 2), ("split", 1024), ("packed", 1), ("packed", 3), ("packed", 5), ("packed", 1000)]
)
def test_ring_sizes(layout: str, size: int) -> None:
    with echoed(LAYOUTS[layout] | EVENT_IDX, size) as queues:
        check(Exchange([queues], SIZES, poll="sleep"), 3_000 if size < 8 else 50_000)


@every_layout
@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize(("descriptors", "indirect"), [(3, False), (4, False), (2, True), (16, True)])
def test_shapes_of_buffers(layout: str, size: int, descriptors: int, indirect: bool) -> None:
    """Chains of three in a ring of four run over its end at each place."""
    with echoed(LAYOUTS[layout] | INDIRECT | EVENT_IDX, size) as queues:
        check(Exchange([queues], SIZES, descriptors=descriptors, indirect=indirect, poll="sleep"), 5_000)


@every_layout
def test_merged_buffers(layout: str) -> None:
    with echoed(LAYOUTS[layout] | MRG_RXBUF, 128) as queues:
        check(Exchange([queues], SIZES, receive_bytes=200, poll="sleep"), 20_000)


@pytest.mark.parametrize(
    ("layout", "base"), [("split", 65530), ("packed", 0x0000), ("packed", 0x003E), ("packed", 0x803F)]
)
def test_bases(layout: str, base: int) -> None:
    with echoed(LAYOUTS[layout] | EVENT_IDX, 64, base) as queues:
        check(Exchange([queues], SIZES, poll="sleep"), 10_000)
