"""Bursts of a device in Python: packets as arrays, from and to rings that the guest of vq.testing drives."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vq
from driver_rig import every_layout
from vq import virtio as v
from vq.testing import Guest
from vq_core.packet_rows import PacketRows
from waiting import wait_for

Connect = Callable[..., Guest]
Bursts = list[vq.DeviceBurst]
PAGE = 4096
NEXT, WRITE = 1, 2
pytest_plugins = ["vq.testing.plugin"]


class Taker(vq.Device):
    """Pulls what waits in its first queue and does with it what the test wants; keeps what is not completed."""

    queues = ("transmitq", "receiveq")
    act: Callable[[vq.DeviceBurst], object]

    def __init__(self, act: Callable[[vq.DeviceBurst], object] | None = None, **words: int) -> None:
        self.kept: Bursts = []
        self.errors: list[Exception] = []
        self.act = act or self.kept.append
        self.words = words

    def handle(self, queue: vq.DeviceQueue) -> None:
        if queue.name == "transmitq":
            while burst := queue.pull(**self.words):
                self.act(burst)

    def on_error(self, queue: vq.DeviceQueue | None, error: Exception) -> None:
        self.errors.append(error)

    def do(self, action: Callable[[], Any]) -> Any:
        """Have something done in the control thread; what it returns."""
        done = threading.Event()
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(action())
            finally:
                done.set()

        self.call(run)
        assert done.wait(60)
        assert not self.errors
        return found[0]


def send(guest: Guest, chains: Sequence[tuple[Sequence[bytes], Sequence[int]]], *, queue: int = 0) -> None:
    """Make chains available, all at once."""
    driver = guest.drivers[queue]
    for readable, writable in chains:
        driver.add([part for part in readable if part], [room for room in writable if room])
    driver.publish()
    driver.kick()


def offer(guest: Guest, rooms: Sequence[int]) -> None:
    """Make receive buffers available, and wait until the device can see them."""
    send(guest, [((), (room,)) for room in rooms], queue=1)


def answers(guest: Guest, count: int, *, queue: int = 0) -> list[bytes]:
    return [answer for _, answer in guest.used(count, queue=queue)]


parts = st.lists(st.binary(min_size=1, max_size=30), max_size=4)
room_sizes = st.lists(st.integers(1, 30), max_size=3)
chains = st.lists(st.tuples(parts, room_sizes).filter(any), min_size=1, max_size=12)


@every_layout
@given(sent=chains, header=st.integers(0, 14), data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_are_what_was_sent(
    vq_guest: Connect, layout: str, sent: list[Any], header: int, data: st.DataObject
) -> None:
    """Whatever the descriptors: lengths, heads, fields, bytes, rooms, and the answers."""
    size, place = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 20))
    numbers = data.draw(st.lists(st.integers(0, 99), max_size=5))
    replies = [data.draw(st.binary(max_size=sum(room))) for _, room in sent]
    came: list[tuple[bytes, int]] = []

    def act(burst: vq.DeviceBurst) -> None:
        whole = [b"".join(readable) for readable, _ in sent][len(came) :][: burst.count]
        packets = [one[header:] for one in whole]
        rooms = [sum(room) for _, room in sent][len(came) :][: burst.count]
        assert len(burst) == burst.count == len(packets)
        assert burst.lengths.tolist() == [len(packet) for packet in packets]
        assert burst.rooms.tolist() == rooms
        assert burst.heads(size).tobytes() == b"".join(packet[:size].ljust(size, b"\0") for packet in packets)
        words = [packet[place : place + 2] for packet in packets]
        expected = [int.from_bytes(word, "big") if len(word) == 2 else 0 for word in words]
        assert burst.field(place, ">u2").tolist() == expected
        assert burst.headers.tobytes() == b"".join(
            one[:header] if len(one) >= header else bytes(header) for one in whole
        )
        line, offsets = burst.gather()
        assert [bytes(line[first:end]) for first, end in pairwise(offsets)] == packets
        which = [number % burst.count for number in numbers]
        line, offsets = burst.gather(np.array(which, int))
        assert [bytes(line[first:end]) for first, end in pairwise(offsets)] == [packets[i] for i in which]
        mine = replies[len(came) :][: burst.count]
        burst.scatter(b"".join(mine), [len(one) for one in mine])
        assert burst.complete()
        came.extend(zip(packets, rooms, strict=True))

    device = Taker(act, header=header)
    with vq_guest(device, layout=layout) as guest:
        send(guest, sent)
        assert answers(guest, len(sent)) == replies
    assert not device.errors


@every_layout
def test_packets_are_pushed(vq_guest: Connect, layout: str) -> None:
    device = Taker()
    guest = vq_guest(device, layout=layout, queues=2)
    queue = device.chains[1]
    assert device.do(lambda: queue.push(np.zeros((3, 4), np.uint8))) == 0  # nothing waits
    offer(guest, [8] * 6)
    rows = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert device.do(lambda: queue.push(rows, [6, 0, 1, 3], header=b"hd")) == 4
    expected = [b"hd" + bytes(rows[i][:length]) for i, length in enumerate([6, 0, 1, 3])]
    assert answers(guest, 4, queue=1) == expected
    headers = np.frombuffer(b"AABBCC", np.uint8).reshape(3, 2)
    assert device.do(lambda: queue.push(b"abbccc", np.array([1, 2, 3], np.uint16), header=headers)) == 2
    assert answers(guest, 2, queue=1) == [b"AAa", b"BBbb"]
    assert (queue.outstanding, queue.dropped) == (0, 0)


@every_layout
def test_a_packet_that_does_not_fit_is_dropped_and_the_others_are_not(vq_guest: Connect, layout: str) -> None:
    device = Taker()
    guest = vq_guest(device, layout=layout, queues=2)
    queue = device.chains[1]
    offer(guest, [4, 4, 9])
    assert device.do(lambda: queue.push(b"1234" + b"12345" + b"1" + b"123456789", [4, 5, 1, 9])) == 4
    assert answers(guest, 3, queue=1) == [b"1234", b"1", b"123456789"]
    assert queue.dropped == 1


def test_a_filter_copies_from_ring_to_ring(vq_guest: Connect) -> None:
    """As a device with packets looks like: no loop over them."""

    class Loop(vq.Device):
        queues = ("receiveq", "transmitq")

        def handle(self, queue: vq.DeviceQueue) -> None:
            if queue.name == "transmitq":
                while burst := queue.pull(header=12):
                    data, offsets = burst.gather(burst.field(0, "u1") != 0)
                    self.chains[0].push(data, np.diff(offsets), header=bytes(10) + b"\1\0")
                    burst.complete()

    guest = vq_guest(Loop(), queues=2, size=256)
    packets = [bytes([i % 3]) * (i + 1) for i in range(90)]
    send(guest, [((), (200,)) for _ in range(60)], queue=0)
    send(guest, [((b"header%06d" % i, packet), ()) for i, packet in enumerate(packets)], queue=1)
    assert answers(guest, 60) == [bytes(10) + b"\1\0" + packet for packet in packets if packet[0]]
    guest.used(90, queue=1)


# -- wrong use --


def test_wrong_use_is_an_error_and_touches_nothing(vq_guest: Connect) -> None:
    seen: list[bool] = []

    def act(burst: vq.DeviceBurst) -> None:
        for rows, lengths, text in (
            (b"123", [1, 2], "2 answers to 3 chains"),
            (b"123456", [1, 1, 4], "4 bytes to chain 2; it has room for 3"),
            (b"123", [1, 1, 2], "come to 4 bytes, there are 3"),
            (b"123", None, "give the lengths"),
            (b"12345", [-1, 3, 3], "lengths are from -1 to 3"),
            (np.zeros((3, 2), np.uint8), [2, 2, 3], "3 rows of 2 bytes"),
            (np.zeros((3, 2), np.uint16), None, "uint16; it must be of 1 or 2, of uint8"),
            (np.zeros((3, 2, 1), np.uint8), None, "3 dimensions"),
            (b"123", [1.0, 1.0, 1.0], "whole numbers"),
            (b"123", [[1, 1, 1]], "whole numbers"),
        ):
            with pytest.raises(ValueError, match=text):
                burst.scatter(rows, lengths)
        for lengths in ([1, 1], [4, 0, 0], [-1, 0, 0]):
            with pytest.raises(ValueError, match="length"):
                burst.complete(lengths)
        for size in (0, 65537, -1):
            with pytest.raises(ValueError, match="heads of"):
                burst.heads(size)
        for place, dtype in ((-1, "u1"), (65536, "u1"), (0, "O"), (0, "V0"), (0, "u1,u2")):
            with pytest.raises(ValueError, match="a field of"):
                burst.field(place, dtype)
        with pytest.raises(IndexError):
            burst.gather([3])
        with pytest.raises(ValueError, match="read-only"):
            burst.lengths[0] = 9
        assert burst.alive
        assert burst.complete()
        assert not burst.alive
        for wrong in (
            burst.complete, burst.gather, lambda: burst.lengths, lambda: burst.rooms, lambda: burst.headers,
            lambda: burst.heads(1), lambda: burst.field(0, "u1"), lambda: burst.scatter(b"", [0, 0, 0]),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="completed already"):
                wrong()
        seen.append(True)

    device = Taker(act)
    guest = vq_guest(device)
    send(guest, [((b"x",), (3,))] * 3)
    assert answers(guest, 3) == [b""] * 3
    assert (seen, device.errors) == ([True], [])
    for most, header in ((0, 0), (257, 0), (1, -1), (1, 1 << 20)):
        with pytest.raises(ValueError, match="chains with headers"):
            device.chains[0].pull(most, header=header)


def test_headers_that_do_not_fit_the_packets_are_refused() -> None:
    queue = Taker().chains[0]
    with pytest.raises(ValueError, match="2 headers for 3 packets"):
        queue.push(np.zeros((3, 1), np.uint8), header=np.zeros((2, 4), np.uint8))


@given(st.lists(st.binary(max_size=5), max_size=6), st.integers(0, 3))
def test_rows_are_read_where_they_lie(parts: list[bytes], step: int) -> None:
    """Views of any stride, and what changes the lengths afterwards changes nothing."""
    line = np.frombuffer(b"".join(parts), np.uint8)
    spread = np.repeat(line, step + 1)[:: step + 1]
    lengths = np.array([len(part) for part in parts], np.int32)
    assert PacketRows(spread, lengths).count == len(parts)


# -- life --


@every_layout
def test_a_burst_that_is_out_when_its_ring_stops_comes_again(vq_guest: Connect, layout: str) -> None:
    device = Taker(most=3)
    guest = vq_guest(device, layout=layout)
    send(guest, [((bytes([number]),), (1,)) for number in range(7)])
    wait_for(lambda: len(device.kept) == 3)
    first, *others = device.kept
    first.scatter(b"abc", [1, 1, 1])
    first.complete()
    assert answers(guest, 3) == [b"a", b"b", b"c"]
    base = guest.stop(0)
    assert not any(burst.alive or burst.complete() for burst in others)
    device.kept.clear()
    guest.start(0, base)
    wait_for(lambda: len(device.kept) == 2)
    assert [bytes(burst.gather()[0]) for burst in device.kept] == [b"\3\4\5", b"\6"]


def test_what_was_overtaken_when_a_ring_stops_is_told(vq_guest: Connect, caplog: pytest.LogCaptureFixture) -> None:
    device = Taker(most=2)
    guest = vq_guest(device)
    send(guest, [((b"x",), (1,))] * 6)
    wait_for(lambda: len(device.kept) == 3)
    device.kept[1].complete()
    guest.used(2)
    with caplog.at_level(logging.WARNING):
        guest.stop(0)
    assert "4 chains were never completed" in caplog.text


@every_layout
def test_completion_in_any_order_from_any_thread(vq_guest: Connect, layout: str) -> None:
    device = Taker(most=4)
    guest = vq_guest(device, layout=layout, size=256)
    send(guest, [((bytes([number]),), (1,)) for number in range(100)])
    wait_for(lambda: sum(map(len, device.kept)) == 100)

    def complete(bursts: Bursts) -> None:
        for burst in reversed(bursts):
            burst.scatter(burst.field(0, "u1")[:, None])
            assert burst.complete()

    threads = [threading.Thread(target=complete, args=(device.kept[part::2],)) for part in range(2)]
    for thread in threads:
        thread.start()
    assert sorted(answers(guest, 100)) == [bytes([number]) for number in range(100)]
    for thread in threads:
        thread.join()
    assert device.chains[0].outstanding == 0


def test_chains_and_bursts_of_one_queue_count_together(vq_guest: Connect) -> None:
    device = Taker(most=5)
    guest = vq_guest(device, size=32)
    queue = device.chains[0]
    send(guest, [((b"x",), (1,))] * 16)
    wait_for(lambda: queue.outstanding == 16)
    device.kept[1].complete()
    guest.used(5)
    assert device.do(queue.pop) is None
    device.act = lambda burst: None  # dropped without an answer: it stays out
    send(guest, [((b"y",), (1,))] * 5)
    wait_for(lambda: queue.outstanding == 16)
    for burst in device.kept:
        if burst.alive:
            burst.complete()
    assert len(guest.used(11)) == 11
    assert queue.outstanding == 5


@every_layout
def test_a_long_run_goes_round_the_ring(vq_guest: Connect, layout: str) -> None:
    """More than 2^16 chains, echoed; rings of a size that no burst divides."""

    def act(burst: vq.DeviceBurst) -> None:
        data, offsets = burst.gather()
        burst.scatter(data, np.diff(offsets))
        burst.complete()

    device = Taker(act)
    guest = vq_guest(device, layout=layout, size=256)
    driver = guest.drivers[0]
    sent = done = 0
    while done < 70_000:
        while driver.free >= 2 and sent < 70_000:
            driver.add([sent.to_bytes(3, "little")], [3])
            sent += 1
        driver.publish()
        driver.kick()
        for buffer, length in guest.drivers[0].poll() or [(buffer, 3) for buffer, _ in guest.used(1)]:
            assert int.from_bytes(buffer.written(length), "little") == done
            done += 1


def test_another_thread_may_not_take_from_a_queue_that_is_served(vq_guest: Connect) -> None:
    failures: list[str] = []

    def act(burst: vq.DeviceBurst) -> None:
        def steal() -> None:
            for taking in (device.chains[0].pull, device.chains[0].pop, lambda: device.chains[0].push(b"1", [1])):
                with pytest.raises(RuntimeError) as error:
                    taking()
                failures.append(str(error.value))

        thread = threading.Thread(target=steal)
        thread.start()
        thread.join()
        burst.complete()

    device = Taker(act)
    guest = vq_guest(device)
    send(guest, [((b"x",), (1,))])
    guest.used(1)
    assert failures == ["transmitq is served by another thread now; Device.call has it do something"] * 3


# -- what a hostile driver gains --


def test_a_ring_that_is_refilled_for_ever_does_not_keep_the_loop(vq_guest: Connect) -> None:
    """Heads are available twice and thrice: no burst loop outlives its turn, and messages are answered."""
    turns: list[int] = []

    class Greedy(Taker):
        def handle(self, queue: vq.DeviceQueue) -> None:
            count = 0
            while burst := queue.pull():
                count += burst.count
                burst.complete()
                avail = guest.drivers[0].avail
                avail[1] = int(avail[1]) + burst.count & 0xFFFF
            turns.append(count)

    device = Greedy()
    guest = vq_guest(device, size=256)
    send(guest, [((b"x",), (1,))] * 128)
    wait_for(lambda: len(turns) > 3)
    assert max(turns) <= 1024
    guest.frontend.barrier()


@pytest.mark.parametrize("spoilt", ["addr", "len", "next"])
def test_a_chain_that_breaks_the_queue_ends_the_burst_before_it(vq_guest: Connect, spoilt: str) -> None:
    results: list[tuple[int, bool, bool]] = []

    def act(burst: vq.DeviceBurst) -> None:
        burst.scatter(np.zeros((burst.count, 1), np.uint8))
        results.append((burst.count, burst.alive, burst.complete()))

    class Small(Taker):
        max_bytes = 64

    device = Small(act)
    guest = vq_guest(device, size=64)
    driver = guest.drivers[0]
    for _ in range(4):
        driver.add([b"x"], [1])
    last = 2 * 3  # the first descriptor of the fourth chain
    driver.desc[spoilt][last] = {"addr": 1 << 60, "len": 1 << 30, "next": 999}[spoilt]
    driver.publish()
    driver.kick()
    wait_for(lambda: results)
    guest.frontend.barrier()
    assert results == [(3, False, False)]
    assert not device.errors


def test_lengths_are_fixed_when_a_burst_is_taken(vq_guest: Connect) -> None:
    """The driver changes descriptors and bytes of what is out; nothing is read by what it says now."""
    device = Taker()
    guest = vq_guest(device)
    send(guest, [((b"abcd",), (4,))] * 2)
    wait_for(lambda: device.kept)
    (burst,) = device.kept
    desc = guest.drivers[0].desc
    desc["len"] = 1 << 30
    desc["addr"] = 1 << 50
    assert burst.lengths.tolist() == [4, 4]
    assert bytes(burst.gather()[0]) == b"abcdabcd"
    with pytest.raises(ValueError, match="room for 4"):
        burst.scatter(b"0123456789", [5, 5])


# -- dirty log --


@every_layout
def test_what_is_written_is_logged(vq_guest: Connect, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and pushed packets; the rings' own pages are not, without VRING_F_LOG."""
    protocol = v.mask(v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_LOG_SHMFD)
    monkeypatch.setattr("vq.testing.guest.PROTOCOL", protocol)
    device = Taker()
    guest = vq_guest(device, layout=layout, queues=2)
    base, size = guest.memory.regions[0][:2]
    log = os.memfd_create("log")
    log_size = (base + size) // PAGE // 8
    os.ftruncate(log, log_size)
    guest.frontend.set_log_base(log, log_size)
    guest.frontend.set_features(guest.features | v.mask(v.VHOST_F_LOG_ALL))

    def written(act: Callable[[], object], chains: list[Any], queue: int) -> set[int]:
        driver = guest.drivers[queue]
        blocks = [driver.add([part for part in readable if part], rooms) for readable, rooms in chains]
        driver.publish()
        driver.kick()
        if queue == 0:
            wait_for(lambda: device.chains[0].outstanding == len(chains))
        os.pwrite(log, bytes(log_size), 0)
        device.do(act)
        guest.used(len(blocks), queue=queue)
        bits = np.unpackbits(np.frombuffer(os.pread(log, log_size, 0), np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())

    def answer() -> None:
        burst = device.kept.pop()
        burst.scatter(b"1" * 5000, [5000, 0])
        burst.scatter(b"1", [1, 0])
        burst.complete()

    room = 3 * PAGE
    burst = written(answer, [((b"x",), (room,)), ((b"x",), (room,))], 0)
    assert len(burst) in (2, 3)
    assert burst == {min(burst) + i for i in range(len(burst))}
    pushed = written(lambda: device.chains[1].push(b"1" * 5000, [5000]), [((), (room,))], 1)
    assert len(pushed) in (2, 3)
    assert not burst & pushed
    assert min(burst | pushed) >= base // PAGE
    os.close(log)
