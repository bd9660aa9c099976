"""What tests of the block device behind its socket share: a server in a thread, and a front-end with one queue."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blk_rig import OUT, header
from vq import virtio as v
from vq.devices.blk import BlkDevice
from vq.frontend import Frontend, RingSetup
from vq.payload import Region
from vq.server import Server
from vq_core.disk import Disk
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from waiting import wait_for

VERSION_1 = v.mask(v.VIRTIO_F_VERSION_1)
PROTOCOL = v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)


@contextmanager
def serving(image: Path, path: str, *, direct: bool = False, **options: Any) -> Iterator[Server]:
    """A server for a file, in a thread."""
    server = Server(BlkDevice(Disk(image, direct=direct), **options), path=path)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.request_stop()
        thread.join(60)
        server.close()


class DiskGuest:
    """A front-end with a running request queue.

    Parameters
    ----------
    path
        The back-end's socket.
    features
        Wanted virtio features.
    memory
        Of the guest; rings are laid out in its first region with room. It is closed with the guest.
    """

    protocol = PROTOCOL

    def __init__(self, path: str, features: int, memory: GuestMemory) -> None:
        self.frontend = Frontend.connect(path, timeout=60)
        self.features = self.frontend.negotiate(features, self.protocol)
        self.frontend.set_features(self.features)
        self.memory = memory
        self.driver = DriverQueue(memory, 64, features=self.features)
        self.share()
        self.start()

    def share(self) -> None:
        """Send the memory table."""
        regions = self.memory.regions
        self.frontend.set_mem_table([Region(*one[:4]) for one in regions], [one[4] for one in regions])

    def start(self) -> None:
        driver = self.driver
        base = 0x8000 if driver.layout == "packed" else 0
        self.frontend.start_ring(
            RingSetup(0, driver.size, *driver.addresses, base, driver.kick_fd, driver.call_fd, None)
        )

    def ask(self, kind: int, sector: int, place: tuple[int, int]) -> int:
        """One request about `place` in guest memory; its status."""
        readable, writable = (
            ([header(kind, sector), place], [1]) if kind == OUT else ([header(kind, sector)], [place, 1])
        )
        buffer = self.driver.add(readable, writable)
        self.driver.publish()
        self.driver.kick()
        wait_for(self.driver.poll)
        return bytes(buffer.writable[-1])[0]

    def __enter__(self) -> DiskGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.frontend.close()
        self.driver.close()
        self.memory.close()
