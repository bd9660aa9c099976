"""A guest behind an IOMMU: its driver knows I/O virtual addresses only, which are like no other address of it."""

from __future__ import annotations

from typing import Any

from pump_rig import PROTOCOL, USUAL, Guest
from vq import virtio as v
from vq.frontend import Frontend, RingSetup
from vq.iommu import PAGE, Iommu
from vq.payload import Region
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory

IOVA = 0x7_FF00_0000  # of the first region, for the driver
GPA = 0x1_0000  # and for the memory table
ACCESS_PLATFORM = v.mask(v.VIRTIO_F_ACCESS_PLATFORM)
IOMMU_PROTOCOL = PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_BACKEND_REQ)


class IommuGuest(Guest):
    """A guest as any other, whose memory the back-end reaches through an IOMMU.

    What `GuestMemory` calls a guest address is I/O virtual here.
    """

    def __init__(
        self,
        path: str,
        features: int = USUAL,
        *,
        size: int = 256,
        memory_bytes: int = 8 << 20,
        start: bool = True,
        mapped: bool = True,
        protocol: int = IOMMU_PROTOCOL,
        **options: Any,
    ) -> None:
        self.frontend = Frontend.connect(path, timeout=60)
        self.features = self.frontend.negotiate(features | ACCESS_PLATFORM, protocol)
        self.frontend.set_features(self.features)
        self.iommu = Iommu(self.frontend)
        self.heir = False
        self.memory = GuestMemory(memory_bytes, guest_addr=IOVA, **options)
        self.receiveqs = [DriverQueue(self.memory, size, features=self.features)]
        self.transmitqs = [DriverQueue(self.memory, size, features=self.features)]
        self.share()
        if mapped:
            self.map_all()
        if start:
            self.start()

    def share(self) -> None:
        regions = self.memory.regions
        rows = [Region(iova - IOVA + GPA, size, user, offset) for iova, size, user, offset, _ in regions]
        self.frontend.set_mem_table(rows, [row[4] for row in regions])

    def map_all(self) -> None:
        """Map all memory."""
        for iova, size, user, _, _ in self.memory.regions:
            self.iommu.map(iova, size, user)

    def ring(self, index: int, *, logged: bool = False) -> RingSetup:
        driver = self.queue(index)
        flags = v.VHOST_VRING_F_LOG if logged else 0
        places = driver.guest_addresses
        fds = (driver.kick_fd, driver.call_fd, None)
        return RingSetup(index, driver.size, *places, driver.used_idx, *fds, places[2], flags)

    def serve(self, until: Any, seconds: float = 20) -> None:
        """Answer misses until a condition holds."""
        assert self.frontend.serve(until, seconds), "it does not come"

    def page(self, address: int) -> int:
        """Where a page of the front-end's addresses begins."""
        return address // PAGE * PAGE
