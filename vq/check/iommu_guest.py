"""A guest behind an IOMMU: its driver's addresses are like no others, and the back-end has to ask for each page."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vq import virtio as v
from vq.check.guest import BASIC_PROTOCOL, Guest
from vq.check.outcome import Failed
from vq.frontend import RingSetup
from vq.iommu import PAGE, READ, WRITE, Iommu
from vq.payload import Region

if TYPE_CHECKING:
    from vq.check.target import Target

__all__ = ["FEATURES", "PROTOCOL", "SHIFT", "IommuGuest"]

FEATURES: Final = (v.VIRTIO_F_ACCESS_PLATFORM,)
PROTOCOL: Final = (v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_BACKEND_REQ)
SHIFT: Final = 1 << 32  # from addresses of the driver to those of the memory table


class IommuGuest(Guest):
    """A connection as any other, but for what its addresses mean.

    What `Guest.memory` calls a guest address is I/O virtual here.

    Parameters
    ----------
    target, layout
        As for `Guest`.
    running
        Start the rings. Nothing is mapped in the back-end then; it has to ask.

    Attributes
    ----------
    iommu : Iommu
        What lies where, all memory at first; it answers while somebody waits.
    """

    def __init__(self, target: Target, *, layout: str = "split", running: bool = True) -> None:
        protocol = BASIC_PROTOCOL | v.mask(*PROTOCOL)
        super().__init__(target, features=v.mask(*FEATURES), protocol=protocol, layout=layout, running=False)
        try:
            self.iommu = Iommu(self.frontend)
            for iova, size, user, *_ in self.memory.regions:
                self.iommu.map(iova, size, user)
            self.share()
            if running:
                self.start_all()
        except BaseException:
            self.close()
            raise

    @property
    def regions(self) -> tuple[list[Region], list[int]]:
        rows, fds = super().regions
        return [Region(row.guest_addr + SHIFT, *row[1:]) for row in rows], fds

    def setup(self, index: int, base: int | None = None) -> RingSetup:
        desc, avail, used = self.queues[index].guest_addresses
        return replace(super().setup(index, base), desc=desc, avail=avail, used=used)

    def attend(self) -> None:
        channel = self.frontend.channel
        assert channel is not None
        channel.dispatch()
        if channel.refused:
            raise Failed("a request on the back-end channel is none: a MISS has an address, a permission, and no size")
        if channel.closed:
            raise Failed("the back-end has closed its channel")

    def asked(self, start: int, size: int, perm: int) -> bool:
        """Whether the back-end has asked for a page of a range, with a permission."""
        pages = range(start // PAGE, (start + size - 1) // PAGE + 1)
        self.attend()
        return any(iova // PAGE in pages and wanted & perm for iova, wanted in self.iommu.missed)

    def tell(self, start: int, size: int) -> None:
        """Send the translations of a range, asked for or not."""
        for page in range(start // PAGE, (start + size - 1) // PAGE + 1):
            user, perm = self.iommu.pages[page]
            self.iommu.update(page * PAGE, PAGE, user, perm & (READ | WRITE))
