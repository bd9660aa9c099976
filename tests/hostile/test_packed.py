"""Line 36: what only a packed ring can say. What holds for both layouts is tested beside the split rings."""

from __future__ import annotations

import time

import pytest

from hostile.conftest import Connect
from hostile.guest import INDIRECT, NEXT, PLAIN, WRITE, A, Guest
from hostile.process import Host, wait_until
from reference_device import AVAIL, USED
from vq import virtio as v

EVENT = PLAIN | v.mask(v.VIRTIO_F_EVENT_IDX)
BUFFERS = A + 0x200000
PAYLOAD = b"a packet of an honest moment" * 3
NUM = 5  # no power of two

LOOP = "more descriptors than a chain may have"
ID = "buffer id outside queue_size"
BAD_INDIRECT = "malformed indirect descriptor"


@pytest.fixture
def layout() -> str:
    return "packed"


@pytest.fixture
def guest(connect: Connect) -> Guest:
    return connect(EVENT, num=NUM)


def put(guest: Guest, *descriptors: tuple[int, int, int, int], index: int = 1, lap: int = AVAIL, at: int = 0) -> None:
    """Write (addr, len, id, flags) from slot `at` of a ring on, the first one's flags last; then kick."""
    ring = guest.rings[index].ring
    for number in reversed(range(len(descriptors))):
        addr, length, buffer_id, flags = descriptors[number]
        slot = ring[(at + number) % len(ring)]
        slot["addr"], slot["len"], slot["id"] = addr, length, buffer_id
        slot["flags"] = flags | lap
    guest.kick(1)


def packets(guest: Guest) -> int:
    """Packets that all guests so far have sent."""
    return int(guest.host.queue("transmitq0").get("packets", 0))


CASES = {
    "id outside the ring": (ID, [(BUFFERS, 64, NUM, 0)]),
    "largest id": (ID, [(BUFFERS, 64, 0xFFFF, 0)]),
    "id of a chain outside": (ID, [(BUFFERS, 64, 0, NEXT), (BUFFERS, 64, NUM, 0)]),
    "chain without an end": (LOOP, [(BUFFERS, 64, 0, NEXT)] * NUM),
    "chain of nothing without an end": (LOOP, [(BUFFERS, 0, 0, NEXT)] * NUM),
    "indirect inside a chain": (BAD_INDIRECT, [(BUFFERS, 64, 0, NEXT), (BUFFERS, 32, 0, INDIRECT)]),
}


@pytest.mark.shows("VIRTIO_F_RING_PACKED")
@pytest.mark.checklist(27, 28, 36)
@pytest.mark.parametrize("name", CASES)
def test_a_malformed_chain_breaks_its_ring_alone(guest: Guest, name: str) -> None:
    """Lines 27, 28, 36: ids and chains that cannot be."""
    cause, descriptors = CASES[name]
    put(guest, *descriptors)
    guest.broken(1, cause)
    guest.works()


@pytest.mark.checklist(36)
@pytest.mark.parametrize("buffer_id", [NUM, 0xFFFF])
def test_an_id_outside_the_receiveq(guest: Guest, buffer_id: int) -> None:
    """Line 36: the same on the other queue, also behind a right buffer."""
    put(guest, (BUFFERS, 200, buffer_id, WRITE), index=0)
    guest.transmitq.add([bytes(12) + PAYLOAD])
    guest.transmitq.kick()
    guest.broken(0, ID)
    guest.works()


@pytest.mark.checklist(36)
def test_flags_of_the_wrong_lap_make_nothing_available(guest: Guest) -> None:
    """Line 36: wrap counters that do not match."""
    before = packets(guest)
    for lap in (0, USED, AVAIL | USED):
        put(guest, (BUFFERS, 64, 0, 0), lap=lap)
    guest.frontend.barrier()
    assert packets(guest) == before
    guest.well()
    guest.works()


@pytest.mark.checklist(36)
def test_the_rest_of_a_chain_is_of_another_lap(guest: Guest) -> None:
    """Line 36: a head makes its whole chain available, whatever the flags of the others say (2.8.6)."""
    before = packets(guest)
    put(guest, (BUFFERS + 12, 30, 2, 0), at=1, lap=USED)
    put(guest, (BUFFERS, 12, 0, NEXT))
    wait_until("it was taken", lambda: packets(guest) == before + 1)
    assert int(guest.transmit.ring[0]["id"]) == 2
    assert [int(slot["flags"]) & (AVAIL | USED) for slot in guest.transmit.ring[:2]] == [AVAIL | USED] * 2
    guest.well()
    guest.works()


@pytest.mark.checklist(36)
def test_a_chain_over_the_end_of_the_ring(guest: Guest) -> None:
    """Line 36: it goes on in slot 0, and may come round to its own head, but not further."""
    before = packets(guest)
    put(guest, *[(BUFFERS, 64, 0, 0)] * (NUM - 1))
    wait_until("they were taken", lambda: packets(guest) == before + NUM - 1)
    put(guest, (BUFFERS, 12, 0, NEXT), (BUFFERS, 30, 4, 0), at=NUM - 1)
    wait_until("it was taken", lambda: packets(guest) == before + NUM)
    assert int(guest.transmit.ring[NUM - 1]["id"]) == 4
    assert int(guest.transmit.ring[0]["flags"]) == 0, "the slots behind the end are of the next lap"
    put(guest, *[(BUFFERS, 64, 0, NEXT)] * NUM, at=1, lap=USED)
    guest.broken(1, LOOP)
    guest.works()


@pytest.mark.checklist(36)
def test_ids_that_are_in_use_twice_harm_nobody(guest: Guest) -> None:
    """Line 36: the same id for each buffer comes back as often as it was given."""
    before = packets(guest)
    put(guest, *[(BUFFERS, 64, 3, 0)] * NUM)
    wait_until("all were taken", lambda: packets(guest) == before + NUM)
    assert [int(entry["id"]) for entry in guest.transmit.ring] == [3] * NUM
    guest.works()


@pytest.mark.checklist(36, 37)
@pytest.mark.parametrize("event", [(NUM, 2), (0x7FFF, 2), (0xFFFF, 2), (0, 3), (0xFFFF, 0xFFFF)])
def test_event_structure_that_says_nonsense(guest: Guest, event: tuple[int, int]) -> None:
    """Lines 36, 37: offsets outside the ring, reserved flags."""
    before = packets(guest)
    for queue in guest.queues:
        queue.driver_event[:] = event
    put(guest, *[(BUFFERS, 64, 0, 0)] * 3)
    wait_until("all were taken", lambda: packets(guest) == before + 3)
    guest.well()
    guest.works()


@pytest.mark.checklist(38)
@pytest.mark.parametrize("lap", [0, USED, AVAIL | USED])
def test_the_guest_writes_what_was_used(guest: Guest, lap: int) -> None:
    """Line 38: what the device wrote is never read back: its place stands whatever is written behind it."""
    for number in range(1, 2 * NUM):
        before = packets(guest)
        place = (number - 1) % NUM, AVAIL if (number - 1) // NUM % 2 == 0 else USED
        put(guest, (BUFFERS, 64, 1, 0), at=place[0], lap=place[1])
        wait_until("it was taken", lambda before=before: packets(guest) == before + 1)
        # As it was offered, or anything else that is not of the next lap.
        slot = guest.transmit.ring[place[0]]
        slot["addr"], slot["len"], slot["id"] = 1 << 60, 0xFFFFFFFF, 0xFFFF
        slot["flags"] = lap if lap != place[1] ^ (AVAIL | USED) else place[1]
    guest.well()
    guest.works()


@pytest.mark.checklist(31)
def test_buffers_over_a_ring(guest: Guest) -> None:
    """Line 31: packets read from and written over descriptors and event structures; only this guest suffers."""
    guest.write(BUFFERS, bytes(12) + PAYLOAD)
    for addr in (*guest.receiveq.guest_addresses, *guest.transmitq.guest_addresses):
        for index in (0, 1):
            guest.restart(index)
        put(guest, *[(addr + number, 96, number, WRITE) for number in range(NUM)], index=0)
        put(guest, *[(BUFFERS, 96, number, 0) for number in range(NUM)])
        guest.frontend.barrier()
        time.sleep(0.01)
    for index in (0, 1):
        guest.errors(index)
    guest.works()


@pytest.mark.checklist(36)
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("num", [1, 2, 3, 32768])
def test_any_size_of_the_ring(host: Host, connect: Connect, num: int, in_order: bool) -> None:
    """Line 36: from one entry to the most, and no power of two."""
    guest = connect(EVENT | (v.mask(v.VIRTIO_F_IN_ORDER) if in_order else 0), num=num)
    assert v.has(guest.frontend.features, v.VIRTIO_F_IN_ORDER) == in_order
    if num == 1:  # header and payload need one descriptor each
        before = packets(guest)
        put(guest, (BUFFERS, 64, 0, 0))
        wait_until("it was taken", lambda: packets(guest) == before + 1)
        return
    for _ in range(2):
        guest.works()
