"""The back-end channel: what a device asks of the front-end by itself, and the rules of when it may.

A device has the channel as `Device.channel`. Without a connection, without the socket of SET_BACKEND_REQ_FD, or without
the feature that a request needs, nothing can be sent, and `send` says so. While all rings stand nothing may be sent:
then it waits until one is started.

Spec: vhost-user, "Back-end message types", "Ring states" (suspended).
"""

from __future__ import annotations

import select
import struct
from collections.abc import Callable, Sequence
from typing import Any

from vq import virtio as v
from vq.errors import ConnectionClosed, ResourceError, UsageError, VqError
from vq.message import BACKEND_REQUESTS, BackendRequest, Fds, fds_allowed
from vq.offer import PAGE_BYTES
from vq.payload import VRING_NOFD_MASK, Mmap, VringArea
from vq.request_queue import Done, RequestQueue
from vq.session_state import SessionState
from vq.shared_objects import SharedObjects

__all__ = ["BackendChannel"]


class BackendChannel:
    """The channel of one back-end, for whatever connection there is.

    Parameters
    ----------
    epoll
        Where the channel registers what it waits for.
    warn
        Called with a text for people.

    Attributes
    ----------
    objects : SharedObjects
        What the device shares with other devices.
    broken : bool
        The front-end has spoilt the channel of this connection, and brought no other since.

    Notes
    -----
    Nothing here waits. Threading: one control thread; callbacks run in it.
    """

    def __init__(self, epoll: select.epoll, warn: Callable[[str], None]) -> None:
        self._epoll = epoll
        self.warn = warn
        self.objects = SharedObjects(self)
        self._session: SessionState | None = None
        self._queue: RequestQueue | None = None
        self._config_due = False  # the configuration space has changed, and the front-end has not been told
        self.broken = False
        self.closed = False

    # -- the connection --

    def begin(self, session: SessionState) -> None:
        """There is a connection."""
        self._session = session
        self.broken = False
        self.objects.begin()

    def give(self, fd: int) -> None:
        """The front-end has sent a socket, which stays the session's; it replaces the one before.

        Raises
        ------
        OSError
            There is no room for more descriptors.
        """
        queue = RequestQueue(fd, self._held)
        self._drop(ResourceError("the front-end has replaced the back-end channel"))
        self._queue = queue
        self.broken = False
        self._epoll.register(queue.fileno(), select.EPOLLIN)

    def end(self) -> None:
        """The connection is over; everything that waits fails."""
        self._session = None
        self._config_due = False
        self._drop(ResourceError("the connection has ended"))

    def close(self) -> None:
        """Forget what the device shares; the back-end is over."""
        self.closed = True
        self.objects.close()

    def fileno(self) -> int:
        """What is registered in the epoll now; -1 for nothing."""
        return -1 if self._queue is None else self._queue.fileno()

    def dispatch(self) -> None:
        """Serve the socket, which is ready; never raises for what the front-end did."""
        if self._queue is not None:
            try:
                self._queue.dispatch()
            except (VqError, OSError) as error:
                self._give_up(error)
            self.flush()  # there may be room now for what is due

    def flush(self) -> None:
        """Say what can be said now: a ring may have been started, a feature negotiated."""
        session = self._session
        if session is None or self._queue is None or session.suspended:
            return
        if self._config_due:
            self._config_due = False
            if self.can_send(BackendRequest.CONFIG_CHANGE_MSG):
                self._tell_config()
        self.objects.announce()
        try:
            if self._queue is not None:
                self._queue.flush()
        except (VqError, OSError) as error:
            self._give_up(error)

    def _held(self) -> bool:
        return self._session is None or self._session.suspended

    def _give_up(self, error: VqError | OSError) -> None:
        """Go on without the channel; with an IOMMU the back-end ends the connection (`broken`)."""
        reason = str(error)
        if isinstance(error, ConnectionClosed):
            reason = "the front-end closed the back-end channel, which lasts as long as the connection"
        self.warn(f"back-end channel given up: {reason}")
        self.broken = True
        self._drop(ResourceError(f"the back-end channel is broken: {reason}"), hang_up=True)

    def _drop(self, reason: VqError, *, hang_up: bool = False) -> None:
        queue, self._queue = self._queue, None
        if queue is not None:
            self._epoll.unregister(queue.fileno())
            queue.close(reason, hang_up=hang_up)

    # -- requests --

    def refusal(self, request: BackendRequest, *, with_fds: bool = False) -> VqError | None:
        """Tell why a request could not be sent now.

        Parameters
        ----------
        request
            Which.
        with_fds
            Whether descriptors go along.

        Returns
        -------
        VqError or None
            None: it can, though it may have to wait for a ring to be started.
        """
        session = self._session
        if session is None or self._queue is None:
            reason = "the front-end has given no back-end channel" if session is not None else "nobody is connected"
            return ResourceError(f"{request.name}: {reason}")
        rule = BACKEND_REQUESTS[request]
        protocol = [v.VHOST_USER_PROTOCOL_F_BACKEND_REQ]
        protocol += [] if rule.gate.protocol is None else [rule.gate.protocol]
        protocol += [v.VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD] if with_fds or rule.fds is Fds.ONE else []
        missing = [v.protocol_feature_names(v.mask(bit))[0] for bit in protocol if not session.negotiated(bit)]
        if rule.gate.offered is not None and not v.has(session.features, rule.gate.offered):
            missing += v.feature_names(v.mask(rule.gate.offered))
        return UsageError(f"{request.name}: {', '.join(missing)} not negotiated") if missing else None

    def can_send(self, request: BackendRequest, *, with_fds: bool = False) -> bool:
        """Whether `send` would take this request now."""
        return self.refusal(request, with_fds=with_fds) is None

    def send(
        self,
        request: BackendRequest,
        payload: Any = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        done: Done | None = None,
    ) -> None:
        """Send a request, as soon as it may be sent; does not wait.

        Parameters
        ----------
        request
            Which.
        payload
            Value for its codec (`vq.payload`), None for none.
        fds
            Descriptors to go along; they stay the caller's, who may close them at once.
        need_reply
            Ask for an ack. Where REPLY_ACK was not negotiated none can be asked for.
        done
            Called once, with a `VqError` or None, and with the descriptor of a SHARED_OBJECT_LOOKUP or None: when the
            answer has come, or when a request that is not answered has been sent.

        Raises
        ------
        UsageError
            A feature that the request needs was not negotiated, or payload or descriptors do not suit it.
        ResourceError
            There is no connection, no channel, or too much waits already.
        """
        refusal = self.refusal(request, with_fds=bool(fds))
        if refusal is not None:
            raise refusal
        assert self._session is not None
        assert self._queue is not None
        rule = BACKEND_REQUESTS[request]
        try:
            rule.payload.encode(payload)
        except (struct.error, TypeError, ValueError) as error:
            raise UsageError(f"{request.name}: {payload!r} is no payload of it: {error}") from error
        allowed = fds_allowed(rule.fds, payload)
        if len(fds) not in allowed:
            raise UsageError(f"{request.name}: {len(fds)} descriptors; it takes {allowed.start}")
        need_reply = need_reply and self._session.negotiated(v.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        try:
            self._queue.send(request, payload, fds, need_reply=need_reply, done=done)
        except OSError as error:
            raise ResourceError(f"{request.name} cannot be sent", errno=error.errno or 0) from error

    def forget(self, request: BackendRequest, payload: Any) -> None:
        """Do not send what waits and is out of date; what somebody waits for stays."""
        if self._queue is not None:
            self._queue.forget(request, payload)

    def config_changed(self) -> None:
        """Say that the configuration space has changed, as soon as the front-end can be told.

        While all rings stand it is told nothing; nor is one that has negotiated no way of telling it.
        """
        self._config_due = self._session is not None
        self.flush()

    def _tell_config(self) -> None:
        assert self._queue is not None
        need_reply = not self._queue.overdue  # whoever has not answered so far shall know at least
        try:
            self.send(BackendRequest.CONFIG_CHANGE_MSG, need_reply=need_reply, done=self._config_told)
        except ResourceError:  # too much waits for a front-end that reads nothing
            self._config_due = True

    def _config_told(self, failure: VqError | None, _fd: int | None) -> None:
        if isinstance(failure, ResourceError):  # it has not been sent, or nobody knows
            self._config_due = self._session is not None
            self.flush()
        elif failure is not None:
            self.warn(f"{failure}; it may go on with the old values")

    def set_host_notifier(
        self, queue: int, fd: int | None, offset: int = 0, size: int = PAGE_BYTES, *, done: Done | None = None
    ) -> None:
        """Let the driver kick a queue by a write to memory, a page of a device for instance.

        Parameters
        ----------
        queue
            Index of the virtqueue.
        fd
            What the page is mapped from; None takes the notifier away.
        offset, size
            Where it lies there; exactly one page.
        done
            As for `send`.

        Raises
        ------
        UsageError
            The place is not a page; or as `send`.
        ResourceError
            As `send`.
        """
        if self._session is not None and not 0 <= queue < len(self._session.rings):
            raise UsageError(f"host notifier: queue {queue} does not exist")
        if size != PAGE_BYTES or offset % PAGE_BYTES:
            raise UsageError(f"host notifier: {size} bytes at {offset}; it must be a page of {PAGE_BYTES} bytes")
        area = VringArea(queue if fd is not None else queue | VRING_NOFD_MASK, size, offset)
        request = BackendRequest.VRING_HOST_NOTIFIER_MSG
        self.send(request, area, [] if fd is None else [fd], need_reply=True, done=done)

    def map_shmem(
        self,
        shmid: int,
        fd: int,
        *,
        fd_offset: int = 0,
        shm_offset: int,
        length: int,
        writable: bool = False,
        done: Done | None = None,
    ) -> None:
        """Map a part of a file into a shared memory region of the device, where the driver sees it.

        Parameters
        ----------
        shmid
            Region, of those of the offer.
        fd, fd_offset
            The file, and where in it.
        shm_offset, length
            Where in the region, in bytes. Nothing else may be mapped there.
        writable
            The driver may write.
        done
            As for `send`.

        Raises
        ------
        UsageError
            The place is not inside a region, or not made of pages; or as `send`.
        ResourceError
            As `send`.
        """
        self._check_shmem(shmid, shm_offset, length, fd_offset)
        part = Mmap(shmid, fd_offset, shm_offset, length, int(writable))
        self.send(BackendRequest.SHMEM_MAP, part, [fd], need_reply=True, done=done)

    def unmap_shmem(self, shmid: int, shm_offset: int, length: int, *, done: Done | None = None) -> None:
        """Take away what `map_shmem` has mapped, all of it; raises as that."""
        self._check_shmem(shmid, shm_offset, length, 0)
        part = Mmap(shmid, 0, shm_offset, length, 0)
        self.send(BackendRequest.SHMEM_UNMAP, part, need_reply=True, done=done)

    def _check_shmem(self, shmid: int, shm_offset: int, length: int, fd_offset: int) -> None:
        size = dict(self._session.offer.shmem).get(shmid, 0) if self._session is not None else 0
        if length <= 0 or (shm_offset | length | fd_offset) % PAGE_BYTES or fd_offset < 0:
            raise UsageError(f"shmem: {length} bytes at {shm_offset}, from {fd_offset}; only whole pages can be mapped")
        if not 0 <= shm_offset <= size - length:
            raise UsageError(f"shmem: {length} bytes at {shm_offset} of region {shmid}, which has {size}")
