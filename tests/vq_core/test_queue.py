"""Life of a ring: notification in both directions, counted exactly; indices; start, stop and resume."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_rig import EVENT_IDX, INDIRECT, PACKED, PAGE, VERSION_1, Guest, every_layout, pattern, signals
from reference_device import DESC, DISABLE, Place
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.queue import Queue

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
bases = st.one_of(st.sampled_from([0, 1, 32767, 32768, 65535]), st.integers(65400, 65535))
bursts = st.lists(st.integers(1, 32), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory(4 << 20)


def counts(guest: Guest, index: int) -> tuple[int, int]:
    snapshot = guest.port.queues[index].snapshot()
    return snapshot["calls"], snapshot["calls_suppressed"]


def move(harness: ModuleType, source: Any, target: Any) -> tuple[int, int]:
    """One round; after a full burst a packed ring is left alone for some polls, unless there is another one."""
    rounds = (harness.move(source, 0, target, 0) for _ in range(30))
    return next((moved for moved in rounds if moved != (0, 0)), (0, 0))


class Expected:
    """Calls by the words of the specification: the positions that were passed, one by one."""

    def __init__(self, position: int, event_idx: bool) -> None:
        self.position, self.event_idx, self.first = position, event_idx, True
        self.calls = self.suppressed = 0

    def ask(self, driver: DriverQueue, distance: int, flags: int) -> tuple[int, int]:
        """Let the driver want its call so far ahead, and say these flags; only one of the two is in force."""
        event = (self.position + distance) % 65536
        driver.avail[2 + driver.size], driver.avail[0] = event, flags & 1
        return event, flags

    def publish(self, count: int, event: int, flags: int) -> None:
        passed = [(self.position + i) % 65536 for i in range(count)]
        self.position = (self.position + count) % 65536
        wanted = (self.first or event in passed) if self.event_idx else not flags & 1
        self.first = False
        self.calls += wanted
        self.suppressed += not wanted


class ExpectedPacked(Expected):
    """The same of a packed ring: slots and their wrap counters instead of positions."""

    def __init__(self, place: Place, event_idx: bool) -> None:
        super().__init__(0, event_idx)
        self.place = place

    def ask(self, driver: DriverQueue, distance: int, flags: int) -> tuple[int, int]:
        event = self.place.moved(distance).off_wrap
        driver.driver_event[:] = (event, flags)
        return event, flags

    def publish(self, count: int, event: int, flags: int) -> None:
        passed = [self.place.moved(i).off_wrap for i in range(count)]
        self.place = self.place.moved(count)
        wanted = flags != DISABLE
        if flags == DESC and self.event_idx:
            wanted = self.first or event in passed
        self.first = False
        self.calls += wanted
        self.suppressed += not wanted


@pytest.mark.shows("VIRTIO_F_EVENT_IDX")
@every_layout
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("index", [0, 1], ids=["receiveq", "transmitq"])
@many
@given(
    base=bases,
    steps=st.lists(st.tuples(st.integers(1, 32), st.integers(-40, 40), st.integers(0, 2)), min_size=1, max_size=8),
)
def test_calls_are_counted_exactly(
    harness: ModuleType,
    memory: GuestMemory,
    layout: int,
    event_idx: bool,
    index: int,
    base: int,
    steps: list[tuple[int, int, int]],
) -> None:
    guest = Guest(layout | (EVENT_IDX if event_idx else 0), size=64, base=base, memory=memory)
    driver, expected = (guest.receiveq, guest.transmitq)[index], Expected(base, event_idx)
    if layout == PACKED:
        expected = ExpectedPacked(Place(64, driver.used_idx & 0x7FFF, driver.used_idx >> 15), event_idx)
    source, target = harness.Feed(), harness.Collect()
    signalled = 0
    for count, distance, flags in steps:
        for _ in range(count):
            if index:
                guest.send(b"packet")
            else:
                guest.post(10)
                source.add(b"packet")
        driver.publish()
        event, flags = expected.ask(driver, distance, flags)
        ends = (guest.port, target) if index else (source, guest.port)
        assert move(harness, *ends) == (count, count)
        expected.publish(count, event, flags)
        assert counts(guest, index) == (expected.calls, expected.suppressed)
        signalled += signals(driver.call_fd)
        assert signalled == expected.calls
        assert len(driver.poll()) == count
    assert counts(guest, 1 - index)[1] == 0


@pytest.mark.shows("VIRTIO_F_EVENT_IDX")
@every_layout
@pytest.mark.parametrize("event_idx", [False, True])
@many
@given(base=bases, steps=st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=10))
def test_kicks_are_asked_for_exactly_when_armed(
    harness: ModuleType, memory: GuestMemory, layout: int, event_idx: bool, base: int, steps: list[tuple[int, bool]]
) -> None:
    guest, target = Guest(layout | (EVENT_IDX if event_idx else 0), base=base, memory=memory), harness.Collect()
    guest.send(b"first")
    assert guest.transmitq.kick()  # a driver's first one is always sent
    assert harness.arm(guest.port, 0)  # and found, whether the kick was seen or not
    harness.move(guest.port, 0, target, 0)
    signals(guest.transmitq.kick_fd)
    for count, sleeping in steps:
        if sleeping:
            assert not harness.arm(guest.port, 0)
        for number in range(count):
            guest.send(b"packet")
            assert guest.transmitq.kick() is (sleeping and (number == 0 or not event_idx))
        assert harness.arm(guest.port, 0)
        assert harness.move(guest.port, 0, target, 0) == (count, count)
        assert len(guest.transmitq.poll()) >= count
    asked = sum(sleeping * (1 if event_idx else count) for count, sleeping in steps)
    total = 1 + sum(count for count, _ in steps)
    assert guest.transmitq.kicks == (1 + asked, total - 1 - asked)
    assert signals(guest.transmitq.kick_fd) == asked


@every_layout
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_receiveq_asks_for_kicks_while_somebody_waits_for_room(
    harness: ModuleType, layout: int, event_idx: bool
) -> None:
    guest, source = Guest(layout | (EVENT_IDX if event_idx else 0)), harness.Feed()
    guest.post(50)
    assert guest.receiveq.kick()
    source.add(b"packet")
    harness.move(source, 0, guest.port, 0)
    guest.post(50)
    assert not guest.receiveq.kick()  # nobody waits
    assert harness.arm(guest.port, 0, False, True)  # that one is there already
    source.add(b"packet")
    harness.move(source, 0, guest.port, 0)
    assert not harness.arm(guest.port, 0, False, True)
    guest.post(50)
    assert guest.receiveq.kick()


@every_layout
@many
@given(base=bases, sizes=st.sampled_from([1, 2, 8, 64]), counts_=bursts)
def test_indices_run_over_the_end(
    harness: ModuleType, memory: GuestMemory, layout: int, base: int, sizes: int, counts_: list[int]
) -> None:
    guest = Guest(layout, size=sizes, base=base, memory=memory)
    first = guest.transmitq.used_idx
    source, target = harness.Feed(), harness.Collect()
    moved = 0
    for count in counts_:
        count = min(count, sizes)
        packets = [pattern(20, moved + i) for i in range(count)]
        guest.post(20, count)
        for packet in packets:
            guest.send(packet)
            source.add(packet)
        guest.receiveq.publish()
        guest.transmitq.publish()
        assert move(harness, guest.port, target) == move(harness, source, guest.port) == (count, count)
        assert [packet.data for packet in target.take()] == packets == guest.received()
        assert len(guest.transmitq.poll()) == count
        moved += count
        if layout == PACKED:
            end = Place(sizes, first & 0x7FFF, first >> 15).moved(moved).off_wrap
            assert guest.transmitq.used_idx == guest.receiveq.used_idx == end
        else:
            end = (base + moved) % 65536
            assert int(guest.transmitq.used_head[1]) == int(guest.receiveq.used_head[1]) == end
    assert guest.stop() == [end] * 2


def test_more_than_a_whole_round_of_the_index(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1 | EVENT_IDX, size=256, base=65000), harness.Collect()
    calls, seen = 0, 0
    for burst in range(70000 // 32):
        for _ in range(32):
            guest.transmitq.add([(0x4000_0000, 60)])
        guest.transmitq.publish()
        guest.transmitq.arm()  # the next used buffer is to be told
        assert harness.move(guest.port, 0, target, 0) == (32, 32)
        calls += signals(guest.transmitq.call_fd)
        seen += len(guest.transmitq.poll())
        assert calls == burst + 1
        del target.packets[:]
    assert seen == 70000 // 32 * 32
    assert guest.stop()[1] == (65000 + seen) % 65536


@pytest.mark.parametrize(
    ("layout", "first", "taken", "end"),
    [(VERSION_1, 65530, 1, 4), (PACKED, 0x8000 | 58, 1, 4)],
    ids=["split", "packed"],
)
def test_stop_tells_where_to_go_on(harness: ModuleType, layout: int, first: int, taken: int, end: int) -> None:
    guest, target = Guest(layout, base=first), harness.Collect()
    guest.post(10, 3)
    for number in range(10):
        guest.send(bytes([number + 1]))
    guest.receiveq.publish()
    guest.transmitq.publish()
    harness.move(guest.port, 0, target, 0, 7)
    assert guest.stop() == [first, taken]
    assert guest.stop() == [first, taken]  # a stopped ring answers the same
    assert harness.move(guest.port, 0, target, 0) == (0, 0)
    for queue, _ in guest.rings:
        assert (queue.started, queue.live) == (False, False)
    guest.start(base=taken)
    harness.move(guest.port, 0, target, 0)
    assert [packet.data for packet in target.take()] == [bytes([number + 1]) for number in range(10)]
    assert len(guest.transmitq.poll()) == 10
    assert guest.stop()[1] == end


@pytest.mark.parametrize("in_order", [True, False])
def test_after_a_crash_a_ring_goes_on_at_the_used_index(harness: ModuleType, in_order: bool) -> None:
    """The base is ahead of the used index: requests were taken, and lost. In-order devices take them again."""
    guest, target = Guest(VERSION_1, base=65533), harness.Collect()
    for number in range(8):
        guest.send(bytes([number + 1]))
    guest.transmitq.publish()
    harness.move(guest.port, 0, target, 0, 2)
    guest.stop()
    target.take()
    queue, driver = guest.rings[1]
    queue.start(guest.map, 64, *driver.addresses, (65533 + 6) % 65536, VERSION_1, enabled=True, in_order=in_order)
    harness.move(guest.port, 0, target, 0)
    assert [packet.data for packet in target.take()] == [bytes([n + 1]) for n in range(2 if in_order else 6, 8)]
    assert int(driver.used_head[1]) == (65533 + 8 if in_order else 65533 + 4) % 65536


def test_used_index_is_read_once(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    guest.send(b"one")
    guest.transmitq.publish()
    guest.transmitq.used_head[1] = 4711  # a guest that scribbles over the used ring hurts nobody else
    harness.move(guest.port, 0, target, 0)
    assert int(guest.transmitq.used_head[1]) == 1


def test_a_new_call_descriptor_is_signalled_once(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    queue, driver = guest.rings[1]
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        queue.set_call(fd)
        assert (signals(fd), signals(driver.call_fd)) == (1, 0)
        guest.send(b"packet")
        driver.publish()
        harness.move(guest.port, 0, target, 0)
        assert (signals(fd), signals(driver.call_fd)) == (1, 0)
        queue.set_call(None)
        guest.send(b"packet")
        driver.publish()
        harness.move(guest.port, 0, target, 0)
        assert (signals(fd), signals(driver.call_fd)) == (0, 0)
        queue.stop()
        queue.set_call(fd)
        assert signals(fd) == 0  # of a stopped ring nothing can have been missed
    finally:
        os.close(fd)


def test_enabled_is_remembered_while_stopped() -> None:
    guest = Guest(VERSION_1)
    queue = guest.port.queues[0]
    guest.stop()
    assert (queue.enabled, queue.live) == (True, False)
    queue.set_enabled(False)
    assert not queue.enabled
    guest.start(enabled=False)
    assert (queue.started, queue.enabled, queue.live) == (True, False, False)
    queue.set_enabled(True)
    assert queue.live


def test_a_full_descriptor_does_not_hold_the_worker(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    os.eventfd_write(guest.transmitq.call_fd, 2**64 - 2)
    guest.send(b"packet")
    guest.transmitq.publish()
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    assert counts(guest, 1) == (1, 0)
    assert signals(guest.transmitq.call_fd) >= 2**64 - 2  # the kernel counts to its very end, and no further


# ---- what start refuses ----


@pytest.mark.parametrize("num", [0, -1, 3, 100, 65536, 2**40])
def test_sizes(num: int) -> None:
    guest = Guest(VERSION_1, start=False)
    with pytest.raises((ValueError, OverflowError)):
        guest.port.queues[0].start(guest.map, num, *guest.receiveq.addresses, 0, VERSION_1)
    assert not guest.port.queues[0].started


@every_layout
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize(
    ("shift", "text"), [(1, "not aligned"), (1 << 40, "one memory region"), (-(1 << 40), "one memory region")]
)
def test_placement(layout: int, part: int, shift: int, text: str) -> None:
    guest = Guest(layout, start=False)
    addresses = list(guest.receiveq.addresses)
    addresses[part] += shift
    with pytest.raises(ValueError, match=text):
        guest.port.queues[0].start(guest.map, 64, *addresses, 0, layout)
    assert not guest.port.queues[0].started


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, PACKED])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_may_end_with_its_region_but_not_later(features: int, part: int) -> None:
    """With EVENT_IDX the two bytes of the event field count."""
    memory = GuestMemory(16 * PAGE)
    table = MemoryMap(memory.regions)
    (_, size, user, _, _) = memory.regions[0]
    event = 2 if features & EVENT_IDX else 0
    length = (16 * 64, 4 + 2 * 64 + event, 4 + 8 * 64 + event)[part]
    alignment = (16, 2, 4)[part]
    if features == PACKED:
        length, alignment = (16 * 64, 4, 4)[part], (16, 4, 4)[part]
    last = (user + size - length) // alignment * alignment
    for address, fits in ((last, True), (last + alignment, False)):
        addresses = [user, user + 4096, user + 8192]
        addresses[part] = address
        queue = Queue(0, "test")
        if fits:
            queue.start(table, 64, *addresses, 0, features)
            queue.stop()
        else:
            with pytest.raises(ValueError, match="one memory region"):
                queue.start(table, 64, *addresses, 0, features)


def test_a_ring_in_two_regions_is_refused() -> None:
    memory = GuestMemory(16 * PAGE, guest_addr=0, user_addr=1 << 32)
    memory.add_region(16 * PAGE, guest_addr=16 * PAGE, user_addr=(1 << 32) + 16 * PAGE)
    table = MemoryMap(memory.regions)
    with pytest.raises(ValueError, match="one memory region"):
        Queue(0, "test").start(table, 64, (1 << 32) + 16 * PAGE - 512, 1 << 32, (1 << 32) + PAGE, 0, VERSION_1)


def test_a_started_queue_is_not_started_again() -> None:
    guest = Guest(VERSION_1)
    with pytest.raises(ValueError, match="stop it first"):
        guest.start()


@every_layout
def test_memory_that_misses_the_ring_is_refused_and_nothing_changes(harness: ModuleType, layout: int) -> None:
    guest, target = Guest(layout), harness.Collect()
    elsewhere = GuestMemory(1 << 20, user_addr=0x1000_0000_0000)
    with pytest.raises(ValueError, match="one memory region"):
        guest.port.queues[1].set_memory(MemoryMap(elsewhere.regions))
    guest.send(b"still here")
    guest.transmitq.publish()
    assert harness.move(guest.port, 0, target, 0) == (1, 1)


@every_layout
def test_new_memory_keeps_the_indices(harness: ModuleType, layout: int) -> None:
    guest, target = Guest(layout, base=65535), harness.Collect()
    for number in range(3):
        guest.send(bytes([number + 1]))
        guest.transmitq.publish()
        assert harness.move(guest.port, 0, target, 0) == (1, 1)
        guest.map = MemoryMap(guest.memory.regions)
        for queue, _ in guest.rings:
            queue.set_memory(guest.map)
    assert [packet.data for packet in target.take()] == [b"\1", b"\2", b"\3"]
    assert guest.stop() == ([0x8000 | 63, 2] if layout == PACKED else [65535, 2])


# ---- broken rings ----


def test_a_broken_queue_is_reported_once_and_heals_with_a_restart(harness: ModuleType) -> None:
    report, err = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
    try:
        guest, target = Guest(VERSION_1, start=False), harness.Collect()
        driver = guest.transmitq
        port = type(guest.port)("guest", 1, report)
        queue = port.queues[1]
        queue.start(guest.map, 64, *driver.addresses, 0, VERSION_1, err_fd=err, enabled=True)
        assert queue.poll_report() is None
        guest.send(b"good")
        guest.send(b"bad")
        driver.avail[2 + 1] = 900
        driver.publish()
        assert harness.move(port, 0, target, 0) == (1, 1)
        assert harness.move(port, 0, target, 0) == (0, 0)
        assert (signals(report), signals(err)) == (1, 1)
        assert queue.poll_report() == (900, "head outside queue_size", "VIRTIO 1.3, 2.7.6")
        assert queue.poll_report() is None
        assert (queue.broken, queue.live) == ("head outside queue_size", False)
        assert not harness.arm(port, 0)  # nothing to wait for
        queue.set_enabled(False)
        queue.set_enabled(True)
        assert not queue.live
        assert queue.stop() == 1  # the good one was taken and given back
        driver.avail[2 + 1] = 1
        queue.start(guest.map, 64, *driver.addresses, 1, VERSION_1, enabled=True)
        assert (queue.broken, queue.live) == (None, True)
        assert harness.move(port, 0, target, 0) == (1, 1)
        assert [packet.data for packet in target.take()] == [b"good", b"bad"]
    finally:
        os.close(report)
        os.close(err)


def test_snapshot_says_what_happened(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1 | INDIRECT, size=32), harness.Collect()
    queue = guest.port.queues[1]
    assert (queue.index, queue.name, queue.num) == (1, "transmitq0", 32)
    guest.send(b"12345")
    guest.transmitq.add([b"short"])
    guest.transmitq.publish()
    harness.move(guest.port, 0, target, 0)
    expected: dict[str, Any] = {
        "packets": 1,
        "bytes": 5,
        "dropped": {"too_short": 1},
        "busy_cycles": 0,  # they are the worker's to count, as is the rest
        "cycles_per_packet": 0.0,
        "empty_polls": 0,
        "bursts": {},
        "layout": "split",
        "calls": 1,
        "calls_suppressed": 0,
        "size": 32,
        "started": True,
        "enabled": True,
        "broken": None,
    }
    assert queue.snapshot() == expected
    guest.stop()
    assert queue.snapshot() == expected | {"started": False}


@every_layout
def test_one_entry_is_a_ring(harness: ModuleType, layout: int) -> None:
    guest, target = Guest(layout, size=1), harness.Collect()
    assert guest.transmitq.size == 1
    for number in range(5):
        guest.send(bytes([number + 1]))
        guest.transmitq.publish()
        assert harness.move(guest.port, 0, target, 0) == (1, 1)
        assert len(guest.transmitq.poll()) == 1
    assert [packet.data for packet in target.take()] == [bytes([number + 1]) for number in range(5)]
