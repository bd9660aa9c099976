"""The worker loop with real threads: no packet is lost, no wake-up either, and nothing is burnt while idle."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from types import ModuleType
from typing import Any

import pytest

from engine_rig import (
    CSUM,
    EVENT_IDX,
    GUEST_CSUM,
    GUEST_TSO4,
    HOST_TSO4,
    MRG_RXBUF,
    VERSION_1,
    Guest,
    asleep,
    every_layout,
    pattern,
    running,
    signals,
)
from vq_core.guest_memory import GuestMemory
from vq_core.plan import Plan
from vq_core.ports.gen import GenPort, frame
from vq_core.ports.null import NullPort
from vq_core.program import DROP, Burst, PythonProgram
from vq_core.queue import wake
from vq_core.traffic import Exchange, traffic_memory_bytes
from vq_core.worker import Worker
from waiting import wait_for

CLEAN = {"lost": 0, "duplicated": 0, "reordered": 0, "changed": 0}


def echo(guest: Guest) -> Plan:
    return Plan([(guest.port, 0, guest.port, 0)])


def faults(traffic: Exchange) -> dict[str, int]:
    return {name: traffic.counters[name] for name in CLEAN}


@pytest.mark.parametrize("poll", ["adaptive", "busy"])
@pytest.mark.parametrize("features", [0, VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | MRG_RXBUF])
def test_echo(features: int, poll: str) -> None:
    sizes = (64, 1514, 600, 9000)
    guest = Guest(features, size=256, memory=GuestMemory(traffic_memory_bytes(256, 9000)))
    with running(Worker(None, poll)) as (worker,):
        worker.set_plan(echo(guest))
        traffic = Exchange([(guest.transmitq, guest.receiveq)], sizes, poll="sleep" if poll == "adaptive" else "busy")
        traffic.run(packets=3000)
    assert faults(traffic) == CLEAN
    assert traffic.counters["verified"] == 3000
    counted = {"packets": 3000, "bytes": 3000 // 4 * sum(sizes), "dropped": {}}
    assert guest.to_guest == guest.from_guest == counted


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX])
def test_no_wake_up_is_lost(features: int) -> None:
    """Packets one by one, with pauses around the time after which a worker goes to sleep."""
    guest, dice = Guest(features, size=8), random.Random(4)
    fast = 0
    with running(Worker()) as (worker,):
        worker.set_plan(echo(guest))
        for number in range(6000):
            guest.post(16)
            guest.receiveq.kick()
            guest.send(number.to_bytes(16, "little"))
            guest.transmitq.kick()
            assert guest.receiveq.wait(60), f"packet {number} did not come back"
            (packet,) = guest.received()
            assert packet == number.to_bytes(16, "little")
            guest.transmitq.poll()
            pause = dice.random()
            if pause < 0.6:
                fast += 1
            else:
                end = time.perf_counter() + (pause - 0.6) * 500e-6
                while time.perf_counter() < end:
                    pass
        assert worker.snapshot()["sleeps"] > 100
    assert fast > 1000
    assert guest.to_guest["packets"] == 6000


def test_a_sleeping_worker_stands_still_and_a_busy_one_does_not() -> None:
    guest, other = Guest(VERSION_1), Guest(VERSION_1)
    with running(Worker(None, "adaptive"), Worker(None, "busy")) as (adaptive, busy):
        adaptive.set_plan(echo(guest))
        busy.set_plan(echo(other))
        asleep(adaptive)
        before = adaptive.snapshot()["rounds"], busy.snapshot()["rounds"]
        time.sleep(0.1)
        assert adaptive.snapshot()["rounds"] == before[0]
        wait_for(lambda: busy.snapshot()["rounds"] > before[1])
        assert busy.snapshot()["sleeps"] == 0
        assert (busy.snapshot()["busy_cycles"], busy.snapshot()["idle_cycles"] > 0) == (0, True)


@every_layout
@pytest.mark.parametrize("buffers", [60, 80, 94])
def test_too_few_buffers_for_a_packet_let_the_worker_sleep(layout: int, buffers: int) -> None:
    """Also when they are more than a port looks for at once; the one that was missing wakes it."""
    guest = Guest(layout | EVENT_IDX | MRG_RXBUF, size=256)
    gen = GenPort("gen", size=1518)  # with its header: 95.6 buffers of 16 bytes
    with running(Worker()) as (worker,):
        for _ in range(buffers):
            guest.receiveq.add(writable=[16])
        guest.receiveq.publish()
        worker.set_plan(Plan([(gen, 0, guest.port, 0)]))
        asleep(worker)
        assert guest.to_guest["packets"] == 0
        assert not guest.receiveq.poll()
        for _ in range(96 - buffers):
            guest.receiveq.add(writable=[16])
            guest.receiveq.kick()
        wait_for(lambda: guest.to_guest["packets"] == 1)
        assert sum(length for _, length in guest.receiveq.poll()) == 12 + 1518
        asleep(worker)


def test_what_happens_to_a_sleeping_queue_wakes_it() -> None:
    """Start, enable and new kick descriptors are looked at without a kick."""
    guest = Guest(VERSION_1, start=False)
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(guest.port, 0, guest.port, 0)]))
        guest.post(8, 4)
        guest.receiveq.publish()
        guest.send(b"start")
        guest.transmitq.publish()  # no kick, here and below
        asleep(worker)
        guest.start()
        assert wait_for(guest.received) == [b"start"]
        asleep(worker)
        guest.port.queues[1].set_kick(None)
        guest.send(b"polled")
        guest.transmitq.publish()
        guest.port.queues[1].set_enabled(True)
        assert wait_for(guest.received) == [b"polled"]
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            guest.port.queues[1].set_kick(fd)
            asleep(worker)
            guest.send(b"kicked")
            guest.transmitq.publish()
            os.eventfd_write(fd, 1)
            assert wait_for(guest.received) == [b"kicked"]
            assert signals(fd) == 1  # kick descriptors are never read
        finally:
            guest.stop()
            os.close(fd)


def test_a_queue_without_a_kick_fd_is_polled() -> None:
    """The front-end asks for polling so; with a kick fd again the worker sleeps."""
    guest = Guest(VERSION_1)
    guest.port.queues[1].set_kick(None)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    with running(Worker()) as (worker,):
        worker.set_plan(echo(guest))
        guest.post(60, 4)
        guest.receiveq.publish()
        for number in range(3):
            time.sleep(0.02)  # far longer than a worker waits before it sleeps
            guest.send(bytes([number]) * 60)
            guest.transmitq.publish()
            assert wait_for(guest.received) == [bytes([number]) * 60]
        guest.port.queues[1].set_kick(fd)
        asleep(worker)
        guest.port.queues[1].set_kick(None)
    os.close(fd)


def test_an_announcement_wakes_it(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(guest.port, 0, target, 0)]))
        for _ in range(3):
            asleep(worker)
            guest.port.announce(bytes.fromhex("525400123456"))
            wait_for(lambda: target.packets)
            assert len(target.take()) == 1


def test_a_guest_without_buffers_costs_only_its_own_packets(harness: ModuleType) -> None:
    near, far = Guest(VERSION_1), Guest(VERSION_1)
    far.post(20, 10)
    far.receiveq.publish()
    for number in range(50):
        near.send(bytes([number + 1]))
    near.transmitq.publish()
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(near.port, 0, far.port, 0)]))
        back: list[Any] = []
        wait_for(lambda: back.extend(near.transmitq.poll()) or len(back) == 50)
    assert far.received() == [bytes([number + 1]) for number in range(10)]
    assert far.to_guest == {"packets": 10, "bytes": 10, "dropped": {"no_descriptors": 40}}
    assert near.from_guest == {"packets": 50, "bytes": 50, "dropped": {}}


def test_a_guest_waits_a_moment_for_room() -> None:
    """Buffers that come within a millisecond come in time; who gives none at all is not waited for again and again."""
    near, far = Guest(VERSION_1, size=256), Guest(VERSION_1, size=256)
    whole = slow = 0
    with running(Worker(None, "busy")) as (worker,):
        worker.set_plan(Plan([(near.port, 0, far.port, 0)]))
        for number in range(30):
            for _ in range(8):
                near.send(pattern(20, number))
            near.transmitq.kick()
            far.post(20, 8)
            far.receiveq.publish()
            back: list[Any] = []
            wait_for(lambda back=back: back.extend(near.transmitq.poll()) or len(back) == 8)
            got = far.received()
            whole += len(got) == 8
            if len(got) < 8:  # the machine was busy elsewhere for 4 ms: use up what is too much now
                for _ in range(8 - len(got)):
                    near.send(b"used up")
                near.transmitq.kick()
                wait_for(lambda: not (far.received() or far.receiveq.outstanding))
                wait_for(lambda: not (near.transmitq.poll() or near.transmitq.outstanding))
        assert whole > 15
        assert far.receiveq.outstanding == 0
        for _ in range(50):
            start = time.monotonic()
            near.send(b"lost")
            near.transmitq.kick()
            wait_for(near.transmitq.poll)
            slow += time.monotonic() - start > 3e-3
        assert slow < 25, "one patience of 4 ms is enough"
    assert far.to_guest["dropped"]["no_descriptors"] >= 50


@pytest.mark.parametrize("size", [16, 32])
def test_no_patience_where_there_is_room(size: int) -> None:
    """Packets to be segmented may take many buffers, but a ring of 32 whole ones never has more than these."""
    offloads = CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4
    near = Guest(VERSION_1 | offloads)
    far = Guest(VERSION_1 | offloads, size=size, memory=GuestMemory(4 << 20))
    segmented = struct.pack("<BBHHHH", 1, 1, 54, 1000, 34, 16) + bytes(2)
    far.post(4000, size)
    far.receiveq.publish()
    slow = 0
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(near.port, 0, far.port, 0)]))
        for number in range(600):
            start = time.monotonic()
            near.send(pattern(3000, number), segmented if number % 2 else None)
            near.transmitq.kick()
            assert wait_for(far.received) == [pattern(3000, number)]
            slow += time.monotonic() - start > 3e-3  # a patience is 4 ms
            near.transmitq.poll()
            far.post(4000)
            far.receiveq.publish()
    assert slow < 150, "every second packet waited in vain"
    assert far.to_guest["dropped"] == {}


@pytest.mark.parametrize("features", [VERSION_1 | MRG_RXBUF, VERSION_1 | MRG_RXBUF | EVENT_IDX])
def test_a_source_that_holds_loses_nothing(features: int) -> None:
    """3,000 bytes into buffers of 500: the room says too much, and what does not fit has to wait."""
    guest, source = Guest(features), GenPort("gen", 3000, 100)
    got, buffers = b"", 0
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(source, 0, guest.port, 0)]))
        asleep(worker)  # waits for room
        dice = random.Random(1)
        end = time.monotonic() + 60
        while guest.to_guest["packets"] < 100 and time.monotonic() < end:
            guest.post(488, min(dice.randrange(1, 12), guest.receiveq.free))
            guest.receiveq.kick()
            if dice.random() < 0.2:
                worker.set_plan(Plan([(source, 0, guest.port, 0)]))
            time.sleep(0.0005)
            used = guest.receiveq.poll()
            buffers += len(used)
            got += b"".join(token.written(length) for token, length in used)
        used = guest.receiveq.poll()
        buffers += len(used)
        got += b"".join(token.written(length) for token, length in used)
    assert source.finished
    assert buffers == 700  # 3,012 bytes take seven buffers
    assert got == (bytes(10) + b"\7\0" + frame(3000)) * 100
    assert guest.to_guest == {"packets": 100, "bytes": 300000, "dropped": {}}


@every_layout
def test_room_that_another_flow_has_seen_is_not_slept_over(harness: ModuleType, layout: int) -> None:
    """Two sources that hold, one target: a buffer comes behind the look of the first, and the second one looks."""

    def post() -> None:
        early.on_arm = None
        guest.post(2000)
        guest.receiveq.publish()
        assert harness.room(guest.port, 0) == 1

    guest, early, source = Guest(VERSION_1 | layout), harness.Collect("early"), GenPort("gen", 64, 1)
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(early, 0, NullPort("null"), 0), (source, 0, guest.port, 0)]))
        asleep(worker)
        early.on_arm = post
        wake(guest.port.queues)
        wait_for(lambda: guest.to_guest["packets"] == 1)


def test_what_a_source_holds_is_counted_when_its_flow_ends() -> None:
    guest, source = Guest(VERSION_1 | MRG_RXBUF), GenPort("gen", 3000, 1000)
    guest.post(488, 8)
    guest.receiveq.publish()
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(source, 0, guest.port, 0)]))
        asleep(worker)
        pulled = source.snapshot()["from_gen"]["packets"]
        assert pulled == 8  # eight buffers promised room for eight
        assert guest.to_guest == {"packets": 1, "bytes": 3000, "dropped": {}}
        worker.set_plan(Plan())
        assert guest.to_guest["dropped"] == {"no_descriptors": 7}


def test_verdicts_go_no_further_than_their_burst() -> None:
    """What waits when a flow loses its program keeps its verdicts; what is pulled afterwards has none."""

    def drop_the_last(burst: Burst) -> Any:
        return [0] * (burst.count - 1) + [DROP]

    guest, source = Guest(VERSION_1 | MRG_RXBUF), GenPort("gen", 3000, 40)
    guest.post(488, 8)
    guest.receiveq.publish()
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(source, 0, guest.port, 0, PythonProgram(drop_the_last), 0)]))
        asleep(worker)
        assert (source.snapshot()["from_gen"]["packets"], guest.to_guest["packets"]) == (8, 1)
        worker.set_plan(Plan([(source, 0, guest.port, 0)]))
        while not (source.finished and guest.receiveq.free == 64):
            guest.post(488, min(32, guest.receiveq.free))
            guest.receiveq.kick()
            asleep(worker)
            if not guest.receiveq.poll():
                break
    assert source.snapshot()["from_gen"]["dropped"] == {"program": 1}
    assert guest.to_guest == {"packets": 39, "bytes": 39 * 3000, "dropped": {}}


def test_flows_move_between_workers_without_loss() -> None:
    guests = [Guest(VERSION_1 | EVENT_IDX, size=256, name=f"guest{i}") for i in range(2)]
    moves = 0
    with running(Worker(), Worker()) as workers:
        queues = [(guest.transmitq, guest.receiveq) for guest in guests]
        traffic = Exchange(queues, (64, 900), poll="sleep", patience=60)
        thread = threading.Thread(target=traffic.run, kwargs={"duration": 1.5})
        thread.start()
        while thread.is_alive():
            for worker in workers:
                worker.set_plan(Plan())
            for guest, worker in zip(guests, workers if moves % 2 else reversed(workers), strict=True):
                worker.set_plan(echo(guest))
            moves += 1
            time.sleep(0.005)
        thread.join()
    assert faults(traffic) == CLEAN
    assert traffic.counters["verified"] == traffic.counters["sent"] > 1000
    assert moves > 20


def test_an_endpoint_has_one_owner() -> None:
    guest = Guest(VERSION_1)
    with running(Worker(), Worker()) as (first, second):
        first.set_plan(echo(guest))
        with pytest.raises(ValueError, match="belongs to another worker"):
            second.set_plan(echo(guest))
        first.set_plan(Plan())
        assert guest.port.mailboxes == [None]
        second.set_plan(echo(guest))
        assert guest.port.mailboxes == [second.mailbox]


def test_plans_check_their_endpoints() -> None:
    guest, null = Guest(VERSION_1), NullPort("null")
    for flow in ((guest.port, 1, null, 0), (guest.port, 0, null, 1), (guest.port, -1, null, 0)):
        with pytest.raises(IndexError, match="endpoint"):
            Plan([flow])
    with pytest.raises(TypeError):
        Plan([(guest.port, 0, "null", 0)])
    plan = Plan([(guest.port, 0, null, 0), (guest.port, 0, guest.port, 0)])
    assert plan.owned == [(null, 0), (guest.port, 0)]


def test_a_worker_stays_on_its_processor() -> None:
    cpu = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    worker = Worker(cpu, "adaptive")
    thread = threading.Thread(target=worker.run)
    thread.start()
    asleep(worker)
    try:
        assert os.sched_getaffinity(thread.native_id or -1) == {cpu}
    finally:
        worker.stop()
        thread.join()
    assert os.sched_getaffinity(0) == before
    assert worker.snapshot()["cpu"] == cpu


@pytest.mark.parametrize(
    ("sub_burst", "lengths", "parts"),
    [
        (16, [64] * 32, [16, 16]),
        (16, [1518] * 32, [8, 8, 8, 8]),
        (16, [64] * 16 + [1518] * 16, [16, 8, 8]),
        (16, [9000, 9000] + [64] * 30, [2, 16, 14]),
        (8, [1518] * 32, [4] * 8),
        (1, [1518] * 32, [1] * 32),
        (32, [1518] * 32, [32]),
    ],
)
def test_a_sub_burst_of_long_packets_ends_early(
    harness: ModuleType, sub_burst: int, lengths: list[int], parts: list[int]
) -> None:
    guest, target = Guest(VERSION_1, memory=GuestMemory(traffic_memory_bytes(256, 9000))), harness.Collect()
    for length in lengths:
        guest.send(bytes(length))
    guest.transmitq.publish()
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(guest.port, 0, target, 0)], sub_burst=sub_burst))
        wait_for(lambda: len(target.packets) == len(lengths))
    assert target.pushes == parts
    assert [len(packet[0]) for packet in target.packets] == lengths
    assert not target.errors


def test_only_known_ways_to_poll() -> None:
    with pytest.raises(ValueError, match="adaptive and busy"):
        Worker(None, "lazy")


def test_several_flows_of_one_worker(harness: ModuleType) -> None:
    guests = [Guest(VERSION_1, name=f"guest{i}") for i in range(3)]
    targets = [harness.Collect(f"target{i}") for i in range(3)]
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(guest.port, 0, target, 0) for guest, target in zip(guests, targets, strict=True)]))
        for number, guest in enumerate(guests):
            for i in range(40):
                guest.send(pattern(30, 100 * number + i))
            guest.transmitq.kick()
        wait_for(lambda: all(len(target.packets) == 40 for target in targets))
    for number, target in enumerate(targets):
        assert [packet.data for packet in target.take()] == [pattern(30, 100 * number + i) for i in range(40)]
