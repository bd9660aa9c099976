"""One packet under way, against a device in plain Python that can do wrong on purpose."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from reference_device import reference_device
from vq_core.driver import BrokenRingError, DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.roundtrip import RoundTrip
from vq_core.traffic import traffic_memory_bytes

VERSION_1 = 1 << 32
HEADER = 12

Answer = Callable[[int, bytes], bytes | None]


@contextmanager
def echoing(answer: Answer, **options: object) -> Iterator[RoundTrip]:
    """Give a RoundTrip whose packets come back as `answer` says; None swallows one."""
    size = int(str(options.get("size", 64)))
    with GuestMemory(traffic_memory_bytes(16, size)) as memory:
        transmitq = DriverQueue(memory, 16, features=VERSION_1)
        receiveq = DriverQueue(memory, 16, features=VERSION_1)
        trips = RoundTrip(transmitq, receiveq, **options)
        sent, back = reference_device(transmitq), reference_device(receiveq)
        stopping = threading.Event()

        def serve() -> None:
            count = 0
            while not stopping.wait(0.0001):
                while (chain := sent.pop()) is not None:
                    packet = answer(count, chain.payload[HEADER:])
                    count += 1
                    sent.put(chain.head, 0)
                    sent.publish()
                    if packet is not None and (room := back.pop()) is not None:
                        back.put(room.head, room.write(bytes(10) + b"\1\0" + packet))
                        back.publish()
                        if back.wants_call():
                            os.eventfd_write(receiveq.call_fd, 1)

        device = threading.Thread(target=serve)
        device.start()
        try:
            yield trips
        finally:
            stopping.set()
            device.join()
            transmitq.close()
            receiveq.close()


def honest(count: int, packet: bytes) -> bytes:
    return packet


@pytest.mark.parametrize("poll", ["busy", "sleep"])
@pytest.mark.parametrize("size", [64, 65, 1518])
def test_each_round_trip_is_timed(size: int, poll: str) -> None:
    seen: set[bytes] = set()

    def note(count: int, packet: bytes) -> bytes:
        assert len(packet) == size
        seen.add(packet[16:24])
        return packet

    with echoing(note, size=size, poll=poll) as trips:
        trips.run(0.1)
        assert trips.counters == {"verified": len(seen), "lost": 0, "changed": 0}
        assert len(trips.nanoseconds) == len(seen) > 20  # each with a number of its own, and more than a ring
        assert float(trips.nanoseconds.min()) > 100
        assert float(trips.nanoseconds.sum()) < 0.5e9


def test_a_changed_packet_is_seen_and_not_timed() -> None:
    def change(count: int, packet: bytes) -> bytes:
        return packet[:-1] + bytes([packet[-1] ^ 1]) if count == 2 else packet[:-1] if count == 3 else packet

    with echoing(change, samples=10) as trips:
        trips.run(1.0)
        assert trips.counters == {"verified": 10, "lost": 0, "changed": 2}


def test_a_packet_that_does_not_come_back_is_lost() -> None:
    with echoing(lambda count, packet: packet if count < 5 else None, patience=0.05) as trips:
        trips.run(5.0)
        assert trips.counters == {"verified": 5, "lost": 1, "changed": 0}


def test_the_pause_lies_between_packets_and_is_not_timed() -> None:
    with echoing(honest, pause=0.02) as trips:
        trips.run(0.2)
        assert 2 <= trips.counters["verified"] <= 11
        assert float(trips.nanoseconds.min()) < 0.02e9


def test_samples_end_a_run_and_can_be_forgotten() -> None:
    with echoing(honest, samples=5) as trips:
        trips.run(5.0)
        assert trips.counters["verified"] == 5
        trips.forget()
        assert len(trips.nanoseconds) == 0
        trips.run(5.0)
        assert len(trips.nanoseconds) == 5


def test_stop_ends_it() -> None:
    with echoing(honest) as trips:
        threading.Timer(0.1, trips.stop).start()
        trips.run(60.0)
        assert trips.counters["lost"] == 0


def test_a_broken_ring_is_an_error_and_gives_the_queues_back() -> None:
    with GuestMemory(traffic_memory_bytes(16, 64)) as memory:
        transmitq, receiveq = (DriverQueue(memory, 16, features=VERSION_1) for _ in range(2))
        trips = RoundTrip(transmitq, receiveq)
        receiveq.used_head[1] = 999
        with pytest.raises(BrokenRingError):
            trips.run(1.0)
        assert not transmitq.busy and not receiveq.busy


@pytest.mark.parametrize(
    "options",
    [{"size": 63}, {"size": 9217}, {"poll": "often"}, {"samples": 0}, {"pause": -1.0}, {"pause": 11}, {"patience": 0}],
)
def test_wrong_arguments_are_refused(options: dict[str, object]) -> None:
    with GuestMemory(traffic_memory_bytes(16, 64)) as memory:
        transmitq, receiveq = (DriverQueue(memory, 16, features=VERSION_1) for _ in range(2))
        with pytest.raises(ValueError, match=r"is outside|is neither|at least"):
            RoundTrip(transmitq, receiveq, **options)
