"""Requests that the control thread serves itself: every shape of chain, answers that come late, and wake-ups."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driver_rig import EVENT_IDX, IN_ORDER, LAYOUTS, every_layout
from engine_rig import PAGE, Arena, pattern
from vq_core.chain_queue import ChainQueue
from vq_core.dirty import DirtyLog
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.memory import MemoryMap
from vq_core.queue import Queue
from waiting import wait_for

LIMIT = 4096
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Driver:
    """A ring of our driver, and the request queue that serves it."""

    def __init__(
        self, layout: str = "split", features: int = 0, *, size: int = 16, memory: GuestMemory | None = None
    ) -> None:
        self.features = LAYOUTS[layout] | features
        self.memory = memory or GuestMemory(1 << 20)
        self.ring = DriverQueue(self.memory, size, features=self.features)
        self.base = 0x8000 if layout == "packed" else 0
        self.report_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.queue = Queue(0, "requests", self.report_fd)
        self.requests = ChainQueue(self.queue, LIMIT)
        self.start()

    def start(self, base: int | None = None, **options: Any) -> None:
        self.queue.start(
            MemoryMap(self.memory.regions), self.ring.size, *self.ring.addresses, self.base if base is None else base,
            self.features, **({"kick_fd": self.ring.kick_fd, "call_fd": self.ring.call_fd, "enabled": True} | options),
        )  # fmt: skip

    def ask(self, data: bytes = b"ask", room: int = 8) -> Any:
        token = self.ring.add([data] if data else [], [room] if room else [])
        self.ring.kick()
        return token

    def answers(self) -> list[tuple[Any, bytes]]:
        return [(token, token.written(length)) for token, length in self.ring.poll()]

    @property
    def readable(self) -> bool:
        return bool(select.select([self.requests], [], [], 0)[0])

    def close(self) -> None:
        if self.queue.started:
            self.queue.stop()
        self.requests.close()
        self.ring.close()
        os.close(self.report_fd)


@pytest.fixture(params=LAYOUTS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver = Driver(request.param)
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena(GuestMemory(1 << 20))


@st.composite
def cuts(draw: st.DrawFn, total: int) -> list[int]:
    """Lengths of at most six parts, zero among them, that sum up to `total`."""
    inner = sorted(draw(st.lists(st.integers(0, total), max_size=5)))
    return [b - a for a, b in zip([0, *inner], [*inner, total], strict=True)]


@every_layout
@many
@given(data=st.data())
def test_any_shape_of_a_request(arena: Arena, layout: str, data: st.DataObject) -> None:
    features = data.draw(st.sampled_from([0, EVENT_IDX, IN_ORDER]))
    driver = Driver(layout, features, memory=arena.memory)
    asked = []
    at = 0
    arena.clean()
    for seed in range(data.draw(st.integers(1, 3))):
        sent = pattern(data.draw(st.one_of(st.integers(0, 40), st.integers(0, 6000))), seed)
        room = data.draw(st.one_of(st.integers(0, 10), st.integers(0, 3000)))
        answer = pattern(data.draw(st.integers(0, room)), seed + 50)
        readable, at = arena.place(at, lengths := data.draw(cuts(len(sent))), [3] * len(lengths))
        writable, at = arena.place(at, lengths := data.draw(cuts(room)), [3] * len(lengths))
        done = 0
        for addr, length in readable:
            arena.poke(addr, sent[done : done + length])
            done += length
        indirect = data.draw(st.booleans())
        if driver.ring.free < (1 if indirect else len(readable) + len(writable)):
            break
        token = driver.ring.add(readable, writable, indirect=indirect)
        asked.append((sent, room, answer, writable, token))
    driver.ring.kick()
    expected = bytearray(arena.peek(arena.start, arena.size))
    for sent, room, answer, writable, _ in asked:
        request = driver.requests.pop()
        assert request is not None
        assert request.data == sent[:LIMIT]
        assert (request.readable_bytes, request.writable_bytes) == (len(sent), room)
        assert request.complete(answer)
        done = 0
        for addr, length in writable:
            part = answer[done : done + length]
            expected[addr - arena.start : addr - arena.start + len(part)] = part
            done += len(part)
    assert driver.requests.pop() is None
    assert driver.ring.poll() == [], "nothing is seen before it is published"
    driver.requests.publish()
    assert driver.ring.poll() == [(token, len(answer)) for _, _, answer, _, token in asked]
    assert arena.peek(arena.start, arena.size) == expected, "something else was written to"
    driver.close()


def test_answers_come_in_any_order(driver: Driver) -> None:
    tokens = [driver.ask(bytes([n])) for n in range(3)]
    requests = [driver.requests.pop() for _ in range(3)]
    for n in (2, 0, 1):
        assert requests[n] is not None
        assert requests[n].complete(bytes([n + 100]))
    driver.requests.publish()
    assert driver.answers() == [(tokens[n], bytes([n + 100])) for n in (2, 0, 1)]


def test_wrong_use_is_refused(driver: Driver) -> None:
    driver.ask(room=4)
    request = driver.requests.pop()
    assert request is not None
    with pytest.raises(ValueError, match="answer of 5 bytes"):
        request.complete(b"12345")
    assert request.alive
    assert request.complete(b"1234")
    assert not request.alive
    with pytest.raises(ValueError, match="already"):
        request.complete(b"")
    with pytest.raises(ValueError, match="stop it first"):
        driver.requests.close()
    with pytest.raises(ValueError, match="belongs to a worker or is started"):
        ChainQueue(driver.queue)


def test_an_answer_after_the_stop_goes_nowhere(driver: Driver) -> None:
    token = driver.ask(room=4)
    before = bytes(token.writable[0])
    request = driver.requests.pop()
    assert request is not None
    driver.queue.stop()
    assert not request.alive
    assert not request.complete(b"late")
    assert bytes(token.writable[0]) == before
    assert driver.ring.poll() == []


def test_a_request_that_was_lost_is_taken_again(driver: Driver) -> None:
    token = driver.ask(b"lost")
    late = driver.requests.pop()
    driver.queue.stop()
    driver.start()  # in order, so that it goes on where the used side stands
    request = driver.requests.pop()
    assert late is not None
    assert request is not None
    assert (request.data, late.alive) == (b"lost", False)
    assert request.complete(b"found")
    driver.requests.publish()
    assert driver.answers() == [(token, b"found")]


def test_a_request_of_an_earlier_life_is_not_answered(driver: Driver) -> None:
    driver.ask()
    request = driver.requests.pop()
    assert request is not None
    base = driver.queue.stop()
    driver.start(base & 0xFFFF)
    assert not request.alive
    assert not request.complete(b"late")
    driver.requests.publish()
    assert driver.ring.poll() == []


def test_memory_may_go_while_a_request_is_out(driver: Driver) -> None:
    extra = driver.memory.add_region(PAGE, guest_addr=0x7000_0000)
    driver.queue.set_memory(MemoryMap(driver.memory.regions))
    driver.ring.add([b"ask"], [(0x7000_0000, 8)])
    driver.ring.kick()
    request = driver.requests.pop()
    assert request is not None
    del extra
    rest = [row for row in driver.memory.regions if row[0] != 0x7000_0000]
    driver.queue.set_memory(MemoryMap(rest))
    assert not request.complete(b"nowhere")
    assert driver.queue.broken == "address outside the guest's memory"
    assert os.eventfd_read(driver.report_fd) == 1


def test_memory_may_change_while_a_request_is_out(driver: Driver) -> None:
    driver.ask()
    request = driver.requests.pop()
    assert request is not None
    driver.queue.set_memory(MemoryMap(driver.memory.regions))
    assert request.complete(b"answer")
    driver.requests.publish()
    assert [answer for _, answer in driver.answers()] == [b"answer"]


def test_no_more_are_out_than_the_ring_has_entries() -> None:
    driver = Driver(size=4)
    for n in range(4):
        driver.ring.add([bytes([n])])
    driver.ring.kick()
    out = [driver.requests.pop() for _ in range(4)]
    assert all(out)
    driver.ring.avail[1] += 2  # the heads of before once more
    assert driver.requests.pop() is None
    assert out[0] is not None
    assert out[0].complete()
    assert driver.requests.pop() is not None
    assert driver.requests.pop() is None
    driver.close()


def test_a_disabled_ring_waits(driver: Driver) -> None:
    driver.queue.set_enabled(False)
    driver.ask()
    assert driver.requests.pop() is None
    driver.queue.set_enabled(True)
    assert driver.requests.pop() is not None


def test_refusing_breaks_the_queue(driver: Driver) -> None:
    driver.ask(room=0)
    driver.ask()
    request = driver.requests.pop()
    assert request is not None
    assert request.writable_bytes == 0
    request.refuse()
    assert driver.requests.pop() is None
    assert driver.queue.poll_report()[1] == "request without a whole header or without a byte for its status"  # type: ignore[index]
    driver.requests.publish()
    assert driver.ring.poll() == []


@pytest.mark.parametrize("what", ["outside", "wraps", "answer outside"])
def test_an_address_outside_memory_breaks_the_queue(driver: Driver, what: str) -> None:
    part = {"outside": (0x6666_0000, 8), "wraps": (2**64 - 4, 8), "answer outside": (0x6666_0000, 8)}[what]
    driver.ring.add([b"ask", part] if what != "answer outside" else [b"ask"], [part] if "answer" in what else [8])
    driver.ring.kick()
    assert driver.requests.pop() is None
    assert driver.queue.broken == "address outside the guest's memory"


def test_kicks_wake_an_event_loop(driver: Driver) -> None:
    requests = driver.requests
    requests.begin()
    requests.arm()
    assert not driver.readable
    driver.ask()
    assert driver.readable
    requests.begin()
    assert not driver.readable
    request = requests.pop()
    assert request is not None
    request.complete()
    requests.publish()
    requests.arm()
    assert not driver.readable
    driver.ask()
    assert driver.readable


def test_what_is_left_wakes_it_again(driver: Driver) -> None:
    driver.ask()
    driver.ask()
    driver.requests.begin()
    driver.requests.pop()
    driver.requests.arm()
    assert wait_for(lambda: driver.readable)


def test_a_ring_without_kicks_is_looked_at(driver: Driver) -> None:
    driver.queue.set_kick(None)
    driver.requests.begin()
    driver.requests.arm()
    assert wait_for(lambda: driver.readable)
    driver.requests.begin()
    assert not driver.readable


@every_layout
def test_it_calls_as_the_driver_wants(layout: str) -> None:
    for wanted in (True, False):
        driver = Driver(layout)
        if not wanted:
            driver.ring.disarm()
        driver.ask()
        request = driver.requests.pop()
        assert request is not None
        request.complete(b"x")
        assert driver.queue.snapshot()["calls"] == 0
        driver.requests.publish()
        assert driver.queue.snapshot()["calls"] == wanted
        driver.close()


def test_it_tells_of_a_new_driver(driver: Driver) -> None:
    assert driver.requests.begun()
    assert not driver.requests.begun()
    driver.ask()
    request = driver.requests.pop()
    assert request is not None
    request.complete()
    driver.requests.publish()
    driver.start(driver.queue.stop() & 0xFFFF)
    assert not driver.requests.begun(), "the driver of before goes on"
    driver.queue.stop()
    driver.ring.reset()
    driver.start()
    assert driver.requests.begun()


@every_layout
def test_answers_are_logged(layout: str) -> None:
    driver = Driver(layout, memory=GuestMemory(1 << 20, guest_addr=0x10_0000))
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    place = driver.memory.alloc(PAGE, PAGE)
    driver.queue.set_log(DirtyLog(fd, PAGE, 0))
    driver.ring.add([b"ask"], [(place.guest_addr + 100, 8)])
    driver.ring.kick()
    request = driver.requests.pop()
    assert request is not None
    assert not any(os.pread(fd, PAGE, 0))
    request.complete(b"12")
    page = place.guest_addr >> 12
    assert os.pread(fd, PAGE, 0)[page >> 3] == 1 << (page & 7)
    driver.queue.set_log(None)
    os.close(fd)
    driver.close()


def test_a_spare_queue_takes_part_in_nothing(driver: Driver) -> None:
    driver.queue.set_spare(True)
    assert driver.queue.enabled
    assert not driver.queue.live
    driver.ask()
    assert driver.requests.pop() is None
    driver.start(driver.queue.stop() & 0xFFFF)
    assert not driver.queue.live
    driver.queue.set_spare(False)
    assert driver.queue.live
    assert driver.requests.pop() is not None
