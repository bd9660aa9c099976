"""What the tests of a block back-end share: a server in a thread, a front-end for it, and a second decoder."""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blk_rig import header
from vq import virtio as v
from vq.devices.blk import BlkDevice
from vq.frontend import Frontend, RingSetup
from vq.message import Request
from vq.payload import Region
from vq.server import Server
from vq_core.disk import Disk
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from waiting import wait_for

PROTOCOL = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    v.VHOST_USER_PROTOCOL_F_CONFIG, v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, v.VHOST_USER_PROTOCOL_F_STATUS,
    v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
)  # fmt: skip
USUAL = v.mask(v.VIRTIO_F_VERSION_1, v.VIRTIO_BLK_F_FLUSH, v.VIRTIO_BLK_F_CONFIG_WCE)


class BlkConfig(ctypes.LittleEndianStructure):
    """The configuration space as the specification lays it out (VIRTIO 1.3, 5.2.4): a second decoder."""

    _pack_ = 1
    _fields_ = (
        ("capacity", ctypes.c_uint64),
        ("size_max", ctypes.c_uint32),
        ("seg_max", ctypes.c_uint32),
        ("cylinders", ctypes.c_uint16),
        ("heads", ctypes.c_uint8),
        ("sectors", ctypes.c_uint8),
        ("blk_size", ctypes.c_uint32),
        ("physical_block_exp", ctypes.c_uint8),
        ("alignment_offset", ctypes.c_uint8),
        ("min_io_size", ctypes.c_uint16),
        ("opt_io_size", ctypes.c_uint32),
        ("writeback", ctypes.c_uint8),
        ("unused0", ctypes.c_uint8),
        ("num_queues", ctypes.c_uint16),
        ("max_discard_sectors", ctypes.c_uint32),
        ("max_discard_seg", ctypes.c_uint32),
        ("discard_sector_alignment", ctypes.c_uint32),
        ("max_write_zeroes_sectors", ctypes.c_uint32),
        ("max_write_zeroes_seg", ctypes.c_uint32),
        ("write_zeroes_may_unmap", ctypes.c_uint8),
        ("unused1", ctypes.c_uint8 * 3),
        ("max_secure_erase_sectors", ctypes.c_uint32),
        ("max_secure_erase_seg", ctypes.c_uint32),
        ("secure_erase_sector_alignment", ctypes.c_uint32),
        ("zoned_sectors", ctypes.c_uint32),
        ("max_open_zones", ctypes.c_uint32),
        ("max_active_zones", ctypes.c_uint32),
        ("max_append_sectors", ctypes.c_uint32),
        ("write_granularity", ctypes.c_uint32),
        ("model", ctypes.c_uint8),
        ("unused2", ctypes.c_uint8 * 3),
    )


def fields(space: bytes) -> dict[str, int]:
    """Read a configuration space; bytes that are not there read as zero."""
    found = BlkConfig.from_buffer_copy(space.ljust(ctypes.sizeof(BlkConfig), b"\0"))
    values = {name: getattr(found, name) for name, _ in BlkConfig._fields_}
    return {name: value if isinstance(value, int) else int(any(value)) for name, value in values.items()}


class Guest:
    """A front-end with one running request queue, and a back-end channel."""

    def __init__(self, path: str, features: int = USUAL, protocol: int = PROTOCOL, *, channel: bool = True) -> None:
        self.frontend = Frontend.connect(path, timeout=60)
        self.features = self.frontend.negotiate(features, protocol)
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(60)
        if channel:
            self.frontend.request(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
        theirs.close()
        self.frontend.set_features(self.features)
        self.memory = GuestMemory(1 << 20)
        regions = self.memory.regions
        self.frontend.set_mem_table([Region(*row[:4]) for row in regions], [row[4] for row in regions])
        self.driver = DriverQueue(self.memory, 64, features=self.features)

    def start(self) -> None:
        driver = self.driver
        ring = RingSetup(0, driver.size, *driver.addresses, driver.used_idx, driver.kick_fd, driver.call_fd, None)
        self.frontend.start_ring(ring)

    def ask(self, kind: int, data: bytes = b"", size: int = 0) -> int:
        buffer = self.driver.add([header(kind), data] if data else [header(kind)], [size, 1] if size else [1])
        self.driver.publish()
        self.driver.kick()
        wait_for(self.driver.poll)
        return bytes(buffer.writable[-1])[0]

    def config(self) -> dict[str, int]:
        return fields(self.frontend.get_config(0, 60))

    def close(self) -> None:
        self.frontend.close()
        self.ours.close()
        self.driver.close()
        self.memory.close()


@contextmanager
def serving(disk: Disk, path: str, **options: Any) -> Iterator[Server]:
    """A server in a thread."""
    server = Server(BlkDevice(disk, **options), path=path)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.request_stop()
        thread.join(60)
        server.close()
