"""A chain as files: what the driver has sent to read, the room for the answer to write."""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING

from vq_core.device_chain import DeviceChain

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ChainReader", "ChainWriter"]


class _ChainFile(io.RawIOBase):
    """A place in a part of a chain."""

    def __init__(self, chain: DeviceChain, length: int) -> None:
        super().__init__()
        self._chain = chain
        self._length = length
        self._place = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise ValueError(f"a place before the beginning: {origin + offset}")
        self._place = origin + offset
        return self._place


class ChainReader(_ChainFile):
    """What the driver has sent, as a binary file: for parsers that want one.

    Parameters
    ----------
    chain
        It must not be completed while this is used; ValueError otherwise.
    """

    def __init__(self, chain: DeviceChain) -> None:
        super().__init__(chain, chain.readable_bytes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Copy bytes from the place on; how many, 0 at the end.

        Raises
        ------
        ValueError
            The chain is completed.
        """
        target = memoryview(buffer).cast("B")
        data = self._chain.read_at(self._place, len(target))
        target[: len(data)] = data
        self._place += len(data)
        return len(data)


class ChainWriter(_ChainFile):
    """The room for an answer, as a binary file; `chain.complete(file.tell())` when all is written.

    Parameters
    ----------
    chain
        It must not be completed while this is used; ValueError otherwise.

    Notes
    -----
    At the end of the room less is written than was given, as to a file on a full disk: `write` tells how much, and
    raises OSError (ENOSPC) where nothing fits.
    """

    def __init__(self, chain: DeviceChain) -> None:
        super().__init__(chain, chain.writable_bytes)

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        """Write bytes from the place on; how many there was room for.

        Raises
        ------
        OSError
            ENOSPC: there is no more room.
        ValueError
            The chain is completed.
        """
        source = memoryview(data).cast("B")
        part = source[: max(0, self._length - self._place)]
        if not len(part):
            if len(source):
                raise OSError(errno.ENOSPC, "the chain has room for no more")
            return 0
        written = self._chain.write_at(self._place, part)
        self._place += written
        return written
