"""Lines 26 to 34, 38 and 48 once more: random chains, against a walk in plain Python."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from hostile.conftest import Connect
from hostile.guest import C_BYTES, GAP, PAGE, PLAIN, A, B, C, Guest
from hostile.process import Host, Neighbour, wait_until
from hostile.rings import LAYOUTS
from hostile.walker import INDIRECT, NEXT, WRITE, BrokenError, Descriptor, Received, receive, send
from vq import virtio as v

NUM = 16
PACKED_NUM = NUM * NUM  # room for NUM chains that take all descriptors each
SENTINEL = NUM - 1  # a descriptor with an honest packet, offered last: when it is through, all before it are
AREA = A + 0x200000  # a page of zeroes, where headers may begin; then pages of a pattern; then tables
ZEROES, PATTERN, TABLES, HONEST = AREA, AREA + PAGE, AREA + 0x10000, AREA + 0x20000
MRG = PLAIN | v.mask(v.VIRTIO_NET_F_MRG_RXBUF)
EVENT = PLAIN | v.mask(v.VIRTIO_F_EVENT_IDX)
SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def rarely(odd: st.SearchStrategy[Any], usual: st.SearchStrategy[Any], times: int = 30) -> st.SearchStrategy[Any]:
    """One of `times` draws is odd."""
    return st.sampled_from([True] + [False] * (times - 1)).flatmap(lambda is_odd: odd if is_odd else usual)


inside = st.one_of(
    st.integers(ZEROES, ZEROES + 64),
    st.integers(ZEROES, PATTERN + 4 * PAGE),
    st.sampled_from([B - 1, B - 6, B - 20, B, C, GAP - 40]),
)
outside = st.sampled_from([GAP - 1, GAP - 30, GAP, C + C_BYTES - 10, A - 1, 0, (1 << 64) - 1, (1 << 64) - 8])
addresses = rarely(outside, inside, 20)
lengths = rarely(
    st.sampled_from([0xFFFFFFFF, 0x80000000, 66000]),
    st.one_of(st.integers(0, 40), st.integers(0, 40), st.sampled_from([10, 11, 12, 13, 64, 500, 0])),
)
flags = rarely(st.sampled_from([WRITE, WRITE | NEXT, 8, NEXT | 0x8000]), st.sampled_from([0, NEXT]), 15)
indices = rarely(st.integers(NUM, 65535), st.integers(0, NUM - 2))
rows = st.tuples(addresses, lengths, flags, indices)


header_lengths = st.sampled_from([12, 12, 10, 11, 13])


@st.composite
def twins(draw: st.DrawFn, first: int) -> list[Descriptor]:
    """A header and its data in a descriptor each, what most drivers send; `first` is the index of the header's."""
    header, data = draw(addresses), draw(addresses)
    ways = draw(rarely(st.sampled_from([(WRITE, 0), (0, WRITE), (WRITE, WRITE)]), st.just((0, 0)), 8))
    after = draw(rarely(indices, st.just(first + 1)))
    return [(header, draw(header_lengths), NEXT | ways[0], after), (data, draw(lengths), ways[1], 0)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, list[Descriptor]]:
    """An indirect table: where, and what."""
    count = draw(st.integers(1, 6))
    # Most of them are honest lists, so that walks get far.
    made = [draw(rows) for _ in range(count)]
    if draw(st.booleans()):
        made = draw(twins(0)) + draw(st.lists(rows, max_size=1))
    elif draw(st.integers(0, 3)):
        made = [(row[0], row[1], row[2] & WRITE | (NEXT if n + 1 < count else 0), n + 1) for n, row in enumerate(made)]
    return draw(st.sampled_from([TABLES, TABLES + 5, B - 40, B - 7])), made


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[Descriptor], list[tuple[int, list[Descriptor]]], list[int]]:
    """A descriptor table of NUM - 1 rows, indirect tables for it, and up to three heads."""
    ring = [draw(rows) for _ in range(NUM - 1)]
    if draw(st.booleans()):  # neighbours joined, so that chains become long and right
        end = draw(st.integers(1, NUM - 2))
        ring[:end] = [(row[0], row[1], row[2] & WRITE | NEXT, n + 1) for n, row in enumerate(ring[:end])]
        ring[end] = (ring[end][0], ring[end][1], ring[end][2] & WRITE, 0)
    elif draw(st.booleans()):
        at = draw(st.integers(0, NUM - 3))
        ring[at : at + 2] = draw(twins(at))
    placed = draw(st.lists(tables(), max_size=1))
    for addr, entries in placed:
        length = draw(st.sampled_from([16 * len(entries)] * 5 + [16 * len(entries) + 1, 8, 0, 16 * len(entries) + 16]))
        at = draw(st.integers(0, NUM - 2))
        ring[at] = (addr, length, INDIRECT | draw(st.sampled_from([0, 0, 0, 0, NEXT, WRITE])), 0)
    heads = draw(st.lists(rarely(st.sampled_from([NUM, 0xFFFF]), st.integers(0, NUM - 2)), min_size=1, max_size=3))
    return ring, placed, heads


class Bench:
    """A guest whose rings are filled anew for each example."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.packed = guest.transmitq.layout == "packed"
        guest.write(PATTERN, bytes((at * 37 + 11) & 255 for at in range(0xF000)))
        guest.write(B, bytes((at * 41 + 7) & 255 for at in range(PAGE)))
        guest.write(HONEST, bytes(12) + b"the honest packet " * 4)

    def clear(self) -> None:
        """Stop both rings, and start them empty."""
        for index in (0, 1):
            self.guest.restart(index)
            self.guest.errors(index)

    def fit(self, ring: list[Descriptor], heads: list[int]) -> tuple[list[Descriptor], list[int]]:
        """What can be said in this layout: in a packed ring neighbours make a chain, and its end is in the ring."""
        if not self.packed:
            return ring, heads
        rows = [(addr, length, flags, n + 1) for n, (addr, length, flags, _) in enumerate(ring)]
        rows[-1] = (*rows[-1][:2], rows[-1][2] & ~NEXT, 0)
        return rows, [head % len(rows) for head in heads]

    def lay(self, ring: list[Descriptor], placed: list[tuple[int, list[Descriptor]]], raw: Any) -> None:
        """Write descriptors and tables."""
        for index, row in enumerate(ring):
            raw.put(index, *row)
        for addr, entries in placed:
            data = self.guest.table(entries)
            if addr < B < addr + len(data):
                self.guest.write(addr, data[: B - addr])
                self.guest.write(B, data[B - addr :])
            else:
                self.guest.write(addr, data)

    def byte(self, addr: int) -> int | None:
        """The byte at a guest address."""
        for start, size, view in self.views:
            if start <= addr < start + size:
                return view[addr - start]
        return None

    @property
    def views(self) -> list[tuple[int, int, memoryview]]:
        if not hasattr(self, "_views"):
            self._views = [(row[0], row[1], self.guest.bytes_at(row[0], row[1])) for row in self.guest.memory.regions]
        return self._views

    def dropped(self, index: int) -> dict[str, int]:
        return dict(self.guest.host.queue(self.guest.name(index)).get("dropped", {}))

    def cause(self, index: int) -> str | None:
        return self.guest.host.queue(self.guest.name(index))["broken"]


def features_of(names: str) -> int:
    """The features that these words stand for."""
    words = {"1.0": PLAIN, "legacy": 0, "mergeable": MRG, "packed": PLAIN | LAYOUTS["packed"], "event": EVENT}
    return functools.reduce(operator.or_, (words[name] for name in names.split()))


@pytest.fixture(params=["1.0", "legacy", "event", "packed", "packed event"])
def bench(request: pytest.FixtureRequest, connect: Connect) -> Bench:
    return Bench(connect(features_of(request.param), num=PACKED_NUM if "packed" in request.param else NUM))


HONEST_PAYLOAD = b"the honest packet " * 4


@pytest.mark.checklist(26, 27, 28, 29, 32, 33)
@SETTINGS
@given(rings())
@example(([(ZEROES, 12, NEXT, 1), (PATTERN, 66000, 0, 0), *[(0, 0, 0, 0)] * 13], [], [0]))
@example(([(ZEROES, 12, NEXT, 1), (PATTERN, 500, 0, 0), *[(0, 0, 0, 0)] * 13], [], [0, 0]))
@example(([(ZEROES, 12, WRITE | NEXT, 1), (PATTERN, 500, 0, 0), *[(0, 0, 0, 0)] * 13], [], [0]))
@example(([(ZEROES, 12, NEXT, 1), (PATTERN, 500, WRITE, 0), *[(0, 0, 0, 0)] * 13], [], [0]))
@example(([(ZEROES, 12, NEXT, 1), (GAP - 1, 500, 0, 0), *[(0, 0, 0, 0)] * 13], [], [0]))
@example(([(ZEROES, 12, NEXT, 1), (PATTERN, 0xFFFFFFF4, 0, 0), *[(0, 0, 0, 0)] * 13], [], [0]))
@example(
    (
        [(TABLES, 32, INDIRECT, 0), *[(0, 0, 0, 0)] * 14],
        [(TABLES, [(ZEROES, 12, NEXT, 1), (PATTERN, 500, 0, 0)])],
        [0, 0],
    )
)
@example(
    (
        [(TABLES, 32, INDIRECT, 0), *[(0, 0, 0, 0)] * 14],
        [(TABLES, [(ZEROES, 12, NEXT, 0), (PATTERN, 500, 0, 0)])],
        [0],
    )
)
@example(([(ZEROES, 12, NEXT, 1), (B - 6, 12, WRITE | NEXT, 2), (B, 1, 0, 0), *[(0, 0, 0, 0)] * 12], [], [0]))
@example(
    (
        [(B - 7, 48, INDIRECT, 0), *[(0, 0, 0, 0)] * 14],
        [(B - 7, [(ZEROES, 6, NEXT, 1), (ZEROES, 6, NEXT, 2), (PATTERN, 9, 0, 0)])],
        [0, 0],
    )
)
def test_sent(bench: Bench, made: tuple[list[Descriptor], list[tuple[int, list[Descriptor]]], list[int]]) -> None:
    """Lines 26 to 29, 32, 33: the same packets with the same bytes, or the ring broken for the same cause."""
    ring, placed, heads = made
    ring, heads = bench.fit(ring, heads)
    guest = bench.guest
    bench.clear()
    bench.lay(ring, placed, guest.transmit)
    header = guest.header_bytes
    guest.transmit.put(SENTINEL, HONEST + 12 - header, header + len(HONEST_PAYLOAD))
    whole = [*ring, (HONEST + 12 - header, header + len(HONEST_PAYLOAD), 0, 0)]
    expected: list[bytes] = []
    drops: dict[str, int] = {}
    cause = None
    served = 0
    for head in [*heads, SENTINEL]:
        try:
            outcome = send(whole, bench.byte, head, header, bench.packed)
        except BrokenError as broken:
            cause = str(broken)
            break
        served += 1
        if isinstance(outcome, bytes):
            expected.append(outcome)
        else:
            drops[outcome] = drops.get(outcome, 0) + 1
    event(cause or f"{len(expected) - 1} packets, dropped {drops or None}")
    # Received in the largest buffers there can be, so that nothing is dropped on the way back.
    position = guest.receive.used_idx
    for number in range(4):
        guest.receive.put(number, A + 0x300000 + number * 0x11000, 0x11000, WRITE)
    guest.receive.offer(0, 1, 2, 3)
    before = bench.dropped(1)
    start = guest.transmit.used_idx
    guest.transmit.offer(*heads, SENTINEL)
    guest.kick(1)
    if cause is None:
        wait_until("all are through", lambda: (guest.receive.used_idx - position) % 65536 == len(expected))
        assert bench.cause(1) is None
    else:
        wait_until(f"it is broken: {cause}", lambda: bench.cause(1))
        assert bench.cause(1) == cause
        assert guest.told(1) == 1
        wait_until(
            "what came before it is through", lambda: (guest.receive.used_idx - position) % 65536 == len(expected)
        )
    came = []
    for number in range(len(expected)):
        slot, length = guest.receive.element(position + number)
        came.append(bytes(guest.bytes_at(A + 0x300000 + slot * 0x11000 + header, length - header)))
    assert came == expected
    wait_until("buffers are given back", lambda: (guest.transmit.used_idx - start) % 65536 == served)
    order = [*heads, SENTINEL][:served]
    assert [guest.transmit.element(start + number) for number in range(served)] == [(head, 0) for head in order]
    after = bench.dropped(1)
    assert {
        kind: after.get(kind, 0) - before.get(kind, 0) for kind in after if after.get(kind, 0) != before.get(kind, 0)
    } == drops


@pytest.fixture(params=["mergeable", "1.0", "legacy", "packed mergeable", "packed"])
def receiver(request: pytest.FixtureRequest, connect: Connect) -> Bench:
    return Bench(connect(features_of(request.param), num=PACKED_NUM if "packed" in request.param else NUM))


# Here nothing may overlap: which of two writes to a byte wins is nobody's affair.
write_rows = st.tuples(
    rarely(st.sampled_from([GAP, 0, (1 << 64) - 8]), st.none()),
    rarely(st.just(0x80000000), st.one_of(st.integers(0, 40), st.sampled_from([1, 5, 12, 100, 200]))),
    rarely(st.sampled_from([NEXT, 0]), st.sampled_from([WRITE | NEXT, WRITE]), 20),
    indices,
)


@pytest.mark.checklist(26, 27, 28, 29, 32, 33, 34, 38, 48)
@SETTINGS
@given(
    st.lists(write_rows, min_size=NUM, max_size=NUM),
    st.permutations(range(NUM)),
    st.integers(1, NUM),
    st.integers(1, 200),
    st.booleans(),
)
def test_received(receiver: Bench, made: list[Any], order: list[int], count: int, size: int, joined: bool) -> None:
    """Lines 26 to 29, 32 to 34, 48: the same used elements and bytes, not one more written, or broken alike."""
    guest = receiver.guest
    receiver.clear()
    ring: list[Descriptor] = []
    for number, (addr, length, flag, after) in enumerate(made):
        if joined and number + 1 < NUM and flag & NEXT:
            after = number + 1
        place = AREA + 0x1000 + number * 0x200 if number != 7 else B - 9
        ring.append(
            (
                place if addr is None else addr,
                min(length, 0x200) if addr is None and length < 0x1000 else length,
                flag,
                after,
            )
        )
    ring, heads = receiver.fit(ring, order[:count])
    receiver.lay(ring, [], guest.receive)
    slots = [1] * len(heads)
    if receiver.packed:
        slots = [next(n for n in range(head, NUM) if not ring[n][2] & NEXT) - head + 1 for head in heads]
    full = guest.receive.num - sum(slots) < slots[-1]
    packet = bytes((at * 29 + 5) & 255 for at in range(size))
    header = guest.header_bytes
    guest.write(HONEST + PAGE, bytes(header) + packet)
    guest.transmit.put(0, HONEST + PAGE, header + size)
    image = bytes(guest.bytes_at(AREA, 0x10000)) + bytes(guest.bytes_at(B, PAGE))
    mergeable = v.has(guest.frontend.features, v.VIRTIO_NET_F_MRG_RXBUF)
    cause = None
    outcome: Received | str = ""
    try:
        outcome = receive(ring, receiver.byte, heads, packet, header, mergeable, receiver.packed, full)
    except BrokenError as broken:
        cause = str(broken)
    event(cause or (outcome if isinstance(outcome, str) else f"{len(outcome.used)} buffers"))
    # Chains that share descriptors write the same bytes twice.
    places = list(outcome.written) if isinstance(outcome, Received) else []
    before = receiver.dropped(0)
    position = guest.receive.used_idx
    guest.receive.offer(*heads)
    guest.transmit.offer(0)
    guest.kick(1)
    wait_until("the packet was sent", lambda: guest.transmit.used_idx == guest.transmit.avail_idx)
    if cause is not None:
        wait_until(f"it is broken: {cause}", lambda: receiver.cause(0))
        assert receiver.cause(0) == cause
        assert guest.told(0) == 1
        assert guest.receive.used_idx == position
        return
    assert receiver.cause(0) is None
    if isinstance(outcome, str):
        after_drop = receiver.dropped(0)
        assert after_drop.get(outcome, 0) == before.get(outcome, 0) + 1
        assert guest.receive.used_idx == position
        return
    assert (guest.receive.used_idx - position) % 65536 == len(outcome.used)
    assert [guest.receive.element(position + number) for number in range(len(outcome.used))] == outcome.used
    now = bytes(guest.bytes_at(AREA, 0x10000)) + bytes(guest.bytes_at(B, PAGE))
    if len(places) == header + size:
        for at, value in outcome.written.items():
            assert receiver.byte(at) == value
    touched = {at - AREA for at in places if AREA <= at < AREA + 0x10000} | {
        at - B + 0x10000 for at in places if at >= B
    }
    changed = {at for at, (old, new) in enumerate(zip(image, now, strict=True)) if old != new}
    assert changed <= touched


@pytest.mark.checklist(26, 46)
def test_thousands_of_breaks_leave_nothing(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Lines 26, 46: a guest that breaks its ring again and again takes no memory."""
    guest = connect(num=NUM)

    def break_once() -> None:
        guest.transmit.put(0, GAP, 100)
        guest.transmit.offer(0)
        guest.kick(1)
        wait_until("it is broken", lambda: guest.errors(1))
        guest.restart(1)

    for _ in range(50):
        break_once()
    before = host.private_kilobytes()
    for _ in range(300):
        break_once()
    assert host.private_kilobytes() - before < 512
