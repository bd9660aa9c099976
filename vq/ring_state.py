"""One virtqueue as the session knows it: what the front-end has said so far, and whether that suffices to start.

A ring has two independent flags, started and enabled, both off at first. Its parts (entries, addresses, base, fds) may
come in any order and before the features, so the checks that depend on the layout are made when a part arrives, as far
as they are possible then, and all of them again at the start.

Spec: vhost-user, "Ring states"; VIRTIO 1.3, 2.7 and 2.8.
"""

from __future__ import annotations

import fcntl
import os
from typing import Literal

from vq import virtio as v
from vq.effects import INBAND, RingConfig
from vq.errors import FrontendError
from vq.payload import VringAddr
from vq.reaper import close_fd

FdKind = Literal["kick_fd", "call_fd", "err_fd"]


class RingState:
    """State of one ring; owns its three fds."""

    __slots__ = ("addr", "base", "by_message", "call_fd", "enabled", "err_fd", "index", "kick_fd", "num", "started")

    def __init__(self, index: int) -> None:
        self.index = index
        self.call_fd: int | None = None
        self.err_fd: int | None = None
        self.kick_fd: int | None = None
        self.started = False
        self.enabled = False
        # Nothing has been said about a call fd. QEMU acknowledges in-band notifications like all that it is offered,
        # does without them, and drops each call fd at a stop, to bring the next only after the start.
        self.by_message = True
        self.forget_layout()

    def forget_layout(self) -> None:
        """Go back to a ring of which neither entries nor addresses nor base are known."""
        self.num = 0
        self.base = 0
        self.addr: VringAddr | None = None

    def replace_fd(self, kind: FdKind, fd: int | None) -> None:
        """Take over an fd and close the one before; the data plane must have let go of that."""
        setattr(self, kind, replace_fd(getattr(self, kind), fd))

    def close_fds(self) -> None:
        """Close all fds of the ring."""
        self.replace_fd("kick_fd", None)
        self.replace_fd("call_fd", None)
        self.replace_fd("err_fd", None)

    def config(self, request: str, features: int, kick_fd: int | None, *, inband: bool = False) -> RingConfig:
        """Put together what the data plane needs to start the ring.

        Parameters
        ----------
        request
            Name of the message that starts it, for the error.
        features
            Acknowledged features; they decide the layout.
        kick_fd
            The kick fd to start with, which the ring need not own yet.
        inband
            In-band notifications were negotiated.

        Raises
        ------
        FrontendError
            A part is missing or does not suit the layout; the ring stays stopped.
        """
        packed = v.has(features, v.VIRTIO_F_RING_PACKED)
        where = f"ring {self.index}: "
        if self.num == 0:
            raise FrontendError(request, where + "num", "not set", "SET_VRING_NUM must come before the kick fd")
        if self.addr is None:
            raise FrontendError(request, where + "addresses", "not set", "SET_VRING_ADDR must come before the kick fd")
        check_num(request, self.index, self.num, packed)
        check_alignment(request, self.addr, packed)
        low = self.base & 0xFFFF
        if packed:
            position = low & 0x7FFF
            if position >= self.num:
                raise FrontendError(request, where + "base", position, f"the ring has {self.num} entries")
            # Without an in-flight region the used side stands where the available side does. The upper half that came
            # is ignored: virtio-user leaves it 0.
            base = low << 16 | low
        else:
            base = low
        return RingConfig(
            index=self.index,
            num=self.num,
            desc=self.addr.desc,
            avail=self.addr.avail,
            used=self.addr.used,
            log_guest_addr=self.addr.log_guest_addr,
            flags=self.addr.flags & v.VHOST_VRING_F_LOG,
            base=base,
            kick_fd=kick_fd,
            call_fd=self._output(self.call_fd, inband),
            err_fd=self._output(self.err_fd, inband),
            enabled=self.enabled,
            packed=packed,
        )

    def _output(self, fd: int | None, inband: bool) -> int | None:
        return INBAND if fd is None and inband and self.by_message else fd


def replace_fd(old: int | None, new: int | None) -> int | None:
    """Close the old fd and give back the new one."""
    if old is not None:
        close_fd(old)
    return new


def check_num(request: str, index: int, num: int, packed: bool | None) -> None:
    """Check the number of entries; `packed` is None as long as the layout is not known.

    Spec: VIRTIO 1.3, 2.7 (a power of two) and 2.8 (any number).
    """
    if not 1 <= num <= v.VIRTQ_SIZE_MAX:
        raise FrontendError(request, f"ring {index}: num", num, f"a ring has 1 to {v.VIRTQ_SIZE_MAX} entries")
    if packed is False and num & (num - 1):
        raise FrontendError(request, f"ring {index}: num", num, "a split ring needs a power of two")


def check_alignment(request: str, addr: VringAddr, packed: bool | None) -> None:
    """Check the alignment of the three parts; the weaker demand of the split layout as long as the layout is unknown.

    Spec: VIRTIO 1.3, 2.7 and 2.8.10.
    """
    event = 4 if packed else 2
    for part, address, alignment in (("desc", addr.desc, 16), ("avail", addr.avail, event), ("used", addr.used, 4)):
        if address % alignment:
            field = f"ring {addr.ring}: {part}"
            raise FrontendError(request, field, f"{address:#x}", f"it must be aligned to {alignment} bytes")


def prepare_signal_fd(request: str, fd: int, *, write: bool) -> None:
    """Check that an fd can serve as kick (read) or call and err (write) fd, and see that it never holds us up.

    eventfds, pipes and sockets pass; of what kind a socket to write to must be is the data plane's affair. Whatever
    lies in a file system is refused without a look at it: its server may be the front-end. The wrong end of a pipe
    would never signal anything.

    Raises
    ------
    FrontendError
        The fd is of no use here.
    """
    what = "call or err fd" if write else "kick fd"
    kind = os.readlink(f"/proc/self/fd/{fd}")
    pipe = kind.startswith("pipe:[")
    if kind != "anon_inode:[eventfd]" and not pipe and not kind.startswith("socket:["):
        limit = "send an eventfd, a pipe or a socket"
        raise FrontendError(request, what, f"no eventfd ({kind.partition(':')[0]})", limit)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_ACCMODE == (os.O_RDONLY if write else os.O_WRONLY):
        raise FrontendError(request, what, "open the wrong way", f"it must be {'writable' if write else 'readable'}")
    if write and pipe:
        # O_NONBLOCK belongs to the open file, which the front-end has too and may change at any time. So the pipe is
        # opened anew, for us alone. (An eventfd cannot be; vq_core.notify signals it without ever waiting.)
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.dup2(own, fd, inheritable=False)
        os.close(own)
    elif not flags & os.O_NONBLOCK:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
