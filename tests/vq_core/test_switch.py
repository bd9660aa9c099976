"""The learning switch: who gets which packet, in which order, and what the table remembers."""

from __future__ import annotations

import random
import threading
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from vq_core.offload import Offload
from vq_core.switch import Switch, SwitchLane

BROADCAST = "ff:ff:ff:ff:ff:ff"
BUCKETS, WAYS = 8192, 4
ALL_BITS = 127


def mac(number: int) -> str:
    """A unicast address of a guest."""
    return (0x525400000000 | number).to_bytes(6, "big").hex(":")


def frame(destination: str, source: str, body: bytes = b"") -> bytes:
    return bytes.fromhex((destination + source).replace(":", "")) + b"\x08\x00" + body


class Net:
    """A switch whose ports are one Feed and one Collect each."""

    def __init__(self, harness: ModuleType, count: int, age_s: int = 300, absent: tuple[int, ...] = ()) -> None:
        self.harness = harness
        self.switch = Switch(count, age_s)
        self.feeds = [harness.Feed(f"p{i}") for i in range(count)]
        self.collects = [harness.Collect(f"p{i}") for i in range(count)]
        self.lane = SwitchLane(self.switch, [None if i in absent else (self.collects[i], 0) for i in range(count)])
        self.work = Offload()

    def send(self, port: int, *frames: bytes, now_s: int = 0, segments: Any = (), header: Any = None) -> int:
        """One burst from a port; how many pushes were taken."""
        assert len(frames) <= 32
        for data in frames:
            lengths, left = [], len(data)
            for length in segments:
                lengths.append(min(length, left))
                left -= lengths[-1]
            self.feeds[port].add(data, header, lengths)
        pushed: int = self.harness.forward(self.lane, self.feeds[port], port, self.work, now_s)
        assert self.feeds[port].released_count == self.feeds[port].pulled_count
        return pushed

    def got(self) -> dict[int, list[bytes]]:
        """What each port was given since the last call; ports with nothing are left out."""
        taken = {i: [packet.data for packet in collect.take()] for i, collect in enumerate(self.collects)}
        return {i: packets for i, packets in taken.items() if packets}

    def dropped(self, port: int) -> dict[str, int]:
        """What was dropped as having come from a port (the lane's endpoint of it)."""
        result: dict[str, int] = self.collects[port].endpoint_snapshot(0)[self.collects[port].directions[1]]["dropped"]
        return result


def test_learns_and_forwards(harness: ModuleType) -> None:
    net = Net(harness, 4)
    unknown = frame(mac(1), mac(0), b"a")
    assert net.send(0, unknown) == 3
    assert net.got() == {1: [unknown], 2: [unknown], 3: [unknown]}
    answer = frame(mac(0), mac(1), b"b")
    assert net.send(1, answer) == 1
    assert net.got() == {0: [answer]}
    again = frame(mac(1), mac(0), b"c")
    assert net.send(0, again) == 1
    assert net.got() == {1: [again]}
    assert net.switch.entries(0) == {mac(0): 0, mac(1): 1}
    assert all(collect.flushes == len(collect.pushes) > 0 for collect in net.collects)


@pytest.mark.parametrize("destination", [BROADCAST, "33:33:00:00:00:01", "01:80:c2:00:00:00"])
def test_floods_groups(harness: ModuleType, destination: str) -> None:
    net = Net(harness, 3)
    data = frame(destination, mac(9))
    assert net.send(1, data) == 2
    assert net.got() == {0: [data], 2: [data]}


def test_same_port_is_dropped(harness: ModuleType) -> None:
    net = Net(harness, 3)
    net.send(0, frame(BROADCAST, mac(0)), frame(BROADCAST, mac(5)))
    net.got()
    assert net.send(0, frame(mac(5), mac(0))) == 0
    assert net.got() == {} and net.dropped(0) == {"no_target": 1}


def test_learns_within_a_burst(harness: ModuleType) -> None:
    """What an earlier packet of the burst teaches holds for a later one, also after a lookup that found nothing."""
    net = Net(harness, 3)
    first, second = frame(mac(7), mac(1)), frame(BROADCAST, mac(7))
    assert net.send(0, first, second, first) == 4
    assert net.got() == {1: [first, second], 2: [first, second]} and net.dropped(0) == {"no_target": 1}


@pytest.mark.parametrize("source", ["00:00:00:00:00:00", BROADCAST, "01:00:5e:00:00:01"])
def test_never_learns_impossible_sources(harness: ModuleType, source: str) -> None:
    net = Net(harness, 3)
    assert net.send(0, frame(mac(1), source)) == 2
    assert net.switch.entries(0) == {}
    assert net.send(1, frame("00:00:00:00:00:00", mac(1))) == 2  # zero is no address of anybody


def test_too_short(harness: ModuleType) -> None:
    net = Net(harness, 3)
    good = frame(BROADCAST, mac(0))
    assert len(good) == 14
    assert net.send(0, good[:13], good, good[:1]) == 2
    assert net.got() == {1: [good], 2: [good]} and net.dropped(0) == {"too_short": 2}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(segments=st.lists(st.integers(0, 13), max_size=14))
def test_addresses_in_any_segments(harness: ModuleType, segments: list[int]) -> None:
    net = Net(harness, 3)
    net.send(2, frame(BROADCAST, mac(0xABCDEF)))
    net.got()
    data = frame(mac(0xABCDEF), mac(0x123456), b"xyz")
    assert net.send(0, data, segments=segments) == 1
    assert net.got() == {2: [data]} and net.switch.entries(0)[mac(0x123456)] == 0


def test_unconnected_ports(harness: ModuleType) -> None:
    net = Net(harness, 4, absent=(2,))
    data = frame(BROADCAST, mac(0))
    assert net.send(0, data) == 2 and sorted(net.got()) == [1, 3]
    # An address behind a port that this lane does not reach: learnt through another lane, which has all ports.
    other = Net(harness, 4)
    other.switch = net.switch
    other.lane = SwitchLane(net.switch, [(collect, 0) for collect in other.collects])
    other.send(2, frame(BROADCAST, mac(2)))
    assert net.send(0, frame(mac(2), mac(0))) == 0
    assert net.got() == {} and net.dropped(0) == {"no_target": 1}
    # A port that is no member cannot be a source.
    assert net.send(2, data) == 0 and net.got() == {}
    alone = Net(harness, 3, absent=(1, 2))
    assert alone.send(0, data, data) == 0 and alone.dropped(0) == {"no_target": 2}


def test_single_port(harness: ModuleType) -> None:
    net = Net(harness, 1)
    assert net.send(0, frame(BROADCAST, mac(0))) == 0 and net.dropped(0) == {"no_target": 1}


def test_full_target(harness: ModuleType) -> None:
    net = Net(harness, 3)
    net.send(1, frame(BROADCAST, mac(1)))
    net.got()
    net.collects[1].room = 2
    frames = [frame(mac(1), mac(0), bytes([i])) for i in range(4)] + [frame(BROADCAST, mac(0))]
    assert net.send(0, *frames) == 3
    assert net.got() == {1: frames[:2], 2: frames[4:]}
    assert net.collects[1].dropped == {"no_descriptors": 3} and net.collects[2].dropped == {}


class Model:
    """The switch in a few lines of Python, for bursts in which the table never overflows."""

    def __init__(self, ports: int, age_s: int) -> None:
        self.ports, self.age_s = ports, age_s
        self.table: dict[str, tuple[int, int]] = {}

    def burst(self, port: int, frames: list[tuple[str, str]], now_s: int) -> dict[int, list[int]]:
        out: dict[int, list[int]] = {}
        for number, (destination, source) in enumerate(frames):
            if not int(source[:2], 16) & 1:
                self.table[source] = (port, now_s)
            known = self.table.get(destination)
            if known and now_s - known[1] <= self.age_s:
                targets = [known[0]] if known[0] != port else []
            else:
                targets = [other for other in range(self.ports) if other != port]
            for target in targets:
                out.setdefault(target, []).append(number)
        return out


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_against_model(harness: ModuleType, data: Any) -> None:
    """Any bursts: each target gets exactly its packets, in the order of the burst, floods among them."""
    ports = data.draw(st.integers(2, 6))
    net, model, now_s = Net(harness, ports, age_s=10), Model(ports, 10), 1000
    address = st.one_of(st.integers(0, 9).map(mac), st.just(BROADCAST))
    for _ in range(data.draw(st.integers(1, 6))):
        now_s += data.draw(st.sampled_from([0, 1, 10, 11]))
        port = data.draw(st.integers(0, ports - 1))
        pairs = data.draw(st.lists(st.tuples(address, address), min_size=1, max_size=32))
        frames = [frame(to, source, bytes([n])) for n, (to, source) in enumerate(pairs)]
        expected = model.burst(port, pairs, now_s)
        assert net.send(port, *frames, now_s=now_s) == sum(len(numbers) for numbers in expected.values())
        assert net.got() == {target: [frames[n] for n in numbers] for target, numbers in expected.items()}
    alive = {address: port for address, (port, seen) in model.table.items() if now_s - seen <= 10}
    assert net.switch.entries(now_s) == alive


def test_each_target_is_pushed_once(harness: ModuleType) -> None:
    """A burst with gaps costs one push a target, and one without is not copied but passed on as it stands."""
    net = Net(harness, 3)
    net.send(1, frame(BROADCAST, mac(1)))
    net.send(2, frame(BROADCAST, mac(2)))
    for collect in net.collects:
        collect.pushes.clear()
    net.got()
    frames = [frame(mac(1 + i % 2), mac(0), bytes([i])) for i in range(31)] + [frame(BROADCAST, mac(0))]
    net.send(0, *frames)
    assert net.got() == {1: [*frames[:31:2], frames[31]], 2: [*frames[1:31:2], frames[31]]}
    assert [collect.pushes for collect in net.collects] == [[], [17], [16]]


def test_512_ports(harness: ModuleType) -> None:
    net = Net(harness, 512)
    frames = [frame(BROADCAST, mac(0), bytes([i])) for i in range(32)]
    assert net.send(511, *frames) == 511 * 32
    assert net.got() == dict.fromkeys(range(511), frames)
    net.send(100, frame(BROADCAST, mac(100)))
    net.got()
    frames[5] = frame(mac(100), mac(0))
    net.send(511, *frames)
    got = net.got()
    assert got.pop(100) == frames
    assert got == {i: frames[:5] + frames[6:] for i in range(511) if i != 100}


def test_offloads_are_completed_by_target(harness: ModuleType) -> None:
    """A flooded TCP packet: whole to a port that takes it, in pieces to one that does not."""
    net = Net(harness, 3)
    net.collects[1].accepts = ALL_BITS
    built = bytes(Ether(dst=BROADCAST, src=mac(0)) / IP() / TCP(flags="PA") / Raw(b"d" * 3000))
    header = harness.Header(1, 1, 54, 1000, 34, 16)
    assert net.send(0, built, header=header) == 2
    got = net.got()
    assert got[1] == [built] and [len(piece) for piece in got[2]] == [1054] * 3
    assert b"".join(piece[54:] for piece in got[2]) == b"d" * 3000


# ---- the table ----


def test_ageing(harness: ModuleType) -> None:
    net = Net(harness, 3, age_s=300)
    net.send(1, frame(BROADCAST, mac(1)), now_s=50)
    net.got()
    probe = frame(mac(1), mac(0))
    assert net.send(0, probe, now_s=350) == 1 and sorted(net.got()) == [1]
    assert net.switch.entries(350)[mac(1)] == 1 and mac(1) not in net.switch.entries(351)
    assert net.send(0, probe, now_s=351) == 2 and sorted(net.got()) == [1, 2]
    net.send(1, frame(mac(0), mac(1)), now_s=352)  # heard of again
    net.got()
    assert net.send(0, probe, now_s=652) == 1 and sorted(net.got()) == [1]


def test_clock_a_little_behind(harness: ModuleType) -> None:
    """Workers read the clock one after the other: an entry of the next second is not aged."""
    net = Net(harness, 3)
    net.send(1, frame(BROADCAST, mac(1)), now_s=1000)
    net.got()
    assert net.send(0, frame(mac(1), mac(0)), now_s=999) == 1


def test_station_moves(harness: ModuleType) -> None:
    net = Net(harness, 3)
    net.send(1, frame(BROADCAST, mac(1)))
    net.send(2, frame(BROADCAST, mac(1)))
    assert net.switch.entries(0) == {mac(1): 2}
    net.got()
    net.send(0, frame(mac(1), mac(0)))
    assert sorted(net.got()) == [2]


def test_forget(harness: ModuleType) -> None:
    net = Net(harness, 3)
    net.send(1, frame(BROADCAST, mac(1)), frame(BROADCAST, mac(11)))
    net.send(2, frame(BROADCAST, mac(2)))
    assert net.switch.forget(1) == 2 and net.switch.entries(0) == {mac(2): 2}
    assert net.switch.forget(1) == 0
    net.got()
    assert net.send(0, frame(mac(1), mac(0))) == 2  # unknown again: a flood
    for port in (-1, 3):
        with pytest.raises(IndexError, match=f"port {port} is not in 0 to 2"):
            net.switch.forget(port)


def fill(net: Net, port: int, numbers: range, now_s: int) -> None:
    frames = [frame(mac(port), mac(number)) for number in numbers]
    for at in range(0, len(frames), 32):
        net.send(port, *frames[at : at + 32], now_s=now_s)
    net.got()


def test_flooding_port_evicts_its_own(harness: ModuleType) -> None:
    """A guest that invents addresses cannot push others out, as long as it finds some of its own or a free way."""
    net = Net(harness, 3)
    fill(net, 1, range(100, 300), now_s=1)
    for start in range(0x10000, 0x10000 + 3 * BUCKETS * WAYS, 32 * 256):
        fill(net, 0, range(start, start + 32 * 256), now_s=2 + start % 7)
        net.feeds[0] = harness.Feed("p0")
    entries = net.switch.entries(9)
    assert len(entries) > BUCKETS * WAYS * 0.95
    kept = sum(entries.get(mac(number)) == 1 for number in range(100, 300))
    assert kept >= 199  # a bucket of four others' addresses is possible, and rare


def test_eviction_of_the_oldest(harness: ModuleType) -> None:
    """When buckets overflow, the youngest entries stay; an aged one goes before a fresh one of the same port."""
    net = Net(harness, 2, age_s=10)
    old, young, late = range(1, 20001), range(20001, 40001), range(40001, 50001)

    def kept(numbers: range, now_s: int) -> int:
        entries = net.switch.entries(now_s)
        return sum(mac(number) in entries for number in numbers)

    fill(net, 0, old, now_s=100)
    fill(net, 0, young, now_s=105)
    # 8192 buckets of four ways: of 20000 addresses at random 18760 find room, whatever was there before.
    assert 18300 < kept(young, 105) < 19200 and kept(old, 105) > 8000
    fill(net, 1, late, now_s=114)  # finds most of its room where `old` has aged at 110
    assert kept(late, 114) > 7200 and kept(young, 114) > 16500 and kept(old, 114) == 0


def test_workers_share_the_table(harness: ModuleType) -> None:
    """Two threads learn the same addresses, which move between ports, while a third reads: only whole entries."""
    switch = Switch(5)
    nets = []
    for port in (0, 1):
        feed = harness.Feed(endless=True)
        for number in random.Random(port).sample(range(200), 200):
            feed.add(frame(mac(number), mac(number)))  # to itself: dropped, nothing is pushed
        lane = SwitchLane(switch, [(harness.Collect(f"p{i}"), 0) for i in range(5)])
        nets.append((feed, lane))
    threads = [
        threading.Thread(target=harness.measure_forward, args=(lane, feed, port, Offload(), 100000))
        for port, (feed, lane) in enumerate(nets)
    ]
    for thread in threads:
        thread.start()
    valid = {mac(number) for number in range(200)}
    while any(thread.is_alive() for thread in threads):
        entries = switch.entries(1)
        assert set(entries) <= valid and set(entries.values()) <= {0, 1}
    for thread in threads:
        thread.join()
    assert len(switch.entries(1)) == 200


@pytest.mark.parametrize(
    ("arguments", "text"), [((0,), "port_count 0"), ((4097,), "port_count 4097"), ((3, 0), "age_s 0")]
)
def test_refuses(arguments: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Switch(*arguments)


def test_lane_refuses(harness: ModuleType) -> None:
    switch, port = Switch(2), harness.Collect("p")
    assert (switch.port_count, switch.age_s) == (2, 300)
    with pytest.raises(ValueError, match="1 members for a switch of 2 ports"):
        SwitchLane(switch, [(port, 0)])
    with pytest.raises(IndexError, match="p: endpoint 1 of 1"):
        SwitchLane(switch, [(port, 0), (port, 1)])
    with pytest.raises(TypeError):
        SwitchLane(None, [])
    assert SwitchLane(switch, [(port, 0), None]).members == ((port, 0), None)
