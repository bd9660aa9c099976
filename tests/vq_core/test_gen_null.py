"""The generator and the sink."""

from __future__ import annotations

import time
from types import ModuleType

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from engine_rig import VERSION_1, Guest, pattern, running
from vq_core.offload import Offload
from vq_core.plan import Plan
from vq_core.ports.gen import GenPort, frame
from vq_core.ports.null import NullPort
from vq_core.worker import Worker
from waiting import wait_for


@pytest.mark.parametrize("size", [60, 61, 64, 1514, 9216])
def test_the_packet_is_a_valid_one(harness: ModuleType, size: int) -> None:
    source, target = GenPort("gen", size, 40), harness.Collect()
    assert harness.move(source, 0, target, 0) == (32, 32)
    assert harness.move(source, 0, target, 0) == (8, 8)
    packets = target.take()
    assert len(packets) == 40
    assert {packet.data for packet in packets} == {frame(size)}
    assert all(packet.wants == 0 and not any(packet.header) for packet in packets)
    parsed = Ether(packets[0].data)
    assert len(packets[0].data) == size
    assert (parsed[IP].len, parsed[UDP].len, parsed[IP].src, parsed[IP].dst) == (
        size - 14,
        size - 34,
        "198.18.0.1",
        "198.18.0.2",
    )
    stated = parsed[IP].chksum
    del parsed[IP].chksum
    assert Ether(bytes(parsed))[IP].chksum == stated
    assert not int(parsed.src.split(":")[0], 16) & 1


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, 100_000])
def test_count_is_exact(count: int) -> None:
    source, target = GenPort("gen", 64, count), NullPort("null")
    assert not source.finished
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(source, 0, target, 0)]))
        wait_for(lambda: source.finished)
        time.sleep(0.01)
    expected = {"packets": count, "bytes": 64 * count, "dropped": {}}
    assert source.snapshot() == {"from_gen": expected, "to_gen": {"packets": 0, "bytes": 0, "dropped": {}}}
    assert target.snapshot()["to_null"] == expected


def test_every_endpoint_has_its_own_count(harness: ModuleType) -> None:
    source, target = GenPort("gen", 64, 10, None, 3), harness.Collect()
    for index, finished in ((0, False), (2, False), (1, True)):
        assert harness.move(source, index, target, 0) == (10, 10)
        assert source.finished is finished
    assert harness.move(source, 0, target, 0) == (0, 0)


@pytest.mark.parametrize("rate", [50, 1000, 20_000])
def test_rate(rate: int) -> None:
    """Never too many; not too few either, as far as the machine lets us."""
    source, target = GenPort("gen", 64, None, rate), NullPort("null")
    with running(Worker()) as (worker,):
        start = time.monotonic()
        worker.set_plan(Plan([(source, 0, target, 0)]))
        most, elapsed, sent = 0.0, 0.0, 0
        # What a busy machine made it miss is not sent later: then it takes longer until the rate is there.
        while elapsed < 0.6 or (sent < 0.7 * elapsed * rate and elapsed < 60):
            sent = target.snapshot()["to_null"]["packets"]
            elapsed = time.monotonic() - start
            most = max(most, sent - elapsed * rate)
            time.sleep(0.002)
        sent = target.snapshot()["to_null"]["packets"]
        elapsed = time.monotonic() - start
        sleeps = worker.snapshot()["sleeps"]
    assert most <= 1
    assert sent >= 0.7 * elapsed * rate
    assert sleeps > 10 or rate > 10_000  # between two packets the worker sleeps, if they are far apart


def test_a_slow_target_is_not_flooded_afterwards() -> None:
    guest, source = Guest(VERSION_1, size=256), GenPort("gen", 64, None, 1000)
    with running(Worker()) as (worker,):
        worker.set_plan(Plan([(source, 0, guest.port, 0)]))
        time.sleep(0.4)  # 400 packets are due, and there is no room for one
        assert guest.to_guest["packets"] == 0
        guest.post(64, 256)
        start = time.monotonic()
        guest.receiveq.kick()
        wait_for(lambda: guest.to_guest["packets"] > 10)
        time.sleep(0.02)
        got = guest.to_guest["packets"]
        assert got <= (time.monotonic() - start) * 1000 + 33


def test_what_comes_back_is_taken(harness: ModuleType) -> None:
    source, feed = GenPort("gen"), harness.Feed()
    feed.add(pattern(100, 1))
    feed.add(pattern(50, 2))
    assert harness.move(feed, 0, source, 0) == (2, 2)
    assert source.snapshot()["to_gen"] == {"packets": 2, "bytes": 150, "dropped": {}}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((59,), "60 to 9216"),
        ((9217,), "60 to 9216"),
        ((64, 0), "count"),
        ((64, 2**63), "count"),
        ((64, None, 0), "rate"),
        ((64, None, 10**9 + 1), "rate"),
    ],
)
def test_impossible_generators(arguments: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GenPort("gen", *arguments)


@pytest.mark.parametrize("copy", [False, True])
def test_null_takes_everything(harness: ModuleType, copy: bool) -> None:
    target, feed = NullPort("null", copy), harness.Feed()
    assert (target.sources, target.targets, target.finished) == ([], [0], True)
    sizes = [1, 60, 1500, 1536, 1537, 9000, 65553] * 5
    for number, size in enumerate(sizes):
        feed.add(pattern(size, number), segments=(size // 3, size // 4))
    assert harness.move(feed, 0, target, 0) == (32, 32)
    assert harness.move(feed, 0, target, 0) == (3, 3)
    assert target.snapshot()["to_null"] == {"packets": 35, "bytes": sum(sizes), "dropped": {}}
    assert harness.move(target, 0, harness.Collect(), 0) == (0, 0)
    assert feed.released_count == 35


def test_null_copy_really_copies(harness: ModuleType) -> None:
    """By what it costs: 9,000 bytes cannot be copied in the time that it takes to count them."""
    cycles = {}
    for copy in (False, True):
        feed, target, work = harness.Feed(endless=True), NullPort("null", copy), Offload()
        for number in range(32):
            feed.add(pattern(9000, number))
        runs = [harness.measure_offload(work, feed, target, 100) for _ in range(10)]
        cycles[copy] = min(spent / packets for spent, packets in runs)
    assert cycles[True] > 3 * cycles[False]
    assert cycles[True] > 100
