"""A lock on the file of a disk while a guest runs on it: two guests that write to one file system destroy it.

The locks are those of QEMU, so that programs of QEMU and ours keep out of each other's way: a shared lock on one byte
for each thing that is done with the file, and on another for each thing that nobody else may do meanwhile. They belong
to the open file (OFD), and end with the process whatever becomes of it.

A disk is locked from the start of its first ring to the stop of its last one. So both ends of a live migration may have
the file open, and only one has it locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

__all__ = ["DiskLock"]

DOES: Final = 100  # first byte of what is done
REFUSES: Final = 200  # first byte of what nobody else may do
READ: Final = 0
WRITE: Final = 1
FLOCK: Final = struct.Struct("@hhqqi4x")  # type, whence, start, length, pid
NO_LOCKS: Final = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DiskLock:
    """The locks of one open file.

    Parameters
    ----------
    fd
        Of the file; stays the caller's.
    read_only
        Whether it is only read.
    """

    def __init__(self, fd: int, *, read_only: bool) -> None:
        self._fd = fd
        self._bytes = [DOES + READ, *([] if read_only else [DOES + WRITE]), REFUSES + WRITE]
        # What others refuse of that which we do, and what others do of that which we refuse.
        self._conflicts = [REFUSES + READ, *([] if read_only else [REFUSES + WRITE]), DOES + WRITE]
        self.held = False

    def hold(self) -> bool:
        """Take the locks; True if nobody else is in the way.

        Raises
        ------
        OSError
            The file system has no such locks.
        """
        if self.held:
            return True
        for byte in self._bytes:
            self._ask(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        # Looked at after ours are there: of two that come at once at least one sees the other.
        self.held = not any(
            self._ask(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK for byte in self._conflicts
        )
        if not self.held:
            self._release()
        return self.held

    def release(self) -> None:
        """Let go of the locks; may be called twice."""
        if self.held:
            self.held = False
            self._release()

    def _release(self) -> None:
        for byte in self._bytes:
            self._ask(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)

    def _ask(self, command: int, kind: int, byte: int) -> int:
        """One call of the kernel; the kind of lock that it answers with."""
        answer = fcntl.fcntl(self._fd, command, FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        return int(FLOCK.unpack(answer)[0])
