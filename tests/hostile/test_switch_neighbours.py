"""Lines 26 to 32 on the program as users start it: a guest that breaks its rings on a switch with two honest ones."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.guest import INDIRECT, NEXT, WRITE, A, Guest
from hostile.process import Program, share, start, wait_until
from vq import virtio as v
from vq.frontend import Frontend
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.traffic import Exchange, traffic_memory_bytes

BUFFERS = A + 0x200000
FEATURES = v.mask(v.VIRTIO_F_VERSION_1)


class Switch(Program):
    """`vq pump` with three sockets and JSON reports."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(folder / f"{name}.sock") for name in ("hostile", "one", "two")]
        self.path = self.paths[0]
        super().__init__(
            ["-m", "vq", "pump", *(f"vhost:{path},queues=2" for path in self.paths), "--json", "--interval", "0.05"],
            folder,
        )
        self.reports: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until("the sockets are there", lambda: all(map(os.path.exists, self.paths)))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.reports.append(json.loads(line))

    def fresh(self) -> dict[str, Any]:
        """The hostile port in a report that was made after this call."""
        count = len(self.reports)
        wait_until("a report", lambda: len(self.reports) >= count + 2)
        return dict(self.reports[-1]["ports"][f"vhost:{self.path}"])

    def queue(self, name: str) -> dict[str, Any]:
        return next((queue for queue in self.fresh()["queues"] if queue["name"] == name), {})

    def wait_free(self) -> None:
        wait_until("the socket listens again", lambda: self.fresh()["state"] == "listening")


class Honest:
    """A well-behaved guest of the switch."""

    def __init__(self, path: str) -> None:
        self.frontend = Frontend.connect(path)
        features = self.frontend.negotiate(FEATURES, v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
        self.frontend.set_features(features)
        self.memory = GuestMemory(traffic_memory_bytes(256, 1518))
        share(self.frontend, self.memory)
        self.receiveq, self.transmitq = (DriverQueue(self.memory, 256, features=features) for _ in range(2))
        for index, queue in enumerate((self.receiveq, self.transmitq)):
            start(self.frontend, index, queue)


def avail_idx(guest: Guest) -> str:
    guest.transmit.avail[1] = guest.transmit.avail_idx + 1000
    return "available index more than queue_size ahead"


def head(guest: Guest) -> str:
    guest.transmit.offer(0xFFFF)
    return "head outside queue_size"


def loop(guest: Guest) -> str:
    guest.transmit.put(0, BUFFERS, 1, NEXT, 0)
    guest.transmit.offer(0)
    return "more descriptors than a chain may have"


def address(guest: Guest) -> str:
    guest.transmit.put(0, 0, 100)
    guest.transmit.offer(0)
    return "address outside the guest's memory"


def indirect(guest: Guest) -> str:
    guest.transmit.put(0, BUFFERS, 17, INDIRECT)
    guest.transmit.offer(0)
    return "malformed indirect descriptor"


def order(guest: Guest) -> str:
    guest.transmit.chain((BUFFERS, 10, WRITE), (BUFFERS, 10, 0))
    guest.transmit.offer(0)
    return "device-readable descriptor after a device-writable one"


@pytest.mark.checklist(26, 27, 28, 29, 32)
def test_two_honest_guests_do_not_notice(tmp_path: Path) -> None:
    """Lines 26 to 29, 32: packets from one to the other, flooded to the third, whose rings break all the time."""
    program = Switch(tmp_path)
    try:
        one, two = Honest(program.paths[1]), Honest(program.paths[2])
        exchange = Exchange([(one.transmitq, two.receiveq)], (64, 1518), poll="sleep", window=32, patience=30.0)
        thread = threading.Thread(target=exchange.run, args=[20.0], daemon=True)
        thread.start()
        guest = Guest(program)  # type: ignore[arg-type]
        ways: list[Callable[[Guest], str]] = [avail_idx, head, loop, address, indirect, order]
        for number, way in enumerate(ways):
            cause = way(guest)
            guest.kick(1)
            # Half of the time the receiveq breaks too, by what is flooded to it.
            if number % 2:
                guest.receive.put(0, 0, 2000, WRITE)
                guest.receive.offer(0)
            wait_until(cause, lambda: guest.errors(1))
            assert program.queue("transmitq0")["broken"] == cause
            if number % 2:
                wait_until("the receiveq is broken", lambda: guest.errors(0))
            before = exchange.counters["verified"]
            wait_until("packets move", lambda before=before: exchange.counters["verified"] > before + 50)
            for index in (0, 1):
                guest.restart(index)
        guest.close()
        exchange.stop()
        thread.join()
        counters = exchange.counters
        assert counters["verified"] == counters["sent"] > 300, counters
        assert not any(counters[kind] for kind in ("lost", "duplicated", "reordered", "changed")), counters
        one.frontend.close()
        two.frontend.close()
    finally:
        program.process.send_signal(signal.SIGTERM)
        assert program.close() == 0
    assert "Traceback" not in program.messages
