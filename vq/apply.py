"""Effects of a session become changes of vq_core objects: memory maps, rings, the dirty log."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Final

from vq import effects as e
from vq import virtio as v
from vq.errors import ConnectionClosed, FrontendError, UsageError, VqError
from vq.hosted_device import HostedDevice
from vq.inband import Inband
from vq.memory_maps import MemoryMaps
from vq.postcopy import PostcopyMemory
from vq.state_transfer import StateTransfer
from vq.translation import Translation
from vq_core.dirty import DirtyLog
from vq_core.inflight import InflightRegion, inflight_bytes
from vq_core.memory import MemoryMap

__all__ = ["Applier"]

logger = logging.getLogger(__name__)

LAST: Final = (1 << 64) - 1  # address


class Applier:
    """Carries out the effects of one connection on a device.

    Parameters
    ----------
    device
        Whose queues are changed, and whose hooks are called.
    changed
        Called after a ring was started, stopped, enabled or disabled, and when a frame is to be announced.
    warn
        Called with a text for people: memory of a running ring was taken away, a dirty log was too small.
    channel_given
        Called with the socket of a new back-end channel, which stays the session's.
    inband
        Stands in for descriptors of rings whose notifications are messages.
    wake
        Called by another thread when `hopeless` has become true.
    transfer
        Moves the device's state; None: it cannot be saved or loaded.
    translation_changed
        Called with the translations of an IOMMU when there is one, and with None before they are closed.

    Notes
    -----
    An effect is complete when the call returns: each change of a queue waits until its worker has passed a burst
    boundary, so that what it replaced is not used any more and is unmapped here.
    """

    def __init__(
        self,
        device: HostedDevice,
        changed: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = logger.warning,
        channel_given: Callable[[int], None] = lambda fd: None,
        inband: Inband | None = None,
        wake: Callable[[], None] = lambda: None,
        transfer: StateTransfer | None = None,
        translation_changed: Callable[[Translation | None], None] = lambda translation: None,
    ) -> None:
        self.device = device
        self.changed = changed
        self.warn = warn
        self.channel_given = channel_given
        self.inband = inband
        self.transfer = transfer
        self.translation_changed = translation_changed
        self.features = 0
        self.memory: MemoryMap | None = None
        self._maps = MemoryMaps()
        self.postcopy = PostcopyMemory(device.queues, wake)
        self.log: DirtyLog | None = None
        self.inflight: InflightRegion | None = None
        self.rings: dict[int, e.RingConfig] = {}
        self.waiting: dict[int, int] = {}  # base of each ring whose memory is not there
        self.translation: Translation | None = None  # with ACCESS_PLATFORM

    def __call__(self, effect: e.Effect) -> Any:
        try:
            return self._table[type(effect)](self, effect)
        except ValueError as error:
            # What vq_core refuses is what the front-end sent.
            raise FrontendError(type(effect).__name__, "content", "refused", str(error)) from error

    def close(self) -> None:
        """Release what only this connection needed; the session has been closed before."""
        self._end_translation()

    @property
    def lost(self) -> bool:
        """Whether the front-end has truncated a file that is in use: memory, dirty log or in-flight region."""
        return any(shared is not None and shared.lost for shared in (self.memory, self.log, self.inflight))

    @property
    def hopeless(self) -> bool:
        """Whether a worker has waited too long for a page of a postcopy migration, and its memory was taken away."""
        return self.postcopy.hopeless

    @property
    def muted(self) -> bool:
        """Whether the front-end makes signals to it last."""
        return any(queue.muted for queue in self.device.queues)

    # -- memory --

    def _set_memory(self, effect: e.SetMemory) -> None:
        regions = [(r.guest_addr, r.size, r.user_addr, r.mmap_offset, r.fd) for r in effect.regions]
        if regions:
            self._maps.check()
        self._publish(MemoryMap(regions) if regions else None)

    def _add_region(self, effect: e.AddRegion) -> None:
        self._maps.check()
        r = effect.region
        region = (r.guest_addr, r.size, r.user_addr, r.mmap_offset, r.fd)
        self._publish(MemoryMap([region]) if self.memory is None else self.memory.plus(region))

    def _remove_region(self, effect: e.RemoveRegion) -> None:
        r = effect.region
        if self.memory is not None:
            self._maps.check()
            try:
                rest = self.memory.minus(r.guest_addr, r.size, r.user_addr)
            except KeyError as error:
                raise ValueError(str(error)) from error
            self._publish(rest)

    def _advise_postcopy(self, effect: e.AdvisePostcopy) -> int:
        return self.postcopy.advise()

    def _prepare_memory(self, effect: e.PrepareMemory) -> tuple[int, ...]:
        self._maps.check()
        return self.postcopy.prepare(effect.regions)

    def _adopt_memory(self, effect: e.AdoptMemory) -> None:
        self._publish(self.postcopy.adopt())

    def _end_postcopy(self, effect: e.EndPostcopy) -> None:
        self.postcopy.end()

    def _abandon_postcopy(self, effect: e.AbandonPostcopy) -> None:
        self.postcopy.abandon()

    def _publish(self, memory: MemoryMap | None) -> None:
        """Move all started rings over; one that does not lie in the new memory stops until it does again."""
        self._maps.note(memory)
        if self.translation is not None:
            self.memory = memory
            self.translation.set_memory(memory)
            self._start_waiting()
            return
        for index, ring in self.rings.items():
            queue = self.device.queues[index]
            if not queue.started:
                continue
            try:
                if memory is None:
                    raise ValueError("no memory is left")
                queue.set_memory(memory)
            except ValueError as error:
                self.warn(f"{error}; ring {index} stopped until its memory is there again")
                broken = queue.broken is not None
                base = self._stop_queue(index)
                if not broken:  # a ring that its driver has broken waits for the front-end to stop it
                    self.waiting[index] = base
                queue.signal(ring.err_fd)
                self.changed()
        self.memory = memory
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Start the rings whose memory has come."""
        if self.memory is None:
            return
        for index in list(self.waiting):
            ring = replace(self.rings[index], base=self.waiting[index], enabled=self.device.queues[index].enabled)
            try:
                self._start(ring)
            except ValueError as error:  # not all of it is there yet
                if self.translation is not None:
                    self.warn(f"{error}; ring {index} cannot be started")

    # -- rings --

    def _start_ring(self, effect: e.StartRing) -> None:
        if self.inband is None:
            self._start(effect.ring)
            return
        try:
            self._start(self.inband.resolve(effect.ring))
        except BaseException:
            self.inband.forget(effect.ring.index)
            raise

    def _start(self, ring: e.RingConfig) -> None:
        if self.memory is None:
            raise ValueError("no memory table has been set")
        if self.translation is not None and self.translation.lacks(ring):
            self.device.queues[ring.index].set_enabled(ring.enabled)
            self.rings[ring.index] = ring
            self.waiting[ring.index] = ring.base
            return
        self.device.ring_starting(ring.index)
        if self.memory is None:  # a hook that ends the connection
            raise ConnectionClosed("closed by us")
        self.device.queues[ring.index].start(
            self.memory, ring.num, ring.desc, ring.avail, ring.used, ring.base, self.features,
            kick_fd=ring.kick_fd, call_fd=ring.call_fd, err_fd=ring.err_fd, enabled=ring.enabled,
            log=self._active_log(), log_guest_addr=self._log_guest_addr(ring), in_order=self.device.in_order,
            inflight=self.inflight,
            iotlb=None if self.translation is None else self.translation.iotlb, guest_addresses=ring.guest_addresses,
        )  # fmt: skip
        self.rings[ring.index] = ring
        self.waiting.pop(ring.index, None)
        self.changed()

    def _stop_ring(self, effect: e.StopRing) -> int:
        index = effect.index
        base = 0
        try:
            base = self._stop_queue(index, effect.suspend)
        finally:
            if self.inband is not None:
                self.inband.stop(index)
            try:
                self.device.ring_stopped(index)
            finally:
                base = self.waiting.pop(index, base)
                self.rings.pop(index, None)
                if self.translation is not None and not self.rings:
                    self.translation.invalidate(0, LAST)
                self.changed()
        return base

    def _stop_queue(self, index: int, suspend: bool = False) -> int:
        """Stop a queue whatever its device says to that: it must not run on with memory that goes away."""
        queue = self.device.queues[index]
        try:
            if queue.started:
                self.device.ring_stopping(index)
        finally:
            base = int(queue.stop(suspend))
        return base

    def _enable_ring(self, effect: e.EnableRing) -> None:
        self.device.queues[effect.index].set_enabled(effect.enabled)
        self.changed()

    def _set_kick(self, effect: e.SetKick) -> None:
        self.device.queues[effect.index].set_kick(effect.fd)
        self._remember(effect.index, kick_fd=effect.fd)

    def _set_call(self, effect: e.SetCall) -> None:
        self.device.queues[effect.index].set_call(effect.fd)
        self._remember(effect.index, call_fd=effect.fd)

    def _set_err(self, effect: e.SetErr) -> None:
        self.device.queues[effect.index].set_err(effect.fd)
        self._remember(effect.index, err_fd=effect.fd)

    def _remember(self, index: int, **fds: Any) -> None:
        """Keep what a started ring signals by, for the day it starts again with other memory."""
        if index in self.rings:
            self.rings[index] = replace(self.rings[index], **fds)

    def _signal_err(self, effect: e.SignalErr) -> None:
        self.device.queues[effect.index].signal(effect.fd)

    def _kick(self, effect: e.Kick) -> None:
        """A kick that came as a message: a ring that has a kick descriptor all the same gets it anew, and looks."""
        ring = self.rings.get(effect.index)
        if ring is not None and not (self.inband is not None and self.inband.kick(effect.index)):
            self.device.queues[effect.index].set_kick(ring.kick_fd)

    # -- features and log --

    def _set_features(self, effect: e.SetFeatures) -> None:
        if v.has(effect.features, v.VIRTIO_F_ACCESS_PLATFORM):
            self._begin_translation(effect.features)
        else:
            self._end_translation()
        log_changed = (self.features ^ effect.features) >> v.VHOST_F_LOG_ALL & 1
        self.features = effect.features
        self.device.set_features(effect.features)
        if log_changed:
            self._relog()

    def _set_ring_addresses(self, effect: e.SetRingAddresses) -> None:
        ring = self.rings.get(effect.index)
        if ring is not None:
            ring = replace(ring, flags=effect.flags, log_guest_addr=effect.log_guest_addr)
            self.rings[effect.index] = ring
            self._relog_ring(ring)

    def _set_log(self, effect: e.SetLog) -> None:
        self._replace_log(DirtyLog(effect.fd, effect.size, effect.offset))

    def _clear_log(self, effect: e.ClearLog) -> None:
        self._replace_log(None)

    def _replace_log(self, log: DirtyLog | None) -> None:
        old, self.log = self.log, log
        self._relog()
        if old is not None and old.outside:
            self.warn(f"{old.outside} writes lay beyond the dirty log and are not marked; it must cover all memory")

    def _relog(self) -> None:
        for ring in self.rings.values():
            self._relog_ring(ring)

    def _relog_ring(self, ring: e.RingConfig) -> None:
        queue = self.device.queues[ring.index]
        if self.translation is not None and self.translation.lacks(ring):
            queue.unmap()  # nothing is written until it can be logged
            queue.set_log(self._active_log())
            return
        queue.set_log(self._active_log(), self._log_guest_addr(ring))

    def _active_log(self) -> DirtyLog | None:
        return self.log if v.has(self.features, v.VHOST_F_LOG_ALL) else None

    def _log_guest_addr(self, ring: e.RingConfig) -> int | None:
        """Where the used ring is logged, None if it is not; beyond the log nothing is marked, but it must not wrap."""
        if not ring.flags & v.VHOST_VRING_F_LOG:
            return None
        size = 6 + 8 * ring.num
        if ring.log_guest_addr + size > 1 << 64:
            where = f"ring {ring.index}: log_guest_addr {ring.log_guest_addr:#x}"
            raise ValueError(f"{where} + {size} bytes of used ring passes 2^64")
        return ring.log_guest_addr if self.translation is None else self.translation.log_guest_addr(ring)

    # -- an IOMMU --

    def _begin_translation(self, features: int) -> None:
        if self.translation is None:
            self.translation = Translation(self.device.queues, self.rings, self._relog_ring, self.warn)
            self.translation.set_memory(self.memory)
            self.translation_changed(self.translation)
        self.translation.set_features(features)

    def _end_translation(self) -> None:
        if self.translation is not None:
            self.translation_changed(None)
            self.translation.close()
            self.translation = None

    def ask_again(self) -> None:
        """Forget questions that nobody answers; who still waits for a translation asks anew."""
        if self.translation is not None:
            self.translation.expire()
            self._start_waiting()

    def _update_translation(self, effect: e.UpdateTranslation) -> None:
        assert self.translation is not None
        self.translation.update(effect)
        self._start_waiting()

    def _invalidate_translation(self, effect: e.InvalidateTranslation) -> None:
        assert self.translation is not None
        self.translation.invalidate(effect.iova, effect.last)

    # -- in-flight region --

    def _make_inflight(self, effect: e.MakeInflight) -> tuple[int, int]:
        """Make a file that nobody can truncate; it takes memory where it is written to, by whoever uses it."""
        size = inflight_bytes(effect.num_queues, effect.queue_size, effect.packed)
        fd = os.memfd_create("vq-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return fd, size

    def _set_inflight(self, effect: e.SetInflight) -> None:
        shape = (effect.num_queues, effect.queue_size, effect.packed)
        self.inflight = InflightRegion(effect.fd, effect.size, effect.offset, *shape)

    def _clear_inflight(self, effect: e.ClearInflight) -> None:
        self.inflight = None

    # -- the device's own --

    def _set_mtu(self, effect: e.SetMtu) -> None:
        self.device.set_mtu(effect.mtu)

    def _send_rarp(self, effect: e.SendRarp) -> None:
        self.device.send_rarp(effect.mac)
        self.changed()  # a port without a started ring is in no plan, but what it announces must go out

    def _set_status(self, effect: e.SetStatus) -> None:
        self.device.set_status(effect.status)

    def _reset(self, effect: e.ResetDevice) -> None:
        if self.transfer is not None:
            self.transfer.forget()
        self.device.reset()
        # The negotiation outlives a reset, and the session does not pass on a SET_FEATURES that changes nothing.
        self.device.set_features(self.features)

    def _set_backend_channel(self, effect: e.SetBackendChannel) -> None:
        self.channel_given(effect.fd)

    def _read_config(self, effect: e.ConfigRead) -> bytes:
        return self.device.read_config(effect.offset, effect.size)

    def _write_config(self, effect: e.ConfigWrite) -> None:
        self.device.write_config(effect.offset, effect.data, migration=effect.migration)

    def _save_state(self, effect: e.SaveState) -> None:
        with self._refusing():
            state = self.device.save_state()
        self._transfer.save(effect.fd, state)

    def _load_state(self, effect: e.LoadState) -> None:
        self._transfer.load(effect.fd, self._take_state)

    def _take_state(self, state: bytes) -> None:
        if self.rings:
            raise FrontendError("SET_DEVICE_STATE_FD", "device", "running", "a state is loaded while all rings stand")
        with self._refusing():
            self.device.load_state(state)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A device that fails at a state refuses it: what it had to read may be garbage, and the guest goes on."""
        try:
            yield
        except (VqError, OSError):
            raise
        except Exception as error:
            logger.debug("device=%s", self.device.name, exc_info=True)
            raise UsageError(f"device {self.device.name} has failed at its state: {error!r}") from error

    def _check_state(self, effect: e.CheckState) -> bool | None:
        return self._transfer.check()

    @property
    def _transfer(self) -> StateTransfer:
        if self.transfer is None:
            raise UsageError(f"device {self.device.name}: its state cannot be transferred")
        return self.transfer

    def _get_shared_object(self, effect: e.GetSharedObject) -> int | None:
        return self.device.shared_object(effect.uuid)

    _table: ClassVar[dict[type, Callable[..., Any]]] = {
        e.SetMemory: _set_memory,
        e.AddRegion: _add_region,
        e.AdvisePostcopy: _advise_postcopy,
        e.PrepareMemory: _prepare_memory,
        e.AdoptMemory: _adopt_memory,
        e.EndPostcopy: _end_postcopy,
        e.AbandonPostcopy: _abandon_postcopy,
        e.RemoveRegion: _remove_region,
        e.StartRing: _start_ring,
        e.StopRing: _stop_ring,
        e.EnableRing: _enable_ring,
        e.SetKick: _set_kick,
        e.SetCall: _set_call,
        e.SetErr: _set_err,
        e.SignalErr: _signal_err,
        e.Kick: _kick,
        e.SetFeatures: _set_features,
        e.SetRingAddresses: _set_ring_addresses,
        e.SetLog: _set_log,
        e.ClearLog: _clear_log,
        e.MakeInflight: _make_inflight,
        e.SetInflight: _set_inflight,
        e.ClearInflight: _clear_inflight,
        e.SetMtu: _set_mtu,
        e.SendRarp: _send_rarp,
        e.SetStatus: _set_status,
        e.ResetDevice: _reset,
        e.UpdateTranslation: _update_translation,
        e.InvalidateTranslation: _invalidate_translation,
        e.SetBackendChannel: _set_backend_channel,
        e.ConfigRead: _read_config,
        e.ConfigWrite: _write_config,
        e.SaveState: _save_state,
        e.LoadState: _load_state,
        e.CheckState: _check_state,
        e.GetSharedObject: _get_shared_object,
    }
