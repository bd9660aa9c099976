"""Lines 25 and 30: what changes while it is looked at."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy
import pytest

from hostile.conftest import Connect, every_layout
from hostile.guest import CALL, GAP, INDIRECT, KICK, NEXT, PLAIN, WRITE, A, B, Guest, region_rows
from hostile.process import Host, Neighbour, wait_until
from hostile.test_log import LOG_BYTES, LogFile
from reference_device import AVAIL, DESCRIPTOR, USED
from vq import virtio as v
from vq.message import Request
from vq.payload import Region, VringAddr, VringState
from vq_core.traffic import Exchange

R = Request
BUFFERS = A + 0x200000
OFFLOADS = PLAIN | v.mask(
    v.VIRTIO_NET_F_CSUM, v.VIRTIO_NET_F_HOST_TSO4, v.VIRTIO_NET_F_HOST_TSO6, v.VIRTIO_NET_F_HOST_UFO,
    v.VIRTIO_NET_F_HOST_USO, v.VIRTIO_NET_F_MRG_RXBUF,
)  # fmt: skip
SECONDS = 0.7
NUM = 64


@contextmanager
def meanwhile(act: Callable[[random.Random], None]) -> Iterator[None]:
    """Repeat something in another thread."""
    ending = threading.Event()
    dice = random.Random(7)

    def run() -> None:
        while not ending.is_set():
            act(dice)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


# -- line 30 --


class Flicker:
    """Whole tables of descriptors, right and wrong ones, that replace each other faster than they can be read."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        kind = DESCRIPTOR
        self.versions = []
        dice = numpy.random.default_rng(3)
        good = numpy.zeros(NUM, kind)
        good["addr"] = BUFFERS + 4096 * numpy.arange(NUM)
        good["len"] = 200
        for number in range(24):
            table = good.copy()
            at = dice.integers(0, NUM, 20)
            match number % 6:
                case 0:
                    table["addr"][at] = dice.choice(
                        numpy.array([0, GAP, GAP - 1, B - 1, (1 << 64) - 1, BUFFERS], "u8"), 20
                    )
                case 1:
                    table["len"][at] = dice.choice([0, 1, 12, 0xFFFFFFFF, 70000, 5000], 20)
                case 2:
                    table["flags"][at] = dice.integers(0, 8, 20)
                    table["next"][at] = dice.integers(0, 2 * NUM, 20)
                case 3:
                    table["flags"][at] = INDIRECT
                    table["len"][at] = dice.choice([16, 32, 64, 17, 1024], 20)
                case 4:
                    table["flags"][at] = NEXT
                    table["next"][at] = dice.integers(0, NUM, 20)
                case _:  # which lap they belong to; in a split ring these bits mean nothing
                    table["flags"][at] = dice.choice([AVAIL, USED, AVAIL | USED], 20)
            self.versions.append(table)

    def __call__(self, dice: random.Random, ring: Any, flags: int) -> None:
        table = dice.choice(self.versions)
        if flags:
            table = table.copy()
            table["flags"] |= flags
        ring.overwrite(table)


def hammer(guest: Guest, neighbour: Neighbour, act: Callable[[random.Random], None]) -> int:
    """Offer all heads again and again while `act` flips; broken rings are started anew. How often they broke."""
    broken = 0
    with meanwhile(act):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for index in (0, 1):
                guest.rings[index].again(NUM // 2)
                guest.kick(index)
            for index in (0, 1):
                if guest.errors(index):
                    broken += 1
                    base = guest.stop(index)
                    guest.rings[index].heads_in_order(base)
                    guest.start(index, base=base)
        neighbour.check()
    return broken


@every_layout
@pytest.mark.checklist(30)
@pytest.mark.parametrize("which", ["transmitq", "receiveq", "both"])
def test_descriptors_flicker(host: Host, neighbour: Neighbour, connect: Connect, which: str) -> None:
    """Line 30 (CVE-2020-14374): addr, len, flags and next change between look and use; what was checked is used."""
    guest = connect(OFFLOADS, num=NUM)
    flicker = Flicker(guest)
    for ring, flags in ((guest.receive, WRITE), (guest.transmit, 0)):
        flicker(random.Random(1), ring, flags)
        ring.heads_in_order(0)

    def act(dice: random.Random) -> None:
        if which != "receiveq":
            flicker(dice, guest.transmit, 0)
        if which != "transmitq":
            flicker(dice, guest.receive, WRITE)

    assert hammer(guest, neighbour, act) > 0
    guest.works()


@every_layout
@pytest.mark.checklist(30, 28)
def test_indirect_tables_flicker(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Lines 28, 30: the entries of tables, and the tables' own lengths."""
    guest = connect(OFFLOADS, num=NUM)
    flicker = Flicker(guest)
    size = NUM * 16
    for ring, flags in ((guest.receive, WRITE), (guest.transmit, 0)):
        ring.desc["addr"] = BUFFERS + 0x100000 + (0x10000 if flags else 0)
        ring.desc["len"] = size
        ring.desc["flags"] = INDIRECT
        ring.heads_in_order(0)
    places = [guest.bytes_at(BUFFERS + 0x100000 + at, size) for at in (0, 0x10000)]

    def act(dice: random.Random) -> None:
        table = dice.choice(flicker.versions).copy()
        table["flags"] |= NEXT
        table["next"] = (numpy.arange(NUM) + 1) % dice.choice([NUM, NUM, 2 * NUM, 3])
        table["flags"][dice.randrange(NUM)] = 0
        places[0][:] = guest.table(table)
        table["flags"] |= WRITE
        places[1][:] = guest.table(table)
        guest.transmit.desc["len"] = dice.choice([size, size, 16, 17, 0x100000])

    assert hammer(guest, neighbour, act) > 0
    guest.works()


@every_layout
@pytest.mark.checklist(30, 35)
def test_headers_flicker(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Lines 30, 35: virtio-net header, IP and TCP header of packets that software has to cut, while they change."""
    guest = connect(OFFLOADS, num=NUM)
    for ring, flags in ((guest.receive, WRITE), (guest.transmit, 0)):
        ring.desc["addr"] = BUFFERS + 0x4000 * (numpy.arange(NUM) % 16) + (0x80000 if flags else 0)
        ring.desc["len"] = 3500
        ring.desc["flags"] = flags
        ring.heads_in_order(0)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 3450, 1, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x18, 1000, 0, 0)
    good = struct.pack("<BBHHHHH", 1, 1, 54, 700, 34, 16, 0) + bytes(12) + b"\x08\x00" + ip + tcp
    views = [numpy.frombuffer(guest.bytes_at(BUFFERS + 0x4000 * number, len(good)), "u1") for number in range(16)]
    images = []
    rng = random.Random(5)
    for _ in range(64):
        image = bytearray(good)
        for _ in range(rng.choice([0, 0, 1, 2, 4])):
            image[rng.choice([*range(12), 24, 25, 26, 28, 29, 32, 33, 35, 46, 58, 59])] = rng.choice(
                [0, 1, 3, 4, 5, 0x4F, 0x60, 0xF0, 0xFF]
            )
        images.append(numpy.frombuffer(bytes(image), "u1"))

    def act(dice: random.Random) -> None:
        for view in views:
            view[:] = dice.choice(images)

    hammer(guest, neighbour, act)
    guest.well()
    assert host.port()["to_guest"]["packets"] > 0
    guest.works()


@pytest.mark.checklist(30, 26)
def test_rings_flicker(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Lines 26, 30: indices and heads."""
    guest = connect(OFFLOADS, num=NUM)
    for ring, flags in ((guest.receive, WRITE), (guest.transmit, 0)):
        ring.desc["addr"] = BUFFERS + 4096 * numpy.arange(NUM)
        ring.desc["len"] = 200
        ring.desc["flags"] = flags

    def act(dice: random.Random) -> None:
        for ring in (guest.receive, guest.transmit):
            ring.avail[2 + dice.randrange(NUM)] = dice.choice([0, 1, 63, 64, 65535])
            if dice.random() < 0.01:
                ring.avail[1] = dice.randrange(65536)

    assert hammer(guest, neighbour, act) > 0
    guest.works()


# -- line 25 --


@contextmanager
def traffic(guest: Guest) -> Iterator[Exchange]:
    """Verified packets on the guest's rings."""
    exchange = Exchange([(guest.transmitq, guest.receiveq)], (64, 1500), poll="sleep", patience=30.0, window=16)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            exchange.run(duration=60)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield exchange
    finally:
        exchange.stop()
        thread.join()
    assert not failures, failures
    counters = exchange.counters
    assert counters["verified"] == counters["sent"] > 0, counters
    assert not any(counters[kind] for kind in ("lost", "duplicated", "reordered", "changed")), counters


@every_layout
@pytest.mark.checklist(25)
def test_storm_of_messages_that_are_legal(neighbour: Neighbour, connect: Connect) -> None:
    """Line 25: tables, addresses, fds and logs are exchanged under verified packets; not one is lost or changed."""
    guest = connect(PLAIN | v.mask(v.VHOST_F_LOG_ALL), num=256)
    features = guest.frontend.features
    regions, fds = region_rows(guest.memory)
    added = Region(0x8000_0000, 4096, 0x9000_0000_0000, 0)
    log = LogFile(-(-LOG_BYTES // 4096) * 4096)
    addresses = [queue.addresses for queue in guest.queues]
    storm: list[Callable[[int], None]] = [
        lambda n: guest.frontend.set_mem_table((*regions, added), [*fds, fds[0]]),
        lambda n: guest.frontend.set_mem_table(regions, fds),
        lambda n: guest.frontend.add_region(added, fds[1]),
        lambda n: guest.frontend.remove_region(added),
        lambda n: guest.frontend.set_call(n & 1, guest.queues[n & 1].call_fd),
        lambda n: guest.frontend.request(KICK, n & 1, [guest.queues[n & 1].kick_fd]),
        lambda n: guest.frontend.request(R.SET_VRING_ERR, n & 1, [guest.err_fds[n & 1]]),
        lambda n: guest.frontend.set_log_base(log.fd, LOG_BYTES - n % 7, n % 5),
        lambda n: guest.frontend.set_features(features ^ (v.mask(v.VHOST_F_LOG_ALL) if n & 16 else 0)),
        lambda n: guest.frontend.request(
            R.SET_VRING_ADDR,
            VringAddr(n & 1, n >> 1 & 1, addresses[n & 1][0], addresses[n & 1][2], addresses[n & 1][1], n * 4),
        ),
        lambda n: (
            None if guest.say(R.SET_VRING_NUM, VringState(n & 1, 128)) == "refused" else pytest.fail("a started ring")
        ),
        lambda n: (
            None if guest.say(R.SET_VRING_BASE, VringState(n & 1, n)) == "refused" else pytest.fail("a started ring")
        ),
        lambda n: (
            None if guest.say(R.SET_MEM_TABLE, (added, added), fds[:2]) == "refused" else pytest.fail("an overlap")
        ),
    ]
    try:
        with traffic(guest) as exchange:
            for number in range(60):
                for act in storm:
                    act(number)
            before = exchange.counters["verified"]
            wait_until("packets still move", lambda: exchange.counters["verified"] > before + 100)
        neighbour.check()
    finally:
        log.close()


@every_layout
@pytest.mark.checklist(25)
def test_storm_of_stops_and_starts(neighbour: Neighbour, connect: Connect) -> None:
    """Line 25: rings are enabled, disabled, stopped and started while the driver goes on; then they work."""
    guest = connect(num=64)

    def drive(dice: random.Random) -> None:
        for queue in guest.queues:
            with suppress(BufferError):
                queue.add(writable=[200]) if queue is guest.receiveq else queue.add([bytes(100)])
            queue.publish()
            queue.poll()
        guest.kick(dice.randrange(2))

    with meanwhile(drive):
        for number in range(150):
            index = number & 1
            guest.frontend.enable_ring(index, number % 3 != 0)
            if number % 4 == 0:
                base = guest.stop(index)
                queue = guest.queues[index]
                assert base == guest.frontend.get_vring_base(index) & 0xFFFF
                start_again(guest, index, base)
                assert queue.error is None
            if number % 50 == 49:
                guest.frontend.request(R.RESET_OWNER)
    neighbour.check()
    guest.works()


def start_again(guest: Guest, index: int, base: int) -> None:
    """Start a ring where it stopped, without clearing it."""
    guest.start(index, base=base)


@every_layout
@pytest.mark.checklist(25, 45)
def test_storm_of_resets_under_packets(neighbour: Neighbour, connect: Connect) -> None:
    """Lines 25, 45: RESET_DEVICE, memory taken away and given back, while heads keep coming."""
    guest = connect(num=64)
    regions, fds = region_rows(guest.memory)
    for ring, flags in ((guest.receive, WRITE), (guest.transmit, 0)):
        ring.desc["addr"], ring.desc["len"], ring.desc["flags"] = BUFFERS + (0x10000 if flags else 0), 200, flags
        ring.heads_in_order(0)

    def offer(dice: random.Random) -> None:
        for ring in guest.rings:
            ring.again(32)
        guest.kick(1)

    with meanwhile(offer):
        for number in range(100):
            match number % 3:
                case 0:
                    guest.frontend.request(R.RESET_DEVICE)
                case 1:
                    guest.frontend.set_mem_table(regions[1:], fds[1:])
                    guest.frontend.set_mem_table(regions, fds)
                case _:
                    guest.frontend.remove_region(regions[0])
                    guest.frontend.add_region(regions[0], fds[0])
            for index in (0, 1):
                base = guest.stop(index)
                guest.start(index, base=base)
    assert guest.ring_word(CALL, 0, guest.receiveq.call_fd) == "done"
    neighbour.check()
    guest.works()
