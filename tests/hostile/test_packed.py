"""Line 36: what a guest may write into a packed ring."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from hostile.process import PATIENCE, Host, Neighbour, share, wait_until
from vq import virtio as v
from vq.frontend import Frontend, RingSetup
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

FEATURES = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_F_RING_PACKED, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_F_INDIRECT_DESC)
NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
HEADER = 12
PAYLOAD = b"a packet of an honest moment" * 3
NUM = 5  # no power of two


class PackedGuest:
    """A front-end with one pair of packed rings, whose descriptors a test may write as it likes."""

    def __init__(self, host: Host, num: int = NUM, *, in_order: bool = False) -> None:
        self.host = host
        self.frontend = Frontend.connect(host.path, timeout=PATIENCE)
        wanted = FEATURES | (v.mask(v.VIRTIO_F_IN_ORDER) if in_order else 0)
        features = self.frontend.negotiate(wanted, v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
        assert features & wanted == wanted
        self.frontend.set_features(features)
        self.memory = GuestMemory(1 << 22)
        share(self.frontend, self.memory)
        self.queues = [DriverQueue(self.memory, num, features=features) for _ in range(2)]
        self.receiveq, self.transmitq = self.queues
        self.before = int(self.state().get("packets", 0))
        self.buffer = self.memory.alloc(4096)
        for index in (0, 1):
            self.start(index)

    def start(self, index: int) -> None:
        queue = self.queues[index]
        desc, avail, used = queue.addresses
        base = queue.used_idx | queue.used_idx << 16
        self.frontend.start_ring(
            RingSetup(index, queue.size, desc, avail, used, base, kick_fd=queue.kick_fd, call_fd=queue.call_fd)
        )

    def close(self) -> None:
        self.frontend.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()
        self.host.wait_free()

    def put(self, *descriptors: tuple[int, int, int, int], lap: int = AVAIL) -> None:
        """Write (addr, len, id, flags) from slot 0 of the transmitq on, the first one's flags last; then kick."""
        desc = self.transmitq.desc
        for slot in reversed(range(len(descriptors))):
            addr, length, number, flags = descriptors[slot]
            desc[slot]["addr"], desc[slot]["len"], desc[slot]["id"] = addr, length, number
            desc[slot]["flags"] = flags | lap
        os.eventfd_write(self.transmitq.kick_fd, 1)

    def state(self, name: str = "transmitq0") -> dict[str, Any]:
        found: dict[str, Any] = self.host.queue(name)
        return found

    @property
    def packets(self) -> int:
        """Packets that this guest has sent; the host counts for all that came before too."""
        return int(self.state()["packets"]) - self.before

    def breaks(self, cause: str) -> None:
        wait_until(f"the ring is broken: {cause}", lambda: self.state()["broken"] is not None)
        assert self.state()["broken"] == cause
        assert self.state("receiveq0")["broken"] is None

    def works(self) -> None:
        """Start both rings anew, and insist that a packet comes back."""
        for index in (0, 1):
            self.frontend.stop_ring(index)
            self.queues[index].reset()
            self.start(index)
        token = self.receiveq.add(writable=[HEADER + len(PAYLOAD)])
        self.receiveq.kick()
        self.transmitq.add([bytes(HEADER), PAYLOAD])
        self.transmitq.kick()
        wait_until("the packet comes back", lambda: self.receiveq.wait(0.2))
        ((came, length),) = self.receiveq.poll()
        assert came is token
        assert came.written(length)[HEADER:] == PAYLOAD


@pytest.fixture
def guest(host: Host, neighbour: Neighbour) -> Iterator[PackedGuest]:
    guest = PackedGuest(host)
    yield guest
    guest.close()
    neighbour.check()


BAD_INDIRECT = "malformed indirect descriptor"
LOOP = "more descriptors than a chain may have"
ADDRESS = "address outside the guest's memory"
ID = "buffer id outside queue_size"
ORDER = "device-readable descriptor after a device-writable one"


def _cases(addr: int) -> dict[str, tuple[str, list[tuple[int, int, int, int]]]]:
    return {
        "id outside the ring": (ID, [(addr, 64, NUM, 0)]),
        "largest id": (ID, [(addr, 64, 0xFFFF, 0)]),
        "id of a chain outside": (ID, [(addr, 64, 0, NEXT), (addr, 64, NUM, 0)]),
        "chain without an end": (LOOP, [(addr, 64, 0, NEXT)] * NUM),
        "address outside": (ADDRESS, [(1 << 60, 64, 0, 0)]),
        "address that overflows": (ADDRESS, [((1 << 64) - 32, 64, 0, 0)]),
        "indirect with NEXT": (BAD_INDIRECT, [(addr, 32, 0, INDIRECT | NEXT), (addr, 64, 0, 0)]),
        "indirect inside a chain": (BAD_INDIRECT, [(addr, 64, 0, NEXT), (addr, 32, 0, INDIRECT)]),
        "indirect table of no entry": (BAD_INDIRECT, [(addr, 0, 0, INDIRECT)]),
        "indirect table of half an entry": (BAD_INDIRECT, [(addr, 24, 0, INDIRECT)]),
        "indirect table above the limit": (BAD_INDIRECT, [(addr, 16 * 1025, 0, INDIRECT)]),
        "indirect table outside": (ADDRESS, [(1 << 60, 32, 0, INDIRECT)]),
        "readable after writable": (ORDER, [(addr, 64, 0, NEXT | WRITE), (addr, 64, 0, 0)]),
    }


@pytest.mark.checklist(26, 27, 28, 29, 32, 36)
@pytest.mark.parametrize("name", _cases(0))
def test_a_malformed_chain_breaks_its_ring_alone(guest: PackedGuest, name: str) -> None:
    """Lines 26 to 29, 32, 36: ids, chains, indirect tables and addresses that cannot be."""
    cause, descriptors = _cases(guest.buffer.guest_addr)[name]
    guest.put(*descriptors)
    guest.breaks(cause)
    guest.works()


@pytest.mark.checklist(36)
def test_flags_of_the_wrong_lap_make_nothing_available(guest: PackedGuest) -> None:
    """Line 36: wrap counters that do not match."""
    addr = guest.buffer.guest_addr
    for lap in (0, USED, AVAIL | USED):
        guest.put((addr, 64, 0, 0), lap=lap)
    assert guest.packets == 0
    assert guest.state()["broken"] is None
    guest.works()


@pytest.mark.checklist(36)
def test_ids_that_are_in_use_twice_harm_nobody(guest: PackedGuest) -> None:
    """Line 36: the same id for each buffer comes back as often as it was given."""
    addr = guest.buffer.guest_addr
    guest.put(*[(addr, 64, 3, 0)] * NUM)
    wait_until("all were taken", lambda: guest.packets == NUM)
    assert [int(entry["id"]) for entry in guest.transmitq.desc] == [3] * NUM
    guest.works()


@pytest.mark.checklist(36, 37)
@pytest.mark.parametrize("event", [(NUM, 2), (0x7FFF, 2), (0xFFFF, 2), (0, 3), (0xFFFF, 0xFFFF)])
def test_event_structure_that_says_nonsense(guest: PackedGuest, event: tuple[int, int]) -> None:
    """Lines 36, 37: offsets outside the ring, reserved flags."""
    addr = guest.buffer.guest_addr
    guest.transmitq.driver_event[:] = event
    for _ in range(3):
        guest.put((addr, 64, 0, 0))
    wait_until("it was taken", lambda: guest.packets >= 1)
    assert guest.state()["broken"] is None
    guest.works()


@pytest.mark.checklist(36)
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("num", [1, 2, 3, 32768])
def test_any_size_of_the_ring(host: Host, neighbour: Neighbour, num: int, in_order: bool) -> None:
    """Line 36: from one entry to the most, and no power of two."""
    guest = PackedGuest(host, num, in_order=in_order)
    try:
        if num == 1:  # header and payload need one descriptor each
            guest.put((guest.buffer.guest_addr, 64, 0, 0))
            wait_until("it was taken", lambda: guest.packets == 1)
            return
        for _ in range(2):
            guest.works()
    finally:
        guest.close()
    neighbour.check()
