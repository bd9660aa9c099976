"""Handlers of the session: translations of an IOMMU.

Spec: vhost-user, "IOMMU support".
"""

from __future__ import annotations

from typing import Final

from vq import effects as e
from vq import virtio as v
from vq.errors import FrontendError
from vq.message import Message
from vq.payload import Iotlb
from vq.region_table import ADDRESS_END
from vq.session_state import SessionState

IOTLB_UPDATE: Final = 2
IOTLB_INVALIDATE: Final = 3


def iotlb_msg(session: SessionState, message: Message) -> None:
    """Take over a translation, or forget some; the other types are for us to send."""
    if not v.has(session.features, v.VIRTIO_F_ACCESS_PLATFORM):
        raise FrontendError(message.name, "ACCESS_PLATFORM", "not acknowledged", "without it there is no IOMMU")
    entry: Iotlb = message.payload
    if entry.type == IOTLB_UPDATE:
        update(session, message.name, entry)
    elif entry.type == IOTLB_INVALIDATE:
        # A range may end at 2^64 exactly, and the whole space has a size of 2^64, which reads as 0.
        last = min(entry.iova + entry.size, ADDRESS_END) - 1 if entry.size else ADDRESS_END - 1
        session.apply(e.InvalidateTranslation(entry.iova, last))
    else:
        limit = "a front-end says 2 (update) or 3 (invalidate)"
        raise FrontendError(message.name, "type", entry.type, limit)


def update(session: SessionState, request: str, entry: Iotlb) -> None:
    """Check an update; whether its memory is there is found out where it is looked up."""
    if not 1 <= entry.perm <= 3:
        raise FrontendError(request, "perm", entry.perm, "1 is read, 2 is write, 3 both")
    for field, start in (("iova", entry.iova), ("uaddr", entry.uaddr)):
        if entry.size == 0 or start > ADDRESS_END - entry.size:
            limit = f"with {entry.size:#x} bytes it is empty or passes 2^64"
            raise FrontendError(request, field, f"{start:#x}", limit)
    guest_addresses = session.negotiated(v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES)
    session.apply(e.UpdateTranslation(entry.iova, entry.size, entry.uaddr, entry.perm, guest_addresses))
