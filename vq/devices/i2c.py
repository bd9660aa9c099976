"""The I2C adapter (VIRTIO 1.3, 5.15): chips that are Python objects, on a bus of the guest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final, Protocol

from vq.device import Device
from vq.virtio import DeviceId
from vq_core.device_chain import DeviceChain
from vq_core.device_queue import DeviceQueue

__all__ = ["Chip", "Eeprom", "I2cDevice"]

logger = logging.getLogger(__name__)

F_ZERO_LENGTH_REQUEST: Final = 0
HEADER: Final = 8  # le16 addr, le16 padding, le32 flags
FAIL_NEXT: Final = 1
READ: Final = 2
OK, ERR = b"\0", b"\1"


class Chip(Protocol):
    """What hangs on the bus; an OSError is no acknowledgement."""

    def write(self, data: bytes) -> None:
        """Take what the guest has written; nothing at all to see whether the chip is there."""

    def read(self, size: int) -> bytes:
        """Give `size` bytes."""


class Eeprom:
    """A memory of 256 bytes: the first byte written is the place, which moves on with each byte; a model to copy."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content.ljust(256, b"\xff")[:256])
        self._place = 0

    def write(self, data: bytes) -> None:
        """Go to a place, and write there what follows."""
        if not data:
            return
        past = max(0, len(data) - 257)  # bytes that others overwrite in turn
        self._place = (data[0] + past) % 256
        kept = data[1 + past :]
        first = kept[: 256 - self._place]
        self.content[self._place : self._place + len(first)] = first
        self.content[: len(kept) - len(first)] = kept[len(first) :]
        self._place = (self._place + len(kept)) % 256

    def read(self, size: int) -> bytes:
        """Read on from the place."""
        turned = bytes(self.content[self._place :] + self.content[: self._place])
        self._place = (self._place + size) % 256
        return (turned * (size // 256 + 1))[:size]


class I2cDevice(Device):
    """An adapter with chips.

    Parameters
    ----------
    chips
        By their address on the bus, 0 to 127.
    """

    device_id = DeviceId.I2C
    queues = ("requestq",)
    features = (F_ZERO_LENGTH_REQUEST,)
    max_bytes = 1 << 16

    def __init__(self, chips: Mapping[int, Chip]) -> None:
        self.chips = dict(chips)
        self._failed = False

    def on_reset(self) -> None:
        self._failed = False

    def handle(self, queue: DeviceQueue) -> None:
        for chain in queue:
            if chain.readable_bytes < HEADER or chain.writable_bytes < 1:
                chain.refuse()
                return
            answer, failed = self._transfer(chain)
            chain.write(answer)
            chain.complete()
            self._failed = failed

    def _transfer(self, chain: DeviceChain) -> tuple[bytes, bool]:
        """Carry a request out: the answer, and whether the next one must fail with it (5.15.6.1)."""
        header = chain.read(HEADER)
        address = int.from_bytes(header[:2], "little") >> 1
        flags = int.from_bytes(header[4:], "little")
        size = chain.writable_bytes - 1
        try:
            if self._failed:
                raise OSError("the request before has failed")
            chip = self.chips.get(address)
            if chip is None:
                raise OSError(f"no chip at {address:#x}")
            if flags & READ or size:
                return chip.read(size).ljust(size, b"\0")[:size] + OK, False
            chip.write(chain.read())
            return OK, False
        except OSError as error:
            logger.debug("device=%s error=%r", self.name, str(error))
            return bytes(size) + ERR, bool(flags & FAIL_NEXT)
