"""The entropy device (VIRTIO 1.3, 5.4): buffers of the driver, filled with random bytes."""

from __future__ import annotations

import os
from collections.abc import Callable

from vq.device import Device
from vq.virtio import DeviceId
from vq_core.device_queue import DeviceQueue

__all__ = ["RngDevice"]


class RngDevice(Device):
    """A source of entropy for a guest.

    Parameters
    ----------
    source
        Gives as many random bytes as it is asked for; by default the kernel's.
    """

    device_id = DeviceId.RNG
    queues = ("requestq",)
    max_bytes = 1 << 16  # of one answer, however long the buffer of a driver is

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self._source = source

    def handle(self, queue: DeviceQueue) -> None:
        for chain in queue:
            chain.write(self._source(chain.writable_bytes))
            chain.complete()
