"""Lines 26 to 32 and 38: what a guest may write into rings, descriptors and indirect tables."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from hostile.conftest import Connect, every_layout
from hostile.guest import (
    A_BYTES,
    B_BYTES,
    C_BYTES,
    GAP,
    INDIRECT,
    NEXT,
    PAGE,
    PLAIN,
    WRITE,
    A,
    B,
    C,
    Guest,
)  # fmt: skip
from hostile.process import wait_until
from vq import virtio as v
from vq.frontend import RingSetup

MRG = PLAIN | v.mask(v.VIRTIO_NET_F_MRG_RXBUF)

AVAIL_IDX = "available index more than queue_size ahead"
HEAD = "head outside queue_size"
NEXT_OUTSIDE = "next outside the descriptor table"
LOOP = "more descriptors than a chain may have"
BAD_INDIRECT = "malformed indirect descriptor"
ORDER = "device-readable descriptor after a device-writable one"
LENGTH = "descriptor chain of 2^32 bytes or more"
ADDRESS = "address outside the guest's memory"
DIRECTION = "descriptor chain without a buffer in the direction of the queue"

BUFFERS = A + 0x200000  # where these tests lay their buffers and tables; the driver's rings are far in front of it
TABLE = A + 0x280000
NUM = 16
END = (1 << 64) - 1


def transmit(guest: Guest, *heads: int) -> None:
    """Offer heads on the transmitq, and kick."""
    guest.transmit.offer(*heads)
    guest.kick(1)


def fails(guest: Guest, cause: str, head: int = 0) -> None:
    """Insist that the transmitq breaks by what is offered now, and works again after a restart."""
    transmit(guest, head)
    guest.broken(1, cause)
    guest.works()


def passes(guest: Guest, payload: bytes, *heads: int) -> None:
    """Insist that what is offered now comes back as one packet."""
    token = guest.receiveq.add(writable=[guest.header_bytes + max(len(payload), 1)])
    guest.receiveq.kick()
    transmit(guest, *(heads or (0,)))
    wait_until("the packet comes back", lambda: guest.receiveq.wait(0.2))
    ((came, length),) = guest.receiveq.poll()
    assert came is token
    assert came.written(length)[guest.header_bytes :] == payload
    guest.well()


def refuses(guest: Guest, *heads: int) -> None:
    """Insist that what is offered now is dropped, given back with length 0, and that nothing breaks."""
    packets = guest.host.port()["from_guest"]["packets"]
    position = guest.transmit.used_idx
    transmit(guest, *(heads or (0,)))
    count = len(heads or (0,))
    wait_until("the buffers come back", lambda: (guest.transmit.used_idx - position) % 65536 == count)
    assert [guest.transmit.element(position + number) for number in range(count)] == [
        (head, 0) for head in heads or (0,)
    ]
    assert guest.host.port()["from_guest"]["packets"] == packets
    guest.well()
    guest.works()


def fill(guest: Guest, addr: int, length: int) -> bytes:
    """Write a pattern; gives it."""
    data = bytes((7 * number + 3) & 255 for number in range(length))
    guest.write(addr, data)
    return data


def packet_at(guest: Guest, addr: int, length: int) -> bytes:
    """Write a header of zeroes and a pattern, `length` bytes in all; gives the pattern."""
    guest.write(addr, bytes(12))
    return fill(guest, addr + 12, length - 12)


# -- line 26: available ring --


@pytest.mark.checklist(26)
@pytest.mark.parametrize("ahead", [NUM + 1, NUM + 2, 256, 32768, 65535, 65534])
def test_available_index_runs_ahead_or_back(guest: Guest, ahead: int) -> None:
    """Line 26: further ahead than the ring has entries; 65535 is one backwards."""
    guest.transmit.avail[1] = (guest.transmit.avail_idx + ahead) % 65536
    guest.kick(1)
    guest.broken(1, AVAIL_IDX)
    guest.works()


@pytest.mark.checklist(26)
@pytest.mark.parametrize("ahead", [NUM + 1, 65535])
def test_available_index_of_the_receiveq(guest: Guest, ahead: int) -> None:
    """Line 26: the same on the other queue, which is looked at when a packet comes."""
    guest.receive.avail[1] = (guest.receive.avail_idx + ahead) % 65536
    packet_at(guest, BUFFERS, 100)
    guest.transmit.put(0, BUFFERS, 100)
    transmit(guest, 0)
    guest.broken(0, AVAIL_IDX)
    guest.works()


@pytest.mark.checklist(26)
@pytest.mark.parametrize("head", [NUM, NUM + 1, 255, 0x8000, 0xFFFF])
def test_head_outside_the_table(guest: Guest, head: int) -> None:
    """Line 26: after two right heads, which are served, comes a wrong one."""
    for good in (0, 1):
        packet_at(guest, BUFFERS + good * PAGE, 80)
        guest.transmit.put(good, BUFFERS + good * PAGE, 80)
    transmit(guest, 0, 1, head)
    guest.broken(1, HEAD)
    wait_until("what came before it is given back", lambda: guest.transmit.used_idx == 2)
    guest.works()


@pytest.mark.checklist(26)
def test_the_log_names_queue_and_head(guest: Guest) -> None:
    """Line 26: one line that tells what was wrong where."""
    time.sleep(1.1)  # the log takes one warning a second when there were many
    guest.transmit.offer(12345)
    guest.kick(1)
    text = "queue 1, head 12345: (transmitq0) head outside queue_size; queue stopped"
    wait_until("the log tells", lambda: text in guest.host.messages)
    guest.errors(1)
    guest.works()


@pytest.mark.checklist(26)
@pytest.mark.parametrize("head", [NUM, 0xFFFF])
def test_head_outside_the_table_of_the_receiveq(guest: Guest, head: int) -> None:
    """Line 26: the same on the receiveq."""
    packet_at(guest, BUFFERS, 80)
    guest.transmit.put(0, BUFFERS, 80)
    guest.receive.offer(head)
    transmit(guest, 0)
    guest.broken(0, HEAD)
    guest.works()


@every_layout
@pytest.mark.checklist(26)
@pytest.mark.parametrize("base", [1, 15, 16, 32767, 65520, 65535])
def test_positions_wrap(guest: Guest, base: int) -> None:
    """Line 26: positions run through 2^16 (packed: through slots and wrap counters) without harm."""
    if guest.transmitq.layout == "packed":
        base = base & 0x8000 | base % NUM
    for index in (0, 1):
        guest.restart(index, base)
    for number in range(40):
        guest.exchange(b"position %d " % number * 8)


@pytest.mark.checklist(26)
def test_one_head_in_all_entries(guest: Guest) -> None:
    """Line 26: the same buffer many times at once is the guest's own affair."""
    data = packet_at(guest, BUFFERS, 80)
    guest.transmit.put(3, BUFFERS, 80)
    tokens = [guest.receiveq.add(writable=[80]) for _ in range(NUM)]
    guest.receiveq.kick()
    transmit(guest, *[3] * NUM)
    wait_until("all have come", lambda: guest.receive.used_idx == NUM)
    assert [token.written(length)[12:] for token, length in guest.receiveq.poll()] == [data] * NUM
    assert len(tokens) == NUM
    guest.well()


# -- line 27: chains --


@pytest.mark.checklist(27)
@pytest.mark.parametrize("after", [NUM, NUM + 1, 0x7FFF, 0xFFFF])
def test_next_outside_the_table(guest: Guest, after: int) -> None:
    """Line 27: the second descriptor does not exist."""
    guest.transmit.put(0, BUFFERS, 12, NEXT, after)
    fails(guest, NEXT_OUTSIDE)


@pytest.mark.checklist(27)
@pytest.mark.parametrize("cycle", [[0], [0, 1], [0, 1, 2], [0, 5, 9, 5]], ids=["self", "two", "three", "tail"])
@pytest.mark.parametrize("length", [0, 1, 12])
def test_loop(guest: Guest, cycle: Sequence[int], length: int) -> None:
    """Line 27 (CVE-2016-6490): a chain without end, also one of empty descriptors."""
    for index, after in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        guest.transmit.put(index, BUFFERS, length, NEXT, after)
    fails(guest, LOOP)


@every_layout
@pytest.mark.checklist(27)
def test_longest_chain(guest: Guest) -> None:
    """Line 27: exactly as many descriptors as the table has are legal."""
    data = packet_at(guest, BUFFERS, 12 + 15 * 10)
    parts = [(BUFFERS, 12, 0)] + [(BUFFERS + 12 + 10 * number, 10, 0) for number in range(NUM - 1)]
    passes(guest, data, guest.transmit.chain(*parts))


@pytest.mark.checklist(27)
def test_one_descriptor_too_many(guest: Guest) -> None:
    """Line 27: the table's length and one, by going over one descriptor twice."""
    guest.transmit.chain(*[(BUFFERS, 10, 0)] * NUM)
    guest.transmit.put(NUM - 1, BUFFERS, 10, NEXT, NUM - 1)
    fails(guest, LOOP)


@every_layout
@pytest.mark.checklist(27, 29)
@pytest.mark.parametrize(
    ("lengths", "cause"),
    [
        ([0xFFFFFFFF, 1], ADDRESS),  # the first address check comes before the sum
        ([0x80000000, 0x80000000], ADDRESS),
        ([0xFFFFFFFF], ADDRESS),
    ],
)
def test_lengths_that_memory_does_not_have(guest: Guest, lengths: list[int], cause: str) -> None:
    """Lines 27, 29: lengths up to 2^32 - 1 in memory that is shorter."""
    guest.transmit.chain(*((BUFFERS, length, 0) for length in lengths))
    fails(guest, cause)


@every_layout
@pytest.mark.checklist(27)
@pytest.mark.parametrize("direct", [True, False])
def test_sum_of_lengths(guest: Guest, direct: bool) -> None:
    """Line 27: 2^32 bytes in all, in device-writable descriptors, whose addresses a transmitq never looks at."""
    parts = [(BUFFERS, 0x80000000, WRITE), (BUFFERS, 0x80000000, WRITE)]
    if direct:
        guest.transmit.chain(*parts)
    else:
        guest.write(TABLE, guest.table([(BUFFERS, 0x80000000, WRITE | NEXT, 1), (BUFFERS, 0x80000000, WRITE, 0)]))
        guest.transmit.put(0, TABLE, 32, INDIRECT)
    fails(guest, LENGTH)


@every_layout
@pytest.mark.checklist(27, 29)
def test_empty_descriptors(guest: Guest) -> None:
    """Lines 27, 29: descriptors of length 0 are passed over, wherever they point."""
    data = packet_at(guest, BUFFERS, 100)
    parts = [(END, 0, 0), (BUFFERS, 12, 0), (0, 0, 0), (BUFFERS + 12, 88, 0), (GAP, 0, 0)]
    passes(guest, data, guest.transmit.chain(*parts))


# -- line 28: indirect tables --


@every_layout
@pytest.mark.checklist(28)
@pytest.mark.parametrize("length", [0, 1, 8, 15, 17, 24, 31, 0xFFFFFFF0, 0xFFFFFFFF, 1025 * 16])
def test_length_of_an_indirect_table(guest: Guest, length: int) -> None:
    """Line 28: no entry, half an entry, more than a chain may have."""
    guest.transmit.put(0, TABLE, length, INDIRECT)
    fails(guest, BAD_INDIRECT)


@every_layout
@pytest.mark.checklist(28)
def test_longest_indirect_table(guest: Guest) -> None:
    """Line 28: 1024 entries on a ring of 16 are accepted, as Linux makes them; segments are bounded by the burst."""
    data = packet_at(guest, BUFFERS, 12 + 1023)
    rows = [(BUFFERS, 12, NEXT, 1)]
    rows += [
        (BUFFERS + 12 + number, 1, NEXT if number < 1022 else 0, number + 2 if number < 1022 else 0)
        for number in range(1023)
    ]
    guest.write(TABLE, guest.table(rows))
    guest.transmit.put(0, TABLE, 16 * len(rows), INDIRECT)
    passes(guest, data)


@every_layout
@pytest.mark.checklist(28)
def test_nested_indirect_table(guest: Guest) -> None:
    """Line 28: a table inside a table."""
    guest.write(TABLE, guest.table([(TABLE + PAGE, 16, INDIRECT, 0)]))
    guest.write(TABLE + PAGE, guest.table([(BUFFERS, 80, 0, 0)]))
    guest.transmit.put(0, TABLE, 16, INDIRECT)
    fails(guest, BAD_INDIRECT)


@every_layout
@pytest.mark.checklist(28)
def test_indirect_and_next(guest: Guest) -> None:
    """Line 28: a table in the middle of a chain."""
    guest.write(TABLE, guest.table([(BUFFERS, 80, 0, 0)]))
    guest.transmit.put(0, TABLE, 16, INDIRECT | NEXT, 1)
    guest.transmit.put(1, BUFFERS, 80)
    fails(guest, BAD_INDIRECT)


@pytest.mark.checklist(28)
def test_indirect_table_behind_direct_descriptors(guest: Guest) -> None:
    """Line 28: a table as the last descriptor of a chain is legal."""
    data = packet_at(guest, BUFFERS, 100)
    guest.write(TABLE, guest.table([(BUFFERS + 12, 88, 0, 0)]))
    guest.transmit.put(0, BUFFERS, 12, NEXT, 1)
    guest.transmit.put(1, TABLE, 16, INDIRECT)
    passes(guest, data)


@every_layout
@pytest.mark.checklist(28)
@pytest.mark.parametrize("at", [B - 1, B - 8, B - 15, B - 16, B - 24, B - 32])
def test_indirect_table_across_two_regions(guest: Guest, at: int) -> None:
    """Line 28 (CVE-2018-1059): neighbours in guest addresses lie apart here; an entry may lie in both."""
    data = packet_at(guest, BUFFERS, 100)
    rows = guest.table([(BUFFERS, 12, NEXT, 1), (BUFFERS + 12, 88, 0, 0)])
    split = B - at
    guest.write(at, rows[:split])
    if rows[split:]:
        guest.write(B, rows[split:])
    guest.transmit.put(0, at, len(rows), INDIRECT)
    passes(guest, data)


@every_layout
@pytest.mark.checklist(28)
@pytest.mark.parametrize(
    "at", [GAP - 1, GAP - 8, GAP - 15, GAP - 16, GAP, C - 16, C + C_BYTES - 16, 0, END - 31, END - 15]
)
def test_indirect_table_half_outside(guest: Guest, at: int) -> None:
    """Line 28: two entries, of which the second (or a part of the first) is not in memory."""
    rows = guest.table([(BUFFERS, 12, NEXT, 1), (BUFFERS + 12, 88, 0, 0)])
    for start, size in ((A, A_BYTES), (B, B_BYTES), (C, C_BYTES)):
        if start <= at < start + size:
            guest.write(at, rows[: start + size - at])
    guest.transmit.put(0, at, len(rows), INDIRECT)
    fails(guest, ADDRESS)


@every_layout
@pytest.mark.checklist(28)
@pytest.mark.parametrize("offset", [1, 3, 7, 8, 13])
def test_indirect_table_of_any_alignment(guest: Guest, offset: int) -> None:
    """Line 28: tables need no alignment."""
    data = packet_at(guest, BUFFERS, 100)
    guest.write(TABLE + offset, guest.table([(BUFFERS, 12, NEXT, 1), (BUFFERS + 12, 88, 0, 0)]))
    guest.transmit.put(0, TABLE + offset, 32, INDIRECT)
    passes(guest, data)


@pytest.mark.checklist(28, 31)
def test_indirect_table_inside_the_ring(guest: Guest) -> None:
    """Lines 28, 31: the table is the ring's own, which is read as any other memory."""
    data = packet_at(guest, BUFFERS, 100)
    desc = guest.transmitq.guest_addresses[0]
    guest.transmit.put(4, BUFFERS, 12, NEXT, 1)
    guest.transmit.put(5, BUFFERS + 12, 88)
    guest.transmit.put(0, desc + 4 * 16, 32, INDIRECT)
    passes(guest, data)
    guest.transmit.put(0, desc, 16, INDIRECT)  # itself: nested
    fails(guest, BAD_INDIRECT)


@pytest.mark.checklist(28)
@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ([(BUFFERS, 12, NEXT, 2), (BUFFERS, 8, 0, 0)], NEXT_OUTSIDE),
        ([(BUFFERS, 12, NEXT, 0xFFFF), (BUFFERS, 8, 0, 0)], NEXT_OUTSIDE),
        ([(BUFFERS, 12, NEXT, 0), (BUFFERS, 8, 0, 0)], LOOP),
        ([(BUFFERS, 12, NEXT, 1), (BUFFERS, 8, NEXT, 0)], LOOP),
    ],
)
def test_order_of_an_indirect_table(guest: Guest, rows: list[tuple[int, int, int, int]], cause: str) -> None:
    """Line 28: `next` inside a table follows the same rules as in the ring. Packed tables are used from end to end."""
    guest.write(TABLE, guest.table(rows))
    guest.transmit.put(0, TABLE, 16 * len(rows), INDIRECT)
    fails(guest, cause)


@every_layout
@pytest.mark.checklist(28)
@pytest.mark.parametrize(
    ("first", "cause"), [((GAP, 12, NEXT, 1), ADDRESS), ((BUFFERS, 12, WRITE | NEXT, 1), ORDER)], ids=["gap", "order"]
)
def test_entries_of_an_indirect_table(guest: Guest, first: tuple[int, int, int, int], cause: str) -> None:
    """Line 28: inside a table the same rules hold as in the ring."""
    guest.write(TABLE, guest.table([first, (BUFFERS, 8, 0, 0)]))
    guest.transmit.put(0, TABLE, 32, INDIRECT)
    fails(guest, cause)


@pytest.mark.shows("VIRTIO_F_INDIRECT_DESC")
@every_layout
@pytest.mark.checklist(28)
def test_indirect_without_negotiation(connect: Connect) -> None:
    """Line 28: accepted (section 8.2: Windows has sent it so), with every check in force."""
    guest = connect(v.mask(v.VIRTIO_F_VERSION_1))
    assert not v.has(guest.frontend.features, v.VIRTIO_F_INDIRECT_DESC)
    data = packet_at(guest, BUFFERS, 100)
    guest.write(TABLE, guest.table([(BUFFERS, 12, NEXT, 1), (BUFFERS + 12, 88, 0, 0)]))
    guest.transmit.put(0, TABLE, 32, INDIRECT)
    passes(guest, data)
    guest.transmit.put(0, TABLE, 33, INDIRECT)
    fails(guest, BAD_INDIRECT)


# -- line 29: addresses --

OUTSIDE = [
    (0, 100),
    (A - 1, 100),
    (A - 100, 100),
    (A - 99, 100),
    (GAP, 1),
    (GAP - 1, 100),
    (GAP - 99, 100),
    (C - 1, 100),
    (C + C_BYTES, 100),
    (C + C_BYTES - 99, 100),
    (END, 100),
    (END - 98, 100),
    (END - 99, 100),
    (END - 0xFFFFFFFE, 0xFFFFFFFF),
    (0x7E12_0000_0000, 100),  # the address that the front-end has for A
    (BUFFERS, 0xFFFFFFFF),
    (BUFFERS | 1 << 63, 100),
    (B + B_BYTES - 1, 2),
]


@every_layout
@pytest.mark.checklist(29)
@pytest.mark.parametrize(("addr", "length"), OUTSIDE)
@pytest.mark.parametrize("way", ["straight", "chain", "indirect"])
def test_address_outside(guest: Guest, addr: int, length: int, way: str) -> None:
    """Line 29 (CVE-2020-10725, CVE-2019-18960): on the straight line, in a chain, and in a table."""
    if way == "straight":
        guest.transmit.put(0, addr, length)
    elif way == "chain":
        guest.transmit.chain((BUFFERS, 12, 0), (addr, length, 0))
    else:
        guest.write(TABLE, guest.table([(BUFFERS, 12, NEXT, 1), (addr, length, 0, 0)]))
        guest.transmit.put(0, TABLE, 32, INDIRECT)
    # With the bytes before it, the longest descriptor makes a chain that is too long anyway.
    fails(guest, ADDRESS if way == "straight" or length < 0xFFFFFFFF else LENGTH)


@every_layout
@pytest.mark.checklist(29)
@pytest.mark.parametrize(("addr", "length"), [where for where in OUTSIDE if where[1] < 0xFFFFFFFF])
@pytest.mark.parametrize("way", ["straight", "chain", "indirect", "split header"])
def test_address_outside_of_the_receiveq(guest: Guest, addr: int, length: int, way: str) -> None:
    """Line 29: where the device writes; also behind buffers that it has begun to fill."""
    packet_at(guest, BUFFERS, 200)
    guest.transmit.put(0, BUFFERS, 200)
    if way == "straight":
        guest.receive.put(0, addr, max(length, 2000), WRITE)
    elif way == "chain":
        guest.receive.chain((BUFFERS + PAGE, 12, WRITE), (addr, max(length, 200), WRITE))
    elif way == "indirect":
        guest.write(TABLE, guest.table([(BUFFERS + PAGE, 12, WRITE | NEXT, 1), (addr, max(length, 200), WRITE, 0)]))
        guest.receive.put(0, TABLE, 32, INDIRECT)
    else:
        guest.receive.chain((BUFFERS + PAGE, 11, WRITE), (addr, max(length, 201), WRITE))
    guest.receive.offer(0)
    transmit(guest, 0)
    guest.broken(0, ADDRESS)
    assert guest.receive.used_idx == 0
    guest.works()


@every_layout
@pytest.mark.checklist(29, 48)
@pytest.mark.parametrize("length", [GAP - BUFFERS + 1, 0xFFFFFFFF])
def test_only_what_is_written_needs_memory(guest: Guest, length: int) -> None:
    """Lines 29, 48: the tail of a receive buffer that lies outside is neither needed nor touched."""
    data = packet_at(guest, BUFFERS, 100)
    guest.transmit.put(0, BUFFERS, 100)
    guest.receive.put(0, BUFFERS + PAGE, length, WRITE)
    guest.receive.offer(0)
    transmit(guest, 0)
    wait_until("it is received", lambda: guest.receive.used_idx == 1)
    assert guest.receive.element(0) == (0, 100)
    assert bytes(guest.bytes_at(BUFFERS + PAGE + 12, 88)) == data
    guest.well()


@every_layout
@pytest.mark.checklist(29)
@pytest.mark.parametrize("at", [A, B - 100, B, GAP - 100, C, C + C_BYTES - 100])
def test_first_and_last_byte_of_a_region(guest: Guest, at: int) -> None:
    """Line 29: the edges belong to memory."""
    saved = bytes(guest.bytes_at(at, 100))
    data = packet_at(guest, at, 100)
    guest.transmit.put(0, at, 100)
    if at == A:  # the ring lies there; give the packet from a copy of its place
        guest.write(at, saved)
        guest.write(BUFFERS, bytes(12) + data)
        guest.transmit.chain((A, 0, 0), (BUFFERS, 12, 0), (BUFFERS + 12, 88, 0))
    passes(guest, data)


@every_layout
@pytest.mark.checklist(29)
@pytest.mark.parametrize("before", [1, 5, 11, 12, 13, 60, 99])
@pytest.mark.parametrize("joined", [False, True])
def test_packet_across_two_regions(guest: Guest, before: int, joined: bool) -> None:
    """Line 29 (CVE-2018-1059): adjacent for the guest, apart for us: sent and received in two pieces."""
    data = bytes(12) + bytes(range(88))
    guest.write(B - before, data[:before])
    guest.write(B, data[before:])
    if joined:
        guest.transmit.chain((B - before, 50, 0), (B - before + 50, 50, 0))
    else:
        guest.transmit.put(0, B - before, 100)
    passes(guest, data[12:])
    # The other way: what is received is written across the border.
    guest.write(B - before, b"\xee" * before)
    guest.write(B, b"\xee" * (101 - before))
    guest.write(BUFFERS, data)
    guest.transmit.put(1, BUFFERS, 100)
    for index in (0, 1):
        guest.restart(index)
    guest.transmit.put(1, BUFFERS, 100)
    guest.receive.put(0, B - before, 101, WRITE)
    guest.receive.offer(0)
    position = guest.receive.used_idx
    transmit(guest, 1)
    wait_until("it is received", lambda: guest.receive.used_idx != position)
    assert guest.receive.element(position) == (0, 100)
    written = bytes(guest.bytes_at(B - before, before)) + bytes(guest.bytes_at(B, 101 - before))
    assert written == bytes(10) + b"\1\0" + data[12:] + b"\xee"
    guest.well()


@every_layout
@pytest.mark.checklist(29)
@pytest.mark.parametrize("length", [65553 + 12, 65553 + 13, 1 << 20])
def test_longest_packet(connect: Connect, length: int) -> None:
    """Line 29: the longest packet passes, a longer one is dropped; nothing wraps."""
    guest = connect(MRG)
    guest.write(BUFFERS, bytes(12))
    guest.transmit.put(0, BUFFERS, length)
    if length > 65553 + 12:
        refuses(guest)
        return
    passes(guest, bytes(guest.bytes_at(BUFFERS + 12, length - 12)))


# -- line 31: overlaps --


@pytest.mark.checklist(31)
def test_buffers_over_the_rings(guest: Guest) -> None:
    """Line 31: packets read from and written over rings and tables; only this guest suffers."""
    desc, avail, used = guest.receiveq.guest_addresses
    other_desc, other_avail, other_used = guest.transmitq.guest_addresses
    for number, target in enumerate([desc, avail, used, other_desc, other_avail, other_used, desc + 8, used + 2]):
        guest.receive.put(number, target, 300, WRITE)
        guest.transmit.put(number, BUFFERS, 100)
    packet_at(guest, BUFFERS, 100)
    guest.receive.offer(*range(8))
    transmit(guest, *range(8))
    guest.frontend.barrier()
    wait_until("something has become of it", lambda: guest.receive.used_idx or guest.host.queue("receiveq0")["broken"])
    guest.works()


@pytest.mark.checklist(31)
def test_rings_over_each_other(guest: Guest) -> None:
    """Lines 24, 31: both queues in one place, and the used ring inside of the descriptor table."""
    desc, avail, used = guest.transmitq.addresses
    for index in (0, 1):
        guest.stop(index)
    for parts in ((desc, desc, desc), (desc, avail, desc + 16), (desc, desc + 2, desc + 4), (desc, avail, used)):
        for index in (0, 1):
            ring = RingSetup(index, NUM, *parts, 0, guest.queues[index].kick_fd, guest.queues[index].call_fd)
            guest.frontend.start_ring(ring)
        for value in range(0, 65536, 4099):
            guest.transmit.avail[1] = value
            guest.transmit.put(value % NUM, BUFFERS, 60, value % 8, value % NUM)
            guest.kick(1)
        guest.frontend.barrier()
        for index in (0, 1):
            guest.stop(index)
    for index in (0, 1):
        guest.queues[index].reset()
        guest.start(index)
        guest.errors(index)
    guest.exchange(b"each in its place" * 5)


@pytest.mark.checklist(31)
def test_used_ring_inside_an_indirect_table(guest: Guest) -> None:
    """Line 31: what the device writes changes the table that it reads."""
    _, _, used = guest.transmitq.guest_addresses
    rows = [(BUFFERS, 12, NEXT, 1), (BUFFERS + 12, 88, 0, 0)]
    packet_at(guest, BUFFERS, 100)
    guest.transmit.put(0, used + 4, 16 * len(rows), INDIRECT)
    for _ in range(50):
        guest.write(used + 4, guest.table(rows))
        transmit(guest, 0)
    guest.frontend.barrier()
    guest.works()


# -- line 32: directions --


@every_layout
@pytest.mark.checklist(32)
@pytest.mark.parametrize("direct", [True, False])
def test_readable_after_writable(guest: Guest, direct: bool) -> None:
    """Line 32: first all that is read, then all that is written."""
    if direct:
        guest.transmit.chain((BUFFERS, 50, 0), (BUFFERS, 50, WRITE), (BUFFERS, 50, 0))
    else:
        guest.write(TABLE, guest.table([(BUFFERS, 50, 0, 0), (BUFFERS, 50, NEXT | WRITE, 2), (BUFFERS, 50, 0, 0)]))
        guest.write(TABLE, guest.table([(BUFFERS, 50, NEXT, 1)]))
        guest.transmit.put(0, TABLE, 48, INDIRECT)
    fails(guest, ORDER)


@every_layout
@pytest.mark.checklist(32)
def test_readable_after_writable_on_the_receiveq(guest: Guest) -> None:
    """Line 32: the same where the device writes."""
    packet_at(guest, BUFFERS, 200)
    guest.transmit.put(0, BUFFERS, 200)
    guest.receive.chain((BUFFERS + PAGE, 20, WRITE), (BUFFERS + PAGE, 500, 0))
    guest.receive.offer(0)
    transmit(guest, 0)
    guest.broken(0, ORDER)
    guest.works()


@every_layout
@pytest.mark.checklist(32)
@pytest.mark.parametrize(
    "parts",
    [
        [(BUFFERS, 100, WRITE)],
        [(BUFFERS, 0, 0)],
        [(BUFFERS, 12, 0)],
        [(BUFFERS, 11, 0)],
        [(BUFFERS, 1, 0)],
        [(BUFFERS, 6, 0), (BUFFERS, 6, 0)],
        [(BUFFERS, 12, 0), (BUFFERS, 100, WRITE)],
        [(BUFFERS, 0, 0), (BUFFERS, 0, WRITE)],
    ],
)
def test_nothing_to_send(guest: Guest, parts: list[tuple[int, int, int]]) -> None:
    """Line 32: nothing readable, or only a header: dropped and given back, the ring goes on (section 9.3)."""
    guest.transmit.chain(*parts)
    refuses(guest)
    assert guest.host.queue("transmitq0")["dropped"]["too_short"] > 0


@every_layout
@pytest.mark.checklist(32)
def test_writable_behind_a_packet(guest: Guest) -> None:
    """Line 32: what is writable in a transmitq is not written, and its address not looked at."""
    data = packet_at(guest, BUFFERS, 100)
    passes(guest, data, guest.transmit.chain((BUFFERS, 100, 0), (0, 100, WRITE)))
    assert guest.transmit.element(0) == (0, 0)


@every_layout
@pytest.mark.checklist(32)
@pytest.mark.parametrize(
    "parts",
    [[(BUFFERS + PAGE, 500, 0)], [(BUFFERS + PAGE, 0, WRITE)], [(BUFFERS + PAGE, 20, 0), (BUFFERS + PAGE, 20, 0)]],
)
def test_nothing_to_write_to(guest: Guest, parts: list[tuple[int, int, int]]) -> None:
    """Line 32: a receive buffer that cannot be written to breaks its ring."""
    packet_at(guest, BUFFERS, 100)
    guest.transmit.put(0, BUFFERS, 100)
    guest.receive.chain(*parts)
    guest.receive.offer(0)
    transmit(guest, 0)
    guest.broken(0, DIRECTION)
    guest.works()


@every_layout
@pytest.mark.checklist(32)
def test_readable_in_front_of_a_receive_buffer(guest: Guest) -> None:
    """Line 32: what is readable in a receiveq is neither read nor written."""
    data = packet_at(guest, BUFFERS, 100)
    guest.transmit.put(0, BUFFERS, 100)
    guest.receive.chain((0, 100, 0), (BUFFERS + PAGE, 100, WRITE))
    guest.receive.offer(0)
    transmit(guest, 0)
    wait_until("it is received", lambda: guest.receive.used_idx == 1)
    assert guest.receive.element(0) == (0, 100)
    assert bytes(guest.bytes_at(BUFFERS + PAGE + 12, 88)) == data
    guest.well()


# -- line 38: the used ring --


@pytest.mark.checklist(38)
def test_the_guest_writes_the_used_ring(guest: Guest) -> None:
    """Line 38: what the device wrote is never read back: its own position stands whatever the guest writes there."""
    data = packet_at(guest, BUFFERS, 80)
    for index, ring in enumerate((guest.receive, guest.transmit)):
        ring.put(0, BUFFERS + index * PAGE, 80, 0 if ring is guest.transmit else WRITE)
    guest.transmit.put(0, BUFFERS, 80)
    guest.receive.put(0, BUFFERS + PAGE, 80, WRITE)
    for number in range(40):
        for ring in (guest.receive, guest.transmit):
            ring.used_head[:] = (0x5A5A, (number * 7919) % 65536)
            ring.used["id"] = 0xFFFFFFFF
            ring.used["len"] = 0xFFFFFFFF
        guest.receive.offer(0)
        transmit(guest, 0)
        for ring in (guest.receive, guest.transmit):
            wait_until("the device's own position", lambda ring=ring, number=number: ring.used_idx == number + 1)
            assert ring.element(number) == ((0, 80) if ring is guest.receive else (0, 0))
        assert bytes(guest.bytes_at(BUFFERS + PAGE + 12, 68)) == data
    guest.well()


@pytest.mark.checklist(38, 26)
def test_two_rings_of_a_guest_are_broken_one_by_one(guest: Guest) -> None:
    """Lines 26, 38: each ring says its own cause, once; each is healed by itself."""
    guest.receive.offer(NUM)
    packet_at(guest, BUFFERS, 80)
    guest.transmit.put(0, BUFFERS, 80)
    transmit(guest, 0)
    guest.broken(0, HEAD)
    guest.transmit.put(1, BUFFERS, 80, NEXT, NUM)
    transmit(guest, 1)
    wait_until("both are broken", lambda: guest.host.queue("transmitq0")["broken"] == NEXT_OUTSIDE)
    assert (guest.errors(0), guest.errors(1)) == (0, 1)
    guest.works()
