"""The block device (VIRTIO 1.3, 5.2): what it offers, its configuration space, and the threads that serve it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import msgspec

from vq import virtio as v
from vq.device_state import pack_state, unpack_state
from vq.devices.disk_lock import NO_LOCKS, DiskLock
from vq.errors import FrontendError, ResourceError, UsageError
from vq.hosted_device import HostedDevice
from vq.offer import QUEUES_MAX, Offer, with_postcopy
from vq_core.blk_worker import BlkWorker
from vq_core.disk import Disk
from vq_core.queue import Peer, Queue

__all__ = ["BlkDevice"]

logger = logging.getLogger(__name__)

COMMON_FEATURES: Final = v.mask(
    v.VIRTIO_BLK_F_SEG_MAX, v.VIRTIO_BLK_F_BLK_SIZE, v.VIRTIO_BLK_F_FLUSH, v.VIRTIO_BLK_F_TOPOLOGY, v.VIRTIO_BLK_F_MQ,
    v.VIRTIO_F_INDIRECT_DESC, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_F_VERSION_1, v.VIRTIO_F_ACCESS_PLATFORM,
    v.VIRTIO_F_RING_PACKED, v.VHOST_F_LOG_ALL, v.VHOST_USER_F_PROTOCOL_FEATURES,
)  # fmt: skip
WRITABLE_FEATURES: Final = v.mask(v.VIRTIO_BLK_F_CONFIG_WCE, v.VIRTIO_BLK_F_DISCARD, v.VIRTIO_BLK_F_WRITE_ZEROES)
FEATURES: Final = COMMON_FEATURES | WRITABLE_FEATURES | v.mask(v.VIRTIO_BLK_F_RO)

PROTOCOL_FEATURES: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_LOG_SHMFD, v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_CONFIG, v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, v.VHOST_USER_PROTOCOL_F_STATUS,
    v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT,
    v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
    v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS, v.VHOST_USER_PROTOCOL_F_DEVICE_STATE,
    v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES,
)  # fmt: skip

SEG_MAX: Final = 126  # with header and status a request must fit into a queue, to which QEMU gives 128 entries
POOL_THREADS: Final = 8  # of each worker


class BlkState(msgspec.Struct, frozen=True):
    """What a block device takes along (`vq.device_state`)."""

    features: Annotated[int, msgspec.Meta(ge=0)]  # acknowledged by the driver
    capacity: Annotated[int, msgspec.Meta(ge=0)]  # sectors that the driver knows of
    writeback: Annotated[int, msgspec.Meta(ge=0, le=1)]


class BlkDevice(HostedDevice):
    """A vhost-user-blk device on a disk.

    Parameters
    ----------
    disk
        Where the data is; the device closes it in the end.
    name
        For people.
    queues
        Request queues, 1 to 256.
    packed
        Offer the packed ring layout beside the split one.
    cpus
        A worker for each of these processors, which share the queues; None: one worker, wherever the kernel puts it.
    poll
        "adaptive": workers sleep when there is nothing to do. "busy": never.
    postcopy
        Offer to be the destination of a postcopy migration, which memory slots cannot be offered with.
    lock
        Let no ring run while another process writes to the file, and keep others out while one runs.

    Raises
    ------
    UsageError
        The number of queues is out of range.

    Notes
    -----
    A write is acknowledged when it has reached the medium, unless the driver knows of a write cache: it has negotiated
    FLUSH, and has not switched the cache off in the field `writeback`.
    """

    def __init__(
        self,
        disk: Disk,
        name: str = "blk",
        *,
        queues: int = 1,
        packed: bool = True,
        cpus: Sequence[int] | None = None,
        poll: str = "adaptive",
        postcopy: bool = False,
        lock: bool = True,
    ) -> None:
        if not 1 <= queues <= QUEUES_MAX:
            raise UsageError(f"{queues} queues; 1 to {QUEUES_MAX} are possible")
        self.name = name
        self.disk = disk
        self.report_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        peer = Peer()
        self.queues = [Queue(index, f"requestq{index}", self.report_fd, peer=peer) for index in range(queues)]
        chosen: list[int | None] = list(cpus) if cpus else [None]
        chosen = chosen[:queues]
        self.workers = [
            BlkWorker(disk, self.queues[number :: len(chosen)], cpu, poll) for number, cpu in enumerate(chosen)
        ]
        self._threads: list[threading.Thread] = []
        self._helpers: list[threading.Thread] = []
        features = COMMON_FEATURES | (v.mask(v.VIRTIO_BLK_F_RO) if disk.read_only else WRITABLE_FEATURES)
        if not packed:
            features &= ~v.mask(v.VIRTIO_F_RING_PACKED)
        if postcopy:
            features &= ~v.mask(v.VIRTIO_F_ACCESS_PLATFORM)
        self.offer = Offer(
            features,
            with_postcopy(PROTOCOL_FEATURES) if postcopy else PROTOCOL_FEATURES,
            queue_count=queues,
            queue_num_answer=queues,
            config_size=v.VIRTIO_BLK_CONFIG_SIZE,
        )
        self._lock = DiskLock(disk.fileno(), read_only=disk.read_only) if lock and disk.fileno() >= 0 else None
        self._features = 0
        self._writeback = 1
        self._set_cache()

    # -- life --

    def start(self) -> None:
        """Start the threads of the workers and of their pools."""
        for number, worker in enumerate(self.workers):
            for helper in range(POOL_THREADS):
                _begin(self._helpers, worker.pool.serve, f"vq-blk-{number}-{helper}")
        for number, worker in enumerate(self.workers):
            _begin(self._threads, worker.run, f"vq-blk-{number}")

    def close(self) -> None:
        """Finish what is under way, end all threads and close the disk; may be called twice."""
        if self.report_fd is None:
            return
        for worker in self.workers:
            worker.stop()
        for thread in self._threads:
            thread.join()
        for worker in self.workers:
            worker.pool.stop()
        for thread in self._helpers:
            thread.join()
        for worker in self.workers:
            worker.close()
        self.disk.close()
        os.close(self.report_fd)
        self.report_fd = None

    # -- the disk --

    def resize(self) -> bool:
        """Look how long the file is now; guests that run are told if that has changed the capacity.

        Returns
        -------
        bool
            Whether it has changed.
        """
        changed = self.disk.measure()
        if changed:
            self.config_changed()
        return changed

    def snapshot(self) -> dict[str, Any]:
        """Counters since the start.

        Returns
        -------
        dict
            ``{"capacity": bytes, "queues": [{...}], "workers": [{...}]}``.
        """
        count = len(self.workers)
        queues = [self.workers[i % count].queue_snapshot(i // count) for i in range(len(self.queues))]
        return {
            "capacity": self.disk.capacity * v.VIRTIO_BLK_SECTOR_BYTES,
            "queues": queues,
            "workers": [worker.snapshot() for worker in self.workers],
        }

    # -- what the front-end says --

    def set_features(self, features: int) -> None:
        self._features = features
        self._set_cache()

    def ring_starting(self, index: int) -> None:
        if self._lock is None:
            return
        try:
            free = self._lock.hold()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("device=%s path=%s error='cannot be locked: %s'", self.name, self.disk.path, error.strerror)
            self._lock = None
            return
        if not free:
            what = "another process writes to it" if self.disk.read_only else "another process uses it"
            remedy = "end that one; with --no-lock nobody looks, and two guests that write destroy the file system"
            raise ResourceError(f"the disk is locked: {what}", path=self.disk.path, remedy=remedy)

    def ring_stopped(self, index: int) -> None:
        self._unlock_if_idle()

    def _unlock_if_idle(self) -> None:
        if self._lock is None or not self._lock.held or any(queue.started for queue in self.queues):
            return
        # Who goes on with the file may be on another host: it must find there what was acknowledged here.
        try:
            if not self.disk.read_only and not self.disk.ready:
                self.disk.flush()
        except OSError as error:
            logger.error("device=%s path=%s error='flush: %s'", self.name, self.disk.path, error.strerror)
        self._lock.release()

    def reset(self) -> None:
        self._unlock_if_idle()  # also when a ring was to start and could not
        self._features = 0
        self._writeback = 1
        self._set_cache()

    def save_state(self) -> bytes:
        return pack_state(v.VIRTIO_ID_BLOCK, BlkState(self._features, self.disk.capacity, self._writeback))

    def load_state(self, state: bytes) -> None:
        came = unpack_state(state, v.VIRTIO_ID_BLOCK, BlkState)
        unoffered = came.features & ~self.offer.features
        if unoffered:
            names = ", ".join(v.feature_names(unoffered))
            raise FrontendError("device state", "features", f"{came.features:#x}", f"{names} is not offered here")
        if came.capacity > self.disk.capacity:
            limit = f"the disk has {self.disk.capacity} here; it must be no smaller than where the guest comes from"
            raise FrontendError("device state", "capacity", came.capacity, limit)
        self._writeback = came.writeback
        self._set_cache()

    def _set_cache(self) -> None:
        cached = v.has(self._features, v.VIRTIO_BLK_F_FLUSH)
        if v.has(self._features, v.VIRTIO_BLK_F_CONFIG_WCE):
            cached = cached and bool(self._writeback)
        self.disk.set_stable(not cached)

    @property
    def config(self) -> v.BlkConfig:
        """The configuration space at this moment."""
        block = self.disk.block_bytes
        physical = max(1, self.disk.physical_block_bytes // block)
        writable = not self.disk.read_only
        return v.BlkConfig(
            capacity=self.disk.capacity,
            seg_max=SEG_MAX,
            blk_size=block,
            physical_block_exp=physical.bit_length() - 1,
            min_io_size=min(physical, 0xFFFF),
            writeback=self._writeback,
            num_queues=len(self.queues),
            max_discard_sectors=BlkWorker.DISCARD_SECTORS_MAX if writable else 0,
            max_discard_seg=BlkWorker.RANGES_MAX if writable else 0,
            discard_sector_alignment=self.disk.physical_block_bytes // v.VIRTIO_BLK_SECTOR_BYTES if writable else 0,
            max_write_zeroes_sectors=BlkWorker.WRITE_ZEROES_SECTORS_MAX if writable else 0,
            max_write_zeroes_seg=BlkWorker.RANGES_MAX if writable else 0,
            write_zeroes_may_unmap=int(writable),
        )

    def read_config(self, offset: int, size: int) -> bytes:
        return self.config.pack()[offset : offset + size]

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        at = v.VIRTIO_BLK_CONFIG_WRITEBACK - offset
        if migration:
            # The whole space may come; what describes the disk is told by the disk that is here.
            value = data[at] if 0 <= at < len(data) else self._writeback
        elif at != 0 or len(data) != 1 or not v.has(self.offer.features, v.VIRTIO_BLK_F_CONFIG_WCE):
            limit = f"only the byte at {v.VIRTIO_BLK_CONFIG_WRITEBACK} (writeback) can be written, on a writable disk"
            raise FrontendError("SET_CONFIG", "range", f"{len(data)} bytes at {offset}", limit)
        else:
            value = data[0]
        if value not in (0, 1):
            raise FrontendError("SET_CONFIG", "writeback", value, "0 is write-through, 1 is write-back")
        self._writeback = value
        self._set_cache()


def _begin(threads: list[threading.Thread], target: Callable[[], object], name: str) -> None:
    """Start a thread; those that run are known, also when there can be no more."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    threads.append(thread)
