"""Many threads at once: workers, drivers, control messages and readers of counters; each object in the hands of one.

This is what a free-threaded interpreter is promised (`freethreading_compatible` in setup.py). Under the GIL the workers
run without it all the same, and the others meet between any two of their steps.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest

import vq
from vq import virtio as v
from vq.payload import Region
from vq.ring_driver import RingDriver
from vq_core.chain_worker import ChainWorker
from vq_core.guest_memory import GuestMemory
from vq_core.queue import Queue

Connect = Callable[..., vq.Frontend]
pytest_plugins = ["vq.testing.plugin"]

FEATURES = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_F_RING_PACKED, v.VIRTIO_F_EVENT_IDX, v.VHOST_USER_F_PROTOCOL_FEATURES)
PROTOCOL = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
)
QUEUES = 4  # two for each worker
REQUESTS = 300
PAGE = 4096


class Swallow(vq.HostedDevice):
    """Requests come back empty, from two workers; the last queue is started and stopped all the time."""

    in_order = True

    def __init__(self) -> None:
        self.name = "swallow"
        self.queues = [Queue(index, f"queue{index}") for index in range(QUEUES + 1)]
        self.offer = vq.Offer(FEATURES, PROTOCOL, queue_count=QUEUES + 1, queue_num_answer=QUEUES + 1)
        self.workers = [ChainWorker(self.queues[:2]), ChainWorker(self.queues[2:])]
        self._threads = [threading.Thread(target=worker.run) for worker in self.workers]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for worker, thread in zip(self.workers, self._threads, strict=True):
            worker.stop()
            thread.join()
            worker.close()


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Have threads give up the GIL a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_workers_drivers_and_messages_at_once(vq_frontend: Connect, layout: str) -> None:
    device = Swallow()
    frontend = vq_frontend(device)
    features = FEATURES if layout == "packed" else FEATURES & ~v.mask(v.VIRTIO_F_RING_PACKED)
    frontend.set_features(frontend.negotiate(features, PROTOCOL))
    drivers = [frontend.driver(index, 16) for index in range(QUEUES + 1)]
    assert drivers[0].ring.layout == layout
    # Given out before: an allocator is not for several threads.
    blocks = [driver.ring.memory.alloc(64) for driver in drivers]
    answers: list[list[bytes]] = [[] for _ in range(QUEUES)]
    done = threading.Event()
    seen: list[int] = []

    def drive(driver: RingDriver) -> None:
        for _ in range(REQUESTS):
            answers[driver.index].append(driver.ask(blocks[driver.index]))

    def look() -> None:
        while not done.is_set():
            seen.append(sum(queue.snapshot()["calls"] for queue in device.queues))

    threads = [threading.Thread(target=drive, args=(driver,)) for driver in drivers[:QUEUES]]
    watcher = threading.Thread(target=look)
    for thread in [*threads, watcher]:
        thread.start()
    rounds = 0
    with GuestMemory(PAGE, guest_addr=1 << 40, user_addr=1 << 45) as plugged:
        (row,) = plugged.regions
        region = Region(*row[:4])
        while any(thread.is_alive() for thread in threads) or rounds < 3:
            rounds += 1
            frontend.add_region(region, row[4])
            assert drivers[QUEUES].ask(blocks[QUEUES]) == b""
            drivers[QUEUES].stop()
            frontend.set_call(rounds % QUEUES, drivers[rounds % QUEUES].ring.call_fd)
            frontend.remove_region(region)
            drivers[QUEUES].start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert answers == [[b""] * REQUESTS] * QUEUES
    assert sum(worker.snapshot()["answered"] or 0 for worker in device.workers) == REQUESTS * QUEUES + rounds
    assert seen == sorted(seen)  # counters never go back
