"""Handing over: when a call returns the data plane has obeyed, whoever runs the command, and whatever a worker does."""

from __future__ import annotations

import threading
import time
from types import ModuleType

import pytest

from engine_rig import VERSION_1, Guest, running
from vq_core.handover import StuckWorkerError
from vq_core.memory import MemoryMap
from vq_core.plan import Plan
from vq_core.worker import Worker
from waiting import wait_for


def mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:vq-guest-memory" in line for line in maps)


def test_without_a_worker_the_caller_obeys_himself() -> None:
    guest, worker = Guest(VERSION_1), Worker()
    worker.set_plan(Plan([(guest.port, 0, guest.port, 0)]))  # owned, but nobody runs yet
    guest.port.queues[0].set_enabled(False)
    assert not guest.port.queues[0].live
    assert guest.stop() == [0, 0]


def test_an_ended_worker_hinders_nobody() -> None:
    guest, worker = Guest(VERSION_1), Worker()
    thread = threading.Thread(target=worker.run)
    thread.start()
    worker.set_plan(Plan([(guest.port, 0, guest.port, 0)]))
    worker.stop()
    thread.join(60)
    worker.stop()  # again
    start = time.monotonic()
    for _ in range(100):
        guest.port.queues[0].set_enabled(False)
        guest.port.queues[0].set_enabled(True)
    worker.set_plan(Plan())
    assert time.monotonic() - start < 60
    assert guest.port.mailboxes == [None]


@pytest.mark.parametrize("poll", ["adaptive", "busy"])
def test_a_change_is_in_force_when_the_call_returns(harness: ModuleType, poll: str) -> None:
    """A disabled ring delivers nothing, from the first packet after the call on; a thousand times."""
    guest, source = Guest(VERSION_1, size=256), harness.Feed()
    queue = guest.port.queues[0]
    guest.post(16, 200)
    guest.receiveq.publish()
    with running(Worker(None, poll)) as (worker,):
        worker.set_plan(Plan([(source, 0, guest.port, 0)]))
        for _ in range(150):
            queue.set_enabled(False)
            before = int(guest.receiveq.used_head[1])
            dropped = guest.to_guest["dropped"].get("disabled", 0)
            source.add(b"never")
            wait_for(lambda dropped=dropped: guest.to_guest["dropped"].get("disabled", 0) > dropped)
            assert int(guest.receiveq.used_head[1]) == before
            queue.set_enabled(True)
            source.add(b"always")
            wait_for(lambda before=before: int(guest.receiveq.used_head[1]) == before + 1)
    assert guest.received() == [b"always"] * 150


def test_two_control_threads_at_once() -> None:
    guests = [Guest(VERSION_1, name=f"guest{i}") for i in range(2)]
    problems: list[BaseException] = []

    def change(guest: Guest) -> None:
        try:
            for _ in range(1000):
                guest.port.queues[0].set_enabled(False)
                assert not guest.port.queues[0].live
                guest.port.queues[0].set_enabled(True)
                assert guest.port.queues[0].live
        except BaseException as problem:
            problems.append(problem)

    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(guest.port, 0, guest.port, 0) for guest in guests]))
        threads = [threading.Thread(target=change, args=(guest,)) for guest in guests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert problems == []


def test_workers_that_start_and_end_while_commands_come() -> None:
    """The moments at which the runner of a command changes: 300 of them, without a command lost or run twice."""
    guest = Guest(VERSION_1)
    queue = guest.port.queues[0]
    for _ in range(150):
        worker = Worker()
        thread = threading.Thread(target=worker.run)
        thread.start()
        worker.set_plan(Plan([(guest.port, 0, guest.port, 0)]))
        queue.set_enabled(False)
        assert not queue.live
        stopper = threading.Thread(target=worker.stop)
        stopper.start()
        for _ in range(3):
            queue.set_enabled(True)
            assert queue.live
        stopper.join(60)
        thread.join(60)
        assert not thread.is_alive()
        worker.set_plan(Plan())


def test_the_old_map_is_gone_when_the_call_returns() -> None:
    guest = Guest(VERSION_1)
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(guest.port, 0, guest.port, 0)]))
        before = mapped()
        for _ in range(50):
            guest.map = MemoryMap(guest.memory.regions)
            for queue, _ in guest.rings:
                queue.set_memory(guest.map)
            assert mapped() == before
        guest.stop()
        del guest.map
        assert mapped() == before - 1


def test_a_worker_that_is_stuck_is_told_of_and_does_nothing_behind_our_back(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    go, reached = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        go.wait(300)

    with running(Worker()) as (worker,):
        plan = Plan([(guest.port, 0, target, 0)])
        worker.set_plan(plan)
        target.on_push = block
        guest.send(b"stuck")
        guest.transmitq.kick()
        assert reached.wait(60)
        start = time.monotonic()
        with pytest.raises(StuckWorkerError, match="a program or port blocks it"):
            guest.port.queues[1].stop()
        assert 10 <= time.monotonic() - start < 60
        target.on_push = None
        go.set()
        # The command was withdrawn: the ring still runs, with its memory, and the next command is the next one.
        guest.send(b"goes on")
        guest.transmitq.kick()
        wait_for(lambda: len(target.packets) == 2)
        assert guest.port.queues[1].started
        assert guest.port.queues[1].stop() == 2
        assert [packet.data for packet in target.take()] == [b"stuck", b"goes on"]
