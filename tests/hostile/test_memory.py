"""Lines 8 to 11, 24, 45 and 47: the memory table, memory that goes away, and where rings may lie."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.conftest import Connect
from hostile.guest import (
    A_BYTES,
    A_USER,
    B_BYTES,
    B_USER,
    C_BYTES,
    C_USER,
    KICK,
    PAGE,
    PLAIN,
    WRITE,
    A,
    B,
    C,
    Guest,
    region_rows,
)  # fmt: skip
from hostile.memory import HUGE_PAGE, LoseableMemory, huge_pages_free
from hostile.process import Host, Neighbour, wait_until
from vq import virtio as v
from vq.errors import VqError
from vq.frontend import RingSetup
from vq.message import Request
from vq.payload import Region, VringAddr, VringState

R = Request
BUFFERS = A + 0x200000
LOST = (0x2_0000_0000, 0x7F00_0000_0000)  # where memory that goes away lies: guest and user address


# -- line 8 --


def raw_table(count: int, rows: list[tuple[int, int, int, int]]) -> bytes:
    return struct.pack("=I4x", count) + b"".join(struct.pack("=QQQQ", *row) for row in rows)


ROW = (A, A_BYTES, A_USER, 0)


@pytest.mark.checklist(8)
@pytest.mark.parametrize("count", [0, 2, 8, 9, 255, 256, 0x10000001, 0xFFFFFFFF])
def test_number_of_regions_that_lies(mute: Guest, count: int) -> None:
    """Line 8: the number inside must agree with the size outside, also where 32 n + 8 wraps."""
    assert mute.say(R.SET_MEM_TABLE, raw_table(count, [ROW]), [mute.memory.regions[0][4]]) == "closed"


@pytest.mark.checklist(8)
@pytest.mark.parametrize("count", [8, 9, 32])
def test_many_regions_are_legal(connect: Connect, count: int) -> None:
    """Line 8: more than the eight of old specifications, up to what a message may carry in fds."""
    guest = connect()
    regions, fds = region_rows(guest.memory)
    more = [
        Region(0x8000_0000 + number * 0x100000, PAGE, 0x9000_0000_0000 + number * 0x100000, number * PAGE)
        for number in range(count - 3)
    ]
    assert guest.say(R.SET_MEM_TABLE, (*regions, *more), [*fds, *[fds[0]] * len(more)]) == "done"
    guest.exchange(b"in more memory" * 5)


@pytest.mark.checklist(8)
@pytest.mark.parametrize("fds", [0, 2, 4, 32])
def test_fds_differ_from_regions(mute: Guest, fds: int) -> None:
    """Line 8: three regions with another number of fds."""
    regions, given = region_rows(mute.memory)
    assert mute.say(R.SET_MEM_TABLE, regions, (given * 11)[:fds]) == "closed"


END = (1 << 64) - 1
WRONG_REGIONS = [
    pytest.param(Region(0x8000_0000, 0, 0x8000_0000, 0), id="empty"),
    pytest.param(Region(A, A_BYTES, 0x8000_0000, 0), id="guest addresses twice"),
    pytest.param(Region(A + A_BYTES - 1, 1, 0x8000_0000, 0), id="guest addresses overlap by a byte"),
    pytest.param(Region(A - 1, 2, 0x8000_0000, 0), id="guest addresses overlap in front"),
    pytest.param(Region(0x8000_0000, A_BYTES, A_USER, 0), id="user addresses twice"),
    pytest.param(Region(0x8000_0000, 1, A_USER + A_BYTES - 1, 0), id="user addresses overlap by a byte"),
    pytest.param(Region(END - PAGE, 2 * PAGE, 0x8000_0000, 0), id="guest address overflows"),
    pytest.param(Region(0x8000_0000, 2 * PAGE, END - PAGE, 0), id="user address overflows"),
    pytest.param(Region(0x8000_0000, PAGE, 0x8000_0000, END - PAGE + 2), id="offset overflows"),
    pytest.param(Region(0x8000_0000, END, 0x8000_0000, 0), id="size of everything"),
    pytest.param(Region(0, END, 0, END), id="everything of everything"),
    pytest.param(Region(0x8000_0000, END - 0x8000_0000, 0x8000_0000, 0), id="size plus alignment overflows"),
    pytest.param(Region(0x8000_0000, A_BYTES + 1, 0x8000_0000, 0), id="a byte more than the file"),
    pytest.param(Region(0x8000_0000, A_BYTES, 0x8000_0000, PAGE), id="a page more than the file"),
    pytest.param(Region(0x8000_0000, PAGE, 0x8000_0000, A_BYTES), id="behind the file"),
    pytest.param(Region(0x8000_0000, PAGE, 0x8000_0000, 1 << 62), id="far behind the file"),
    pytest.param(Region(0x8000_0000, PAGE, 0x8000_0000, (1 << 63) - PAGE), id="offset with the sign bit near"),
    pytest.param(Region(0x8000_0000, 1 << 63, 0x8000_0000, 0), id="size with the sign bit"),
]


@pytest.mark.checklist(8, 9, 10, 46)
@pytest.mark.parametrize("wrong", WRONG_REGIONS)
def test_region_that_is_no_good(guest: Guest, wrong: Region) -> None:
    """Lines 8, 9, 10: the third or the only new one; nothing of the table is taken over, the old one works on."""
    regions, fds = region_rows(guest.memory)
    maps = guest.host.holdings().shared_maps
    assert guest.say(R.SET_MEM_TABLE, (regions[0], regions[1], wrong), [fds[0], fds[1], fds[0]]) == "refused"
    assert guest.say(R.SET_MEM_TABLE, (wrong, *regions), [fds[0], *fds]) == "refused"
    assert guest.say(R.ADD_MEM_REG, wrong, [fds[0]]) == "refused"
    assert guest.host.holdings().shared_maps == maps
    guest.exchange(b"in the old table" * 5)
    send_from(guest, C)


def send_from(guest: Guest, addr: int) -> None:
    """Send a packet that lies at `addr`, and insist on having it back."""
    guest.write(addr, bytes(12) + b"from there" * 8)
    guest.receiveq.add(writable=[200])
    guest.receiveq.kick()
    guest.transmitq.add([(addr, 92)])
    guest.transmitq.kick()
    wait_until("the packet comes back", lambda: guest.receiveq.wait(0.2))
    ((token, length),) = guest.receiveq.poll()
    assert token.written(length)[12:] == b"from there" * 8


@pytest.mark.checklist(8)
@pytest.mark.parametrize("offset", [1, 100, PAGE - 1, PAGE + 1])
def test_unaligned_offset_and_size(guest: Guest, offset: int) -> None:
    """Line 8: bytes of a file that begin anywhere are the bytes that are meant."""
    _, fds = region_rows(guest.memory)
    region = Region(0x8000_0000 + 1, 333, 0x8000_0000_0007, 0x200000 + offset)
    assert guest.say(R.ADD_MEM_REG, region, [fds[0]]) == "done"
    guest.write(A + 0x200000 + offset, bytes(12) + b"q" * 321)
    guest.transmit.put(0, 0x8000_0000 + 1, 333)
    guest.receiveq.add(writable=[400])
    guest.receiveq.kick()
    guest.transmit.offer(0)
    guest.kick(1)
    wait_until("the packet comes back", lambda: guest.receiveq.wait(0.2))
    ((token, length),) = guest.receiveq.poll()
    assert token.written(length)[12:] == b"q" * 321
    guest.transmit.put(1, 0x8000_0000 + 1, 334)  # a byte more than the region
    guest.transmit.offer(1)
    guest.kick(1)
    guest.broken(1, "address outside the guest's memory")


@pytest.mark.checklist(9)
def test_table_without_the_rings(guest: Guest) -> None:
    """Lines 9, 45: a new table in which a running ring does not lie: it stops, its err fd tells, nothing is used."""
    regions, fds = region_rows(guest.memory)
    guest.exchange(b"before" * 12)
    assert guest.say(R.SET_MEM_TABLE, regions[1:], fds[1:]) == "done"
    assert [guest.errors(index) for index in (0, 1)] == [1, 1]
    assert not any(guest.host.queue(guest.name(index))["started"] for index in (0, 1))
    image = bytes(guest.bytes_at(A, 0x10000))
    guest.kick(1)
    guest.frontend.barrier()
    assert bytes(guest.bytes_at(A, 0x10000)) == image
    guest.frontend.set_mem_table(regions, fds)
    guest.works()


# -- line 10 --


@pytest.mark.checklist(10, 42)
def test_more_regions_than_slots(host: Host, guest: Guest) -> None:
    """Lines 10, 42: as many as were promised, not one more; while rings run."""
    slots = guest.frontend.request(R.GET_MAX_MEM_SLOTS)
    assert slots == 509
    _, fds = region_rows(guest.memory)
    before = host.private_kilobytes()
    for number in range(slots - 3):
        region = Region(0x1_0000_0000 + number * PAGE, PAGE, 0x9000_0000_0000 + number * PAGE, 0)
        assert guest.say(R.ADD_MEM_REG, region, [fds[2]]) == "done"
    for _ in range(3):
        assert guest.say(R.ADD_MEM_REG, Region(0xF_0000_0000, PAGE, 0xF000_0000_0000, 0), [fds[2]]) == "refused"
    guest.exchange(b"among many" * 8)
    assert host.private_kilobytes() - before < 4096


@pytest.mark.checklist(10)
def test_region_twice_and_removed_twice(guest: Guest) -> None:
    """Line 10: a duplicate is refused, so is removing what is not there; an fd that comes along is closed."""
    _, fds = region_rows(guest.memory)
    region = Region(0x8000_0000, PAGE, 0x9000_0000_0000, 0)
    assert guest.say(R.ADD_MEM_REG, region, [fds[2]]) == "done"
    assert guest.say(R.ADD_MEM_REG, region, [fds[2]]) == "refused"
    for wrong in (
        region._replace(size=PAGE - 1),
        region._replace(guest_addr=0x8000_1000),
        region._replace(user_addr=1),
    ):
        assert guest.say(R.REM_MEM_REG, wrong) == "refused"
    assert guest.say(R.REM_MEM_REG, region._replace(mmap_offset=END), [fds[2]]) == "done"
    assert guest.say(R.REM_MEM_REG, region) == "refused"
    guest.exchange(b"as before" * 8)


@pytest.mark.checklist(10, 45)
def test_removing_the_region_of_the_rings(guest: Guest) -> None:
    """Lines 10, 45: rings inside stop before the memory goes; the answer comes afterwards."""
    regions, fds = region_rows(guest.memory)
    for _ in range(8):
        guest.receiveq.add(writable=[256])
        guest.transmitq.add([bytes(12 + 64)])
    guest.receiveq.kick()
    guest.transmitq.kick()
    assert guest.say(R.REM_MEM_REG, regions[0]) == "done"
    image = bytes(guest.bytes_at(A, A_BYTES))
    assert [guest.errors(index) for index in (0, 1)] == [1, 1]
    guest.kick(1)
    guest.frontend.barrier()
    assert bytes(guest.bytes_at(A, A_BYTES)) == image
    assert guest.say(R.ADD_MEM_REG, regions[0], [fds[0]]) == "done"
    guest.works()


@pytest.mark.checklist(10, 45)
def test_removing_the_region_of_buffers_under_way(guest: Guest) -> None:
    """Lines 10, 45: a descriptor into a region that is gone breaks the ring."""
    regions, fds = region_rows(guest.memory)
    send_from(guest, C)
    assert guest.say(R.REM_MEM_REG, regions[2]) == "done"
    guest.transmitq.add([(C, 92)])
    guest.transmitq.kick()
    guest.broken(1, "address outside the guest's memory")
    assert guest.say(R.ADD_MEM_REG, regions[2], [fds[2]]) == "done"
    guest.works()
    send_from(guest, C)


@pytest.mark.checklist(45)
@pytest.mark.parametrize("way", ["hang up", "stop", "replace"])
def test_leaving_in_the_middle_of_packets(host: Host, connect: Connect, way: str) -> None:
    """Line 45: what comes to an end afterwards touches no memory that was given back."""
    for _ in range(20):
        guest = connect(num=256)
        for _ in range(256):
            guest.receiveq.add(writable=[128])
            guest.transmitq.add([bytes(12 + 64)])
        guest.receiveq.publish()
        guest.transmitq.publish()
        guest.kick(1)
        if way == "stop":
            base = guest.stop(1)
            assert base == guest.transmit.used_idx
            image = bytes(guest.bytes_at(A, 0x20000))
            guest.kick(1)
            guest.frontend.barrier()
            assert bytes(guest.bytes_at(A, 0x20000))[:0x1000] == image[:0x1000]
        elif way == "replace":
            regions, fds = region_rows(guest.memory)
            guest.frontend.set_mem_table(regions[1:], fds[1:])
            image = bytes(guest.bytes_at(A, A_BYTES))
            guest.frontend.barrier()
            assert bytes(guest.bytes_at(A, A_BYTES)) == image
        guest.close()


# -- line 11 --


@pytest.fixture
def lost() -> Iterator[LoseableMemory]:
    """Memory that will be taken away."""
    memory = LoseableMemory(HUGE_PAGE, *LOST)
    yield memory
    memory.close()


@pytest.fixture(params=["pages", "huge pages"])
def any_lost(request: pytest.FixtureRequest) -> Iterator[LoseableMemory]:
    """The same, of each kind of page."""
    huge = request.param == "huge pages"
    if huge and huge_pages_free() == 0:
        pytest.skip("no huge pages; sudo sysctl vm.nr_hugepages=64")
    memory = LoseableMemory(HUGE_PAGE, *LOST, huge=huge)
    yield memory
    memory.close()


def gone(guest: Guest) -> None:
    """Insist: the connection is ended, and the log says why."""
    assert guest.frontend.wait_closed(5)
    guest.close()
    reasons = [
        line for line in guest.host.messages.splitlines() if " disconnected=" in line and guest.host.path in line
    ]
    assert "truncated" in reasons[-1]


@pytest.mark.checklist(11)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("traffic", [False, True])
def test_ring_memory_is_taken_away(
    connect: Connect, neighbour: Neighbour, any_lost: LoseableMemory, index: int, traffic: bool
) -> None:
    """Line 11: the rings' memory is gone: no SIGBUS ends the process, the connection ends, the next one works."""
    guest = connect(running=False)
    assert guest.say(R.ADD_MEM_REG, any_lost.region, [any_lost.fd]) == "done"
    other = 1 - index
    guest.start(other)
    ring = any_lost.ring(16)
    any_lost.start(guest.frontend, index, 16, guest.queues[index].kick_fd, None, guest.err_fds[index])
    if traffic:
        for number in range(5):
            ring.put(0, BUFFERS, 100, WRITE if index == 0 else 0)
            ring.offer(0)
            (guest.receiveq if index else guest.transmitq).add(*([], [200]) if index else ([bytes(100)],))
            (guest.receiveq if index else guest.transmitq).publish()
            guest.kick(1)
            wait_until("a packet moves", lambda number=number: ring.used_idx == number + 1)
    any_lost.truncate()
    guest.transmitq.add([bytes(100)])
    guest.transmitq.publish()
    guest.kick(1)
    gone(guest)
    neighbour.check()
    connect().exchange(b"a new connection" * 5)


@pytest.mark.checklist(11)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("left", [0, PAGE])
def test_buffers_are_taken_away(
    connect: Connect, neighbour: Neighbour, lost: LoseableMemory, index: int, left: int
) -> None:
    """Line 11: the buffers' memory is gone, wholly or from a page on, read from and written to."""
    guest = connect()
    assert guest.say(R.ADD_MEM_REG, lost.region, [lost.fd]) == "done"
    lost.truncate(left)
    at = lost.guest_addr + 2 * PAGE
    if index == 1:
        guest.receiveq.add(writable=[4000])
        guest.receiveq.kick()
        guest.transmitq.add([bytes(12), (at, 100)])
    else:
        guest.receiveq.add(writable=[(at, 4000)])
        guest.receiveq.kick()
        guest.transmitq.add([bytes(100)])
    guest.transmitq.kick()
    guest.transmitq.add([bytes(100)])  # the loss is seen at the next burst at the latest
    guest.transmitq.publish()
    guest.kick(1)
    gone(guest)
    neighbour.check()


@pytest.mark.checklist(11)
def test_huge_buffers_are_taken_away(connect: Connect, any_lost: LoseableMemory) -> None:
    """Line 11: also of huge pages, with a region that ends inside of one."""
    guest = connect()
    region = any_lost.region._replace(size=HUGE_PAGE // 2 + 100)
    assert guest.say(R.ADD_MEM_REG, region, [any_lost.fd]) == "done"
    any_lost.truncate()
    guest.receiveq.add(writable=[4000])
    guest.receiveq.kick()
    guest.transmitq.add([bytes(12), (any_lost.guest_addr + PAGE, 100)])
    guest.transmitq.kick()
    guest.transmitq.add([bytes(100)])
    guest.transmitq.publish()
    guest.kick(1)
    gone(guest)


@pytest.mark.checklist(11)
def test_indirect_tables_are_taken_away(connect: Connect, lost: LoseableMemory) -> None:
    """Line 11: a table that is gone reads as zeroes: nothing is sent, and the connection ends."""
    guest = connect()
    assert guest.say(R.ADD_MEM_REG, lost.region, [lost.fd]) == "done"
    lost.truncate()
    guest.transmit.put(0, lost.guest_addr, 64, 4)
    guest.transmit.offer(0)
    guest.kick(1)
    guest.transmit.put(1, BUFFERS, 100)
    guest.transmit.offer(1)
    guest.kick(1)
    gone(guest)


@pytest.mark.checklist(11)
@pytest.mark.parametrize("enabled", [True, False])
def test_memory_is_taken_away_before_the_start(connect: Connect, lost: LoseableMemory, enabled: bool) -> None:
    """Line 11: the loss is met first by the control plane, which reads the used index."""
    guest = connect(running=False)
    assert guest.say(R.ADD_MEM_REG, lost.region, [lost.fd]) == "done"
    lost.truncate()
    ring = RingSetup(
        1, 16, *(lost.user_addr + at for at in (0, 0x8000, 0x10000)), 0, guest.transmitq.kick_fd, None, guest.err_fds[1]
    )
    try:
        guest.frontend.start_ring(ring, enable=enabled)
    except VqError:
        assert guest.frontend.wait_closed(5)
    guest.kick(1)
    gone(guest)


@pytest.mark.checklist(11)
def test_memory_is_taken_away_while_a_ring_sleeps(connect: Connect, lost: LoseableMemory) -> None:
    """Line 11: an idle worker meets the loss when it is kicked, whatever its position in the ring."""
    guest = connect(running=False)
    assert guest.say(R.ADD_MEM_REG, lost.region, [lost.fd]) == "done"
    lost.ring(16)
    lost.start(guest.frontend, 1, 16, guest.transmitq.kick_fd, None, guest.err_fds[1])
    guest.frontend.barrier()
    lost.truncate()
    guest.kick(1)
    gone(guest)


# -- line 24 --

NUM = 16
DESC_BYTES, AVAIL_BYTES, USED_BYTES = 16 * NUM, 4 + 2 * NUM, 4 + 8 * NUM
TOP = C_USER + C_BYTES


def placed(guest: Guest, desc: int, avail: int, used: int, *, num: int = NUM) -> str:
    """Try to start the transmitq at these user addresses; "done", or what was refused."""
    guest.ring_word(R.SET_VRING_ERR, 1, guest.err_fds[1])
    assert guest.say(R.SET_VRING_NUM, VringState(1, num)) == "done"
    answer = guest.say(R.SET_VRING_ADDR, VringAddr(1, 0, desc, used, avail, 0))
    if answer != "done":
        return answer
    return guest.ring_word(KICK, 1, guest.transmitq.kick_fd)


def misplaced(guest: Guest, answer: str, *, told: bool = True) -> None:
    """Insist that the ring was refused, its err fd told, and that it can be started at a right place."""
    assert answer == "refused"
    assert guest.errors(1) == (1 if told else 0)
    assert not guest.host.queue("transmitq0").get("started")
    for index in (0, 1):
        guest.queues[index].reset()
        guest.start(index)
        guest.errors(index)
    guest.exchange(b"in its place" * 6)


@pytest.mark.checklist(24)
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("by", [2, 4, 16, 64])
def test_part_ends_behind_its_region(mute: Guest, part: str, by: int) -> None:
    """Line 24: the last bytes of a part are not in memory."""
    sizes = {"desc": (DESC_BYTES, 16), "avail": (AVAIL_BYTES, 2), "used": (USED_BYTES, 4)}
    size, alignment = sizes[part]
    places = dict(zip(("desc", "avail", "used"), mute.transmitq.addresses, strict=True))
    fits = (TOP - size) // alignment * alignment
    places[part] = fits + max(alignment, by // alignment * alignment)
    misplaced(mute, placed(mute, **places))


@pytest.mark.checklist(24)
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_part_ends_at_the_end_of_its_region(mute: Guest, part: str) -> None:
    """Line 24: the last possible place is legal, and works."""
    sizes = {"desc": DESC_BYTES, "avail": AVAIL_BYTES, "used": USED_BYTES + 4}
    places = dict(zip(("desc", "avail", "used"), mute.transmitq.addresses, strict=True))
    places[part] = TOP - sizes[part] // 4 * 4
    assert placed(mute, **places) == "done"
    mute.stop(1)


@pytest.mark.checklist(24)
@pytest.mark.parametrize("part", ["avail", "used"])
def test_event_field_behind_the_region(connect: Connect, part: str) -> None:
    """Line 24: with EVENT_IDX the two bytes behind the ring belong to it."""
    guest = connect(PLAIN | v.mask(v.VIRTIO_F_EVENT_IDX), running=False)
    places = dict(zip(("desc", "avail", "used"), guest.transmitq.addresses, strict=True))
    places[part] = TOP - {"avail": AVAIL_BYTES, "used": USED_BYTES}[part]
    misplaced(guest, placed(guest, **places))


@pytest.mark.checklist(24)
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_part_across_two_regions(connect: Connect, part: str) -> None:
    """Line 24: neighbours in the front-end's addresses, too, lie apart for us."""
    guest = connect(running=False)
    _, fds = region_rows(guest.memory)
    near = Region(0x8000_0000, PAGE, A_USER + A_BYTES, 0)
    assert guest.say(R.ADD_MEM_REG, near, [fds[2]]) == "done"
    places = dict(zip(("desc", "avail", "used"), guest.transmitq.addresses, strict=True))
    places[part] = near.user_addr - 16
    misplaced(guest, placed(guest, **places))


@pytest.mark.checklist(24)
@pytest.mark.parametrize(("part", "by"), [("desc", 8), ("desc", 1), ("avail", 1), ("used", 2), ("used", 1)])
def test_misaligned_part(mute: Guest, part: str, by: int) -> None:
    """Line 24: refused at once, before anything could be started."""
    places = dict(zip(("desc", "avail", "used"), mute.transmitq.addresses, strict=True))
    places[part] += by
    misplaced(mute, placed(mute, **places), told=False)


@pytest.mark.checklist(24)
@pytest.mark.parametrize(("part", "by"), [("desc", 8), ("avail", 1), ("used", 2)])
def test_part_misaligned_by_its_region(mute: Guest, part: str, by: int) -> None:
    """Line 24: the address is even, but the region that it is in begins at an odd byte of its file."""
    _, fds = region_rows(mute.memory)
    assert mute.say(R.ADD_MEM_REG, Region(0x8000_0000, PAGE, 0x9000_0000_0000, by), [fds[2]]) == "done"
    places = dict(zip(("desc", "avail", "used"), mute.transmitq.addresses, strict=True))
    places[part] = 0x9000_0000_0000
    misplaced(mute, placed(mute, **places))


@pytest.mark.checklist(24)
@pytest.mark.parametrize(
    "address",
    [0, A, B, C, END & ~15, (1 << 64) - DESC_BYTES, A_USER - 16, B_USER + B_BYTES, C_USER - DESC_BYTES, 1 << 63],
)
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_part_at_no_address_of_the_front_end(mute: Guest, part: str, address: int) -> None:
    """Line 24: address 0, a guest address in place of the front-end's, and others that overflow."""
    places = dict(zip(("desc", "avail", "used"), mute.transmitq.addresses, strict=True))
    places[part] = address
    misplaced(mute, placed(mute, **places))


@pytest.mark.checklist(24)
def test_more_entries_after_the_addresses(mute: Guest) -> None:
    """Line 24: the ring grows after its place was given; it is looked at as a whole at the start."""
    assert mute.say(R.SET_VRING_NUM, VringState(1, NUM)) == "done"
    places = TOP - DESC_BYTES, *mute.transmitq.addresses[1:]
    assert mute.say(R.SET_VRING_ADDR, VringAddr(1, 0, places[0], places[2], places[1], 0)) == "done"
    mute.ring_word(R.SET_VRING_ERR, 1, mute.err_fds[1])
    assert mute.say(R.SET_VRING_NUM, VringState(1, 2 * NUM)) == "done"
    misplaced(mute, mute.ring_word(KICK, 1, mute.transmitq.kick_fd))


# -- line 47 --


@pytest.mark.checklist(47)
def test_no_guest_data_in_core_dumps(host: Host, guest: Guest) -> None:
    """Line 47: the kernel is told to leave guest memory out ("dd" among the flags of each mapping)."""
    text = Path(f"/proc/{host.process.pid}/smaps").read_text()
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.M)
    of_guests = [block for block in blocks if "memfd:vq-guest-memory" in block]
    assert len(of_guests) >= 4
    for block in of_guests:
        flags = re.search(r"VmFlags: (.*)", block)
        assert flags is not None
        assert "dd" in flags[1].split()
    guest.exchange(b"and it works" * 6)
