"""The dirty-page log: the pages that are marked are exactly those that were written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dirty_rig import LogFile, Watch, ring_pages
from engine_rig import EVENT_IDX, INDIRECT, MRG_RXBUF, PACKED, PAGE, VERSION_1, Arena, Guest, every_layout, pattern
from vq_core.dirty import DirtyLog
from vq_core.guest_memory import GuestMemory

many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FIRST = 0x10_0000  # low addresses, so that a log of all memory is small
RINGS = 64 * PAGE


@pytest.fixture
def log() -> Iterator[LogFile]:
    log = LogFile()
    yield log
    log.close()


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena(GuestMemory(RINGS, guest_addr=FIRST), 48, FIRST + RINGS)


@pytest.mark.shows("VHOST_F_LOG_ALL")
@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | MRG_RXBUF, 0, PACKED, PACKED | MRG_RXBUF])
@many
@given(data=st.data())
def test_exactly_the_written_pages_are_marked(
    harness: ModuleType, arena: Arena, features: int, data: st.DataObject
) -> None:
    guest, source = Guest(features | INDIRECT, memory=arena.memory), harness.Feed()
    arena.clean()
    at = data.draw(st.integers(0, PAGE))
    for _ in range(data.draw(st.integers(1, 8))):
        lengths = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=3))
        if data.draw(st.booleans()):
            lengths = [guest.header_bytes, lengths[0]]  # the header in a descriptor of its own
        if at + sum(lengths) + 9000 > arena.size:
            break
        parts, at = arena.place(at, lengths, data.draw(st.tuples(*[st.sampled_from([0, 1, 3000])] * len(lengths))))
        guest.receiveq.add((), parts, indirect=data.draw(st.booleans()))
    guest.receiveq.publish()
    log = LogFile()
    try:
        with_ring = data.draw(st.booleans())
        for queue, driver in guest.rings:
            queue.set_log(log.log, driver.guest_addresses[2] if with_ring else None)
        for seed in range(data.draw(st.integers(1, 4))):
            source.add(pattern(data.draw(st.integers(1, 6000)), seed))
        before = Watch(guest.memory)
        harness.move(source, 0, guest.port, 0)
        changed, marked = before.changed(), log.marked()
        delivered = guest.to_guest["packets"]
        used_pages = ring_pages(guest.receiveq) | {guest.receiveq.guest_addresses[2] // PAGE}
        if delivered == 0:
            # What was begun and rolled back may be marked and may have been written; it is in no used buffer.
            changed -= used_pages
            marked -= used_pages
        assert (marked | used_pages) >= changed
        if with_ring:
            assert marked == changed
        else:
            assert marked == changed - used_pages
    finally:
        log.close()


@every_layout
def test_a_transmitq_writes_no_page_but_those_of_its_used_ring(harness: ModuleType, log: LogFile, layout: int) -> None:
    memory = GuestMemory(64 * PAGE, guest_addr=FIRST)
    guest, target = Guest(layout, size=1024, memory=memory), harness.Collect()
    driver = guest.transmitq
    guest.port.queues[1].set_log(log.log, driver.guest_addresses[2])
    for burst in range(32):  # fills slots 0 to 1023, a burst a time: the ring has three pages or four
        for number in range(32):
            guest.send(pattern(40, number))
        driver.publish()
        before = Watch(guest.memory)
        assert harness.move(guest.port, 0, target, 0) == (32, 32)
        marked = log.marked()
        # The first one that finds work says, in the event structure of a packed ring, that no kick is wanted.
        told = {driver.guest_addresses[2] // PAGE} if layout == PACKED and burst == 0 else set()
        assert marked == ring_pages(driver, 32 * burst, 32) | told
        assert marked >= before.changed() != set()
        driver.poll()
    guest.port.queues[1].set_log(log.log, None)
    guest.send(b"without VRING_F_LOG")
    driver.publish()
    # After full bursts a packed ring is left alone for some polls.
    assert (1, 1) in (harness.move(guest.port, 0, target, 0) for _ in range(30))
    assert log.marked() == set()


@every_layout
def test_used_elements_are_logged_over_the_end_of_the_index(harness: ModuleType, log: LogFile, layout: int) -> None:
    memory = GuestMemory(64 * PAGE, guest_addr=FIRST)
    guest, target = Guest(layout, size=1024, base=65536 - 16, memory=memory), harness.Collect()
    driver = guest.transmitq
    guest.port.queues[1].set_log(log.log, driver.guest_addresses[2])
    for _ in range(32):
        guest.send(b"packet")
    driver.publish()
    before = Watch(guest.memory)
    assert harness.move(guest.port, 0, target, 0) == (32, 32)
    marked = log.marked()
    assert marked == ring_pages(driver, 1008, 16) | ring_pages(driver, 0, 16) >= before.changed()
    assert len(marked) >= 2


def test_every_slot_of_a_packed_chain_is_logged(harness: ModuleType, log: LogFile) -> None:
    """The mark in each later slot is a store as well: here a head ends its page, and the rest lies in the next."""
    memory = GuestMemory(64 * PAGE, guest_addr=FIRST)
    guest, target = Guest(PACKED, size=1024, memory=memory), harness.Collect()
    driver = guest.transmitq
    slot = (PAGE - driver.guest_addresses[0] % PAGE) // 16 - 1
    for _ in range(slot):
        guest.send(b"packet")
        driver.publish()
        assert harness.move(guest.port, 0, target, 0) == (1, 1)
    guest.port.queues[1].set_log(log.log, driver.guest_addresses[2])
    driver.add([bytes(12), b"packet", b"of three"])
    driver.publish()
    before = Watch(guest.memory)
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    assert len(log.marked()) == 2
    assert before.changed() == ring_pages(driver, slot, 3)


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, PACKED, PACKED | EVENT_IDX])
@pytest.mark.parametrize("index", [0, 1], ids=["receiveq", "transmitq"])
def test_asking_for_kicks_is_logged(harness: ModuleType, log: LogFile, features: int, index: int) -> None:
    """Flags and the event field are a part of the used ring as well (protocol 7.5)."""
    memory = GuestMemory(64 * PAGE, guest_addr=FIRST)
    guest, source, target = Guest(features, size=1024, memory=memory), harness.Feed(), harness.Collect()
    queue, driver = guest.rings[index]
    queue.set_log(log.log, driver.guest_addresses[2])
    guest.post(40)
    guest.send(b"packet")
    source.add(b"packet")
    guest.receiveq.publish()
    guest.transmitq.publish()
    harness.move(guest.port, 0, target, 0)
    harness.move(source, 0, guest.port, 0)
    log.marked()
    before = Watch(guest.memory)
    assert not harness.arm(guest.port, 0, True, True)
    used = driver.guest_addresses[2]
    end = used + (4 if driver.layout == "packed" else 4 + 8 * 1024 + 2)
    written = before.changed() & set(range(used // PAGE, (end - 1) // PAGE + 1))
    assert len(written) == 1
    assert log.marked() == written
    queue.set_log(log.log, None)
    guest.send(b"packet")
    guest.transmitq.publish()
    harness.move(guest.port, 0, target, 0)
    harness.arm(guest.port, 0, True, True)
    assert log.marked() == set()


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, PACKED, PACKED | EVENT_IDX])
def test_asking_for_no_kicks_is_logged(harness: ModuleType, log: LogFile, features: int) -> None:
    """Also when nothing is used after it: the packet is too long for every buffer."""
    memory = GuestMemory(64 * PAGE, guest_addr=FIRST)
    guest, source = Guest(features, size=1024, memory=memory), harness.Feed()
    queue, driver = guest.rings[0]
    harness.arm(guest.port, 0, False, True)
    queue.set_log(log.log, driver.guest_addresses[2])
    guest.post(100)
    driver.publish()
    source.add(bytes(200))
    before = Watch(memory)
    harness.move(source, 0, guest.port, 0)
    assert guest.to_guest["packets"] == 0
    told = set() if features == VERSION_1 | EVENT_IDX else {driver.guest_addresses[2] // PAGE}
    begun = (driver.guest_addresses[2] + 4, 8 * 1024)  # used elements that no index exposes
    assert log.marked() == before.changed([] if features & PACKED == PACKED else [begun]) >= told


@every_layout
def test_a_disabled_transmitq_logs_what_it_gives_back(harness: ModuleType, log: LogFile, layout: int) -> None:
    memory = GuestMemory(64 * PAGE, guest_addr=FIRST)
    guest = Guest(layout, memory=memory)
    queue, driver = guest.rings[1]
    queue.set_enabled(False)
    queue.set_log(log.log, driver.guest_addresses[2])
    guest.send(b"packet")
    driver.publish()
    before = Watch(guest.memory)
    harness.move(guest.port, 0, harness.Collect(), 0)
    assert log.marked() == before.changed() == ring_pages(driver, 0, 1)


def test_pages_beyond_the_log_are_counted_and_not_marked(harness: ModuleType) -> None:
    memory = GuestMemory(64 * PAGE, guest_addr=0)
    guest, source = Guest(VERSION_1, memory=memory), harness.Feed()
    log = LogFile(pages=32)  # bytes behind it in the file must stay as they are
    try:
        os.pwrite(log.fd, b"\xaa" * 100, log.size)
        queue, driver = guest.rings[0]
        queue.set_log(log.log, 1 << 60)
        parts = [(31 * PAGE, 2000), (32 * PAGE - 10, 100), (40 * PAGE, 3000), (63 * PAGE, 100)]
        for part in parts:
            driver.add((), [part])
        driver.publish()
        for length in (1988, 50, 2000, 20):
            source.add(pattern(length, length))
        assert harness.move(source, 0, guest.port, 0) == (4, 4)
        assert log.marked() == {31}
        # Three packets, of which one crosses the end of the log; flags, the four used elements together, and the index.
        assert log.log.outside == 3 + 3
        assert os.pread(log.fd, 100, log.size) == b"\xaa" * 100
    finally:
        log.close()


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 10000])
def test_a_log_may_begin_anywhere_in_its_file(harness: ModuleType, offset: int) -> None:
    memory = GuestMemory(64 * PAGE, guest_addr=0)
    guest, source = Guest(VERSION_1, memory=memory), harness.Feed()
    log = LogFile(offset=offset)
    try:
        os.pwrite(log.fd, b"\x55" * offset, 0)
        guest.port.queues[0].set_log(log.log)
        guest.receiveq.add((), [(20 * PAGE, 5000)])
        guest.receiveq.publish()
        source.add(pattern(4500, 1))
        harness.move(source, 0, guest.port, 0)
        assert log.marked() == {20, 21}
        assert os.pread(log.fd, offset, 0) == b"\x55" * offset
    finally:
        log.close()


def test_bits_of_others_stay(harness: ModuleType, log: LogFile) -> None:
    memory = GuestMemory(64 * PAGE, guest_addr=0)
    guest, source = Guest(VERSION_1, memory=memory), harness.Feed()
    os.pwrite(log.fd, bytes([0b1000_0001]), 20 // 8)
    guest.port.queues[0].set_log(log.log)
    guest.receiveq.add((), [(20 * PAGE, 100)])
    guest.receiveq.publish()
    source.add(pattern(50, 1))
    harness.move(source, 0, guest.port, 0)
    assert log.marked() == {16, 20, 23}


def test_on_and_off(harness: ModuleType, log: LogFile) -> None:
    memory = GuestMemory(64 * PAGE, guest_addr=0)
    guest, source = Guest(VERSION_1, memory=memory), harness.Feed()
    queue = guest.port.queues[0]
    marked = []
    for page in range(20, 26):
        guest.receiveq.add((), [(page * PAGE, 100)])
        guest.receiveq.publish()
        queue.set_log(log.log if page % 2 else None)
        source.add(pattern(50, 1))
        harness.move(source, 0, guest.port, 0)
        marked.append(log.marked())
    assert marked == [set(), {21}, set(), {23}, set(), {25}]
    guest.stop()
    guest.receiveq.add((), [(30 * PAGE, 100)])
    guest.receiveq.publish()
    guest.start()  # a start without a log does not remember the one before
    source.add(pattern(50, 1))
    harness.move(source, 0, guest.port, 0)
    assert guest.receiveq.poll()[-1][1] == 62
    assert log.marked() == set()


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (-1, 0), (1 << 40, 0), (100, 1 << 40), (8, -8)])
def test_impossible_logs(size: int, offset: int) -> None:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE)
        with pytest.raises(ValueError, match="dirty log"):
            DirtyLog(fd, size, offset)
    finally:
        os.close(fd)
