"""The main job without a virtual machine: our driver and our engine in one process, every packet verified.

The back-end half is a whole `Pump` with one vhost port in echo, the front-end half a `Frontend` with rings and buffers
in a memfd. They know each other only by a Unix socket and what goes over it, as a VMM and a back-end would.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vq import virtio as v
from vq.errors import BackendError, UsageError
from vq.frontend import Frontend, RingSetup
from vq.payload import Region
from vq.pump import Pump
from vq_core.driver import BrokenRingError, DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.traffic import Exchange, traffic_memory_bytes

__all__ = ["DemoResult", "echo_backend", "open_exchange", "run_demo", "start_device"]

SIZE_MIN: Final = 64  # bytes: room for number, length and checksum
SIZE_MAX: Final = 65535
RECEIVE_BYTES: Final = 4096  # larger packets are merged from several receive buffers
FEATURES: Final = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_NET_F_MRG_RXBUF)
PROTOCOL_FEATURES: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_STATUS
)
LAYOUTS: Final = {"split": 0, "packed": v.mask(v.VIRTIO_F_RING_PACKED)}  # the feature bits that each adds
# Seconds without any progress before what is under way counts as lost. A back-end that others keep from its processor
# for a second has lost nothing.
PATIENCE_S: Final = 5.0
RECEIVEQ: Final = 0
TRANSMITQ: Final = 1
STATUS_OK: Final = 0xF  # ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK (VIRTIO 1.3, 2.1)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a run of the demo found: in the end, or so far.

    Parameters
    ----------
    layout
        "split" or "packed".
    size
        Bytes of a packet, with its Ethernet header.
    queue_size
        Entries of each ring.
    cpus
        Processors of driver and engine; empty: wherever the kernel put them.
    packets
        Packets that came back and were right.
    bytes
        Bytes of these packets.
    seconds
        How long packets were sent.
    rate
        Verified packets a second: over the whole run in the final result, since the last report in a report.
    lost, duplicated, reordered, changed
        Packets that did not come back, came twice, in another order, or not as they were sent.
    ok
        Packets came back and nothing was wrong with any.
    """

    layout: str
    size: int
    queue_size: int
    cpus: tuple[int, ...]
    packets: int
    bytes: int
    seconds: float
    rate: float
    lost: int
    duplicated: int
    reordered: int
    changed: int
    ok: bool


def run_demo(
    size: int = 64,
    duration: float = 5.0,
    layout: str = "split",
    cpus: Sequence[int] | None = None,
    queue_size: int = 256,
    on_progress: Callable[[DemoResult], None] | None = None,
    interval: float = 1.0,
) -> DemoResult:
    """Send packets through the engine for a while and verify each.

    Parameters
    ----------
    size
        Bytes of a packet, 64 to 65535.
    duration
        Seconds.
    layout
        Ring layout, "split" or "packed".
    cpus
        Processor of the driver, processor of the engine; None: the first two that the process may use.
    queue_size
        Entries of a ring, a power of two, 2 to 32768.
    on_progress
        Gets a `DemoResult` every `interval` seconds, in the caller's thread.
    interval
        Seconds between two calls of `on_progress`.

    Returns
    -------
    DemoResult

    Raises
    ------
    UsageError
        An argument is out of its range.
    BackendError
        The engine broke the protocol or a ring.
    """
    _check(size, duration, layout, queue_size, interval)
    places = _choose(cpus)
    problems: list[BaseException] = []
    with echo_backend(places) as path, open_exchange(path, size, queue_size, places, layout) as exchange:

        def drive() -> None:
            try:
                exchange.run(duration=duration)
            except BaseException as problem:  # handed over to the caller's thread
                problems.append(problem)

        driver = threading.Thread(target=drive, name="vq-driver")
        driver.start()
        since = (0, 0.0)
        try:
            driver.join(interval)
            while driver.is_alive():
                if on_progress is not None:
                    report = _result(exchange, since, layout, size, queue_size, places)
                    since = (report.packets, report.seconds)
                    on_progress(report)
                driver.join(interval)
        finally:
            exchange.stop()
            driver.join()
        for problem in problems:
            if isinstance(problem, BrokenRingError):
                raise BackendError("ring", "used element", problem.value, str(problem), fatal=True) from problem
            raise problem
        return _result(exchange, (0, 0.0), layout, size, queue_size, places)


def _check(size: int, duration: float, layout: str, queue_size: int, interval: float) -> None:
    if not SIZE_MIN <= size <= SIZE_MAX:
        raise UsageError(f"packet size {size} is outside {SIZE_MIN} to {SIZE_MAX} bytes")
    if not 0 < duration < float("inf"):
        raise UsageError(f"duration {duration} is not a positive number of seconds")
    if interval <= 0:
        raise UsageError(f"interval {interval} is not a positive number of seconds")
    if layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is not known; use {' or '.join(LAYOUTS)}")
    if not 2 <= queue_size <= 32768 or queue_size & (queue_size - 1):
        raise UsageError(f"queue size {queue_size} is not a power of two from 2 to 32768")
    if queue_size * RECEIVE_BYTES < size + 12 * queue_size:
        raise UsageError(
            f"{queue_size} receive buffers of {RECEIVE_BYTES} bytes cannot hold a packet of {size}; "
            "use a larger queue size or smaller packets"
        )


def _choose(cpus: Sequence[int] | None) -> tuple[int, ...]:
    """Processors of driver and engine; none when there is only one, which busy threads must share."""
    allowed = sorted(os.sched_getaffinity(0))
    if cpus is None:
        return tuple(allowed[:2]) if len(allowed) >= 2 else ()
    if len(cpus) != 2 or cpus[0] == cpus[1]:
        raise UsageError(f"cpus {list(cpus)}: the demo takes two different ones, for the driver and for the engine")
    for cpu in cpus:
        if cpu not in allowed:
            raise UsageError(f"cpu {cpu} is not among those of this process: {allowed}")
    return tuple(cpus)


@contextmanager
def echo_backend(places: tuple[int, ...]) -> Iterator[str]:
    """Run a pump that echoes; yields the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="vq-demo-") as folder:
        path = str(Path(folder) / "echo.sock")
        with Pump([f"vhost:{path},queues=1"], cpus=places[1:] or None, poll="busy" if places else "adaptive") as pump:
            control = threading.Thread(target=pump.run, name="vq-control")
            control.start()
            try:
                yield path
            finally:
                pump.request_stop()
                control.join()


@contextmanager
def open_exchange(
    path: str, size: int, queue_size: int, places: tuple[int, ...], layout: str = "split"
) -> Iterator[Exchange]:
    """Connect as a front-end, share memory, start one queue pair; yields what drives it."""
    receive_bytes = min(size, RECEIVE_BYTES)
    with (
        Frontend.connect(path) as frontend,
        GuestMemory(traffic_memory_bytes(queue_size, size, receive_bytes=receive_bytes)) as memory,
    ):
        wanted = FEATURES | LAYOUTS[layout]
        features = frontend.negotiate(wanted, PROTOCOL_FEATURES)
        if features & wanted != wanted:
            packed = ", RING_PACKED" if LAYOUTS[layout] else ""
            limit = f"the demo needs VERSION_1, EVENT_IDX, MRG_RXBUF{packed}"
            raise BackendError("GET_FEATURES", "features", hex(frontend.offered_features), limit)
        frontend.set_features(features)
        receiveq = DriverQueue(memory, queue_size, features=features)
        transmitq = DriverQueue(memory, queue_size, features=features)
        sleeping = "busy" if places else "sleep"
        exchange = Exchange(
            [(transmitq, receiveq)], size, receive_bytes=receive_bytes, poll=sleeping, patience=PATIENCE_S,
            cpu=places[0] if places else None,
        )  # fmt: skip
        try:
            start_device(frontend, memory, {RECEIVEQ: receiveq, TRANSMITQ: transmitq})
            yield exchange
            for index in (TRANSMITQ, RECEIVEQ):
                frontend.stop_ring(index)
        finally:
            for queue in (receiveq, transmitq):
                queue.close()


def start_device(
    frontend: Frontend, memory: GuestMemory, queues: Mapping[int, DriverQueue], *, logged: bool = False
) -> None:
    """Share the memory and start the rings, once features are set.

    Parameters
    ----------
    frontend
        A connection on which features have been acknowledged.
    memory
        Holds the rings and all buffers.
    queues
        Rings by index.
    logged
        Whether what is written to the rings is marked in the dirty log.
    """
    table: list[tuple[int, int, int, int, int]] = memory.regions
    frontend.set_mem_table([Region(*row[:4]) for row in table], [row[4] for row in table])
    for index, queue in queues.items():
        desc, avail, used = queue.addresses
        ring = RingSetup(
            index, queue.size, desc, avail, used, _base(queue), kick_fd=queue.kick_fd, call_fd=queue.call_fd
        )
        if logged:
            first = table[0]  # where the rings lie
            ring = replace(ring, flags=v.VHOST_VRING_F_LOG, log_guest_addr=used - first[2] + first[0])
        frontend.start_ring(ring)
    frontend.set_status(STATUS_OK)


def _base(queue: DriverQueue) -> int:
    """Where the back-end begins: at what it has not used yet. Packed: available and used position in one number."""
    position = queue.used_idx
    return position << 16 | position if queue.layout == "packed" else position


def _result(
    exchange: Exchange, since: tuple[int, float], layout: str, size: int, queue_size: int, places: tuple[int, ...]
) -> DemoResult:
    """The counters as they are now; the rate is that since (packets, seconds)."""
    counters: dict[str, int] = exchange.counters
    seconds: float = exchange.seconds
    wrong = {name: counters[name] for name in ("lost", "duplicated", "reordered", "changed")}
    return DemoResult(
        layout=layout,
        size=size,
        queue_size=queue_size,
        cpus=places,
        packets=counters["verified"],
        bytes=counters["verified"] * size,
        seconds=seconds,
        rate=(counters["verified"] - since[0]) / max(seconds - since[1], 1e-9),
        ok=counters["verified"] > 0 and not any(wrong.values()),
        **wrong,
    )
