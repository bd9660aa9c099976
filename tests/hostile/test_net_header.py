"""Lines 33 to 35 and 48: the header in front of each packet, merged buffers, and what is written into them."""

from __future__ import annotations

import itertools
import struct

import pytest

from hostile.conftest import Connect, every_layout
from hostile.guest import INDIRECT, NEXT, PAGE, PLAIN, WRITE, A, B, Guest
from hostile.process import wait_until
from vq import virtio as v

MRG = PLAIN | v.mask(v.VIRTIO_NET_F_MRG_RXBUF)
CSUM = PLAIN | v.mask(v.VIRTIO_NET_F_CSUM)
GSO = CSUM | v.mask(
    v.VIRTIO_NET_F_HOST_TSO4, v.VIRTIO_NET_F_HOST_TSO6, v.VIRTIO_NET_F_HOST_ECN, v.VIRTIO_NET_F_HOST_UFO,
    v.VIRTIO_NET_F_HOST_USO,
)  # fmt: skip
ACCEPTING = GSO | v.mask(
    v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_GUEST_TSO4, v.VIRTIO_NET_F_GUEST_TSO6, v.VIRTIO_NET_F_GUEST_ECN,
    v.VIRTIO_NET_F_GUEST_UFO, v.VIRTIO_NET_F_GUEST_USO4, v.VIRTIO_NET_F_GUEST_USO6, v.VIRTIO_NET_F_MRG_RXBUF,
)  # fmt: skip
BUFFERS = A + 0x200000
NEEDS_CSUM, DATA_VALID, RSC_INFO = 1, 2, 4
TCPV4, UDP, TCPV6, UDP_L4, ECN = 1, 3, 4, 5, 0x80


def header(
    flags: int = 0, gso_type: int = 0, hdr_len: int = 0, gso_size: int = 0, csum_start: int = 0, csum_offset: int = 0
) -> bytes:
    """A header of 12 bytes, as a driver writes it."""
    return struct.pack("<BBHHHHH", flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, 0)


def transmit(guest: Guest, *heads: int) -> None:
    guest.transmit.offer(*heads)
    guest.kick(1)


def received(guest: Guest, count: int = 1) -> list[tuple[bytes, bytes]]:
    """Wait for packets on the receiveq, in buffers of the driver's: (header, payload) of each."""
    got = []
    while len(got) < count:
        wait_until("a packet", lambda: guest.receiveq.wait(0.2))
        got += [token.written(length) for token, length in guest.receiveq.poll()]
    return [(data[: guest.header_bytes], data[guest.header_bytes :]) for data in got]


def room(guest: Guest, count: int, size: int) -> None:
    for _ in range(count):
        guest.receiveq.add(writable=[size])
    guest.receiveq.kick()


def send(guest: Guest, head: bytes, payload: bytes) -> None:
    guest.transmitq.add([head, payload])
    guest.transmitq.kick()


# -- line 33 --


@every_layout
@pytest.mark.checklist(33)
@pytest.mark.parametrize(
    "cuts", [list(range(1, 13)), [1], [11], [6], [3, 9], [12], [10, 11, 12, 13], [2, 4, 6, 8, 10, 14, 40]]
)
@pytest.mark.parametrize("indirect", [True, False])
def test_header_in_pieces(guest: Guest, cuts: list[int], indirect: bool) -> None:
    """Line 33 (CVE-2022-2132): header and packet cut anywhere, sent and received in the same pieces."""
    data = bytes(12) + bytes(range(100, 180))
    guest.write(BUFFERS, data)
    edges = [0, *cuts, len(data)]
    pieces = list(itertools.pairwise(edges))
    for ring, base, flags in ((guest.transmit, BUFFERS, 0), (guest.receive, BUFFERS + PAGE, WRITE)):
        if indirect:
            place = base + 8 * PAGE
            last = len(pieces) - 1
            rows = [
                (base + a, b - a, flags | (NEXT if n < last else 0), n + 1 if n < last else 0)
                for n, (a, b) in enumerate(pieces)
            ]
            guest.write(place, guest.table(rows))
            ring.put(0, place, 16 * len(rows), INDIRECT)
        else:
            ring.chain(*((base + a, b - a, flags) for a, b in pieces))
    guest.receive.offer(0)
    transmit(guest, 0)
    wait_until("it is received", lambda: guest.receive.used_idx == 1)
    assert guest.receive.element(0) == (0, len(data))
    assert bytes(guest.bytes_at(BUFFERS + PAGE, len(data))) == bytes(10) + b"\1\0" + data[12:]
    guest.well()


@every_layout
@pytest.mark.checklist(33)
@pytest.mark.parametrize("total", range(13))
@pytest.mark.parametrize("single", [True, False])
def test_chain_shorter_than_its_header(guest: Guest, total: int, single: bool) -> None:
    """Line 33: dropped, given back with length 0; the ring goes on with the next packet."""
    if single:
        guest.transmit.put(0, BUFFERS, total)
    else:
        guest.transmit.chain(*[(BUFFERS, 1, 0)] * total, (BUFFERS, 0, 0))
    guest.write(BUFFERS + PAGE, bytes(12) + b"after it" * 8)
    guest.transmit.put(14, BUFFERS + PAGE, 76)
    room(guest, 1, 200)
    transmit(guest, 0, 14)
    assert [payload for _, payload in received(guest)] == [b"after it" * 8]
    assert [guest.transmit.element(number) for number in (0, 1)] == [(0, 0), (14, 0)]
    assert guest.host.queue("transmitq0")["dropped"]["too_short"] >= 1
    guest.well()


@every_layout
@pytest.mark.checklist(33)
@pytest.mark.parametrize("before", range(1, 13))
def test_header_across_two_regions(guest: Guest, before: int) -> None:
    """Line 33: the header's bytes lie in two regions, for sending and for receiving."""
    data = bytes(12) + bytes(range(60))
    guest.write(B - before, data[:before])
    guest.write(B, data[before:])
    guest.transmit.put(0, B - before, len(data))
    room(guest, 1, 200)
    transmit(guest, 0)
    assert received(guest) == [(bytes(10) + b"\1\0", data[12:])]
    for index in (0, 1):
        guest.restart(index)
    guest.receive.put(0, B - before, 100, WRITE)
    guest.receive.offer(0)
    guest.write(BUFFERS, data)
    guest.transmit.put(0, BUFFERS, len(data))
    position = guest.receive.used_idx
    transmit(guest, 0)
    wait_until("it is received", lambda: guest.receive.used_idx != position)
    written = bytes(guest.bytes_at(B - before, before)) + bytes(guest.bytes_at(B, len(data) - before))
    assert written == bytes(10) + b"\1\0" + data[12:]


@pytest.mark.shows("VIRTIO_F_VERSION_1")
@pytest.mark.checklist(33)
def test_header_of_ten_bytes(connect: Connect) -> None:
    """Line 33: a legacy driver's header, in single bytes."""
    guest = connect(v.mask(v.VIRTIO_F_INDIRECT_DESC))
    assert guest.header_bytes == 10
    guest.write(BUFFERS, bytes(10) + b"legacy" * 10)
    guest.transmit.chain(*[(BUFFERS + n, 1, 0) for n in range(11)], (BUFFERS + 11, 59, 0))
    room(guest, 1, 100)
    transmit(guest, 0)
    assert received(guest) == [(bytes(10), b"legacy" * 10)]


# -- line 34 --


@every_layout
@pytest.mark.checklist(34, 48)
@pytest.mark.parametrize("size", [1, 2, 5, 7, 11, 12, 13, 30])
def test_tiny_receive_buffers(connect: Connect, size: int) -> None:
    """Lines 34, 48: merged out of many; each filled, num_buffers exact, also when its two bytes lie in two buffers."""
    guest = connect(MRG, num=128)
    payload = bytes(range(100))
    total = 12 + len(payload)
    for number in range(120):
        guest.receive.put(number, BUFFERS + 64 * number, size, WRITE)
    guest.receive.offer(*range(120))
    send(guest, bytes(12), payload)
    count = -(-total // size)
    wait_until("it is received", lambda: guest.receive.used_idx != 0)
    assert guest.receive.used_idx == count
    lengths = [size] * (total // size) + ([total % size] if total % size else [])
    assert [guest.receive.element(number) for number in range(count)] == list(enumerate(lengths))
    written = b"".join(bytes(guest.bytes_at(BUFFERS + 64 * number, length)) for number, length in enumerate(lengths))
    assert written == bytes(10) + struct.pack("<H", count) + payload
    guest.well()


@every_layout
@pytest.mark.checklist(34)
def test_packet_larger_than_all_buffers(connect: Connect) -> None:
    """Line 34 (CVE-2021-3748): a full ring that is too small: dropped, nothing used; the next small one comes."""
    guest = connect(MRG, num=16)
    for number in range(16):
        guest.receive.put(number, BUFFERS + 64 * number, 8, WRITE)
    guest.receive.offer(*range(16))
    send(guest, bytes(12), bytes(117))
    wait_until("it is dropped", lambda: guest.host.queue("receiveq0")["dropped"].get("too_long"))
    assert guest.receive.used_idx == 0
    send(guest, bytes(12), b"x" * 116)  # exactly fits
    wait_until("it is received", lambda: guest.receive.used_idx == 16)
    assert bytes(guest.bytes_at(BUFFERS + 64 + 2, 2)) == struct.pack("<H", 16)
    guest.well()


@every_layout
@pytest.mark.checklist(34)
def test_too_few_buffers_for_now(connect: Connect) -> None:
    """Line 34: a ring that is not full takes nothing of a packet that does not fit; it is dropped as a whole."""
    guest = connect(MRG, num=16)
    for number in range(3):
        guest.receive.put(number, BUFFERS + 64 * number, 8, WRITE)
    guest.receive.offer(0, 1, 2)
    send(guest, bytes(12), bytes(100))
    wait_until("it is dropped", lambda: guest.host.queue("receiveq0")["dropped"].get("no_descriptors"))
    assert guest.receive.used_idx == 0
    send(guest, bytes(12), b"y" * 12)
    wait_until("the small one is received", lambda: guest.receive.used_idx == 3)
    guest.well()


@every_layout
@pytest.mark.checklist(34, 43)
def test_sixty_thousand_buffers_for_a_packet(connect: Connect, neighbour: object) -> None:
    """Lines 34, 43: one byte a buffer on the largest ring, the longest packet: bounded work, no wrap of num_buffers."""
    guest = connect(MRG, num=32768)
    guest.receive.desc["addr"] = BUFFERS
    guest.receive.desc["len"] = 1
    guest.receive.desc["flags"] = WRITE
    guest.receive.offer(*range(32768))
    send(guest, bytes(12), bytes(65535))
    wait_until("it is dropped", lambda: guest.host.queue("receiveq0")["dropped"].get("too_long"))
    assert guest.receive.used_idx == 0
    send(guest, bytes(12), bytes(32768 - 12))
    wait_until("what fits is received", lambda: guest.receive.used_idx == 32768)
    guest.well()


@every_layout
@pytest.mark.checklist(34)
def test_packet_larger_than_its_chain(guest: Guest) -> None:
    """Line 34: without MRG_RXBUF a packet has one chain; a longer one is dropped, the chain stays available."""
    room(guest, 1, 12 + 64)
    send(guest, bytes(12), bytes(65))
    wait_until("it is dropped", lambda: guest.host.queue("receiveq0")["dropped"].get("too_long"))
    assert guest.receive.used_idx == 0
    send(guest, bytes(12), b"z" * 64)
    assert received(guest)[0][1] == b"z" * 64


# -- line 35 --

ETHERNET = bytes.fromhex("020000000001 020000000002 0800".replace(" ", ""))


def tcp4(payload: int) -> bytes:
    """A TCP segment over IPv4 that a device may cut."""
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + payload, 1, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 1000, 0, 0)
    return ETHERNET + ip + tcp + bytes(payload)


BAD_CSUM = [
    (0, 0xFFFF, 200),
    (0xFFFF, 0, 200),
    (0xFFFF, 0xFFFF, 200),
    (0xFFFF, 1, 200),
    (199, 0, 200),
    (198, 1, 200),
    (200, 0, 200),
    (0, 199, 200),
    (1, 0xFFFF - 1, 200),
    (0, 0, 1),
]


@pytest.mark.checklist(35)
@pytest.mark.parametrize(("csum_start", "csum_offset", "size"), BAD_CSUM)
@pytest.mark.parametrize("accepting", [False, True])
def test_checksum_outside_of_the_packet(
    connect: Connect, csum_start: int, csum_offset: int, size: int, accepting: bool
) -> None:
    """Line 35 (CVE-2024-11614): sums of 16-bit fields do not wrap; a store of two bytes stays inside."""
    guest = connect(ACCEPTING if accepting else GSO)
    room(guest, 2, 500)
    send(guest, header(NEEDS_CSUM, csum_start=csum_start, csum_offset=csum_offset), bytes(size))
    send(guest, bytes(12), b"after it" * 8)
    assert received(guest)[0][1] == b"after it" * 8
    assert guest.host.queue("transmitq0")["dropped"]["bad_csum"] >= 1
    guest.well()


@pytest.mark.checklist(35)
@pytest.mark.parametrize(("csum_start", "csum_offset"), [(198, 0), (0, 198), (100, 98), (199 - 1, 0), (0, 0)])
def test_checksum_at_the_last_bytes(connect: Connect, csum_start: int, csum_offset: int) -> None:
    """Line 35: the last place that is legal; completed in software, since this driver does not take it undone."""
    guest = connect(GSO)
    room(guest, 1, 500)
    payload = bytearray(range(200))
    send(guest, header(NEEDS_CSUM, csum_start=csum_start, csum_offset=csum_offset), bytes(payload))
    words = bytes(payload[csum_start:])
    total = sum(struct.unpack(f">{(len(words) + 1) // 2}H", words + bytes(len(words) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    at = csum_start + csum_offset
    payload[at : at + 2] = struct.pack(">H", ~total & 0xFFFF)
    assert received(guest) == [(bytes(10) + b"\1\0", bytes(payload))]


BAD_GSO = [
    pytest.param(header(NEEDS_CSUM, TCPV4, 54, 0, 34, 16), tcp4(3000), id="size 0"),
    pytest.param(header(NEEDS_CSUM, 2, 54, 1000, 34, 16), tcp4(3000), id="type 2"),
    pytest.param(header(NEEDS_CSUM, 6, 54, 1000, 34, 16), tcp4(3000), id="type 6"),
    pytest.param(header(NEEDS_CSUM, 0x7F, 54, 1000, 34, 16), tcp4(3000), id="type 127"),
    pytest.param(header(NEEDS_CSUM, ECN, 54, 1000, 34, 16), tcp4(3000), id="ECN alone"),
    pytest.param(header(NEEDS_CSUM, UDP | ECN, 54, 1000, 34, 6), tcp4(3000), id="UDP with ECN"),
    pytest.param(header(0, TCPV4, 54, 1000, 34, 16), tcp4(3000), id="without NEEDS_CSUM"),
    pytest.param(header(NEEDS_CSUM, TCPV4, 54, 1000, 34, 16), tcp4(0), id="no payload"),
    pytest.param(header(NEEDS_CSUM, TCPV4, 54, 1000, 34, 16), tcp4(0)[:53], id="cut header"),
    pytest.param(header(NEEDS_CSUM, TCPV4, 54, 1000, 34, 16), tcp4(0)[:52], id="header without its end"),
]


@pytest.mark.checklist(35)
@pytest.mark.parametrize(("head", "payload"), BAD_GSO)
@pytest.mark.parametrize("accepting", [False, True])
def test_segmentation_that_makes_no_sense(connect: Connect, head: bytes, payload: bytes, accepting: bool) -> None:
    """Line 35: unknown types, no size, headers that are cut off: dropped, whoever would have to do the work."""
    guest = connect(ACCEPTING if accepting else GSO, num=64)
    room(guest, 8, 4000)
    send(guest, head, payload)
    send(guest, bytes(12), b"after it" * 8)
    assert received(guest)[0][1] == b"after it" * 8
    queue = guest.host.queue("transmitq0")["dropped"]
    assert queue.get("bad_gso", 0) + queue.get("bad_csum", 0) >= 1
    guest.well()


LYING = [
    pytest.param(lambda data: data[:14] + b"\x4f" + data[15:], id="long IP header"),
    pytest.param(lambda data: data[:14] + b"\x40" + data[15:], id="IP header of 0 bytes"),
    pytest.param(lambda data: data[:46] + b"\xf0" + data[47:], id="long TCP header"),
    pytest.param(lambda data: data[:46] + b"\x00" + data[47:], id="TCP header of 0 bytes"),
    pytest.param(lambda data: data[:12] + b"\x86\xdd" + data[14:], id="says IPv6"),
    pytest.param(lambda data: data[:12] + b"\x81\x00\0\1" * 3 + data[12:], id="three VLAN tags"),
    pytest.param(lambda data: data[:20] + b"\x20\x00" + data[22:], id="a fragment"),
    pytest.param(lambda data: data[:23] + b"\x11" + data[24:], id="says UDP"),
    pytest.param(lambda data: b"\xff" * len(data), id="ones"),
    pytest.param(lambda data: bytes(len(data)), id="zeroes"),
]


@pytest.mark.checklist(35)
@pytest.mark.parametrize("lie", LYING)
@pytest.mark.parametrize(("gso_type", "csum_offset"), [(TCPV4, 16), (TCPV6, 16), (UDP, 6), (UDP_L4, 6)])
def test_segmentation_of_headers_that_lie(connect: Connect, lie: object, gso_type: int, csum_offset: int) -> None:
    """Line 35: software that has to cut the packet believes no length in it."""
    guest = connect(GSO, num=64)
    room(guest, 40, 4000)
    payload = lie(tcp4(3000))  # type: ignore[operator]
    for csum_start in (34, 46, 14, 0, 54):
        for hdr_len in (54, 0, 0xFFFF):
            send(guest, header(NEEDS_CSUM, gso_type, hdr_len, 700, csum_start, csum_offset), payload)
            guest.transmitq.poll()
    wait_until("all are looked at", lambda: guest.transmit.used_idx == 15)
    guest.well()
    for _, data in received_now(guest):
        assert len(data) <= len(payload)
    guest.works()


def received_now(guest: Guest) -> list[tuple[bytes, bytes]]:
    """What has come so far."""
    return [(data[:12], data[12:]) for data in (token.written(length) for token, length in guest.receiveq.poll())]


@pytest.mark.checklist(35, 43)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_segments_of_one_byte(connect: Connect, neighbour: object, size: int) -> None:
    """Lines 35, 43: sixty thousand segments of one packet are not made, or are bounded by the room for them."""
    guest = connect(GSO, num=64)
    room(guest, 60, 200)
    payload = tcp4(0xFFFF - 40)
    send(guest, header(NEEDS_CSUM, TCPV4, 54, size, 34, 16), payload)
    wait_until("it is done", lambda: guest.transmit.used_idx == 1)
    guest.well()
    guest.works()


@pytest.mark.checklist(35)
@pytest.mark.parametrize("flags", [DATA_VALID, RSC_INFO, DATA_VALID | RSC_INFO, 0xF8, 0xFE])
def test_other_flags_are_ignored(connect: Connect, flags: int) -> None:
    """Line 35: DATA_VALID and the rest mean nothing from a driver, and do not travel on."""
    guest = connect(ACCEPTING)
    room(guest, 1, 500)
    send(guest, header(flags, hdr_len=0xFFFF, gso_size=0xFFFF, csum_start=0xFFFF, csum_offset=0xFFFF), b"plain" * 20)
    assert received(guest) == [(bytes(10) + b"\1\0", b"plain" * 20)]


@pytest.mark.checklist(35)
@pytest.mark.parametrize("features", [PLAIN, CSUM])
def test_offloads_that_were_not_negotiated(connect: Connect, features: int) -> None:
    """Line 35: what was not acknowledged is dropped, not done."""
    guest = connect(features)
    room(guest, 4, 4000)
    send(guest, header(NEEDS_CSUM, TCPV4, 54, 1000, 34, 16), tcp4(3000))
    if features == PLAIN:
        send(guest, header(NEEDS_CSUM, 0, 0, 0, 34, 16), tcp4(100))
    send(guest, bytes(12), b"after it" * 8)
    assert received(guest)[0][1] == b"after it" * 8
    dropped = guest.host.queue("transmitq0")["dropped"]
    assert dropped.get("bad_gso", 0) + dropped.get("bad_csum", 0) >= (2 if features == PLAIN else 1)


# -- line 48 --


@every_layout
@pytest.mark.checklist(48)
@pytest.mark.parametrize("mergeable", [False, True])
def test_nothing_behind_the_packet_is_written(connect: Connect, mergeable: bool) -> None:
    """Line 48: the used length ends where the packet ends, and the rest of the buffer is as the guest left it."""
    guest = connect(MRG if mergeable else PLAIN)
    for number, size in enumerate((1, 64, 127, 1000)):
        place = BUFFERS + number * PAGE
        guest.write(place, b"\xee" * 2000)
        guest.receive.put(number, place, 2000, WRITE)
        guest.receive.offer(number)
        send(guest, bytes(12), b"\x55" * size)
        wait_until("it is received", lambda number=number: guest.receive.used_idx == number + 1)
        assert guest.receive.element(number) == (number, 12 + size)
        assert bytes(guest.bytes_at(place, 2000)) == bytes(10) + b"\1\0" + b"\x55" * size + b"\xee" * (2000 - 12 - size)


@every_layout
@pytest.mark.checklist(48)
def test_buffers_of_a_failed_packet_disclose_nothing(guest: Guest) -> None:
    """Line 48: what was begun and given up was only the packet's own bytes, and its chain is not used."""
    guest.write(BUFFERS, b"\xee" * 200)
    guest.receive.chain((BUFFERS, 50, WRITE), (BUFFERS + 50, 20, WRITE))
    guest.receive.offer(0)
    send(guest, bytes(12), b"\x55" * 100)
    wait_until("it is dropped", lambda: guest.host.queue("receiveq0")["dropped"].get("too_long"))
    assert guest.receive.used_idx == 0
    assert bytes(guest.bytes_at(BUFFERS + 70, 130)) == b"\xee" * 130
    assert set(bytes(guest.bytes_at(BUFFERS, 70))) <= {0, 1, 0x55, 0xEE}
