"""What a hostile guest, or a hook that fails, costs the thread that serves devices in Python."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

import vq
from vq.memory_maps import MAPS_MAX
from vq.payload import Region
from vq.testing import Guest
from vq_core.taken import HELD, TURN_STEPS
from waiting import wait_for

Serve = Callable[[vq.HostedDevice], str]
Connect = Callable[..., Guest]
NEXT, WRITE = 1, 2
SIZE = 1024
pytest_plugins = ["vq.testing.plugin"]


class Keeper(vq.Device):
    """Takes all that it gets, by the call that knows no turn, and keeps it."""

    def __init__(self) -> None:
        self.kept: list[vq.DeviceChain] = []
        self.turns: list[int] = []

    def handle(self, queue: vq.DeviceQueue) -> None:
        before = len(self.kept)
        while (chain := queue.pop()) is not None:
            self.kept.append(chain)
        self.turns.append(len(self.kept) - before)


def offer_one_long_chain(guest: Guest, room: int, heads: int) -> None:
    """Make one chain of all descriptors available so many times."""
    driver = guest.drivers[0]
    address = driver.guest_addresses[0]
    desc, avail = driver.desc, driver.avail
    desc["addr"], desc["len"] = address, room
    desc["flags"] = WRITE | NEXT
    desc["next"] = range(1, SIZE + 1)
    desc["flags"][-1] = WRITE
    avail[2 : 2 + heads] = 0
    avail[1] = heads
    driver.kick()


@pytest.mark.parametrize("room", [0, 1])
def test_long_chains_end_a_turn(vq_guest: Connect, room: int) -> None:
    """A turn is measured in descriptors: those of no length cost time as well."""
    device = Keeper()
    guest = vq_guest(device, size=SIZE)
    offer_one_long_chain(guest, room, 40)
    wait_for(lambda: len(device.kept) == 40)
    assert max(device.turns) <= TURN_STEPS // SIZE + 1


def test_chains_that_are_kept_hold_so_many_descriptors_at_most(vq_guest: Connect) -> None:
    """The others wait in the ring, and come when some were completed."""
    device = Keeper()
    guest = vq_guest(device, size=SIZE)
    offer_one_long_chain(guest, 1, SIZE)
    most = HELD // SIZE
    wait_for(lambda: len(device.kept) >= most // 4)
    guest.frontend.barrier()
    wait_for(lambda: device.turns[-1:] == [0])
    held = len(device.kept)
    assert held <= most
    for chain in device.kept[:10]:
        chain.complete()
    wait_for(lambda: len(device.kept) > held)
    assert len(device.kept) <= most + 10


def test_a_reset_that_fails_ends_no_loop(vq_serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Keeper):
        def on_reset(self) -> None:
            raise RuntimeError("no idea")

    path = vq_serve(Faulty())
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            with Guest(path) as guest:
                guest.frontend.barrier()
    wait_for(lambda: caplog.text.count("no idea") >= 2)


def test_chains_that_are_kept_hold_so_many_memory_maps_at_most(vq_guest: Connect) -> None:
    """A front-end that changes its memory after each chain is refused before the process has no mappings left."""
    device = Keeper()
    guest = vq_guest(device, size=4 * MAPS_MAX)
    (row,) = guest.memory.regions
    memory, fd = Region(*row[:4]), row[4]

    def change_after_a_chain(number: int) -> None:
        kept = len(device.kept)
        guest.send(b"request")
        wait_for(lambda: len(device.kept) > kept)
        # A second region, which is another one each time.
        more = Region(memory.guest_addr + memory.size, 4096 * (1 + number % 2), memory.user_addr + memory.size, 0)
        guest.frontend.set_mem_table([memory, more], [fd, fd])

    for number in range(MAPS_MAX - 1):
        change_after_a_chain(number)
    with pytest.raises(vq.BackendError, match="SET_MEM_TABLE"):
        change_after_a_chain(MAPS_MAX - 1)
    while device.kept:
        device.kept.pop().complete()
    change_after_a_chain(MAPS_MAX - 1)
    device.kept.pop().complete()
    guest.used(MAPS_MAX + 1)
