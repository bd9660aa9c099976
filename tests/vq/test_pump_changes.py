"""Pumps whose memory, log, descriptors, back-end or sleep changes under verified traffic: nothing is lost."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from pump_rig import (
    PACKED,
    PLAIN,
    USUAL,
    Background,
    Guest,
    every_layout,
    faults,
    mapped,
    pump_process,
    pumping,
    two_cpus,
)
from vq import virtio as v
from vq.payload import Region

F = v.mask


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [str(tmp_path / f"{name}.sock") for name in "abcd"]


# ---- changes while traffic runs ----


@pytest.mark.shows("ADD_MEM_REG", "REM_MEM_REG")
@every_layout
def test_memory_changes_while_traffic_runs(paths: list[str], layout: int) -> None:
    with pumping(f"vhost:{paths[0]}"), Guest(paths[0], USUAL | layout) as guest:
        background = Background(guest.streams())
        own = mapped()
        extra = guest.memory.add_region(1 << 20)
        assert mapped() == own + 1
        row = Region(extra.guest_addr, extra.size, extra.user_addr, extra.mmap_offset)
        for _ in range(15):
            guest.frontend.add_region(row, extra.fd)
            assert mapped() == own + 2
            background.goes_on(20)
            guest.frontend.remove_region(row)
            assert mapped() == own + 1, "the mapping is still there after the ack"
            background.goes_on(20)
        first = guest.memory.regions[0]
        for number in range(15):
            # The whole table anew: everything is mapped again, nothing stays mapped twice.
            rows = [first, (row.guest_addr, row.size - 4096 * number, row.user_addr, 0, extra.fd)]
            guest.frontend.set_mem_table([Region(*r[:4]) for r in rows], [r[4] for r in rows])
            assert mapped() == own + 2
            background.goes_on(20)
        background.finish()


@pytest.mark.shows("SET_LOG_BASE", "VHOST_F_LOG_ALL")
@every_layout
def test_logging_while_traffic_runs(paths: list[str], layout: int) -> None:
    """What changed while the log was on is marked, nothing else is, and nothing after it was switched off."""
    features = USUAL | F(v.VHOST_F_LOG_ALL) | layout
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    size = (0x40_0000 + (4 << 20)) // 4096 // 8
    os.ftruncate(log, size)

    def pages() -> set[int]:
        bits = os.pread(log, size, 0)
        return {8 * at + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1}

    try:
        with (
            pumping(f"vhost:{paths[0]}"),
            Guest(paths[0], features, guest_addr=0x40_0000, memory_bytes=4 << 20, running=0) as guest,
        ):
            guest.frontend.set_features(guest.features & ~F(v.VHOST_F_LOG_ALL))
            guest.start()
            background = Background(guest.streams(), 1514)
            # The device alone writes to receive buffers and used rings: all that lies behind the rings, less the
            # transmit buffers, which come first.
            block = 256 * (64 + 1514 + 63) // 64 * 64
            part, used_bytes = (0, 16 * 256) if layout else (2, 4 + 8 * 256 + 2)
            rings = [queue.guest_addresses for queue in (*guest.receiveqs, *guest.transmitqs)]
            used_pages = {(ring[part] + at) // 4096 for ring in rings for at in range(0, used_bytes, 2)}
            event_pages = {ring[2] // 4096 for ring in rings}
            guest.frontend.set_log_base(log, size)
            background.goes_on()
            assert pages() == set()
            for _ in range(3):
                os.pwrite(log, bytes(size), 0)
                guest.frontend.set_features(guest.features)
                for index in range(2):
                    guest.frontend.set_ring_addresses(guest.ring(index, logged=True))
                background.goes_on(600)
                guest.frontend.set_features(guest.features & ~F(v.VHOST_F_LOG_ALL))
                marked = pages()
                background.goes_on(600)
                assert pages() == marked, "something was logged after the ack"
                assert used_pages <= marked
                buffers = marked - used_pages - event_pages
                # 256 buffers of 1,526 bytes that lie together.
                assert max(buffers) - min(buffers) + 1 == len(buffers)
                assert abs(len(buffers) * 4096 - block) <= 256 * 64 + 2 * 4096
            background.finish()
    finally:
        os.close(log)


@pytest.mark.shows("SET_VRING_CALL")
def test_call_descriptors_are_replaced_while_traffic_runs(paths: list[str]) -> None:
    """As a guest does that masks its interrupt: no call is lost, and the new descriptor is signalled."""
    with pumping(f"vhost:{paths[0]}"), Guest(paths[0]) as guest:
        background = Background(guest.streams())
        masked = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            for number in range(60):
                index = number % 2
                guest.frontend.set_call(index, masked)
                assert os.eventfd_read(masked) >= 1
                guest.frontend.set_call(index, guest.queue(index).call_fd)
                background.goes_on(5)
        finally:
            os.close(masked)
        background.finish()


@every_layout
def test_a_new_back_end_goes_on_where_the_old_one_stopped(paths: list[str], layout: int) -> None:
    """A pump that is stopped between two packets loses none: what it had not taken waits for the next one."""
    guest, background = None, None
    for number in range(3):
        with pumping(f"vhost:{paths[0]}"):
            # The queues belong to the traffic engine: the heir only needs their addresses and used indices.
            heir = Guest(paths[0], USUAL | layout, heir_of=guest)
            if guest is not None:
                guest.frontend.close()
            guest = heir
            background = background or Background(guest.streams(), patience=60)
            background.goes_on(500)
            if number == 2:
                background.finish()
    assert guest is not None
    guest.close()


@every_layout
def test_a_new_back_end_goes_on_where_the_old_one_died(paths: list[str], layout: int) -> None:
    """A killed pump has forgotten which packets it had in its hands: they may come twice, but none is lost.

    In a packed ring the marks of its chains tell where it was.
    """
    guest, background = None, None
    for number in range(3):
        with pump_process(f"vhost:{paths[0]}"):
            heir = Guest(paths[0], USUAL | layout, heir_of=guest)
            if guest is not None:
                guest.frontend.close()
            guest = heir
            background = background or Background(guest.streams(), patience=60, descriptors=3)
            background.goes_on(500)
            if number == 2:
                background.traffic.stop()
                background.thread.join(60)
    assert guest is not None
    assert background is not None
    guest.close()
    found = faults(background.traffic)
    assert found.pop("duplicated") <= 2 * 32
    assert (background.problem, found) == (None, {"lost": 0, "reordered": 0, "changed": 0})


# ---- sleeping ----


def test_an_idle_pump_burns_nothing(paths: list[str]) -> None:
    others = set(os.listdir("/proc/self/task"))

    def busy() -> float:
        """Seconds that the pump's threads have run."""
        threads = set(os.listdir("/proc/self/task")) - others
        return sum(int(Path("/proc/self/task", thread, "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    with pumping(f"vhost:{paths[0]},queues=2", cpus=two_cpus()) as pump, Guest(paths[0], pairs=2) as guest:
        guest.post(64)
        guest.send(b"to begin with")
        guest.receive()
        time.sleep(0.5)
        before, rounds = busy(), [worker["rounds"] for worker in pump.snapshot()["workers"]]
        time.sleep(2)
        assert busy() - before < 0.02
        assert [worker["rounds"] for worker in pump.snapshot()["workers"]] == rounds
        guest.post(64)
        guest.send(b"and awake at once")
        assert guest.receive(1)[1] == b"and awake at once"


@pytest.mark.parametrize("features", [PLAIN, USUAL, PLAIN | PACKED, USUAL | PACKED])
def test_no_wake_up_is_lost(paths: list[str], features: int) -> None:
    """10,000 packets one by one through a pump that goes to sleep between many of them."""
    dice = random.Random(7)
    with (
        pumping(f"vhost:{paths[0]}", f"vhost:{paths[1]}") as pump,
        Guest(paths[0], features) as near,
        Guest(paths[1], features) as far,
    ):
        for number in range(5000):
            for sender, receiver in ((near, far), (far, near)):
                receiver.post(16)
                data = number.to_bytes(16, "little")
                sender.send(data)
                assert receiver.receive(60)[1] == data, number
                sender.transmitqs[0].poll()
                if dice.random() < 0.3:
                    end = time.perf_counter() + dice.random() * 150e-6
                    while time.perf_counter() < end:
                        pass
        assert pump.snapshot()["workers"][0]["sleeps"] > 50
