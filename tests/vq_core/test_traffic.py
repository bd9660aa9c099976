"""The traffic engine against a device in plain Python that can do everything wrong on purpose."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from driver_rig import EVENT_IDX, IN_ORDER, LAYOUTS, VERSION_1, every_layout
from reference_device import Device, reference_device
from vq_core.driver import BrokenRingError, DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.traffic import Exchange, Sink, Source, traffic_memory_bytes

INDIRECT = 1 << 28
MRG_RXBUF = 1 << 15

Fault = Callable[[int, bytes], list[bytes]]


def honest(number: int, packet: bytes) -> list[bytes]:
    return [packet]


class Echo:
    """Sends what comes in on the transmitqs back on the receiveqs of the same pair, changed by `fault`."""

    def __init__(
        self, pairs: list[tuple[DriverQueue, DriverQueue]], fault: Fault = honest, *, features: int = VERSION_1
    ) -> None:
        self.pairs = [(reference_device(transmitq), reference_device(receiveq), []) for transmitq, receiveq in pairs]
        self.calls = [(transmitq.call_fd, receiveq.call_fd) for transmitq, receiveq in pairs]
        self.fault = fault
        self.header_bytes = 12 if features & (VERSION_1 | MRG_RXBUF) else 10
        self.mergeable = bool(features & MRG_RXBUF)
        self.count = 0
        self.most_buffers = 0
        self.headers = set()
        self.shapes = set()
        self.stopping = False

    def turn(self) -> int:
        """Serve everything that is there; how many packets were taken."""
        taken = 0
        for (transmitq, receiveq, waiting), (transmit_call, receive_call) in zip(self.pairs, self.calls, strict=True):
            while (chain := transmitq.pop()) is not None:
                payload = chain.payload
                self.headers.add(payload[: self.header_bytes])
                self.shapes.add(tuple(len(part) for part in chain.readable))
                waiting += self.fault(self.count, payload[self.header_bytes :])
                self.count += 1
                transmitq.put(chain.head, 0)
                taken += 1
            while waiting and self.deliver(receiveq, waiting[0]):
                waiting.pop(0)
            for device, call in ((transmitq, transmit_call), (receiveq, receive_call)):
                device.publish()
                if device.wants_call():
                    os.eventfd_write(call, 1)
        return taken

    def deliver(self, device: Device, packet: bytes) -> bool:
        """Write one packet, into several buffers if they may be merged; False without a buffer."""
        chains, room = [], 0
        while room < len(packet) + self.header_bytes:
            chain = device.pop()
            if chain is None:
                device.unpop(chains)
                return False
            chains.append(chain)
            room += chain.room
            assert self.mergeable or room >= len(packet) + self.header_bytes
        self.most_buffers = max(self.most_buffers, len(chains))
        data = bytes(10) + len(chains).to_bytes(2, "little")
        data = data[: self.header_bytes] + packet
        for chain in chains:
            written = chain.write(data)
            data = data[written:]
            device.put(chain.head, written)
        return True


@contextmanager
def served(echo: Echo) -> Iterator[Echo]:
    """Run the device in a thread of its own."""
    problems: list[BaseException] = []

    def loop() -> None:
        try:
            while not echo.stopping:
                if not echo.turn():
                    time.sleep(0)
        except BaseException as problem:  # handed over to the test
            problems.append(problem)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield echo
    finally:
        echo.stopping = True
        thread.join()
    assert not problems, problems


def pair(
    layout: str, memory: GuestMemory, size: int = 32, features: int = VERSION_1
) -> tuple[DriverQueue, DriverQueue]:
    features = in_layout(layout, features)
    return DriverQueue(memory, size, features=features), DriverQueue(memory, size, features=features)


def in_layout(layout: str, features: int) -> int:
    """A packed ring comes with VERSION_1, a split one without as well."""
    return features | (LAYOUTS["packed"] if layout == "packed" else 0)


def exchange(
    layout: str,
    sizes: int | tuple[int, ...] = 64,
    packets: int = 200,
    fault: Fault = honest,
    *,
    features: int = VERSION_1,
    queue_size: int = 32,
    pairs: int = 1,
    **options: object,
) -> tuple[dict[str, int], Echo, Exchange]:
    largest = sizes if isinstance(sizes, int) else max(sizes)
    memory = GuestMemory(traffic_memory_bytes(queue_size, largest, pairs=pairs))
    queues = [pair(layout, memory, queue_size, features) for _ in range(pairs)]
    # What an honest device owes comes, however late; only where something is lost, the end of patience is waited for.
    engine = Exchange(queues, sizes, patience=60 if fault is honest else 0.3, **options)
    with served(Echo(queues, fault, features=in_layout(layout, features))) as echo:
        engine.run(packets=packets)
    return engine.counters, echo, engine


CLEAN = {"lost": 0, "duplicated": 0, "reordered": 0, "changed": 0}


def faults(counters: dict[str, int]) -> dict[str, int]:
    return {name: counters[name] for name in CLEAN}


@every_layout
@pytest.mark.parametrize("sizes", [64, 65, 71, 72, 95, 96, 127, 1514, 9000, 65535, (64, 1514, 600, 67)])
def test_packets_come_back(layout: str, sizes: int | tuple[int, ...]) -> None:
    counters, echo, engine = exchange(layout, sizes)
    assert faults(counters) == CLEAN
    assert counters["sent"] == counters["received"] == counters["verified"] == echo.count == 200
    every = (sizes,) if isinstance(sizes, int) else sizes
    total = sum(every[i % len(every)] for i in range(200))
    assert counters["sent_bytes"] == counters["received_bytes"] == total
    assert echo.headers == {bytes(12)}
    assert engine.seconds > 0


@every_layout
@pytest.mark.parametrize("features", [0, VERSION_1, MRG_RXBUF, VERSION_1 | EVENT_IDX, VERSION_1 | IN_ORDER])
@pytest.mark.parametrize("poll", ["busy", "sleep"])
def test_features(layout: str, features: int, poll: str) -> None:
    counters, _, _ = exchange(layout, 100, features=features, poll=poll)
    assert faults(counters) == CLEAN
    assert counters["verified"] == 200


@every_layout
@pytest.mark.parametrize(("descriptors", "indirect"), [(2, False), (3, False), (5, True), (1, True), (16, True)])
def test_shapes_of_buffers(layout: str, descriptors: int, indirect: bool) -> None:
    counters, echo, _ = exchange(layout, 700, features=VERSION_1 | INDIRECT, descriptors=descriptors, indirect=indirect)
    assert faults(counters) == CLEAN
    assert counters["verified"] == 200
    (shape,) = echo.shapes
    assert len(shape) == descriptors
    assert sum(shape) == 712
    assert shape[0] == (712 if descriptors == 1 else 12)


@every_layout
@pytest.mark.parametrize(
    ("size", "receive_bytes", "buffers"), [(9000, 1500, 6), (65535, 4096, 16), (1000, 64, 14), (1512, 1512, 1)]
)
def test_mergeable_buffers(layout: str, size: int, receive_bytes: int, buffers: int) -> None:
    counters, echo, _ = exchange(layout, size, features=VERSION_1 | MRG_RXBUF, receive_bytes=receive_bytes)
    assert faults(counters) == CLEAN
    assert counters["verified"] == 200
    assert echo.most_buffers == buffers


@every_layout
def test_several_pairs(layout: str) -> None:
    counters, echo, _ = exchange(layout, 64, 999, pairs=3)
    assert faults(counters) == CLEAN
    assert counters["verified"] == echo.count == 999


def test_the_layouts_of_a_pair_may_differ() -> None:
    """They may belong to two devices."""
    memory = GuestMemory(1 << 20)
    split, packed = pair("split", memory), pair("packed", memory)
    for queues in ((split[0], packed[1]), (packed[0], split[1])):
        engine = Exchange([queues], (64, 300))
        with served(Echo([queues])):
            engine.run(packets=500)
        assert faults(engine.counters) == CLEAN
        assert engine.counters["verified"] == 500


@every_layout
def test_packets_differ(layout: str) -> None:
    seen: list[bytes] = []

    def keep(number: int, packet: bytes) -> list[bytes]:
        seen.append(packet)
        return [packet]

    exchange(layout, 200, 500, keep, pairs=2)
    assert len(set(seen)) == 500
    for at in range(40, 200, 8):  # the payload too, at every position
        assert len({packet[at : at + 8] for packet in seen}) >= 250
    assert {packet[12:14] for packet in seen} == {b"\x88\xb5"}


@every_layout
def test_the_window_is_kept(layout: str) -> None:
    """With one packet under way the device never sees two."""
    memory = GuestMemory(1 << 20)
    queues = pair(layout, memory)
    engine = Exchange([queues], 64, window=1)
    echo = Echo([queues])
    most = 0
    with served(echo):
        turn = echo.turn

        def counting() -> int:
            nonlocal most
            taken = turn()
            most = max(most, taken)
            return taken

        echo.turn = counting  # type: ignore[method-assign]
        time.sleep(0.01)
        engine.run(packets=100)
    assert engine.window == most == 1
    assert engine.counters["verified"] == 100


# ---- what it must find ----


def at(numbers: set[int], otherwise: Fault) -> Fault:
    return lambda number, packet: otherwise(number, packet) if number in numbers else [packet]


@every_layout
def test_finds_lost_packets(layout: str) -> None:
    counters, _, _ = exchange(layout, 64, 200, at({0, 50, 51, 52, 199}, lambda number, packet: []))
    assert faults(counters) == CLEAN | {"lost": 5}
    assert counters["verified"] == 195


@every_layout
def test_finds_the_loss_of_a_whole_window_and_goes_on(layout: str) -> None:
    counters, _, _ = exchange(layout, 64, 500, at(set(range(100, 140)), lambda number, packet: []))
    assert faults(counters) == CLEAN | {"lost": 40}
    assert counters["verified"] == 460


@every_layout
def test_finds_duplicated_packets(layout: str) -> None:
    counters, _, _ = exchange(layout, 64, 200, at({0, 50, 199}, lambda number, packet: [packet] * 3), window=8)
    assert faults(counters) == CLEAN | {"duplicated": 6}
    assert counters["verified"] == 200


@every_layout
def test_finds_reordered_packets(layout: str) -> None:
    held: list[bytes] = []

    def swap(number: int, packet: bytes) -> list[bytes]:
        if number % 50 == 10:
            held.append(packet)
            return []
        if number % 50 == 13:
            return [packet, held.pop()]
        return [packet]

    counters, _, _ = exchange(layout, 64, 200, swap)
    assert faults(counters) == CLEAN | {"reordered": 4}
    assert counters["verified"] == 200


@every_layout
@pytest.mark.parametrize("size", [64, 70, 1514])
def test_finds_any_changed_bit(layout: str, size: int) -> None:
    """Bit flips at every byte of a packet, one a packet."""

    def flip(number: int, packet: bytes) -> list[bytes]:
        place = number % size
        return [packet[:place] + bytes([packet[place] ^ 1 << number % 8]) + packet[place + 1 :]]

    counters, _, _ = exchange(layout, size, size, flip, queue_size=512)
    assert faults(counters) == CLEAN | {"changed": size}
    assert counters["verified"] == 0


@every_layout
def test_finds_swapped_and_cancelling_changes(layout: str) -> None:
    def swap_words(number: int, packet: bytes) -> list[bytes]:
        return [packet[:48] + packet[56:64] + packet[48:56] + packet[64:]]

    def flip_high_bits(number: int, packet: bytes) -> list[bytes]:
        changed = bytearray(packet)
        for place in (47, 79, 111):  # the highest bit of words of one lane
            changed[place] ^= 0x80
        return [bytes(changed)]

    for fault in (swap_words, flip_high_bits):
        counters, _, _ = exchange(layout, 128, 50, fault)
        assert faults(counters) == CLEAN | {"changed": 50}


@every_layout
@pytest.mark.parametrize(
    "fault",
    [
        lambda number, packet: [packet[:-1]],
        lambda number, packet: [packet[:40]],
        lambda number, packet: [b""],
        lambda number, packet: [bytes(len(packet))],
        lambda number, packet: [b"\xff" * len(packet)],
    ],
    ids=["one byte short", "truncated", "empty", "zeroes", "ones"],
)
def test_finds_other_packets(layout: str, fault: Fault) -> None:
    counters, _, _ = exchange(layout, 100, 60, fault)
    assert faults(counters) == CLEAN | {"changed": 60}


@every_layout
def test_finds_packets_from_the_future(layout: str) -> None:
    """A number that was not sent yet, with a right checksum, is not ours."""
    collected: list[bytes] = []
    exchange(layout, 64, 60, lambda number, packet: [collected.append(packet) or packet])
    counters, _, _ = exchange(layout, 64, 10, at({0}, lambda number, packet: [collected[50]]))
    assert faults(counters) == CLEAN | {"changed": 1}


@every_layout
def test_finds_a_bad_number_of_buffers(layout: str) -> None:
    memory = GuestMemory(1 << 20)
    queues = pair(layout, memory, features=VERSION_1 | MRG_RXBUF)
    engine = Exchange([queues], 64, patience=0.1)
    counts = iter([0, 2, 40, 65535, 1])

    class Liar(Echo):
        def deliver(self, device: Device, packet: bytes) -> bool:
            chain = device.pop()
            assert chain is not None
            device.put(chain.head, chain.write(bytes(10) + next(counts).to_bytes(2, "little") + packet))
            device.publish()
            time.sleep(0.01)  # alone, so that the next packet cannot be taken for its rest
            return True

    with served(Liar([queues])):
        for packets in range(1, 6):
            engine.run(packets=packets)
    assert faults(engine.counters) == CLEAN | {"changed": 4}
    assert engine.counters["verified"] == 1


@every_layout
def test_a_broken_ring_ends_the_run(layout: str) -> None:
    memory = GuestMemory(1 << 20)
    queues = pair(layout, memory)
    engine = Exchange([queues], 64)

    class Hostile(Echo):
        def turn(self) -> int:
            transmitq, receiveq, _ = self.pairs[0]
            if transmitq.pop() is not None:
                receiveq.put(900, 64)
                receiveq.publish()
            return 0

    with served(Hostile([queues])), pytest.raises(BrokenRingError, match="used id 900"):
        engine.run(duration=10)
    assert not queues[0].busy
    assert engine.counters["received"] == 0


@every_layout
def test_a_device_that_never_answers(layout: str) -> None:
    memory = GuestMemory(1 << 20)
    queues = pair(layout, memory)
    engine = Exchange([queues], 64, patience=0.1)
    begin = time.monotonic()
    engine.run(duration=0.05)
    assert time.monotonic() - begin > 0.1
    assert faults(engine.counters) == CLEAN | {"lost": 32}


# ---- running ----


@every_layout
def test_counters_are_live_and_stop_works(layout: str) -> None:
    memory = GuestMemory(1 << 20)
    queues = pair(layout, memory)
    engine = Exchange([queues], 64)
    with served(Echo([queues])):
        thread = threading.Thread(target=engine.run)
        thread.start()
        end = time.monotonic() + 60
        seen: set[int] = set()
        while len(seen) < 5 and time.monotonic() < end:
            seen.add(engine.counters["verified"])
            time.sleep(0.005)
        assert engine.running
        assert queues[0].busy
        with pytest.raises(RuntimeError, match="stop it first"):
            queues[0].poll()
        with pytest.raises(RuntimeError, match="stop it first"):
            engine.run()
        engine.stop()
        thread.join(60)
        assert not thread.is_alive()
    assert len(seen) >= 5
    assert not engine.running
    assert engine.counters["verified"] == engine.counters["sent"]


@every_layout
def test_source_and_sink(layout: str) -> None:
    """A source on one device, a sink on another, joined by a Python patch."""
    near, far = GuestMemory(1 << 20), GuestMemory(1 << 20, guest_addr=0x9000_0000)
    (transmitq, _), (_, receiveq) = pair(layout, near), pair(layout, far)
    source, sink = Source([transmitq], (64, 1000)), Sink([receiveq], 1000, verify=True, patience=60)
    with served(Echo([(transmitq, receiveq)], at({7}, lambda number, packet: []))):
        thread = threading.Thread(target=sink.run, kwargs={"packets": 299})
        thread.start()
        source.run(packets=300)
        thread.join(60)
        assert not thread.is_alive()
    assert source.counters["sent"] == 300
    assert sink.counters["verified"] == 299
    assert faults(sink.counters) == CLEAN | {"lost": 1}


@every_layout
def test_sink_counts_anything(layout: str) -> None:
    memory = GuestMemory(1 << 20)
    queues = pair(layout, memory)
    source, sink = Source([queues[0]], 64), Sink([queues[1]])
    with served(Echo([queues], lambda number, packet: [b"anything"])):
        thread = threading.Thread(target=sink.run, kwargs={"packets": 50})
        thread.start()
        source.run(packets=50)
        thread.join(60)
    assert (sink.counters["received"], sink.counters["received_bytes"]) == (50, 400)
    assert faults(sink.counters) == CLEAN


@every_layout
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sizes": 63}, "64 to 65535"),
        ({"sizes": 65536}, "64 to 65535"),
        ({"sizes": ()}, "packet sizes"),
        ({"window": 0}, "window"),
        ({"descriptors": 17}, "descriptors"),
        ({"indirect": True}, "INDIRECT_DESC"),
        ({"sizes": 1000, "receive_bytes": 500}, "MRG_RXBUF"),
        ({"poll": "never"}, "poll"),
    ],
)
def test_wrong_options(layout: str, options: dict[str, object], text: str) -> None:
    memory = GuestMemory(1 << 20)
    with pytest.raises(ValueError, match=text):
        Exchange([pair(layout, memory)], **options)


@every_layout
def test_too_little_memory(layout: str) -> None:
    memory = GuestMemory(1 << 16)
    with pytest.raises(MemoryError, match="larger"):
        Exchange([pair(layout, memory)], 65535)
