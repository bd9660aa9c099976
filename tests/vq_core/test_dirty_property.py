"""Whatever driver and device do, in any order: no page of guest memory changes without a mark while the log is on."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dirty_rig import LogFile, Watch, log_queue, ring_pages
from engine_rig import (
    EVENT_IDX,
    IN_ORDER,
    INDIRECT,
    MRG_RXBUF,
    PACKED,
    PAGE,
    VERSION_1,
    Arena,
    Guest,
    pattern,
)
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

FIRST = 0x10_0000
RINGS = 96 * PAGE
ARENA_PAGES = 48
FEATURES = (MRG_RXBUF, INDIRECT, EVENT_IDX, IN_ORDER)
LOGS = ("off", "on", "on with rings")


class Machine:
    """A guest with both rings, a device, a log, and what must hold after each step of the device."""

    def __init__(self, harness: ModuleType, arena: Arena, data: st.DataObject) -> None:
        self.harness, self.arena, self.data = harness, arena, data
        features = data.draw(st.sampled_from([0, VERSION_1, PACKED]), "layout")
        if features:
            features |= sum(bit for bit in FEATURES if data.draw(st.booleans(), f"feature {bit:#x}"))
        size = data.draw(st.sampled_from([8, 64, 1024]), "ring size")
        base = data.draw(st.sampled_from([0, 3, 65533]), "base")
        self.base = base & 0x8000 | (base & 0x7FFF) % size if features & PACKED == PACKED else base
        self.guest = Guest(features, size=size, base=self.base, memory=arena.memory)
        self.source, self.target = harness.Feed(), harness.Collect()
        self.log = LogFile(FIRST // PAGE + RINGS // PAGE + ARENA_PAGES + 16)
        self.logging = "off"
        self.enabled = [True, True]
        self.writable: set[int] = set()
        self.at = 0

    def close(self) -> None:
        self.guest.stop()
        self.log.close()

    def draw_parts(self, lengths: list[int]) -> list[tuple[int, int]]:
        """Lay buffers out in the arena, over its pages; from its beginning again when it is full."""
        if self.at + sum(lengths) + 3000 * len(lengths) > self.arena.size:
            self.at = 0
        gaps = [self.data.draw(st.sampled_from([0, 1, 3000]), "gap") for _ in lengths]
        parts, self.at = self.arena.place(self.at, lengths, gaps)
        return parts

    # -- the driver --

    def post(self) -> None:
        for _ in range(self.data.draw(st.integers(1, 6), "buffers")):
            lengths = self.data.draw(st.lists(st.integers(1, 4000), min_size=1, max_size=4), "lengths")
            if self.data.draw(st.booleans(), "header apart"):
                lengths = [self.guest.header_bytes, *lengths]
            if self.guest.receiveq.free < len(lengths):
                return
            parts = self.draw_parts(lengths)
            for addr, length in parts:
                self.writable |= set(range(addr // PAGE, (addr + length - 1) // PAGE + 1))
            indirect = bool(self.guest.features & INDIRECT) and self.data.draw(st.booleans(), "indirect")
            self.guest.receiveq.add((), parts, indirect=indirect)
        self.guest.receiveq.publish()

    def send(self) -> None:
        for _ in range(self.data.draw(st.integers(1, 6), "packets")):
            parts: list[bytes] = [bytes(self.guest.header_bytes), b"packet " * self.data.draw(st.integers(1, 300))]
            if self.data.draw(st.booleans(), "one part"):
                parts = [b"".join(parts)]
            if self.guest.transmitq.free < len(parts):
                return
            self.guest.transmitq.add(parts)
        self.guest.transmitq.publish()

    def poll(self) -> None:
        self.guest.receiveq.poll()
        self.guest.transmitq.poll()

    # -- the device --

    def push(self) -> None:
        for seed in range(self.data.draw(st.integers(1, 12), "packets")):
            self.source.add(pattern(self.data.draw(st.integers(1, 6000), "length"), seed))
        self.observe(lambda: self.harness.move(self.source, 0, self.guest.port, 0))

    def pull(self) -> None:
        self.observe(lambda: self.harness.move(self.guest.port, 0, self.target, 0))

    def arm(self) -> None:
        self.observe(lambda: self.harness.arm(self.guest.port, 0, True, True))

    def restart(self) -> None:
        """A stop and a start at the same place, with the log from the start."""
        for (queue, driver), enabled in zip(self.guest.rings, self.enabled, strict=True):
            base = queue.stop()
            options = {"kick_fd": driver.kick_fd, "call_fd": driver.call_fd, "enabled": enabled}
            if self.logging != "off":
                ring = driver.guest_addresses[2] if self.logging == "on with rings" else None
                options |= {"log": self.log.log, "log_guest_addr": ring}
            queue.start(self.guest.map, driver.size, *driver.addresses, base, self.guest.features, **options)

    def switch_enabled(self) -> None:
        index = self.data.draw(st.integers(0, 1), "ring")
        self.enabled[index] = not self.enabled[index]
        self.guest.port.queues[index].set_enabled(self.enabled[index])

    def switch_log(self) -> None:
        self.logging = self.data.draw(st.sampled_from(LOGS), "log")
        for queue, driver in self.guest.rings:
            log_queue(queue, driver, self.log if self.logging != "off" else None, ring=self.logging == LOGS[2])

    # -- what must hold --

    def observe(self, step: Callable[[], object]) -> None:
        """Compare memory before and after a step of the device with the marks that it made."""
        used = [self.used_idx(driver) for _, driver in self.guest.rings]
        before = Watch(self.guest.memory)
        step()
        changed, marked = before.changed(self.unseen(used)), self.log.marked()
        rings: set[int] = set()
        for _, driver in self.guest.rings:
            rings |= ring_pages(driver) | {(driver.guest_addresses[2] + at) // PAGE for at in (0, 4 + 8 * driver.size)}
        if self.logging == "off":
            assert marked == set()
        elif self.logging == "on":
            assert marked >= changed - rings
            assert marked <= self.writable
        else:
            assert marked >= changed
            assert marked <= self.writable | rings

    @staticmethod
    def used_idx(driver: DriverQueue) -> int:
        return int(driver.used_head[1]) if driver.layout == "split" else 0

    def unseen(self, before: list[int]) -> list[tuple[int, int]]:
        """Used elements that the index does not expose: no driver looks at them, whatever they hold."""
        areas = []
        for (_, driver), old in zip(self.guest.rings, before, strict=True):
            if driver.layout == "split":
                count = (self.used_idx(driver) - old) & 0xFFFF
                seen = {(old + number) % driver.size for number in range(count)}
                used = driver.guest_addresses[2] + 4
                areas += [(used + 8 * slot, 8) for slot in range(driver.size) if slot not in seen]
        return areas


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mark_is_missing(harness: ModuleType, data: st.DataObject) -> None:
    machine = Machine(harness, Arena(GuestMemory(RINGS, guest_addr=FIRST), ARENA_PAGES, FIRST + RINGS), data)
    steps = {name: getattr(machine, name) for name in ("post", "push", "send", "pull", "arm", "poll", "restart")}
    steps |= {"switch enabled": machine.switch_enabled, "switch log": machine.switch_log}
    try:
        machine.switch_log()
        for name in data.draw(st.lists(st.sampled_from(sorted(steps)), min_size=5, max_size=25), "steps"):
            steps[name]()
    finally:
        machine.close()
