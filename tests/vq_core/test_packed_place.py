"""Where a packed ring goes on after a crash of the device: found from the marks that the device left in the ring."""

from __future__ import annotations

from types import ModuleType

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine_rig import IN_ORDER, PACKED, Guest, pattern, send_chain
from vq_core.guest_memory import GuestMemory

BEGINNING = 0x8000_8000  # what QEMU says for a ring whose back-end is gone
AVAIL, USED = 1 << 7, 1 << 15
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Bursts of chains, each of so many descriptors; they go round a small ring several times.
chains = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory(4 << 20)


def packed(memory: GuestMemory | None = None, features: int = 0, size: int = 64) -> Guest:
    return Guest(PACKED | features, size=size, memory=memory)


@pytest.mark.parametrize("size", [16, 17])
@many
@given(bursts=chains, lost=st.lists(st.integers(1, 4), max_size=4))
def test_a_transmitq_goes_on_behind_the_last_used_chain(
    harness: ModuleType, memory: GuestMemory, size: int, bursts: list[list[int]], lost: list[int]
) -> None:
    """What was there but not used when the device went away is done by the next one."""
    guest, target = packed(memory, size=size), harness.Collect()
    number = 0
    for burst in bursts:
        packets = [pattern(20, number + i) for i in range(len(burst))]
        for data, descriptors in zip(packets, burst, strict=True):
            send_chain(guest, data, descriptors)
        guest.transmitq.publish()
        assert harness.move(guest.port, 0, target, 0) == (len(burst), len(burst))
        assert [packet.data for packet in target.take()] == packets
        assert len(guest.transmitq.poll()) == len(burst)
        number += len(burst)
    for i, descriptors in enumerate(lost):
        send_chain(guest, pattern(30, i), descriptors)
    guest.transmitq.publish()
    guest.stop()
    guest.start(base=BEGINNING)
    assert harness.move(guest.port, 0, target, 0) == (len(lost), len(lost))
    assert [packet.data for packet in target.take()] == [pattern(30, i) for i in range(len(lost))]
    assert len(guest.transmitq.poll()) == len(lost)


@many
@given(bursts=chains)
def test_a_receiveq_goes_on_behind_the_last_used_chain(
    harness: ModuleType, memory: GuestMemory, bursts: list[list[int]]
) -> None:
    guest, source = packed(memory, size=17), harness.Feed()
    for burst in [*bursts, [1]]:
        for descriptors in burst:
            guest.receiveq.add((), [*[guest.header_bytes] * (descriptors - 1), 40])
        guest.receiveq.publish()
        guest.stop()
        guest.start(base=BEGINNING)
        packets = [pattern(20, i) for i in range(len(burst))]
        for packet in packets:
            source.add(packet)
        assert harness.move(source, 0, guest.port, 0) == (len(burst), len(burst))
        assert guest.received() == packets


@pytest.mark.shows("VIRTIO_F_RING_PACKED")
def test_every_slot_of_a_used_chain_has_the_mark_of_its_lap(harness: ModuleType) -> None:
    """Seven slots and chains of three: the third of them goes over the end."""
    guest, target = packed(size=7), harness.Collect()
    marks = [AVAIL | USED] * 7
    for place in (0, 3, 6):
        send_chain(guest, b"packet", 3)
        guest.transmitq.publish()
        assert harness.move(guest.port, 0, target, 0) == (1, 1)
        assert len(guest.transmitq.poll()) == 1
        if place == 6:
            marks[:2] = [0, 0]
        found = [int(flags) for flags in guest.transmitq.desc["flags"]]
        assert [flags & (AVAIL | USED) for flags in found[: place + 3]] == marks[: place + 3]
        assert not any(found[place + 3 :])


def test_a_ring_given_back_in_batches_is_not_asked(harness: ModuleType) -> None:
    """With IN_ORDER the slots behind the first of a batch keep their bits; the place that is said is the only one."""
    guest, target = packed(features=IN_ORDER, size=16), harness.Collect()
    for turn in range(8):  # two whole laps, four slots at a time
        for number in range(4):
            guest.send(bytes([4 * turn + number + 1]))
        guest.transmitq.publish()
        harness.move(guest.port, 0, target, 0)
        assert len(guest.transmitq.poll()) == 4
    assert guest.stop()[1] == BEGINNING & 0xFFFF
    guest.send(b"next")
    guest.transmitq.publish()
    guest.start(base=BEGINNING)
    target.take()
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    assert [packet.data for packet in target.take()] == [b"next"]


def place(base: int) -> tuple[int, bool]:
    return base & 0x7FFF, bool(base & 0x8000)


@many
@given(laps=st.lists(st.integers(1, 12), min_size=1, max_size=20), waiting=st.integers(0, 8), data=st.data())
def test_a_place_of_long_ago_is_put_right(
    harness: ModuleType, memory: GuestMemory, laps: list[int], waiting: int, data: st.DataObject
) -> None:
    """What a front-end kept from the last stop, before a move to another host, and says when the device has crashed."""
    guest, target = packed(memory, size=16), harness.Collect()
    before = [0x8000]
    for count in laps:
        for number in range(count):
            guest.send(bytes([number + 1]))
        guest.transmitq.publish()
        assert harness.move(guest.port, 0, target, 0) == (count, count)
        guest.transmitq.poll()
        before.append(guest.stop()[1])
        guest.start(base=before[-1])
    for number in range(waiting):
        guest.send(bytes([100 + number]))
    guest.transmitq.publish()
    stale = data.draw(st.sampled_from(before), "base")
    slot, wrap = place(before[-1])
    marks = {int(flags) & USED for flags in guest.transmitq.desc["flags"]}
    assume(marks != {0})  # a ring of which nothing can be told
    assume(place(stale) != ((slot + 1) % 16, wrap ^ (slot == 15)))  # as behind a chain of two, where something waits
    guest.stop()
    target.take()
    guest.start(base=stale)
    assert harness.move(guest.port, 0, target, 0) == (waiting, waiting)
    assert [packet.data for packet in target.take()] == [bytes([100 + number]) for number in range(waiting)]


def test_slots_that_another_device_left_alone_are_no_reason_to_doubt(harness: ModuleType) -> None:
    """Chains used at their first slot only: the place behind them is right, and stays."""
    guest, target = packed(size=16), harness.Collect()
    send_chain(guest, b"a packet in four", 4)
    guest.transmitq.publish()
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    base = guest.stop()[1]
    assert base == 0x8004
    for slot in range(1, 4):  # as they were when the driver made them available
        guest.transmitq.desc["flags"][slot] = AVAIL | (0 if slot == 3 else 1)
    guest.start(base=base)
    target.take()
    guest.transmitq.poll()
    guest.send(b"next")
    guest.transmitq.publish()
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    assert [packet.data for packet in target.take()] == [b"next"]
