"""In-band notifications: kicks, calls and errors of rings that travel as messages, without a descriptor.

The data plane knows nothing of this. It has eventfds for all three, which are ours then; what it signals is turned into
VRING_CALL and VRING_ERR by the control thread. Many calls that come together become one message, as with an eventfd.

Spec: vhost-user, VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from dataclasses import replace
from typing import Final

from vq.backend_channel import BackendChannel
from vq.effects import INBAND, RingConfig
from vq.errors import VqError
from vq.message import BackendRequest
from vq.payload import VringState

__all__ = ["Inband"]

KICK: Final = 0  # the third kind of signal, which goes the other way


class Inband:
    """The eventfds of the rings of one back-end whose notifications are messages.

    Parameters
    ----------
    epoll
        Where the eventfds that the data plane signals are registered.
    channel
        What calls and errors are sent by.

    Notes
    -----
    Threading: one control thread.
    """

    def __init__(self, epoll: select.epoll, channel: BackendChannel) -> None:
        self._epoll = epoll
        self._channel = channel
        self._fds: dict[int, tuple[int, int]] = {}  # ring and request (or KICK) of each

    def resolve(self, ring: RingConfig) -> RingConfig:
        """Put eventfds of ours where a ring says INBAND.

        Raises
        ------
        OSError
            There is no room for more descriptors.
        """
        try:
            if ring.kick_fd == INBAND:
                ring = replace(ring, kick_fd=self._make(ring.index, KICK))
            if ring.call_fd == INBAND:
                ring = replace(ring, call_fd=self._make(ring.index, BackendRequest.VRING_CALL))
            if ring.err_fd == INBAND:
                ring = replace(ring, err_fd=self._make(ring.index, BackendRequest.VRING_ERR))
        except OSError:
            self.forget(ring.index)
            raise
        return ring

    def _make(self, ring: int, request: int) -> int:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._fds[fd] = (ring, request)
        if request != KICK:
            self._epoll.register(fd, select.EPOLLIN)
        return fd

    def kick(self, ring: int) -> bool:
        """Kick a ring, if its kicks are messages."""
        fds = [fd for fd, what in self._fds.items() if what == (ring, KICK)]
        for fd in fds:
            os.eventfd_write(fd, 1)
        return bool(fds)

    def dispatch(self, fd: int) -> bool:
        """Tell the front-end what the data plane has signalled by an eventfd; False: it is none of these."""
        if fd not in self._fds:
            return False
        ring, request = self._fds[fd]
        with suppress(BlockingIOError):
            os.eventfd_read(fd)
            with suppress(VqError):  # it has given no channel, or spoilt it: then nobody hears
                self._channel.send(BackendRequest(request), VringState(ring, 0))
        return True

    def stop(self, ring: int) -> None:
        """Say what was signalled last, and nothing after that: the data plane has let go of the ring."""
        for fd in [fd for fd, what in self._fds.items() if what[0] == ring and what[1] != KICK]:
            self.dispatch(fd)
        self.forget(ring)
        # What the front-end has not taken so far it must not hear when the ring stands.
        for request in (BackendRequest.VRING_CALL, BackendRequest.VRING_ERR):
            self._channel.forget(request, VringState(ring, 0))

    def forget(self, ring: int) -> None:
        """Close the eventfds of a ring."""
        for fd in [fd for fd, what in self._fds.items() if what[0] == ring]:
            if self._fds.pop(fd)[1] != KICK:
                self._epoll.unregister(fd)
            os.close(fd)

    def close(self) -> None:
        """Close all."""
        for ring in {ring for ring, _ in self._fds.values()}:
            self.forget(ring)
