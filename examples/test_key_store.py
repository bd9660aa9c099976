"""A device with all that a device can have, and its test: pytest examples/test_key_store.py.

Two queues, a configuration space that both sides write, requests that a thread of its own answers when it likes, and
events that the device sends by itself.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Annotated, Any

import pytest

import vq
from vq.testing import Guest

PUT, GET = 1, 2
HEADER = struct.Struct("<BI")  # what to do, and with which key


class KeyStore(vq.Device):
    """Keeps a text for each number."""

    queues = ("requestq", "eventq")

    class Config(vq.ConfigLayout):
        """16 bytes that a driver sees."""

        used: vq.le32 = 0
        label: Annotated[bytes, 11] = b"keys"
        events: vq.u8 = vq.writable(1)

    def __init__(self) -> None:
        self.texts: dict[int, bytes] = {}
        self.jobs: SimpleQueue[Any] = SimpleQueue()
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def handle(self, queue: vq.DeviceQueue) -> None:
        if queue.name == "requestq":  # what waits in the other one waits for an event
            for chain in queue:
                self.jobs.put(chain)

    def work(self) -> None:
        while (chain := self.jobs.get()) is not None:
            try:
                self.answer(chain)
            except (struct.error, ValueError):  # too short a request, or no room for the answer
                self.call(chain.refuse)

    def answer(self, chain: vq.DeviceChain) -> None:
        kind, key = HEADER.unpack(chain.read(HEADER.size))
        if kind == PUT:
            self.texts[key] = chain.read()
            chain.complete()
            self.call(lambda: self.tell(key))  # queues belong to the control thread
            self.config.used = len(self.texts)  # the driver is told
        else:
            chain.write(self.texts.get(key, b""))
            chain.complete()

    def tell(self, key: int) -> None:
        if self.config.events and (chain := self.chains[1].pop()):
            chain.write(b"%d" % key)
            chain.complete()

    def close(self) -> None:
        self.jobs.put(None)
        self.thread.join()
        super().close()


Connect = Callable[..., Guest]


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_it_keeps_texts(vq_guest: Connect, layout: str) -> None:
    guest = vq_guest(KeyStore(), layout=layout)
    assert guest.ask(HEADER.pack(PUT, 7) + b"hello") == b""
    assert guest.ask(HEADER.pack(GET, 7), room=16) == b"hello"
    assert guest.ask(HEADER.pack(GET, 8), room=16) == b""


def test_its_driver_sees_what_changes(vq_guest: Connect) -> None:
    guest = vq_guest(KeyStore())
    assert guest.config(16) == bytes(4) + b"keys".ljust(11, b"\0") + b"\1"
    guest.send(room=8, queue=1)
    guest.ask(HEADER.pack(PUT, 7) + b"hello")
    guest.wait_config_change()
    assert guest.config(4) == b"\1\0\0\0"
    [(_, event)] = guest.used(queue=1)
    assert event == b"7"


def test_its_driver_wants_some_events(vq_guest: Connect) -> None:
    guest = vq_guest(KeyStore())
    guest.send(room=8, queue=1)
    for key, wanted in ((7, b"\0"), (8, b"\1")):
        guest.frontend.set_config(15, wanted)
        guest.ask(HEADER.pack(PUT, key) + b"hello")
        guest.wait_config_change()
    [(_, event)] = guest.used(queue=1)
    assert event == b"8"


def test_nonsense_stops_the_queue(vq_guest: Connect) -> None:
    guest = vq_guest(KeyStore())
    with pytest.raises(vq.BackendError, match="stopped by the back-end"):
        guest.ask(b"?", room=1)
