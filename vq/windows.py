"""What a front-end keeps of the files that a back-end sends: shared memory regions, host notifiers, shared objects.

For the front-end role, which stands in for the VMM here: each class has handlers for `RequestServer`, has mapped what
comes, and believes nothing. A file is mapped only as far as it reaches.

Spec: vhost-user, "Back-end message types"; a front-end's duties.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from vq.errors import BackendError
from vq.message import BackendRequest, Message
from vq.payload import VRING_INDEX_MASK, VRING_NOFD_MASK, Mmap, VringArea
from vq.request_server import Handler

if TYPE_CHECKING:
    from vq.frontend import Frontend

__all__ = ["NotifierPages", "ObjectDirectory", "ShmemWindows"]

WRITABLE: Final = 1
PAGE: Final = resource.getpagesize()
END: Final = 1 << 63  # files reach no further
PARTS_MAX: Final = 4096  # mapped at once: each takes one of the mappings that a process may have
OBJECTS_MAX: Final = 1024  # that one device shares


class Mapped(Protocol):
    """A part of a file that is mapped."""

    def close(self) -> None:
        """Unmap it."""


# Maps a part of a file, which has been checked to lie inside: descriptor (which is closed afterwards), offset, length,
# writable. `mmap.mmap` will do.
MapFile = Callable[[int, int, int, bool], Mapped]


def _check_file(message: Message, offset: int, length: int) -> None:
    """Check that a part lies inside of the file that came along."""
    if offset % PAGE or offset >= END - length or os.fstat(message.fds[0]).st_size < offset + length:
        limit = f"whole pages of {PAGE} bytes inside the file"
        raise BackendError(message.name, "file", f"{length} bytes at {offset}", limit)


class ShmemWindows:
    """The shared memory regions of a device, as the driver sees them.

    Parameters
    ----------
    sizes
        Size in bytes of each region, by id (`Frontend.get_shmem_config`).
    map_file
        Maps a part of a file.
    """

    def __init__(self, sizes: Mapping[int, int], map_file: MapFile) -> None:
        self._sizes = dict(sizes)
        self._map_file = map_file
        self._parts: dict[tuple[int, int, int], Mapped] = {}  # by region, offset and length

    @property
    def handlers(self) -> dict[int, Handler]:
        """Who serves what."""
        return {BackendRequest.SHMEM_MAP: self._add, BackendRequest.SHMEM_UNMAP: self._remove}

    def __len__(self) -> int:
        return len(self._parts)

    def _add(self, message: Message) -> None:
        part: Mmap = message.payload
        size = self._sizes.get(part.shmid, 0)
        if part.flags & ~WRITABLE:
            raise BackendError(message.name, "flags", f"{part.flags:#x}", "only bit 0 has a meaning")
        if part.len == 0 or (part.len | part.shm_offset) % PAGE or part.len > size or part.shm_offset > size - part.len:
            value = f"{part.len} bytes at {part.shm_offset}"
            raise BackendError(message.name, f"region {part.shmid}", value, f"whole pages inside of {size} bytes")
        for shmid, offset, length in self._parts:
            if shmid == part.shmid and part.shm_offset < offset + length and offset < part.shm_offset + part.len:
                value = f"{part.len} bytes at {part.shm_offset}"
                limit = f"{length} bytes at {offset} are mapped already"
                raise BackendError(message.name, f"region {shmid}", value, limit)
        if len(self._parts) >= PARTS_MAX:
            raise BackendError(message.name, "mappings", len(self._parts) + 1, f"at most {PARTS_MAX} at once")
        _check_file(message, part.fd_offset, part.len)
        mapped = self._map_file(message.fds[0], part.fd_offset, part.len, bool(part.flags & WRITABLE))
        self._parts[part.shmid, part.shm_offset, part.len] = mapped

    def _remove(self, message: Message) -> None:
        part: Mmap = message.payload
        mapped = self._parts.pop((part.shmid, part.shm_offset, part.len), None)
        if mapped is None:
            value = f"{part.len} bytes at {part.shm_offset}"
            raise BackendError(message.name, f"region {part.shmid}", value, "no mapping is there with this size")
        mapped.close()

    def part(self, shmid: int, shm_offset: int) -> Mapped:
        """What is mapped from this place on; KeyError if nothing is."""
        return next(part for (i, at, _), part in self._parts.items() if (i, at) == (shmid, shm_offset))

    def close(self) -> None:
        """Drop all mappings: the device was reset, or the connection has ended."""
        while self._parts:
            self._parts.popitem()[1].close()


class NotifierPages:
    """The host notifiers of a device.

    Parameters
    ----------
    queues
        Number of virtqueues.
    map_file
        Maps a part of a file.

    Attributes
    ----------
    pages : dict
        What is mapped, by queue.
    """

    def __init__(self, queues: int, map_file: MapFile) -> None:
        self._queues = queues
        self._map_file = map_file
        self.pages: dict[int, Mapped] = {}

    @property
    def handlers(self) -> dict[int, Handler]:
        """Who serves what."""
        return {BackendRequest.VRING_HOST_NOTIFIER_MSG: self._set}

    def _set(self, message: Message) -> None:
        area: VringArea = message.payload
        queue = area.word & VRING_INDEX_MASK
        if queue >= self._queues:
            raise BackendError(message.name, "queue", queue, f"there are {self._queues}")
        page = None
        if not area.word & VRING_NOFD_MASK:
            if area.size != PAGE:
                raise BackendError(message.name, "size", area.size, f"a notifier is a page of {PAGE} bytes")
            _check_file(message, area.offset, PAGE)
            page = self._map_file(message.fds[0], area.offset, PAGE, True)
        old = self.pages.pop(queue, None)
        if old is not None:
            old.close()
        if page is not None:
            self.pages[queue] = page

    def close(self) -> None:
        """Drop all."""
        while self.pages:
            self.pages.popitem()[1].close()


class ObjectDirectory:
    """Which device shares which object, for all devices of a guest."""

    def __init__(self) -> None:
        self.owners: dict[UUID, Frontend] = {}

    def handlers(self, frontend: Frontend) -> dict[int, Handler]:
        """Who serves what for the back-end behind a front-end."""

        def uuid_of(message: Message) -> UUID:
            uuid = UUID(bytes=message.payload)
            if not uuid.int:
                raise BackendError(message.name, "uuid", uuid, "nil is no UUID")
            return uuid

        def add(message: Message) -> None:
            uuid = uuid_of(message)
            if uuid in self.owners:
                raise BackendError(message.name, "uuid", uuid, "it is shared already")
            shared = sum(owner is frontend for owner in self.owners.values())
            if shared >= OBJECTS_MAX:
                raise BackendError(message.name, "objects", shared + 1, f"a device shares at most {OBJECTS_MAX}")
            self.owners[uuid] = frontend

        def remove(message: Message) -> None:
            uuid = uuid_of(message)
            if self.owners.get(uuid) is not frontend:
                raise BackendError(message.name, "uuid", uuid, "only who shares an object can remove it")
            del self.owners[uuid]

        def look_up(message: Message) -> int | None:
            owner = self.owners.get(uuid_of(message))
            return None if owner is None else owner.get_shared_object(uuid_of(message))

        served: dict[int, Any] = {
            BackendRequest.SHARED_OBJECT_ADD: add,
            BackendRequest.SHARED_OBJECT_REMOVE: remove,
            BackendRequest.SHARED_OBJECT_LOOKUP: look_up,
        }
        return served

    def forget(self, frontend: Frontend) -> None:
        """A connection has ended: what its back-end shared is gone."""
        self.owners = {uuid: owner for uuid, owner in self.owners.items() if owner is not frontend}
