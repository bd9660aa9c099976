"""What can be asked of a back-end: a method for each message.

Spec: vhost-user, "Communication", "Starting and stopping rings"; a front-end's duties.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from vq import virtio as v
from vq.errors import BackendError, UsageError
from vq.message import Request, encode_request
from vq.offer import PAGE_BYTES
from vq.payload import VRING_NOFD_MASK, Config, Inflight, Log, Region, VringAddr, VringState
from vq.state_dialogue import StateDialogue

__all__ = ["FrontendMessages", "RingSetup"]

INFLIGHT_BYTES_MAX: Final = 1 << 30  # 256 queues of 32768 entries take a quarter of it


@dataclass(frozen=True, slots=True)
class RingSetup:
    """What `start_ring` tells the back-end about a ring.

    Parameters
    ----------
    index
        Ring index.
    num
        Entries.
    desc, avail, used
        User addresses, inside the `user_addr` ranges of the memory table. Packed: descriptor ring, driver event
        suppression, device event suppression.
    base
        Next available index; for a packed ring all four values, 0x80008000 at first.
    kick_fd, call_fd, err_fd
        The caller's fds; None says NOFD (no message at all for `err_fd`).
    log_guest_addr, flags
        Where the used ring lies for the dirty log, and whether it is logged (VHOST_VRING_F_LOG).
    inband
        Kick by VRING_KICK and be called by VRING_CALL, without fds (needs INBAND_NOTIFICATIONS and `open_channel`).
    """

    index: int
    num: int
    desc: int
    avail: int
    used: int
    base: int = 0
    kick_fd: int | None = None
    call_fd: int | None = None
    err_fd: int | None = None
    log_guest_addr: int = 0
    flags: int = 0
    inband: bool = False


class FrontendMessages(StateDialogue):
    """A connection to a back-end and what can be asked of it by messages; public as `vq.Frontend`."""

    # --- Negotiation -------------------------------------------------------------------------------------------------

    def negotiate(self, features: int, protocol_features: int = 0) -> int:
        """Agree on features, in the order of QEMU, up to and without SET_FEATURES.

        Parameters
        ----------
        features
            virtio feature bits that are wanted; VHOST_USER_F_PROTOCOL_FEATURES comes along by itself.
        protocol_features
            Protocol feature bits that are wanted.

        Returns
        -------
        int
            The features that both want; pass them, or fewer, to `set_features`.
        """
        self.offered_features = self.request(Request.GET_FEATURES)
        if v.has(self.offered_features, v.VHOST_USER_F_PROTOCOL_FEATURES):
            self.offered_protocol_features = self.request(Request.GET_PROTOCOL_FEATURES)
            agreed = protocol_features & self.offered_protocol_features
            self.request(Request.SET_PROTOCOL_FEATURES, agreed)
            self.protocol_features = agreed
        self.request(Request.SET_OWNER)
        return self.offered_features & (features | v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES))

    def set_features(self, features: int) -> None:
        """Acknowledge features, or switch VHOST_F_LOG_ALL later."""
        self.request(Request.SET_FEATURES, features)
        self.features = features

    def queue_num(self) -> int:
        """Ask how many queues the back-end has; 1 if it was not negotiated that one may ask."""
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_MQ):
            return 1
        return int(self.request(Request.GET_QUEUE_NUM))

    def set_status(self, status: int) -> None:
        """Tell the device status byte, if STATUS was negotiated."""
        if self.has_protocol(v.VHOST_USER_PROTOCOL_F_STATUS):
            self.request(Request.SET_STATUS, status)

    def get_status(self) -> int:
        """Ask for the device status byte."""
        return int(self.request(Request.GET_STATUS))

    # --- Memory ------------------------------------------------------------------------------------------------------

    def set_mem_table(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        """Give the back-end the whole memory table, an fd for each region; returns when it has it.

        Without REPLY_ACK a GET_FEATURES behind it serves as a barrier.
        """
        if len(regions) != len(fds):
            raise UsageError(f"set_mem_table: {len(regions)} regions with {len(fds)} fds; each region needs one")
        self.request(Request.SET_MEM_TABLE, tuple(regions), fds)
        self.barrier()

    def postcopy_advise(self) -> int | None:
        """Announce a postcopy migration; returns the back-end's userfaultfd, the caller's from here on, or None."""
        return self.request_fd(Request.POSTCOPY_ADVISE)[1]

    def postcopy_listen(self) -> None:
        """From here on memory tables go by `send_postcopy_table`."""
        self._must_be_done(Request.POSTCOPY_LISTEN)

    def postcopy_end(self) -> None:
        """All pages have come; the back-end has let go of the userfaultfd."""
        self._must_be_done(Request.POSTCOPY_END)

    def _must_be_done(self, request: int) -> None:
        # These are answered always; DPDK wants to be asked nevertheless, and QEMU asks.
        self._transmit(encode_request(request, need_reply=True), ())
        message = self.receive()
        try:
            self._check(request, message, acked=True)
        finally:
            message.close()

    def send_postcopy_table(self, regions: Sequence[Region], fds: Sequence[int]) -> tuple[Region, ...]:
        """Give the memory table of a postcopy migration; the back-end may not touch it before `release_postcopy_table`.

        Returns
        -------
        tuple of Region
            The same regions, with where they lie in the back-end in place of `user_addr`: its page faults say so.
        """
        self._transmit(encode_request(Request.SET_MEM_TABLE, tuple(regions)), fds)
        message = self.receive()
        try:
            self._check(Request.SET_MEM_TABLE, message, acked=False)
            reply = message.payload
        finally:
            message.close()
        if isinstance(reply, int) or [r[:2] for r in reply] != [tuple(r[:2]) for r in regions]:
            raise BackendError("SET_MEM_TABLE", "reply", reply, "the same regions, with other addresses, were expected")
        return tuple(reply)

    def release_postcopy_table(self) -> None:
        """Page faults are served: the back-end may use the table that was sent last."""
        self._transmit(encode_request(Request.SET_MEM_TABLE, 0), ())
        self.request(Request.GET_FEATURES)

    def add_region(self, region: Region, fd: int) -> None:
        """Add one region."""
        self.request(Request.ADD_MEM_REG, region, [fd])
        self.barrier()

    def remove_region(self, region: Region) -> None:
        """Remove one region; it may be unmapped afterwards."""
        self.request(Request.REM_MEM_REG, region)
        self.barrier()

    def set_log_base(self, fd: int, size: int, offset: int = 0) -> None:
        """Give the back-end a dirty log; it writes to it after `set_features` with VHOST_F_LOG_ALL."""
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD):
            raise UsageError("set_log_base: LOG_SHMFD was not negotiated; want it in negotiate()")
        self.request(Request.SET_LOG_BASE, Log(size, offset), [fd])

    def barrier(self) -> None:
        """Wait until the back-end has served everything so far, where acks do not tell already."""
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_REPLY_ACK):
            self.request(Request.GET_FEATURES)

    # --- Rings -------------------------------------------------------------------------------------------------------

    def start_ring(self, ring: RingSetup, *, enable: bool = True) -> None:
        """Set a ring up, start it, and (by default) enable it; returns when the back-end has obeyed.

        Old back-ends start only when the kick fd becomes readable, so the caller writes to it once afterwards.
        """
        self.request(Request.SET_VRING_NUM, VringState(ring.index, ring.num))
        self.request(Request.SET_VRING_BASE, VringState(ring.index, ring.base))
        self.set_ring_addresses(ring)
        if ring.inband:
            self.kick_ring(ring.index)
            if enable:
                self.enable_ring(ring.index, True)
            return
        self.set_call(ring.index, ring.call_fd)
        if ring.err_fd is not None:
            self._ring_fd(Request.SET_VRING_ERR, ring.index, ring.err_fd)
        self._ring_fd(Request.SET_VRING_KICK, ring.index, ring.kick_fd)
        if enable:
            self.enable_ring(ring.index, True)

    def set_ring_addresses(self, ring: RingSetup) -> None:
        """Send the addresses; on a started ring only to switch its logging."""
        addr = VringAddr(ring.index, ring.flags, ring.desc, ring.used, ring.avail, ring.log_guest_addr)
        self.request(Request.SET_VRING_ADDR, addr)

    def set_call(self, index: int, fd: int | None) -> None:
        """Replace the call fd, None = the back-end calls nobody."""
        self._ring_fd(Request.SET_VRING_CALL, index, fd)

    def kick_ring(self, index: int) -> None:
        """Kick by a message; the first one starts the ring."""
        self.request(Request.VRING_KICK, VringState(index, 0))

    def enable_ring(self, index: int, enabled: bool) -> None:
        """Enable or disable a ring, if it can be said (VHOST_USER_F_PROTOCOL_FEATURES acknowledged)."""
        if v.has(self.features, v.VHOST_USER_F_PROTOCOL_FEATURES):
            self.request(Request.SET_VRING_ENABLE, VringState(index, int(enabled)))
            self.barrier()

    def get_vring_base(self, index: int) -> int:
        """Stop a ring and learn where it stopped; the back-end has let go of it then."""
        state: VringState = self.request(Request.GET_VRING_BASE, VringState(index, 0))
        if state.ring != index:
            raise BackendError("GET_VRING_BASE", "ring index", state.ring, f"{index} was asked for")
        return state.num

    def get_vring_base_skip_drain(self, index: int) -> int:
        """Stop a ring without waiting for what it has in flight, which the in-flight region tells of; its base."""
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN):
            raise UsageError("get_vring_base_skip_drain: not negotiated; want GET_VRING_BASE_SKIP_DRAIN in negotiate()")
        state: VringState = self.request(Request.GET_VRING_BASE_SKIP_DRAIN, VringState(index, 0))
        if state.ring != index:
            raise BackendError("GET_VRING_BASE_SKIP_DRAIN", "ring index", state.ring, f"{index} was asked for")
        return state.num

    def stop_ring(self, index: int) -> int:
        """Disable and stop a ring; returns its base for the next start."""
        self.enable_ring(index, False)
        return self.get_vring_base(index)

    def _ring_fd(self, request: int, index: int, fd: int | None) -> None:
        word = index if fd is not None else index | VRING_NOFD_MASK
        self.request(request, word, [] if fd is None else [fd])

    # --- In-flight region --------------------------------------------------------------------------------------------

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """Ask for an in-flight region.

        Returns
        -------
        Inflight, int
            Its shape, as `set_inflight` takes it, and its fd, which is the caller's: kept as long as the guest lives.

        Raises
        ------
        BackendError
            There is none, or the file is not what the reply says.
        """
        self._need_inflight()
        shape, fd = self.request_fd(Request.GET_INFLIGHT_FD, Inflight(0, 0, num_queues, queue_size))
        try:
            if fd is None or shape.mmap_size == 0:
                raise BackendError("GET_INFLIGHT_FD", "region", "none", "the back-end makes none of this shape")
            have, needed = os.fstat(fd).st_size, shape.mmap_offset + shape.mmap_size
            if (shape.num_queues, shape.queue_size) != (num_queues, queue_size):
                value = f"{shape.num_queues} queues of {shape.queue_size}"
                raise BackendError("GET_INFLIGHT_FD", "shape", value, f"{num_queues} of {queue_size} were asked for")
            if not num_queues * queue_size <= shape.mmap_size <= INFLIGHT_BYTES_MAX or needed > have:
                value = f"{shape.mmap_size} bytes at {shape.mmap_offset} of a file of {have}"
                raise BackendError("GET_INFLIGHT_FD", "size", value, f"at most {INFLIGHT_BYTES_MAX}, inside the file")
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        return shape, fd

    def set_inflight(self, shape: Inflight, fd: int) -> None:
        """Give an in-flight region to a back-end whose rings all stand; the fd stays the caller's."""
        self._need_inflight()
        self.request(Request.SET_INFLIGHT_FD, shape, [fd])
        self.barrier()

    def _need_inflight(self) -> None:
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            raise UsageError("in-flight region: INFLIGHT_SHMFD was not negotiated; want it in negotiate()")

    # --- Device ------------------------------------------------------------------------------------------------------

    def get_config(self, offset: int, size: int) -> bytes:
        """Read a part of the configuration space."""
        reply: Config | None = self.request(Request.GET_CONFIG, Config(offset, 0, bytes(size)))
        if reply is None:
            raise BackendError("GET_CONFIG", "reply", "empty", f"{size} bytes at {offset} were asked for")
        if (reply.offset, len(reply.data)) != (offset, size):
            value = f"{len(reply.data)} bytes at {reply.offset}"
            raise BackendError("GET_CONFIG", "reply", value, f"{size} bytes at {offset} were asked for")
        return reply.data

    def set_config(self, offset: int, data: bytes) -> None:
        """Write into the configuration space, as the driver does; BackendError if it was refused (with REPLY_ACK)."""
        self.request(Request.SET_CONFIG, Config(offset, 0, data))

    def reset_device(self) -> None:
        """Bring the device back to its beginning; all rings are stopped by that."""
        self.request(Request.RESET_DEVICE)

    def get_shared_object(self, uuid: UUID) -> int | None:
        """Ask for an object that the device shares; the descriptor is the caller's. None: there is none."""
        _, fd = self.request_fd(Request.GET_SHARED_OBJECT, uuid.bytes)
        return fd

    def get_shmem_config(self) -> dict[int, int]:
        """Ask for the shared memory regions of the device: size by id.

        Raises
        ------
        BackendError
            Their number is wrong, or a size that cannot be.
        """
        count, *sizes = self.request(Request.GET_SHMEM_CONFIG)
        found = {shmid: size for shmid, size in enumerate(sizes) if size}
        if count != len(found):
            raise BackendError("GET_SHMEM_CONFIG", "nregions", count, f"{len(found)} sizes are not 0")
        for shmid, size in found.items():
            if size % PAGE_BYTES or size >= 1 << 63:
                limit = f"a region has whole pages of {PAGE_BYTES} bytes"
                raise BackendError("GET_SHMEM_CONFIG", f"size of region {shmid}", size, limit)
        return found
