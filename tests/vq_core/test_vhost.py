"""The vhost port against our own driver: every byte of every shape of buffer, in both directions."""

from __future__ import annotations

import struct
import threading
import time
from types import ModuleType
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_rig import (
    CANARY,
    CSUM,
    EVENT_IDX,
    GUEST_CSUM,
    GUEST_TSO4,
    HOST_TSO4,
    IN_ORDER,
    INDIRECT,
    MRG_RXBUF,
    PACKED,
    PAGE,
    VERSION_1,
    Arena,
    Guest,
    pattern,
)
from vq_core.guest_memory import GuestMemory
from vq_core.ports.null import NullPort
from waiting import wait_for

PACKET_MAX = 65553
FEATURES = (
    *(0, MRG_RXBUF, VERSION_1, VERSION_1 | MRG_RXBUF, VERSION_1 | EVENT_IDX),
    *(VERSION_1 | IN_ORDER, VERSION_1 | MRG_RXBUF | IN_ORDER),
)
RARP = "ffffffffffff{0}80350001080006040003{0}00000000{0}00000000"

many = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena(GuestMemory(1 << 20))


@st.composite
def cuts(draw: st.DrawFn, total: int, most: int) -> list[int]:
    """Lengths, zero among them, that sum up to `total`; the first bytes (the header) are cut as often as the rest."""
    places = st.one_of(st.integers(0, total), st.integers(0, min(total, 14)))
    inner = sorted(draw(st.lists(places, max_size=most - 1)))
    return [b - a for a, b in zip([0, *inner], [*inner, total], strict=True)]


gaps = st.sampled_from([0, 0, 1, 7, 130])


@st.composite
def packets_out(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Packets for a transmitq: payload, and how header and payload are cut (the header counts 12 at most)."""
    result = []
    for seed in range(draw(st.integers(1, 5))):
        length = draw(st.one_of(st.integers(1, 200), st.integers(1, 9000)))
        result.append(
            {
                "payload": pattern(length, seed),
                "indirect": draw(st.booleans()),
                "writable": draw(st.sampled_from([0, 0, 0, 5])),
            }
        )
    return result


@pytest.mark.shows("VIRTIO_F_ANY_LAYOUT", "VIRTIO_F_INDIRECT_DESC")
@many
@given(data=st.data())
def test_any_shape_of_a_transmit_buffer(harness: ModuleType, arena: Arena, data: st.DataObject) -> None:
    features = data.draw(st.sampled_from(FEATURES))
    guest, target = Guest(features | INDIRECT, memory=arena.memory), harness.Collect()
    packets = data.draw(packets_out())
    limit = data.draw(st.sampled_from([32, 1, 3]))
    arena.clean()
    at, tokens = data.draw(st.integers(0, PAGE)), []
    for packet in packets:
        whole = bytes(guest.header_bytes) + packet["payload"]
        lengths = data.draw(cuts(len(whole), 9))
        parts, at = arena.place(at, lengths, data.draw(st.tuples(*[gaps] * len(lengths))))
        done = 0
        for addr, length in parts:
            arena.poke(addr, whole[done : done + length])
            done += length
        writable, at = arena.place(at, [packet["writable"]] * bool(packet["writable"]), [0] * bool(packet["writable"]))
        tokens.append(guest.transmitq.add(parts, writable, indirect=packet["indirect"]))
    before = arena.peek(arena.start, arena.size)
    guest.transmitq.publish()
    moved = 0
    while moved < len(packets):
        pulled, pushed = harness.move(guest.port, 0, target, 0, limit)
        assert 0 < pulled == pushed <= limit
        moved += pulled
    assert [packet.data for packet in target.take()] == [packet["payload"] for packet in packets]
    used = guest.transmitq.poll()
    assert [token for token, _ in used] == tokens
    if not features & IN_ORDER:  # with it only the last of a batch has a length
        assert {length for _, length in used} == {0}
    assert arena.peek(arena.start, arena.size) == before, "a transmit buffer was written to"
    assert guest.from_guest == {
        "packets": len(packets),
        "bytes": sum(len(p["payload"]) for p in packets),
        "dropped": {},
    }
    assert harness.move(guest.port, 0, target, 0) == (0, 0)


def expected_buffers(
    lengths: list[int], rooms: list[int], header: int, mergeable: bool, size: int
) -> tuple[list[list[int]], int, int]:
    """By the specification: used lengths of each delivered packet, packets dropped, packets dealt with."""
    at, delivered, dropped = 0, [], 0
    for done, length in enumerate(lengths):
        need, used = header + length, []
        for room in rooms[at:] if mergeable else rooms[at : at + 1]:
            used.append(min(room, need - sum(used)))
            if sum(used) == need:
                break
        if sum(used) == need:
            delivered.append(used)
            at += len(used)
        elif (mergeable and len(rooms) - at == size) or (not mergeable and used):
            dropped += 1
        else:
            return delivered, dropped, done
    return delivered, dropped, len(lengths)


@pytest.mark.shows("VIRTIO_F_ANY_LAYOUT", "VIRTIO_F_INDIRECT_DESC")
@many
@given(data=st.data())
def test_any_shape_of_a_receive_buffer(harness: ModuleType, arena: Arena, data: st.DataObject) -> None:
    features, size = data.draw(st.sampled_from(FEATURES)), data.draw(st.sampled_from([4, 64]))
    guest, source = Guest(features | INDIRECT, size=size, memory=arena.memory), harness.Feed()
    header, mergeable = guest.header_bytes, bool(features & MRG_RXBUF)
    arena.clean()
    inside = numpy.zeros(arena.size, bool)
    at, rooms, buffers = data.draw(st.integers(0, PAGE)), [], []
    room_sizes = st.one_of(st.integers(1, 30), st.integers(1, 400), st.integers(1, 6000))
    while len(rooms) < data.draw(st.sampled_from([1, 3, 4, 8])) and guest.receiveq.free:
        room = data.draw(room_sizes)
        lengths = data.draw(cuts(room, 6))
        indirect = len(lengths) + 1 > guest.receiveq.free or data.draw(st.booleans())
        readable, at = (
            arena.place(at, [3], [0])
            if len(lengths) + 1 <= guest.receiveq.free and data.draw(st.booleans())
            else ([], at)
        )
        parts, at = arena.place(at, lengths, data.draw(st.tuples(*[gaps] * len(lengths))))
        guest.receiveq.add(readable, parts, indirect=indirect)
        buffers.append(parts)
        rooms.append(room)
        for addr, length in parts:
            inside[addr - arena.start : addr - arena.start + length] = True
    packets = [
        pattern(data.draw(st.one_of(st.integers(1, 100), st.integers(1, 5000))), seed)
        for seed in range(data.draw(st.integers(1, 6)))
    ]
    for packet in packets:
        source.add(packet, segments=data.draw(cuts(len(packet), 4))[:-1])
    guest.receiveq.publish()
    delivered, dropped, dealt = expected_buffers([len(packet) for packet in packets], rooms, header, mergeable, size)
    assert harness.move(source, 0, guest.port, 0) == (len(packets), dealt)
    assert guest.to_guest == {
        "packets": len(delivered),
        "bytes": sum(map(sum, delivered)) - header * len(delivered),
        "dropped": {"too_long": dropped} if dropped else {},
    }
    used = guest.receiveq.poll()
    assert [length for _, length in used] == [length for lengths in delivered for length in lengths]
    sent = iter(packets)
    taken = iter(buffers)
    for lengths in delivered:
        stream = b"".join(b"".join(arena.peek(*part) for part in next(taken))[:length] for length in lengths)
        assert stream[:10] == bytes(10)
        if header == 12:
            assert int.from_bytes(stream[10:12], "little") == len(lengths)
        while stream[header:] != (packet := next(sent)):
            assert packet in packets, "a packet came that was not next in order"
    outside = numpy.frombuffer(arena.peek(arena.start, arena.size), numpy.uint8)[~inside]
    assert (outside == CANARY).all(), "something was written outside of all receive buffers"
    # What was not used is still there for the next packet, in order.
    if len(rooms) > sum(map(len, delivered)) and rooms[sum(map(len, delivered))] > header:
        source.add(b"!")
        assert harness.move(source, 0, guest.port, 0) == (1, 1)
        assert [length for _, length in guest.receiveq.poll()] == [header + 1]


def test_an_indirect_table_and_a_header_across_regions(harness: ModuleType, arena: Arena) -> None:
    """Every byte of a 3-entry table lies, in turn, at the border of two regions; so does every byte of the header."""
    guest, target = Guest(VERSION_1 | INDIRECT, memory=arena.memory), harness.Collect()
    for offset in range(1, 48):
        arena.clean()
        table = arena.start + 2 * PAGE - offset
        header = arena.start + 5 * PAGE - offset % 13
        payload = pattern(200, offset)
        arena.poke(header, bytes(12) + payload[:50])
        arena.poke(arena.start + 8 * PAGE - offset, payload[50:])
        arena.poke(
            table,
            struct.pack(
                "<" + "QIHH" * 3, header, 5, 1, 1, header + 5, 57, 1, 2, arena.start + 8 * PAGE - offset, 150, 0, 0
            ),
        )
        token = guest.transmitq.add([(table, 48)])
        guest.transmitq.desc[token.id] = (table, 48, 4, 0)
        guest.transmitq.publish()
        assert harness.move(guest.port, 0, target, 0) == (1, 1)
        (packet,) = target.take()
        assert packet.data == payload
        assert guest.transmitq.poll() == [(token, 0)]


@pytest.mark.parametrize("features", [MRG_RXBUF, VERSION_1 | MRG_RXBUF])
def test_a_packet_without_enough_buffers_leaves_them_available(harness: ModuleType, features: int) -> None:
    guest, source = Guest(features), harness.Feed()
    packet = pattern(1000, 1)
    for posted in range(1, 4):
        guest.post(300 - 12)
        guest.receiveq.publish()
        source.add(packet)
        assert harness.move(source, 0, guest.port, 0) == (1, 0), f"{posted} buffers of 300 bytes were enough for 1012"
        assert guest.receiveq.poll() == []
        assert int(guest.receiveq.used_head[1]) == 0
    guest.post(300 - 12)
    guest.receiveq.publish()
    source.add(packet)
    assert harness.move(source, 0, guest.port, 0) == (1, 1)
    used = guest.receiveq.poll()
    assert [length for _, length in used] == [300, 300, 300, 112]
    assert b"".join(token.written(length) for token, length in used) == bytes(10) + b"\4\0" + packet
    assert guest.to_guest == {"packets": 1, "bytes": 1000, "dropped": {}}


def test_what_a_full_ring_cannot_take_is_dropped(harness: ModuleType) -> None:
    """More buffers will never come: to wait for them would be to wait forever."""
    guest, source = Guest(VERSION_1 | MRG_RXBUF, size=4), harness.Feed()
    guest.post(100, 4)
    guest.receiveq.publish()
    source.add(pattern(4 * 112 - 12 + 1, 1))
    source.add(pattern(4 * 112 - 12, 2))
    assert harness.move(source, 0, guest.port, 0) == (2, 2)
    assert guest.to_guest == {"packets": 1, "bytes": 436, "dropped": {"too_long": 1}}
    assert [length for _, length in guest.receiveq.poll()] == [112] * 4


@pytest.mark.shows("VIRTIO_NET_F_MRG_RXBUF")
def test_mergeable_buffers_become_visible_together(harness: ModuleType) -> None:
    """One index store a push: the driver never sees a part of a packet."""
    guest, source = Guest(VERSION_1 | MRG_RXBUF), harness.Feed()
    guest.post(100, 60)
    guest.receiveq.publish()
    indices: list[int] = []
    source.add(pattern(2000, 1))
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            indices.append(int(guest.receiveq.used_head[1]))

    thread = threading.Thread(target=watch)
    thread.start()
    assert harness.move(source, 0, guest.port, 0) == (1, 1)
    stop.set()
    thread.join()
    assert set(indices) <= {0, 18}
    assert int(guest.receiveq.used_head[1]) == 18 == -(-2012 // 112)


def test_num_buffers_may_need_both_bytes(harness: ModuleType) -> None:
    guest, source = Guest(VERSION_1 | MRG_RXBUF, size=1024), harness.Feed()
    packet = pattern(8000, 3)
    for _ in range(300):
        guest.receiveq.add(writable=[10, 17])  # num_buffers begins in the second descriptor
    guest.receiveq.publish()
    source.add(packet)
    assert harness.move(source, 0, guest.port, 0) == (1, 1)
    used = guest.receiveq.poll()
    stream = b"".join(token.written(length) for token, length in used)
    assert len(used) == -(-8012 // 27) == 297
    assert stream == bytes(10) + (297).to_bytes(2, "little") + packet


def test_num_buffers_may_be_cut_in_the_middle(harness: ModuleType) -> None:
    guest, source = Guest(VERSION_1 | MRG_RXBUF), harness.Feed()
    packet = pattern(30, 3)
    for parts in ([11], [1, 20], [20]):
        guest.receiveq.add(writable=parts)
    guest.receiveq.publish()
    source.add(packet)
    assert harness.move(source, 0, guest.port, 0) == (1, 1)
    used = guest.receiveq.poll()
    assert b"".join(token.written(length) for token, length in used) == bytes(10) + b"\3\0" + packet
    assert [length for _, length in used] == [11, 21, 10]


@pytest.mark.parametrize("length", [PACKET_MAX, PACKET_MAX + 1])
@pytest.mark.parametrize("parts", [1, 2, 16])
def test_the_largest_packet(harness: ModuleType, length: int, parts: int) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    packet = pattern(length, 5)
    whole = bytes(12) + packet
    step = -(-len(whole) // parts)
    guest.transmitq.add([whole[at : at + step] for at in range(0, len(whole), step)])
    guest.transmitq.publish()
    if length > PACKET_MAX:
        assert harness.move(guest.port, 0, target, 0) == (0, 0)
        assert guest.from_guest["dropped"] == {"too_long": 1}
    else:
        assert harness.move(guest.port, 0, target, 0) == (1, 1)
        assert [packet.data for packet in target.take()] == [packet]
    assert len(guest.transmitq.poll()) == 1


@pytest.mark.parametrize("features", [0, VERSION_1])
def test_what_has_no_payload_is_dropped_and_given_back(harness: ModuleType, features: int) -> None:
    guest, target = Guest(features), harness.Collect()
    header = guest.header_bytes
    shapes: list[list[bytes]] = [[bytes(n)] for n in range(1, header + 1)] + [
        [bytes(header), b""],
        [bytes(4), bytes(header - 4)],
    ]
    for shape in shapes:
        guest.transmitq.add(shape)
    guest.send(b"behind them")
    guest.transmitq.publish()
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    assert [packet.data for packet in target.take()] == [b"behind them"]
    assert guest.from_guest == {"packets": 1, "bytes": 11, "dropped": {"too_short": len(shapes)}}
    assert [length for _, length in guest.transmitq.poll()] == [0] * (len(shapes) + 1)
    assert guest.port.queues[1].broken is None


def test_dropped_alone_is_given_back_at_once(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    guest.transmitq.add([b"short"])
    guest.transmitq.publish()
    assert harness.move(guest.port, 0, target, 0) == (0, 0)
    assert len(guest.transmitq.poll()) == 1
    assert guest.port.queues[1].snapshot()["calls"] == 1


def test_chains_with_more_segments_than_a_burst_holds(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1 | INDIRECT, size=2048, memory=GuestMemory(4 << 20)), harness.Collect()
    fits, too_many = pattern(1025, 1), pattern(1026, 2)
    for packet in (fits, too_many, fits[:600], fits[:500], fits[:300]):
        guest.transmitq.add([bytes(12), *(packet[i : i + 1] for i in range(len(packet)))], indirect=True)
    guest.transmitq.publish()
    pulls = []
    while (moved := harness.move(guest.port, 0, target, 0))[0]:
        pulls.append(moved[0])
    got = [packet.data for packet in target.take()]
    assert got == [fits, fits[:600], fits[:500], fits[:300]]
    assert sum(pulls) == 4
    assert max(pulls) <= 2  # 600 + 500 segments are more than a burst has
    assert guest.from_guest["dropped"] == {"segments": 1}
    assert len(guest.transmitq.poll()) == 5


def test_a_longer_packet_than_the_mtu_is_dropped(harness: ModuleType) -> None:
    guest, source = Guest(VERSION_1 | GUEST_CSUM | GUEST_TSO4, mtu=1500), harness.Feed()
    guest.post(9000, 8)
    guest.receiveq.publish()
    source.add(pattern(1518, 1))  # an Ethernet header and a VLAN tag more
    source.add(pattern(1519, 2))
    segmented = harness.Header(1, 1, 54, 1460, 34, 16)
    source.add(pattern(5000, 3), header=segmented)
    source.add(pattern(60, 4))
    assert harness.move(source, 0, guest.port, 0) == (4, 4)
    assert [len(packet) for packet in guest.received()] == [1518, 5000, 60]
    assert guest.to_guest == {"packets": 3, "bytes": 6578, "dropped": {"mtu": 1}}
    guest.port.configure(VERSION_1, None)
    source.add(pattern(1519, 5))
    harness.move(source, 0, guest.port, 0)
    assert [len(packet) for packet in guest.received()] == [1519]


def test_an_announcement_is_one_frame_with_exact_bytes(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    mac = "525400123456"
    guest.port.announce(bytes.fromhex(mac))
    guest.send(b"from the guest")
    guest.transmitq.publish()
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    assert harness.move(guest.port, 0, target, 0) == (0, 0)
    first, second = target.take()
    assert first.data == bytes.fromhex(RARP.format(mac)).ljust(60, b"\0")
    assert len(first.data) == 60
    assert first.wants == 0
    assert second.data == b"from the guest"
    assert len(guest.transmitq.poll()) == 1


@pytest.mark.parametrize("mac", ["010000000001", "ffffffffffff", "000000000000"])
def test_no_announcement_for_what_is_no_address(harness: ModuleType, mac: str) -> None:
    guest = Guest(VERSION_1)
    guest.port.announce(bytes.fromhex(mac))
    assert harness.move(guest.port, 0, harness.Collect(), 0) == (0, 0)
    with pytest.raises(ValueError, match="it has 6"):
        guest.port.announce(b"12345")


def test_an_announcement_needs_no_ring(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1, start=False), harness.Collect()
    guest.port.announce(bytes.fromhex("525400123456"))
    assert guest.port.sources == [0]
    assert harness.arm(guest.port, 0)
    assert harness.move(guest.port, 0, target, 0) == (1, 1)
    assert len(target.take()) == 1


# ---- headers ----

TCP4 = bytes(12) + b"\x08\x00" + bytes([0x45]) + bytes(8) + b"\x06" + bytes(10) + bytes(12) + b"\x50" + bytes(7)


def header(
    flags: int = 0,
    gso_type: int = 0,
    hdr_len: int = 0,
    gso_size: int = 0,
    start: int = 0,
    offset: int = 0,
    tail: bytes = b"\0\0",
) -> bytes:
    return struct.pack("<BBHHHH", flags, gso_type, hdr_len, gso_size, start, offset) + tail


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("features", "asked", "result"),
    [
        (0, header(), (0, (0,) * 6)),
        (0, header(flags=2, hdr_len=9, gso_size=7, start=3, offset=4), (0, (0,) * 6)),  # DATA_VALID is ignored here
        (0, header(flags=4), (0, (0,) * 6)),
        (CSUM, header(1, start=34, offset=16), (1, (1, 0, 0, 0, 34, 16))),
        (0, header(1, start=34, offset=16), "bad_csum"),
        (CSUM, header(1, start=1052, offset=0), (1, (1, 0, 0, 0, 1052, 0))),
        (CSUM, header(1, start=1053, offset=0), "bad_csum"),
        (CSUM, header(1, start=65535, offset=65535), "bad_csum"),
        (CSUM, header(0, 1, 54, 1000, 34, 16), "bad_gso"),
        (CSUM, header(1, 1, 54, 1000, 34, 16), "bad_gso"),
        (CSUM | HOST_TSO4, header(1, 1, 54, 1000, 34, 16), (3, (1, 1, 54, 1000, 34, 16))),
        (CSUM | HOST_TSO4, header(1, 1, 54, 0, 34, 16), "bad_gso"),
        (CSUM | HOST_TSO4, header(1, 1, 0, 1000, 34, 16), (3, (1, 1, 54, 1000, 34, 16))),
        (CSUM | HOST_TSO4, header(1, 4, 54, 1000, 34, 16), "bad_gso"),
        (CSUM | HOST_TSO4, header(1, 0x81, 54, 1000, 34, 16), "bad_gso"),
        (CSUM | HOST_TSO4, header(1, 77, 54, 1000, 34, 16), "bad_gso"),
    ],
)
def test_what_a_header_may_ask(harness: ModuleType, features: int, asked: bytes, result: Any, split: bool) -> None:
    guest, target = Guest(features | VERSION_1), harness.Collect(accepts=127)
    packet = TCP4 + pattern(1000, 1)
    assert len(packet) == 1054
    guest.transmitq.add([asked[:5], asked[5:] + packet] if split else [asked + packet])
    guest.transmitq.publish()
    moved = harness.move(guest.port, 0, target, 0)
    if isinstance(result, str):
        assert moved == (0, 0)
        assert guest.from_guest["dropped"] == {result: 1}
    else:
        assert moved == (1, 1)
        (got,) = target.take()
        assert (got.wants, tuple(got.header), got.data) == (*result, packet)
    assert len(guest.transmitq.poll()) == 1


@pytest.mark.parametrize(("features", "size"), [(VERSION_1, 12), (MRG_RXBUF, 12), (0, 10)])
@pytest.mark.parametrize("split", [False, True])
def test_a_header_arrives_as_it_was_sent(harness: ModuleType, features: int, size: int, split: bool) -> None:
    """It is written even where the buffer holds other bytes, and where it holds nearly the right ones."""
    guest, source = Guest(features | GUEST_CSUM | GUEST_TSO4), harness.Feed()
    packet = pattern(1054, 1)
    want = harness.Header(1, 1, 54, 1000, 34, 16)
    expected = struct.pack("<BBHHHH", *want) + b"\1\0"
    for stale in (b"\xff" * 12, expected, expected[:8] + b"\0\0\1\0", expected[:10] + b"\7\0", bytes(12)):
        block = guest.memory.alloc(size + 2000)
        memoryview(block)[:size] = stale[:size]
        parts = (
            [(block.guest_addr, 5), (block.guest_addr + 5, size + 1995)] if split else [(block.guest_addr, size + 2000)]
        )
        guest.receiveq.add(writable=parts)
        guest.receiveq.publish()
        source.add(packet, header=want)
        assert harness.move(source, 0, guest.port, 0) == (1, 1)
        assert bytes(block)[: size + 1054] == expected[:size] + packet
        assert [length for _, length in guest.receiveq.poll()] == [size + 1054]


# ---- disabled and stopped ----


def test_a_disabled_transmitq_is_emptied_without_effect(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    queue = guest.port.queues[1]
    queue.set_enabled(False)
    for _ in range(50):
        guest.send(b"never seen")
    guest.transmitq.publish()
    assert harness.arm(guest.port, 0)  # there is something to do, although nothing will come of it
    while harness.arm(guest.port, 0):
        assert harness.move(guest.port, 0, target, 0) == (0, 0)
    assert [length for _, length in guest.transmitq.poll()] == [0] * 50
    assert guest.from_guest == {"packets": 0, "bytes": 0, "dropped": {"disabled": 50}}
    queue.set_enabled(True)
    guest.send(b"seen")
    guest.transmitq.publish()
    harness.move(guest.port, 0, target, 0)
    assert [packet.data for packet in target.take()] == [b"seen"]


def test_a_disabled_receiveq_gets_nothing(harness: ModuleType) -> None:
    guest, source = Guest(VERSION_1), harness.Feed()
    guest.post(100, 10)
    guest.receiveq.publish()
    guest.port.queues[0].set_enabled(False)
    assert (guest.port.targets, harness.room(guest.port, 0)) == ([], -1)
    for _ in range(3):
        source.add(b"never seen")
    assert harness.move(source, 0, guest.port, 0) == (3, 3)
    assert guest.receiveq.poll() == []
    assert guest.to_guest["dropped"] == {"disabled": 3}
    guest.port.queues[0].set_enabled(True)
    assert (guest.port.targets, harness.room(guest.port, 0)) == ([0], 10)
    source.add(b"seen")
    harness.move(source, 0, guest.port, 0)
    assert guest.received() == [b"seen"]
    guest.stop()
    source.add(b"too late")
    assert harness.move(source, 0, guest.port, 0) == (1, 1)
    assert guest.to_guest["dropped"] == {"disabled": 3, "not_connected": 1}


def test_room_is_looked_at_again_before_it_seems_to_run_out(harness: ModuleType) -> None:
    """A worker asks for up to 44 buffers at once: it must not wait for what is there already."""
    guest, source = Guest(VERSION_1, size=128), harness.Feed()
    guest.post(10, 128)
    guest.receiveq.publish()
    assert harness.room(guest.port, 0) == 128
    for left in range(127, 30, -1):
        source.add(b"packet")
        harness.move(source, 0, guest.port, 0)
        guest.receiveq.poll()
        guest.post(10)
        guest.receiveq.publish()
        assert harness.room(guest.port, 0) >= 64, f"{left} known"


def test_sub_bursts_are_published_one_by_one(harness: ModuleType) -> None:
    guest, target = Guest(VERSION_1), harness.Collect()
    for number in range(32):
        guest.send(bytes([number + 1]))
    guest.transmitq.publish()
    seen: list[int] = []
    target.on_push = lambda: seen.append(int(guest.transmitq.used_head[1]))
    assert harness.move(guest.port, 0, target, 0, 32, 8) == (32, 32)
    assert seen == [0, 8, 16, 24]  # a buffer is given back after its packet was pushed, not before
    assert int(guest.transmitq.used_head[1]) == 32


def test_given_back_up_to_the_last_packet_that_was_pushed(harness: ModuleType) -> None:
    """Dropped packets between two sub-bursts are given back with those behind them."""
    guest, target = Guest(VERSION_1), harness.Collect()
    for number in range(16):
        guest.transmitq.add([b"bad"]) if number % 4 == 3 else guest.send(b"good")
    guest.transmitq.publish()
    seen: list[int] = []
    target.on_push = lambda: seen.append(int(guest.transmitq.used_head[1]))
    assert harness.move(guest.port, 0, target, 0, 32, 4) == (12, 12)
    assert seen == [0, 5, 10]
    assert len(guest.transmitq.poll()) == 16


@pytest.mark.shows("VIRTIO_F_IN_ORDER")
def test_in_order_one_element_stands_for_all_that_is_published_at_once(harness: ModuleType) -> None:
    """VIRTIO 1.3, 2.7.9: it names the last buffer and stands where the first would; the index counts all of them."""
    guest, target = Guest(VERSION_1 | IN_ORDER), harness.Collect()
    guest.transmitq.used["id"] = CANARY
    tokens = [guest.send(bytes([number + 1])) for number in range(32)]
    guest.transmitq.publish()
    assert harness.move(guest.port, 0, target, 0, 32, 8) == (32, 32)
    ids = guest.transmitq.used["id"].tolist()
    assert {slot: head for slot, head in enumerate(ids) if head != CANARY} == {0: 7, 8: 15, 16: 23, 24: 31}
    assert int(guest.transmitq.used_head[1]) == 32
    assert [token for token, _ in guest.transmitq.poll()] == tokens


@pytest.mark.shows("VIRTIO_F_IN_ORDER")
@pytest.mark.parametrize("layout", ["one", "chain", "indirect"])
def test_in_order_heads_follow_from_the_buffers_before(harness: ModuleType, layout: str) -> None:
    """Once in step the entries of the available ring are not looked at, also over the end of the table."""
    guest, target, source = Guest(VERSION_1 | IN_ORDER | INDIRECT, size=16), harness.Collect(), harness.Feed()
    cut = {"one": (20,), "chain": (5, 7, 8), "indirect": (12, 8)}[layout]
    places = [guest.memory.alloc(64) for _ in range(8)]

    def add(queue: Any, place: Any, *, writable: bool) -> None:
        addresses = [place.guest_addr + sum(cut[:i]) for i in range(len(cut))]
        parts = list(zip(addresses, cut, strict=True))
        queue.add([] if writable else parts, parts if writable else [], indirect=layout == "indirect")

    for turn in range(1, 10):
        expected = [bytes([turn, number]) * 4 for number in range(4)]
        for number, data in enumerate(expected):
            guest.memory.view(places[number].guest_addr, 20)[:] = bytes(12) + data
            add(guest.transmitq, places[number], writable=False)
            add(guest.receiveq, places[4 + number], writable=True)
            source.add(data)
        if turn > 1:
            guest.transmitq.avail[2:18] = guest.receiveq.avail[2:18] = 0xFFFF
        guest.transmitq.publish()
        guest.receiveq.publish()
        assert harness.move(guest.port, 0, target, 0) == (4, 4)
        assert [packet.data for packet in target.take()] == expected
        assert len(guest.transmitq.poll()) == 4
        assert harness.move(source, 0, guest.port, 0) == (4, 4)
        assert [length for _, length in guest.receiveq.poll()] == [20] * 4
        assert [bytes(guest.memory.view(place.guest_addr + 12, 8)) for place in places[4:]] == expected


@pytest.mark.parametrize("way", ["dropped for the MTU", "burst ended for fairness"])
def test_in_order_a_head_that_was_refused_is_not_gone_on_from(harness: ModuleType, way: str) -> None:
    """A look at a bad head that has no consequence for its packet leaves none behind for the next one either."""
    size, long = (8192, 5000) if way == "burst ended for fairness" else (4, 1)
    guest, source = Guest(VERSION_1 | IN_ORDER, size=size, mtu=100, memory=GuestMemory(1 << 20)), harness.Feed()
    first, second = guest.memory.alloc(512), guest.memory.alloc(512)
    desc = guest.receiveq.desc
    for slot in range(long):  # a chain whose last descriptor alone has room
        desc[slot] = (first.guest_addr, 512 if slot == long - 1 else 0, 2 if slot == long - 1 else 3, slot + 1)
    desc[long] = (second.guest_addr, 512, 2, 0)
    guest.receiveq.avail[2:6] = (0, 0xFFFF, 0xFFFF, 0xFFFF)
    guest.receiveq.avail[1] = 2
    source.add(b"first")
    source.add(bytes(2000) if long == 1 else b"later")
    pushed = harness.move(source, 0, guest.port, 0)[1]
    assert pushed == (2 if long == 1 else 1)
    guest.receiveq.avail[1] = 3
    source.add(b"second")
    assert harness.move(source, 0, guest.port, 0)[1] == 1
    assert bytes(guest.memory.view(first.guest_addr + 12, 5)) == b"first"
    assert bytes(guest.memory.view(second.guest_addr + 12, 6)) == b"second"
    assert int(guest.receiveq.used["id"][1]) == long


def test_a_disabled_transmitq_of_long_chains_costs_a_round_no_more_than_an_enabled_one(harness: ModuleType) -> None:
    guest = Guest(VERSION_1 | IN_ORDER, size=8192, memory=GuestMemory(1 << 20), start=False)
    guest.start(enabled=False)
    desc = guest.transmitq.desc
    for slot in range(8192):  # one chain of all descriptors, named by every head
        desc[slot] = (guest.memory.regions[0][0], 0, 1 if slot < 8191 else 0, slot + 1 if slot < 8191 else 0)
    guest.transmitq.avail[1] = 32
    used = []
    for _ in range(2):
        assert harness.move(guest.port, 0, harness.Collect(), 0) == (0, 0)
        used.append(int(guest.transmitq.used_head[1]))
    assert used == [1, 2]


@pytest.mark.parametrize("layout", [VERSION_1, PACKED])
def test_a_driver_that_refills_is_left_alone_for_a_moment(harness: ModuleType, layout: int) -> None:
    """After a full burst the few buffers that are left do not count as room, until there are more or it has paused."""
    guest, source = Guest(layout, size=256), harness.Feed()

    def post(count: int) -> None:
        guest.receiveq.poll()
        guest.post(100, count)
        guest.receiveq.publish()

    def push(count: int) -> None:
        for _ in range(count):
            source.add(bytes(64))
        assert harness.move(source, 0, guest.port, 0) == (count, count)

    post(37)
    push(32)
    assert harness.room(guest.port, 0) == 0
    assert wait_for(lambda: harness.room(guest.port, 0)) == 5
    push(5)  # no full burst: nothing is held back
    post(3)
    assert harness.room(guest.port, 0) == 3
    post(100)
    push(32)
    assert harness.room(guest.port, 0) >= 64  # and more than a burst is there already
    push(32)
    push(32)
    assert harness.room(guest.port, 0) == 0
    push(7)  # whoever has packets that cannot wait finds what there is
    time.sleep(0.001)
    assert harness.room(guest.port, 0) == 0


@pytest.mark.parametrize(
    ("layout", "size"), [(VERSION_1, 32), (VERSION_1, 256), (PACKED, 32), (PACKED, 33), (PACKED, 256)]
)
def test_a_driver_in_full_flow_is_left_alone_for_a_moment(harness: ModuleType, layout: int, size: int) -> None:
    """What follows a full burst waits a little; not if it is as much again, nor when packets are released in parts."""
    guest, null = Guest(layout, size=size), NullPort("null")

    def move(**options: int) -> int:
        return int(harness.move(guest.port, 0, null, 0, **options)[0])

    def send(count: int) -> None:
        guest.transmitq.poll()
        for _ in range(count):
            guest.send(bytes(64))
        guest.transmitq.publish()

    send(32)
    assert move() == 32
    send(5)
    assert move() == 0
    assert wait_for(move) == 5
    send(5)
    assert move() == 5
    if size == 256:
        send(64)
        assert [move(), move()] == [32, 32]
    send(32)
    assert wait_for(lambda: move(step=8)) == 32
    send(5)
    assert move() == 5
    # A round that lasts, since other queues have much to do, is wait enough.
    send(32)
    assert move() == 32
    send(5)
    assert move() == 0
    time.sleep(0.001)
    assert move() == 5
    # A ring that starts anew starts without a past.
    send(32)
    assert move() == 32
    base = guest.port.queues[1].stop()
    guest.stop()
    guest.start(base=base & 0xFFFF)
    send(5)
    assert move() == 5


@pytest.mark.parametrize("ring", ["transmitq", "receiveq"])
def test_a_chain_is_never_followed_behind_its_table(harness: ModuleType, ring: str) -> None:
    """What looks like the right descriptor does not count where the table has ended."""
    guest, source, target = Guest(VERSION_1, memory=GuestMemory(4 << 20)), harness.Feed(), harness.Collect()
    queue = getattr(guest, ring)
    header, data, write = guest.memory.alloc(64), guest.memory.alloc(64), 2 if ring == "receiveq" else 0
    table = int(queue.guest_addresses[0])
    behind = numpy.frombuffer(guest.memory.view(table + 16 * 65535, 16), queue.desc.dtype)
    behind[0] = (data.guest_addr, 64, write, 0)
    queue.desc[0] = (header.guest_addr, 12, 1 | write, 65535)
    queue.avail[2], queue.avail[1] = 0, 1
    if ring == "receiveq":
        source.add(b"lost")
        harness.move(source, 0, guest.port, 0)
    else:
        harness.move(guest.port, 0, target, 0)
    assert "next" in str(guest.port.queues[0 if ring == "receiveq" else 1].broken)
    assert target.packets == [] and bytes(guest.memory.view(data.guest_addr, 4)) == bytes(4)
