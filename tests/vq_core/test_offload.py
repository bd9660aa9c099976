"""Checksums and segmentation in software, against scapy: what comes out is byte for byte what scapy builds."""

from __future__ import annotations

import random
import struct
import threading
import time
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, PadN, defragment6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from engine_rig import Guest
from vq import virtio as v
from vq_core.offload import Offload

NEEDS_CSUM = 1
TCPV4, UFO, TCPV6, USO, ECN = 1, 3, 4, 5, 0x80
CSUM_BIT, TSO4_BIT, TSO6_BIT, ECN_BIT, UFO_BIT, USO4_BIT, USO6_BIT = (1 << i for i in range(7))
ALL_BITS = 127
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def ones_sum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words, the slow way."""
    total = 0
    for (word,) in struct.iter_unpack("!H", data + b"\0" * (len(data) & 1)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Big(NamedTuple):
    """A packet as a driver hands it over: `packet` with a finished checksum, `data` with that of the pseudo header."""

    packet: Packet
    data: bytes
    header: Any
    start: int  # csum_start

    @property
    def transport(self) -> type[Packet]:
        return TCP if TCP in self.packet else UDP


def big(harness: ModuleType, packet: Packet, gso_type: int = 0, gso_size: int = 0) -> Big:
    """Build `packet` with scapy and put the pseudo header's sum into its checksum field, as a driver does."""
    built = bytes(packet)
    transport = TCP if TCP in packet else UDP
    offset = 16 if transport is TCP else 6
    start = len(built) - len(bytes(packet[transport]))
    right = int.from_bytes(built[start + offset : start + offset + 2], "big")
    # What scapy finished is ~(pseudo + rest); hence pseudo = ~finished - rest, wherever its addresses came from.
    rest = ones_sum(built[start : start + offset] + b"\0\0" + built[start + offset + 2 :])
    pseudo = ((right ^ 0xFFFF) - rest) % 0xFFFF
    data = built[: start + offset] + pseudo.to_bytes(2, "big") + built[start + offset + 2 :]
    return Big(Ether(built), data, harness.Header(NEEDS_CSUM, gso_type, start, gso_size, start, offset), start)


def recompute(packet: Packet) -> bytes:
    """The same packet with every length and checksum computed by scapy."""
    packet = packet.copy()
    for layer, fields in ((IP, ("len", "chksum")), (IPv6, ("plen",)), (UDP, ("len", "chksum")), (TCP, ("chksum",))):
        if layer in packet:
            for field in fields:
                packet[layer].delfieldval(field)
    return bytes(packet)


def pieces_expected(packet: Packet, size: int, ecn: bool = False) -> list[bytes]:
    """What TSO or USO should make of a packet, built by scapy."""
    transport = TCP if TCP in packet else UDP
    payload = bytes(packet[transport].payload)
    parts = [payload[i : i + size] for i in range(0, len(payload), size)]
    built = []
    for number, part in enumerate(parts):
        piece = packet.copy()
        piece[transport].remove_payload()
        piece = piece / Raw(part)
        if IP in piece:
            piece[IP].id = (packet[IP].id + number) & 0xFFFF
        if transport is TCP:
            piece[TCP].seq = (packet[TCP].seq + number * size) & 0xFFFFFFFF
            flags = int(packet[TCP].flags)
            if number < len(parts) - 1:
                flags &= ~0x09
            if ecn and number > 0:
                flags &= ~0x80
            piece[TCP].flags = flags
        built.append(recompute(piece))
    return built


def run(harness: ModuleType, bigs: list[Big], accepts: int = 0, segments: Any = ()) -> tuple[list[Any], dict[str, int]]:
    """Send packets through offload_push; what the target got, and what was dropped."""
    feed, collect = harness.Feed(), harness.Collect(accepts=accepts)
    for item in bigs:
        lengths, left = [], len(item.data)
        for length in segments:
            lengths.append(min(length, left))
            left -= lengths[-1]
        feed.add(item.data, item.header, lengths)
    work = Offload()
    while feed.pulled_count < len(bigs):
        dealt = harness.offload(work, feed, collect)
        assert dealt[0] > 0
    assert feed.endpoint_snapshot(0)["from_port"]["dropped"] == {}
    return collect.take(), collect.dropped


# ---- packets of all kinds ----


@st.composite
def ethernet(draw: Any) -> Packet:
    frame = Ether(dst="52:54:00:00:00:01", src="52:54:00:00:00:02")
    for kind in draw(st.lists(st.sampled_from([Dot1Q, Dot1AD]), max_size=2)):
        frame = frame / kind(vlan=draw(st.integers(1, 4094)))
    return frame


@st.composite
def network(draw: Any, version: int) -> Packet:
    if version == 4:
        alert = IPOption_Router_Alert()
        options = draw(st.sampled_from([[], [alert], [IPOption(b"\x01"), IPOption(b"\x1e\x04\xab\xcd"), alert]]))
        flags = draw(st.sampled_from(["", "DF"]))
        ident = draw(st.sampled_from([0, 1, 0x1234, 0xFFFE]))
        tos = draw(st.integers(0, 255))
        return IP(src="10.1.2.3", dst="10.4.5.255", id=ident, flags=flags, options=options, tos=tos)
    flow = draw(st.integers(0, 0xFFFFF))
    packet = IPv6(src="2001:db8::1", dst="2001:db8::ffff:2", tc=draw(st.integers(0, 255)), fl=flow)
    if draw(st.booleans()):
        packet = packet / IPv6ExtHdrHopByHop()
    if draw(st.booleans()):
        packet = packet / IPv6ExtHdrDestOpt()
    if draw(st.booleans()):
        packet = packet / IPv6ExtHdrRouting(addresses=["2001:db8::77", "2001:db8::78"], segleft=draw(st.integers(0, 2)))
    if draw(st.booleans()):
        packet = packet / IPv6ExtHdrDestOpt()
    return packet


def payloads(limit: int = 6000) -> st.SearchStrategy[bytes]:
    """Random bytes; of sizes around those of pieces as often as of any size."""
    edges = [1, 2, 47, 48, 49, 96, 97, 1000, 1448, 1449, 1460, 2896, 4380, limit - 1, limit]
    sizes = st.one_of(st.sampled_from([size for size in edges if size <= limit]), st.integers(1, limit))
    return st.builds(lambda size, seed: random.Random(seed).randbytes(size), sizes, st.integers(0, 1 << 32))


@st.composite
def tcp(draw: Any) -> Packet:
    stamp = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
    options = draw(st.sampled_from([[], stamp, [("MSS", 1460), ("SAckOK", b""), ("WScale", 7)]]))
    sequence = draw(st.sampled_from([0, 1, 0xFFFFFF00, 0x7FFFFFFF]))
    flags = draw(st.sampled_from(["A", "PA", "FPA", "FPACE", "AE", "FAU"]))
    return TCP(sport=draw(st.integers(1, 65535)), dport=80, seq=sequence, ack=77, flags=flags, options=options)


splits = st.lists(st.integers(0, 90), max_size=12)


# ---- sums ----


@PROPERTY
@given(data=st.one_of(st.binary(max_size=300), st.integers(0, 65553).map(lambda n: b"\xff" * n)))
def test_checksum_add(harness: ModuleType, data: bytes) -> None:
    assert harness.internet_checksum(data) == ones_sum(data)


def test_checksum_add_of_every_length(harness: ModuleType) -> None:
    # From nothing to several vectors, with all that may be left behind the last one.
    noise = random.Random(1).randbytes(600)
    for data in (noise, b"\xff" * 600, b"\xff\xff\xff\xff\0\0\0\0" * 75):
        for start in (0, 1, 14):
            wrong = [n for n in range(580) if harness.internet_checksum(data[start:n]) != ones_sum(data[start:n])]
            assert wrong == []


# ---- checksum only ----


@pytest.mark.shows("VIRTIO_NET_F_CSUM")
@pytest.mark.parametrize("version", [4, 6])
@PROPERTY
@given(data=st.data())
def test_completes_checksum(harness: ModuleType, version: int, data: Any) -> None:
    transport = data.draw(st.one_of(tcp(), st.just(UDP(sport=9, dport=10))))
    packet = data.draw(ethernet()) / data.draw(network(version)) / transport / Raw(data.draw(payloads(3000)))
    item = big(harness, packet)
    got, dropped = run(harness, [item], segments=data.draw(splits))
    assert [bytes(piece.data) for piece in got] == [bytes(item.packet)] == [recompute(item.packet)]
    assert got[0].header == harness.Header() and dropped == {}


@pytest.mark.parametrize("gso_type", [0, USO])
def test_udp_zero_becomes_all_ones(harness: ModuleType, gso_type: int) -> None:
    frame = Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2)
    checksum = Ether(bytes(frame / Raw(b"\0\0")))[UDP].chksum
    item = big(harness, frame / Raw(checksum.to_bytes(2, "big")), gso_type, 2 if gso_type else 0)
    (got,), _ = run(harness, [item])
    assert Ether(got.data)[UDP].chksum == 0xFFFF
    # The same sum in a TCP segment stays zero: there it means nothing else.
    frame = Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / TCP()
    checksum = Ether(bytes(frame / Raw(b"\0\0")))[TCP].chksum
    item = big(harness, frame / Raw(checksum.to_bytes(2, "big")), TCPV4 if gso_type else 0, 2 if gso_type else 0)
    (got,), _ = run(harness, [item])
    assert Ether(got.data)[TCP].chksum == 0


# ---- TSO and USO ----


@pytest.mark.shows("VIRTIO_NET_F_HOST_TSO4", "VIRTIO_NET_F_HOST_TSO6")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ecn", [False, True])
@PROPERTY
@given(data=st.data())
def test_tso(harness: ModuleType, version: int, ecn: bool, data: Any) -> None:
    size = data.draw(st.sampled_from([48, 49, 536, 1000, 1448, 1460, 8960]))
    packet = data.draw(ethernet()) / data.draw(network(version)) / data.draw(tcp()) / Raw(data.draw(payloads()))
    item = big(harness, packet, (TCPV4 if version == 4 else TCPV6) | (ECN if ecn else 0), size)
    got, dropped = run(harness, [item], segments=data.draw(splits))
    assert dropped == {}
    assert [piece.data for piece in got] == pieces_expected(item.packet, size, ecn)
    assert all(piece.header == harness.Header() and len(piece.segments) == 2 for piece in got)
    assert b"".join(piece.data[-piece.segments[1] :] for piece in got) == bytes(item.packet[TCP].payload)


@pytest.mark.shows("VIRTIO_NET_F_HOST_USO")
@pytest.mark.parametrize("version", [4, 6])
@PROPERTY
@given(data=st.data())
def test_uso(harness: ModuleType, version: int, data: Any) -> None:
    size = data.draw(st.sampled_from([48, 333, 1200, 1472, 9000]))
    packet = data.draw(ethernet()) / data.draw(network(version)) / UDP(sport=5, dport=443) / Raw(data.draw(payloads()))
    item = big(harness, packet, USO, size)
    # One of the two kinds is not enough: the header does not say which it is.
    accepts = data.draw(st.sampled_from([0, USO4_BIT, USO6_BIT]))
    got, dropped = run(harness, [item], accepts=accepts, segments=data.draw(splits))
    assert dropped == {}
    assert [piece.data for piece in got] == pieces_expected(item.packet, size)


@pytest.mark.shows("VIRTIO_NET_F_GUEST_CSUM")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["tso", "uso"])
def test_target_that_takes_checksums(harness: ModuleType, version: int, kind: str) -> None:
    layer = IP(id=0xFFFF) if version == 4 else IPv6() / IPv6ExtHdrHopByHop()
    transport = TCP(flags="PA", options=[("Timestamp", (1, 2))]) if kind == "tso" else UDP()
    gso_type = USO if kind == "uso" else TCPV4 if version == 4 else TCPV6
    item = big(harness, Ether() / Dot1Q() / layer / transport / Raw(random.Random(1).randbytes(5001)), gso_type, 1000)
    got, dropped = run(harness, [item], accepts=CSUM_BIT)
    assert dropped == {} and len(got) == 6
    finished = []
    for piece in got:
        assert piece.header._replace(hdr_len=0) == item.header._replace(gso_type=0, gso_size=0, hdr_len=0)
        start, field = item.start, item.start + item.header.csum_offset
        checksum = ones_sum(piece.data[start:]) ^ 0xFFFF
        finished.append(piece.data[:field] + checksum.to_bytes(2, "big") + piece.data[field + 2 :])
    assert finished == pieces_expected(item.packet, 1000)


def test_largest_packet(harness: ModuleType) -> None:
    packet = Ether() / Dot1Q() / IP() / TCP(flags="PA") / Raw(random.Random(2).randbytes(65535 - 40))
    item = big(harness, packet, TCPV4, 1448)
    assert len(item.data) == 65553
    got, dropped = run(harness, [item] * 3, segments=[4096] * 15)
    assert dropped == {} and [piece.data for piece in got] == pieces_expected(item.packet, 1448) * 3


@pytest.mark.shows("VIRTIO_NET_F_HOST_ECN")
@pytest.mark.parametrize("flags", ["A", "PA", "FPA", "FPACE", "ACE", "FPUEA"])
@pytest.mark.parametrize("ecn", [0, ECN])
def test_flags_of_pieces(harness: ModuleType, flags: str, ecn: int) -> None:
    """FIN and PSH on the last piece only; CWR on the first only, if the driver said so with GSO_ECN."""
    item = big(harness, Ether() / IP() / TCP(flags=flags) / Raw(b"x" * 2500), TCPV4 | ecn, 1000)
    got, _ = run(harness, [item])
    first, middle, last = (str(Ether(piece.data)[TCP].flags) for piece in got)
    plain = "".join(flag for flag in "FSRPAUEC" if flag in flags)
    assert last == (plain.replace("C", "") if ecn else plain)
    assert first == plain.replace("F", "").replace("P", "")
    assert middle == (first.replace("C", "") if ecn else first)


@pytest.mark.shows("VIRTIO_NET_F_GUEST_ECN")
def test_ecn_only_missing(harness: ModuleType) -> None:
    item = big(harness, Ether() / IP() / TCP(flags="ACE") / Raw(b"x" * 3000), TCPV4 | ECN, 1000)
    whole, _ = run(harness, [item], accepts=CSUM_BIT | TSO4_BIT | ECN_BIT)
    assert [piece.data for piece in whole] == [item.data] and whole[0].header.gso_type == TCPV4 | ECN
    cut, _ = run(harness, [item], accepts=CSUM_BIT | TSO4_BIT)
    assert [bool(Ether(piece.data)[TCP].flags.C) for piece in cut] == [True, False, False]


# ---- UFO ----


def datagram(harness: ModuleType, item: Big, size: int, segments: Any = ()) -> list[Packet]:
    got, dropped = run(harness, [item], accepts=ALL_BITS & ~UFO_BIT, segments=segments)
    assert dropped == {}
    return [Ether(piece.data) for piece in got]


@pytest.mark.shows("VIRTIO_NET_F_HOST_UFO")
@PROPERTY
@given(data=st.data())
def test_ufo_ipv4(harness: ModuleType, data: Any) -> None:
    size = data.draw(st.sampled_from([48, 55, 552, 1480]))
    packet = data.draw(ethernet()) / data.draw(network(4)) / UDP() / Raw(data.draw(payloads()))
    item = big(harness, packet, UFO, size)
    pieces = datagram(harness, item, size, data.draw(splits))
    whole = bytes(item.packet[UDP])
    if len(whole) <= size & ~7:
        assert bytes(pieces[0]) == bytes(item.packet)
        return
    assert b"".join(bytes(piece[IP].payload) for piece in pieces) == whole
    idents = {piece[IP].id for piece in pieces}
    assert len(idents) == 1 and (idents == {item.packet[IP].id} or item.packet[IP].id == 0)
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        assert piece[IP].frag == number * (size & ~7) // 8 and int(piece[IP].flags) == (0 if last else 1)
        assert len(bytes(piece[IP].payload)) == size & ~7 or last
        assert bytes(piece)[: item.start - item.packet[IP].ihl * 4] == item.data[: item.start - item.packet[IP].ihl * 4]
        again = piece.copy()
        again[IP].delfieldval("len")
        again[IP].delfieldval("chksum")
        assert bytes(again) == bytes(piece)
        # Options without the copied flag are in the first fragment only.
        raw = bytes(piece[IP])[20 : piece[IP].ihl * 4]
        first = bytes(item.packet[IP])[20 : item.packet[IP].ihl * 4]
        assert raw == (first if number == 0 else first.replace(b"\x1e\x04\xab\xcd", b"\x01\x01\x01\x01"))


@pytest.mark.shows("VIRTIO_NET_F_HOST_UFO")
@PROPERTY
@given(data=st.data())
def test_ufo_ipv6(harness: ModuleType, data: Any) -> None:
    size = data.draw(st.sampled_from([48, 1234, 1448]))
    packet = data.draw(ethernet()) / data.draw(network(6)) / UDP() / Raw(data.draw(payloads()))
    item = big(harness, packet, UFO, size)
    pieces = datagram(harness, item, size, data.draw(splits))
    assert all(len(bytes(piece[IPv6])) == piece[IPv6].plen + 40 for piece in pieces)
    if len(pieces) == 1:
        assert bytes(pieces[0]) == bytes(item.packet)
        return
    assert bytes(defragment6([piece[IPv6] for piece in pieces])) == bytes(item.packet[IPv6])


def test_ufo_identifications_differ(harness: ModuleType) -> None:
    item = big(harness, Ether() / IPv6() / UDP() / Raw(b"x" * 2000), UFO, 1000)
    got, _ = run(harness, [item] * 20)
    idents = [piece.data[14 + 40 + 4 : 14 + 40 + 8] for piece in got]
    assert len(got) == 60 and len(set(idents)) == 20
    assert idents == [ident for ident in idents[::3] for _ in range(3)]


# ---- a burst: order, runs, room ----


def mixed(harness: ModuleType) -> list[Big]:
    """A burst of all kinds, each packet with a payload of its own."""
    bigs = []
    for number in range(24):
        body = random.Random(number).randbytes(40 + 300 * number)
        packet = Ether() / IP(id=number) / TCP(flags="PA", seq=number) / Raw(body)
        kind = number % 6
        if kind < 2:
            bigs.append(Big(packet, bytes(packet), None, 0))
        elif kind < 4:
            bigs.append(big(harness, packet))
        else:
            bigs.append(big(harness, packet, TCPV4, 150))
    return bigs


def expected_by_packet(bigs: list[Big], whole: bool = False) -> list[list[bytes]]:
    made = []
    for item in bigs:
        if item.header is None or whole:
            made.append([item.data])
        elif item.header.gso_type:
            made.append(pieces_expected(item.packet, item.header.gso_size))
        else:
            made.append([bytes(item.packet)])
    return made


def test_order_and_runs(harness: ModuleType) -> None:
    bigs = mixed(harness)
    feed, collect = harness.Feed(), harness.Collect()
    for item in bigs:
        feed.add(item.data, item.header, [14, 20])
    assert harness.offload(Offload(), feed, collect) == [len(bigs)]
    assert [piece.data for piece in collect.take()] == list(chain(*expected_by_packet(bigs)))
    # Two plain packets are one push; so are the two checksums and two cut packets behind them.
    assert collect.pushes[:3] == [2, 2 + len(expected_by_packet(bigs)[4]) + len(expected_by_packet(bigs)[5]), 2]


# Features of a driver, and a packet that none of them can do without.
WHOLE: dict[tuple[int, ...], tuple[Packet, int]] = {
    (v.VIRTIO_NET_F_GUEST_TSO4,): (IP() / TCP(), TCPV4),
    (v.VIRTIO_NET_F_GUEST_TSO6,): (IPv6() / TCP(), TCPV6),
    (v.VIRTIO_NET_F_GUEST_TSO4, v.VIRTIO_NET_F_GUEST_ECN): (IP() / TCP(flags="ACE"), TCPV4 | ECN),
    (v.VIRTIO_NET_F_GUEST_UFO,): (IP() / UDP(), UFO),
    (v.VIRTIO_NET_F_GUEST_USO4, v.VIRTIO_NET_F_GUEST_USO6): (IP() / UDP(), USO),
}


@pytest.mark.shows(
    "VIRTIO_NET_F_GUEST_TSO4", "VIRTIO_NET_F_GUEST_TSO6", "VIRTIO_NET_F_GUEST_ECN", "VIRTIO_NET_F_GUEST_UFO",
    "VIRTIO_NET_F_GUEST_USO4", "VIRTIO_NET_F_GUEST_USO6", "VIRTIO_NET_F_GUEST_CSUM",
)  # fmt: skip
@pytest.mark.parametrize("bits", WHOLE, ids=lambda bits: "+".join(v.feature_names(v.mask(*bits), v.DeviceId.NET)))
def test_a_guest_gets_whole_what_its_features_take(harness: ModuleType, bits: tuple[int, ...]) -> None:
    """With all of them the packet as it was sent, header included; with one of them missing its pieces."""
    layers, gso_type = WHOLE[bits]
    item = big(harness, Ether() / layers / Raw(random.Random(4).randbytes(3000)), gso_type, 1000)
    header = item.header._replace(hdr_len=item.start + (20 if item.transport is TCP else 8))
    everything = (v.VIRTIO_F_VERSION_1, v.VIRTIO_NET_F_GUEST_CSUM, *bits)
    for missing in (None, *everything[1:]):
        guest, feed = Guest(v.mask(*(bit for bit in everything if bit != missing))), harness.Feed()
        guest.post(4000, 5)
        guest.receiveq.publish()
        feed.add(item.data, header, [100])
        assert harness.offload(Offload(), feed, guest.port) == [1]
        got = [token.written(length) for token, length in guest.receiveq.poll()]
        if missing is None:
            assert got == [struct.pack("<BBHHHH", *header) + b"\1\0" + item.data]
        else:
            assert 3 <= len(got) <= 4
            assert all(data[1] == 0 for data in got), "no piece is to be segmented again"


@pytest.mark.shows("VIRTIO_NET_F_GUEST_TSO4")
def test_accepted_packets_pass_untouched(harness: ModuleType) -> None:
    bigs = mixed(harness)
    feed, collect = harness.Feed(), harness.Collect(accepts=ALL_BITS)
    for item in bigs:
        feed.add(item.data, item.header, [3, 0, 60])
    harness.offload(Offload(), feed, collect)
    got = collect.take()
    assert collect.pushes == [24] and [piece.data for piece in got] == [item.data for item in bigs]
    assert all(piece.segments[:3] == (3, 0, 60) for piece in got)


@PROPERTY
@given(rooms=st.lists(st.integers(0, 60), min_size=1, max_size=8), accepts=st.sampled_from([0, CSUM_BIT | TSO4_BIT]))
def test_room(harness: ModuleType, rooms: list[int], accepts: int) -> None:
    """Every call stops where the target is full; a packet begun is dealt with, its rest dropped and counted."""
    bigs = mixed(harness)
    by_packet = expected_by_packet(bigs, whole=bool(accepts))
    feed, collect = harness.Feed(), harness.Collect(accepts=accepts)
    for item in bigs:
        feed.add(item.data, item.header)
    dealt = harness.offload(Offload(), feed, collect, rooms)
    sent: list[bytes] = []
    expected_dealt, dropped, at = [], 0, 0
    for room in rooms:
        before = at
        while at < len(by_packet):
            pieces = by_packet[at]
            sent += pieces[:room]
            if room < len(pieces):
                dropped += len(pieces) - room if room else 0
                at += 1 if room else 0
                break
            room -= len(pieces)
            at += 1
        expected_dealt.append(at - before)
        if at == len(by_packet):
            break
    assert dealt == expected_dealt
    assert [piece.data for piece in collect.take()] == sent
    assert collect.dropped == ({"no_descriptors": dropped} if dropped else {})


# ---- hostile drivers ----


def tso_bytes(harness: ModuleType, version: int = 4, size: int = 500, body: int = 2000) -> Big:
    layer = IP() if version == 4 else IPv6()
    return big(harness, Ether() / layer / TCP() / Raw(b"p" * body), TCPV4 if version == 4 else TCPV6, size)


def with_byte(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def hostile(harness: ModuleType) -> dict[str, tuple[bytes, Any]]:
    """Packets that the source lets through (net_header_check) and nobody can cut."""
    four, six = tso_bytes(harness), tso_bytes(harness, 6)
    udp = big(harness, Ether() / IP() / UDP() / Raw(b"u" * 2000), UFO, 7)
    v4, v6 = four.header, six.header
    loop = b"\0" * 12 + b"\x86\xdd" + b"\x60" + b"\0" * 5 + b"\x3c\x40" + b"\0" * 32
    options = loop + b"\x3c\0\0\0\0\0\0\0" * 4000

    def behind_options(count: int, protocol: int, rest: bytes) -> bytes:
        """IPv6 with that many options headers, all of them correct."""
        return (
            loop[:20] + b"\x3c" + loop[21:] + b"\x3c\0\0\0\0\0\0\0" * (count - 1) + bytes([protocol]) + bytes(7) + rest
        )

    segment = bytes(12) + b"\xf0" + bytes(2000)
    return {
        "doff below 5": (with_byte(four.data, 46, 0x40), v4),
        "doff 0": (with_byte(four.data, 46, 0), v4),
        "TCP header truncated": (with_byte(four.data[:60], 46, 0xF0), v4._replace(hdr_len=54)),
        "no payload behind the options": (with_byte(four.data[:60], 46, 0x70)[:62], v4._replace(hdr_len=54)),
        "csum_start in the Ethernet header": (four.data, v4._replace(csum_start=4)),
        "csum_start 0": (four.data, v4._replace(csum_start=0)),
        "csum_start in the IP header": (four.data, v4._replace(csum_start=30)),
        "csum_start in the payload": (four.data, v4._replace(csum_start=100)),
        "csum_offset of UDP": (four.data, v4._replace(csum_offset=6)),
        "csum_offset in the payload": (four.data, v4._replace(csum_offset=600)),
        "csum_offset wraps": (four.data + b"\0" * 60000, v4._replace(csum_start=0xFF00 - 0x8000, csum_offset=0x6FFF)),
        "IHL 4": (with_byte(four.data, 14, 0x44), v4),
        "IHL 15": (with_byte(four.data, 14, 0x4F), v4),
        "IPv4 version 6": (with_byte(four.data, 14, 0x65), v4),
        "IPv4 fragment": (with_byte(four.data, 20, 0x20), v4),
        "IPv4 fragment offset": (with_byte(four.data, 21, 1), v4),
        "IPv4 protocol UDP": (with_byte(four.data, 23, 17), v4),
        "TCPV4 in IPv6": (six.data, v6._replace(gso_type=TCPV4)),
        "TCPV6 in IPv4": (four.data, v4._replace(gso_type=TCPV6)),
        "IPv6 version 4": (with_byte(six.data, 14, 0x40), v6),
        "IPv6 next header unknown": (with_byte(six.data, 20, 59), v6),
        "IPv6 authentication header": (with_byte(six.data, 20, 51), v6._replace(csum_start=62)),
        "IPv6 fragment header": (with_byte(six.data, 20, 44), v6._replace(csum_start=62)),
        "IPv6 hop-by-hop second": (
            with_byte(six.data, 20, 60)[:54] + bytes(8) + bytes([6]) + bytes(7) + six.data[54:],
            v6._replace(csum_start=70),
        ),
        "IPv6 extension beyond the headers": (
            with_byte(with_byte(six.data, 20, 60), 55, 0xFF),
            v6._replace(csum_start=62),
        ),
        "IPv6 extension without end": (options, v6._replace(csum_start=54 + 8 * 50)),
        "IPv6 headers longer than ours": (options, v6._replace(csum_start=54 + 8 * 2000)),
        "IPv6 options just too long": (
            behind_options(56, 17, segment),
            v6._replace(gso_type=USO, csum_start=54 + 8 * 56, csum_offset=6),
        ),
        "IPv6 and TCP options too long": (behind_options(53, 6, segment), v6._replace(csum_start=54 + 8 * 53)),
        "ARP": (with_byte(four.data, 13, 6), v4),
        "three VLAN tags": (
            four.data[:12] + b"\x81\0\0\1" * 3 + four.data[12:],
            v4._replace(csum_start=v4.csum_start + 12),
        ),
        "UFO of less than 8": (udp.data, udp.header),
        "USO in TCP": (four.data, v4._replace(gso_type=USO)),
        "too many pieces": (tso_bytes(harness, 4, 1, 65000).data, v4._replace(gso_size=1)),
        "just too many pieces": (tso_bytes(harness, 4, 1, 1367).data, v4._replace(gso_size=1)),
        "IPv4 above 65535": (tso_bytes(harness, 4, 1, 65495).data + b"1", v4._replace(gso_size=1448)),
    }


def test_hostile_headers(harness: ModuleType) -> None:
    good = tso_bytes(harness)
    for name, (data, header) in hostile(harness).items():
        feed, collect = harness.Feed(), harness.Collect()
        feed.add(good.data, good.header)
        feed.add(data, header, [1] * 30)
        feed.add(good.data, good.header)
        assert harness.offload(Offload(), feed, collect) == [3], name
        assert collect.dropped == {"bad_gso": 1}, name
        assert [piece.data for piece in collect.take()] == pieces_expected(good.packet, 500) * 2, name


def test_longest_headers(harness: ModuleType) -> None:
    """As many options as a slot of headers holds, cut in each way."""
    chain_of = IPv6ExtHdrDestOpt(options=PadN(optdata=b"\0" * 252))
    hop = IPv6ExtHdrHopByHop(options=PadN(optdata=b"\0" * 164))
    body = Raw(random.Random(3).randbytes(3000))
    tall = Ether() / IPv6() / hop / chain_of / TCP(options=[("Timestamp", (1, 2)), ("NOP", None), ("NOP", None)]) / body
    item = big(harness, tall, TCPV6, 1000)
    assert item.start == 478
    got, dropped = run(harness, [item])
    assert dropped == {} and [piece.data for piece in got] == pieces_expected(item.packet, 1000)
    item = big(harness, Ether() / IPv6() / hop / chain_of / UDP() / body, UFO, 1000)
    got, dropped = run(harness, [item])
    assert bytes(defragment6([Ether(piece.data)[IPv6] for piece in got])) == bytes(item.packet[IPv6])


def test_most_pieces(harness: ModuleType) -> None:
    item = big(harness, Ether() / IP() / TCP() / Raw(bytes(range(256)) * 5 + b"z" * 86), TCPV4, 1)
    got, dropped = run(harness, [item])
    assert dropped == {} and len(got) == 1366
    assert bytes(piece.data[-1] for piece in got) == bytes(item.packet[TCP].payload)


def test_bad_packet_is_counted_once(harness: ModuleType) -> None:
    """A caller that holds its packets comes again with a bad one that stood behind a full target."""
    data, header = hostile(harness)["doff 0"]
    good = tso_bytes(harness)
    feed, collect = harness.Feed(), harness.Collect()
    feed.add(good.data, good.header)
    feed.add(data, header)
    assert harness.offload(Offload(), feed, collect, rooms=[0, 2, 0, 8]) == [0, 1, 1]
    assert collect.dropped == {"no_descriptors": 2, "bad_gso": 1}


def test_time_is_bounded(harness: ModuleType) -> None:
    """The most expensive burst: 32 packets of 64 KiB in the smallest pieces allowed."""
    item = big(harness, Ether() / IP() / TCP() / Raw(b"p" * 65483), TCPV4, 48)
    feed, collect = harness.Feed(), harness.Collect(room=32)
    for _ in range(32):
        feed.add(item.data, item.header)
    start = time.thread_time()
    assert harness.offload(Offload(), feed, collect) == [1]  # stops where the target is full
    assert time.thread_time() - start < 1
    assert len(collect.take()) == 32 and collect.dropped == {"no_descriptors": 1365 - 32}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_bytes(harness: ModuleType, data: Any) -> None:
    """Valid packets with a few bytes changed, and headers with any values: the contract holds, lengths are right."""
    version = data.draw(st.sampled_from([4, 6]))
    transport = data.draw(st.one_of(tcp(), st.just(UDP())))
    layers = data.draw(ethernet()) / data.draw(network(version)) / transport / Raw(data.draw(payloads(300)))
    item = big(harness, layers)
    frame = bytearray(item.data)
    for _ in range(data.draw(st.integers(0, 3))):
        frame[data.draw(st.integers(12, min(len(frame) - 1, 160)))] = data.draw(st.integers(0, 255))
    header = harness.Header(
        NEEDS_CSUM,
        data.draw(st.sampled_from([0, 1, 3, 4, 5, 0x81, 0x84])),
        0,
        data.draw(st.integers(1, 100)),
        data.draw(st.one_of(st.just(item.start), st.integers(0, 200))),
        data.draw(st.one_of(st.just(item.header.csum_offset), st.integers(0, 65535))),
    )
    feed, collect = harness.Feed(), harness.Collect(accepts=data.draw(st.sampled_from([0, CSUM_BIT])))
    feed.add(bytes(frame), header, data.draw(st.lists(st.integers(0, 7), max_size=7)))
    for count in harness.offload(Offload(), feed, collect):
        assert count == feed.pulled_count
    got = collect.take()
    assert len(got) <= 1366
    lost = feed.endpoint_snapshot(0)["from_port"]["dropped"]
    assert bool(got) != bool(collect.dropped or lost)
    if header.gso_type:
        for piece in got:
            check_lengths(piece.data)


def check_lengths(frame: bytes) -> None:
    """The IP length of a piece is that of the frame."""
    at = 12
    while frame[at : at + 2] in (b"\x81\0", b"\x88\xa8"):
        at += 4
    ethertype = frame[at : at + 2]
    if ethertype == b"\x08\0":
        assert int.from_bytes(frame[at + 4 : at + 6], "big") == len(frame) - at - 2
        assert ones_sum(frame[at + 2 : at + 2 + (frame[at + 2] & 15) * 4]) == 0xFFFF
    else:
        assert ethertype == b"\x86\xdd"
        assert int.from_bytes(frame[at + 6 : at + 8], "big") == len(frame) - at - 2 - 40


def test_guest_changes_its_memory_between_batches(harness: ModuleType) -> None:
    item = tso_bytes(harness, 4, 100, 9000)
    feed, collect = harness.Feed(), harness.Collect()
    feed.add(item.data, item.header, [14, 20, 20, 3000])

    def tamper() -> None:
        for view in feed.packet_memory(0):
            view[:] = b"\xff" * len(view)

    collect.on_push = tamper
    harness.offload(Offload(), feed, collect)
    assert len(collect.pushes) == 3
    assert [piece.data for piece in collect.take()] == pieces_expected(item.packet, 100)


def test_guest_changes_its_memory_at_any_time(harness: ModuleType) -> None:
    """Headers that change while they are parsed: each result is consistent, whichever values were read."""
    item = big(harness, Ether() / IP() / UDP() / Raw(b"u" * 4000), UFO, 1000)
    feed, collect = harness.Feed(endless=True), harness.Collect()
    feed.add(item.data, item.header, [17])
    head, tail = feed.packet_memory(0)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            head[14] ^= 0x0F  # header length
            tail[6] ^= 0x10  # protocol

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        work, end = Offload(), time.monotonic() + 0.5
        while time.monotonic() < end:
            harness.offload(work, feed, collect, limit=1)
            for piece in collect.take():
                check_lengths(piece.data)
    finally:
        stop.set()
        thread.join()
    assert collect.dropped["bad_gso"] > 0
