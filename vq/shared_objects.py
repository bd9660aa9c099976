"""Objects (dma-bufs, mostly) that a device shares with other devices of the guest, and those of others that it uses.

The device keeps the descriptors; the front-end keeps who has which, and asks the owner when somebody looks one up. What
is shared is told to each front-end that comes, since none knows what the one before was told.

Spec: vhost-user, VHOST_USER_PROTOCOL_F_SHARED_OBJECT; VIRTIO 1.3, 2.12 (exporting objects).
"""

from __future__ import annotations

import os
from typing import Protocol
from uuid import UUID

from vq.errors import UsageError, VqError
from vq.message import BackendRequest
from vq.request_queue import Done

__all__ = ["SharedObjects"]

NIL = UUID(int=0)


class Channel(Protocol):
    """What of a `vq.backend_channel.BackendChannel` is needed here."""

    def can_send(self, request: BackendRequest) -> bool: ...

    def send(
        self, request: BackendRequest, payload: bytes, *, need_reply: bool = False, done: Done | None = None
    ) -> None: ...

    def warn(self, message: str) -> None: ...


class SharedObjects:
    """The objects of one back-end.

    Parameters
    ----------
    channel
        What the front-end is told by.

    Notes
    -----
    Threading: one control thread.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._fds: dict[UUID, int] = {}
        self._told: set[UUID] = set()

    def __len__(self) -> int:
        return len(self._fds)

    def share(self, uuid: UUID, fd: int) -> None:
        """Share an object under a UUID; the descriptor stays the caller's.

        Raises
        ------
        UsageError
            The UUID is nil, or in use.
        OSError
            There is no room for another descriptor.
        """
        if uuid == NIL or uuid in self._fds:
            raise UsageError(f"shared object {uuid}: {'nil is no UUID' if uuid == NIL else 'it is shared already'}")
        self._fds[uuid] = os.dup(fd)
        self.announce()

    def withdraw(self, uuid: UUID) -> None:
        """Share an object no longer; who has its descriptor already keeps it.

        Raises
        ------
        UsageError
            It is not shared.
        """
        if uuid not in self._fds:
            raise UsageError(f"shared object {uuid}: it is not shared")
        os.close(self._fds.pop(uuid))
        if uuid in self._told:
            self._told.discard(uuid)
            self._tell(BackendRequest.SHARED_OBJECT_REMOVE, uuid)

    def look_up(self, uuid: UUID, done: Done) -> None:
        """Ask for an object of another device.

        Parameters
        ----------
        uuid
            Which.
        done
            Called with a failure or None, and with the descriptor or None; it is the callee's then.

        Raises
        ------
        VqError
            It cannot be asked for now; see `BackendChannel.send`.
        """
        self._channel.send(BackendRequest.SHARED_OBJECT_LOOKUP, uuid.bytes, done=done)

    def find(self, uuid: bytes) -> int | None:
        """The descriptor of an object of ours, which stays ours; None if there is none."""
        return self._fds.get(UUID(bytes=uuid))

    def begin(self) -> None:
        """There is another front-end, which knows nothing."""
        self._told.clear()

    def announce(self) -> None:
        """Tell the front-end what it does not know, if it can be told."""
        if self._channel.can_send(BackendRequest.SHARED_OBJECT_ADD):
            for uuid in [uuid for uuid in self._fds if uuid not in self._told]:
                self._told.add(uuid)
                self._tell(BackendRequest.SHARED_OBJECT_ADD, uuid)

    def _tell(self, request: BackendRequest, uuid: UUID) -> None:
        try:
            self._channel.send(request, uuid.bytes, need_reply=True, done=self._told_of)
        except VqError as error:
            self._channel.warn(f"shared object {uuid}: {error}")

    def _told_of(self, failure: VqError | None, _fd: int | None) -> None:
        if failure is not None:
            self._channel.warn(f"shared object: {failure}")

    def close(self) -> None:
        """Forget all; may be called twice."""
        while self._fds:
            os.close(self._fds.popitem()[1])
