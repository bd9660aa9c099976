"""The driver-side virtqueue against devices that break the rules (protocol 11.1, line 49): both layouts."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from driver_rig import EVENT_IDX, IN_ORDER, LAYOUTS, every_layout, make
from reference_device import NEXT, WRITE, Device, PackedDevice, SplitDevice, reference_device
from vq_core.driver import BrokenRingError, Buffer, DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.roundtrip import RoundTrip
from vq_core.traffic import Exchange

Attack = Callable[[DriverQueue, Device, Buffer], None]


def bad_id(queue: DriverQueue, device: Device, token: Buffer) -> None:
    device.put(queue.size, 0)


def huge_id(queue: DriverQueue, device: Device, token: Buffer) -> None:
    device.put(0xFFFFFFFF, 0)


def wide_id(queue: DriverQueue, device: Device, token: Buffer) -> None:
    device.put(0x10000 + token.id, 0)  # right in its lower 16 bits


def not_outstanding(queue: DriverQueue, device: Device, token: Buffer) -> None:
    device.put(7, 0)


def inner_descriptor(queue: DriverQueue, device: Device, token: Buffer) -> None:
    device.put(1, 0)  # the second descriptor of the chain is no head


def not_published(queue: DriverQueue, device: Device, token: Buffer) -> None:
    device.put(queue.add([b"later"]).id, 0)


def too_long(queue: DriverQueue, device: Device, token: Buffer) -> None:
    device.put(token.id, 101)


def index_ahead(queue: DriverQueue, device: Device, token: Buffer) -> None:
    assert isinstance(device, SplitDevice)
    device.put(token.id, 0)
    device.skip(1)


def index_far_ahead(queue: DriverQueue, device: Device, token: Buffer) -> None:
    assert isinstance(device, SplitDevice)
    device.skip(30000)


def index_behind(queue: DriverQueue, device: Device, token: Buffer) -> None:
    assert isinstance(device, SplitDevice)
    device.skip(-1)


def highest_id(queue: DriverQueue, device: Device, token: Buffer) -> None:
    device.put(0xFFFF, 0)


BOTH = [
    (bad_id, 2, "outside the ring of 8", 8),
    (not_outstanding, 3, "not outstanding", 7),
    (inner_descriptor, 3, "not outstanding", 1),
    (too_long, 4, "above the writable bytes", 101),
]
SPLIT = [
    (huge_id, 2, "outside the ring", 0xFFFFFFFF),
    (wide_id, 2, "outside the ring", 0x10000),
    (not_published, 3, "not outstanding", 2),
    (index_ahead, 1, "ahead of what was made available", 2),
    (index_far_ahead, 1, "ahead of what was made available", 30000),
    (index_behind, 1, "ahead of what was made available", 65535),
]
PACKED = [
    (highest_id, 2, "outside the ring", 0xFFFF),
    (not_published, 3, "not outstanding", 1),
]
HOSTILE = [
    *((layout, *case) for layout in LAYOUTS for case in BOTH),
    *(("split", *case) for case in SPLIT),
    *(("packed", *case) for case in PACKED),
]


@pytest.mark.parametrize(
    ("layout", "attack", "cause", "text", "value"), HOSTILE, ids=lambda item: getattr(item, "__name__", "")
)
@pytest.mark.parametrize("features", [0, IN_ORDER])
def test_hostile_device(layout: str, attack: Attack, cause: int, text: str, value: int, features: int) -> None:
    queue = make(layout, 8, features)
    device = reference_device(queue)
    token = queue.add([b"request"], [100])
    queue.publish()
    assert device.pop() is not None
    attack(queue, device, token)
    device.publish()
    for _ in range(2):  # sticky
        with pytest.raises(BrokenRingError, match=text) as caught:
            queue.poll()
    assert (caught.value.cause, caught.value.value) == (cause, value)
    assert text in str(queue.error)
    with pytest.raises(BrokenRingError):
        queue.arm()
    with pytest.raises(BrokenRingError):
        queue.wait(1)
    queue.reset()
    assert queue.error is None
    device = reference_device(queue)
    token = queue.add([b"again"])
    queue.publish()
    device.serve(lambda chain: 0)
    assert queue.poll() == [(token, 0)]


def test_in_order_refuses_what_is_not_counted() -> None:
    """Split: the element stands for three buffers, the index says one."""
    queue = make("split", 8, IN_ORDER)
    device = reference_device(queue)
    tokens = [queue.add([b"x"]) for _ in range(3)]
    queue.publish()
    device.put(tokens[2].id, 0)
    device.publish()
    with pytest.raises(BrokenRingError, match="not next in order"):
        queue.poll()


@pytest.mark.parametrize("features", [0, IN_ORDER, EVENT_IDX])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after traffic"])
def test_packed_descriptors_used_for_nothing(used: bool, features: int) -> None:
    """Nothing is outstanding, or not published yet, but the next descriptor is marked used."""
    for added in (0, 2):
        for look in (DriverQueue.poll, DriverQueue.arm):
            queue = make("packed", 3, features)
            device = reference_device(queue)
            assert isinstance(device, PackedDevice)
            if used:
                queue.add([b"x"] * 2)
                queue.publish()
                device.serve(lambda chain: 0)
                queue.poll()
            slot = queue.used_idx & 0x7FFF
            for _ in range(added):
                queue.add([b"y"])
            device.put_raw(0, 0, 0)
            device.publish()
            with pytest.raises(BrokenRingError, match=f"descriptor {slot} is marked used") as caught:
                look(queue)
            assert (caught.value.cause, caught.value.value) == (6, slot)


def test_a_packed_batch_that_goes_on_behind_the_published() -> None:
    """More used descriptors than buffers: what stands before the first bad one is delivered."""
    queue = make("packed", 8)
    device = reference_device(queue)
    tokens = [queue.add([b"x"]) for _ in range(2)]
    queue.publish()
    assert device.serve(lambda chain: 0) == 2
    for head in (0, 1, 2):
        device.put(head, 0)
    device.publish()
    assert queue.poll() == [(token, 0) for token in tokens]
    with pytest.raises(BrokenRingError, match="descriptor 2 is marked used"):
        queue.poll()


@pytest.mark.parametrize("flags", [0, NEXT, 0x7F7D])
def test_a_packed_length_without_write_says_nothing(flags: int) -> None:
    """2.8.5: a device may leave there what it likes, for instance the length that the driver wrote."""
    queue = make("packed", 8)
    device = reference_device(queue)
    assert isinstance(device, PackedDevice)
    token, second = queue.add([b"request"]), queue.add((), [100])
    queue.publish()
    device.put_raw(token.id, 7, flags)
    device.put_raw(second.id, 100, flags | WRITE)
    device.publish()
    assert queue.poll() == [(token, 0), (second, 100)]


@every_layout
@pytest.mark.parametrize("features", [0, IN_ORDER])
def test_used_twice(layout: str, features: int) -> None:
    queue = make(layout, 8, features)
    device = reference_device(queue)
    first, second = queue.add([b"a"]), queue.add([b"b"])
    queue.publish()
    device.put(first.id, 0)
    device.put(first.id, 0)
    device.publish()
    assert queue.poll() == [(first, 0)]  # what stands before the bad element counts
    with pytest.raises(BrokenRingError, match="not outstanding"):
        queue.poll()
    assert second.id == 1


@every_layout
def test_any_used_ring_is_survived(layout: str) -> None:
    """Random bytes in everything the device may write: an error or a result, never more than was posted."""
    chance = random.Random(7)
    results = {"delivered": 0, "broken": 0}
    for _ in range(600):
        queue = make(layout, 8, chance.choice((0, EVENT_IDX, IN_ORDER)))
        tokens = {queue.add([b"a"], [chance.randint(1, 50)]) for _ in range(4)}
        queue.publish()
        scribble(queue, chance)
        try:
            for _ in range(4):
                for token, length in queue.poll():
                    tokens.remove(token)
                    assert length <= len(token.writable[0])
                    results["delivered"] += 1
                queue.kick()
        except BrokenRingError:
            results["broken"] += 1
    assert all(results.values()), results


def scribble(queue: DriverQueue, chance: random.Random) -> None:
    """Write what a hostile device might."""
    if queue.layout == "packed":
        for slot in range(8):
            flags = chance.choice((chance.getrandbits(16), 0x8080 | WRITE, 0x8080))
            length, head = chance.randint(0, 60), chance.choice((chance.getrandbits(16), chance.randint(0, 4)))
            queue.desc[slot] = (chance.getrandbits(64), length, head, flags)
        queue.device_event[:] = (chance.getrandbits(16), chance.getrandbits(16))
        return
    for slot in range(8):
        queue.used[slot] = (chance.choice((chance.getrandbits(32), chance.randint(0, 9))), chance.randint(0, 60))
    for index in range(8):
        queue.desc[index] = tuple(chance.getrandbits(bits) for bits in (64, 32, 16, 16))
    queue.used_head[:] = (chance.getrandbits(16), chance.choice((chance.getrandbits(16), chance.randint(0, 5))))


class Withholding:
    """A device that answers each packet with a used receive buffer, and never gives a transmit buffer back."""

    def __init__(self, transmitq: DriverQueue, receiveq: DriverQueue) -> None:
        self.queues = transmitq, receiveq
        self.views = transmitq.avail, receiveq.avail, receiveq.used, receiveq.used_head
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        sent, posted, used, head = self.views
        size = self.queues[1].size
        done = 0
        while not self.ending.wait(0.0005):
            # More than was sent: with wrong contents, for as long as buffers are posted.
            if int(sent[1]) and int(posted[1]) != done:
                used[done % size] = (int(posted[2 + done % size]), 76)
                done = (done + 1) % 65536
                head[1] = done

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *problem: object) -> None:
        self.ending.set()
        self.thread.join()


def ends(run: Callable[[], object]) -> bool:
    """Whether it comes back within ten seconds."""
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    return not thread.is_alive()


def test_round_trips_end_when_no_transmit_buffer_comes_back() -> None:
    memory = GuestMemory(1 << 22)
    transmitq, receiveq = (DriverQueue(memory, 8) for _ in range(2))
    trips = RoundTrip(transmitq, receiveq, patience=0.2)
    with Withholding(transmitq, receiveq):
        assert ends(lambda: trips.run(0.5))
    assert trips.counters["lost"] == 1


def test_traffic_ends_although_a_device_hands_over_packets_for_ever() -> None:
    memory = GuestMemory(1 << 22)
    transmitq, receiveq = (DriverQueue(memory, 64) for _ in range(2))
    exchange = Exchange([(transmitq, receiveq)], [64], patience=0.1)
    with Withholding(transmitq, receiveq):
        assert ends(lambda: exchange.run(duration=0.2))
    assert exchange.counters["changed"] > 0
