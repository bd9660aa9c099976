"""What a session wants from the data plane: one frozen record for each change.

`Session` calls `apply(effect)`. The call is synchronous: when it returns, the data plane has obeyed and no longer uses
what the effect replaced (old memory, old fds); when it raises a `VqError` or an `OSError`, nothing has changed.

Every fd in an effect is *borrowed*: the session owns it, keeps it open as long as the effect is in force (ring fds) or
until `apply` returns (memory and log, which live on as mappings), and closes it. An applier that needs an fd for longer
duplicates it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = [
    "INBAND",
    "AbandonPostcopy",
    "AddRegion",
    "AdoptMemory",
    "AdvisePostcopy",
    "CheckState",
    "ClearInflight",
    "ClearLog",
    "ConfigRead",
    "ConfigWrite",
    "Effect",
    "EnableRing",
    "EndPostcopy",
    "GetSharedObject",
    "InvalidateTranslation",
    "Kick",
    "LoadState",
    "MakeInflight",
    "MemoryRegion",
    "PrepareMemory",
    "RemoveRegion",
    "ResetDevice",
    "RingConfig",
    "SaveState",
    "SendRarp",
    "SetBackendChannel",
    "SetCall",
    "SetErr",
    "SetFeatures",
    "SetInflight",
    "SetKick",
    "SetLog",
    "SetMemory",
    "SetMtu",
    "SetRingAddresses",
    "SetStatus",
    "SignalErr",
    "StartRing",
    "StopRing",
    "UpdateTranslation",
]

INBAND: Final = -1  # in place of a ring's fd: what it would signal is a message


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A part of guest memory behind an fd.

    Parameters
    ----------
    guest_addr, user_addr
        Where the region starts for the driver and in the front-end's own address space. Neither these ranges nor
        `mmap_offset` + `size` pass 2^64, and no two live regions overlap; the session has checked both.
    size
        Bytes, at least 1.
    mmap_offset
        Offset of the region's first byte in the file. The size of the file has *not* been checked.
    fd
        The file, borrowed; -1 in a `RemoveRegion`, which only names a region.
    """

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    fd: int = -1


@dataclass(frozen=True, slots=True)
class SetFeatures:
    """Take over the acknowledged features; the only bit that can change while a ring is started is LOG_ALL."""

    features: int


@dataclass(frozen=True, slots=True)
class SetMemory:
    """Replace the whole memory table; started rings find their addresses again in the new one. Empty = forget all."""

    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True, slots=True)
class AdvisePostcopy:
    """Open a userfaultfd in place of the one before; returns a copy of it (int), which the session owns."""


@dataclass(frozen=True, slots=True)
class PrepareMemory:
    """Map a whole memory table whose pages are still on their way, touching nothing.

    Returns where each region lies in this process (tuple of int), in the order of `regions`: what the front-end tells
    our page faults apart by, and no address for us.
    """

    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True, slots=True)
class AdoptMemory:
    """Replace the memory table by the one that was prepared; who touches a page that has not come waits for it."""


@dataclass(frozen=True, slots=True)
class EndPostcopy:
    """All pages have come; let go of the userfaultfd."""


@dataclass(frozen=True, slots=True)
class AbandonPostcopy:
    """The connection ends in the middle of a postcopy migration: nobody may wait for a page any more."""


@dataclass(frozen=True, slots=True)
class AddRegion:
    """Add one region to the table."""

    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class RemoveRegion:
    """Take out the region with this guest address, user address and size, after nobody uses it any longer."""

    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class RingConfig:
    """Everything that a ring needs in order to start.

    Parameters
    ----------
    index
        0 .. queue_count-1.
    num
        Entries, 1..32768; a power of two for a split ring.
    desc, avail, used
        Addresses as the front-end sent them (its user addresses, or IOVA with an IOMMU), aligned for the layout but not
        yet looked up. Packed: `avail` is the driver event suppression, `used` the device event suppression.
    log_guest_addr, flags
        Where the used ring lies in the dirty log, and bit 0 (VHOST_VRING_F_LOG): log it.
    base
        Where to go on. Split: next available index, 16 bits. Packed: bits 0-14 position, 15 wrap counter, the same
        again in bits 16-31 for the used side.
    kick_fd, call_fd, err_fd
        Borrowed and non-blocking; None = poll, and call nobody; INBAND = by messages.
    enabled
        Whether the ring may have side effects; a started but disabled ring processes without.
    packed
        Layout.
    guest_addresses
        The three addresses are guest physical ones (GPA_ADDRESSES was negotiated); with an IOMMU they are IOVA as ever.
    """

    index: int
    num: int
    desc: int
    avail: int
    used: int
    log_guest_addr: int
    flags: int
    base: int
    kick_fd: int | None
    call_fd: int | None
    err_fd: int | None
    enabled: bool
    packed: bool
    guest_addresses: bool = False


@dataclass(frozen=True, slots=True)
class StartRing:
    """Start a ring and look for buffers at once, as if kicked; raises if an address lies outside memory."""

    ring: RingConfig


@dataclass(frozen=True, slots=True)
class StopRing:
    """Finish and publish what was taken, then never touch the ring again; returns the base to answer (int).

    With `suspend` what was taken and not begun stays in flight, if there is an in-flight region.
    """

    index: int
    suspend: bool = False


@dataclass(frozen=True, slots=True)
class EnableRing:
    """Set the enable flag of a ring, started or not; on True scan the ring again, a kick may have been missed."""

    index: int
    enabled: bool


@dataclass(frozen=True, slots=True)
class SetKick:
    """Replace the kick fd of a started ring, and look for buffers at once."""

    index: int
    fd: int | None


@dataclass(frozen=True, slots=True)
class SetCall:
    """Replace the call fd of a started ring, and signal the new one once: an interrupt may have gone to the old."""

    index: int
    fd: int | None


@dataclass(frozen=True, slots=True)
class SetErr:
    """Replace the err fd of a started ring."""

    index: int
    fd: int | None


@dataclass(frozen=True, slots=True)
class SignalErr:
    """Write to the err fd (non-blocking; a full counter is success): this ring could not be started."""

    index: int
    fd: int


@dataclass(frozen=True, slots=True)
class SetRingAddresses:
    """Switch the logging of a started ring; its addresses and indices stay."""

    index: int
    flags: int
    log_guest_addr: int


@dataclass(frozen=True, slots=True)
class SetLog:
    """Map the dirty log: `size` bytes from `offset` of the borrowed fd; the old one goes after this works."""

    fd: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class ClearLog:
    """Unmap the dirty log."""


@dataclass(frozen=True, slots=True)
class MakeInflight:
    """Make the file of an in-flight region: returns (fd, size); the fd is the session's, the content all zero."""

    num_queues: int
    queue_size: int
    packed: bool


@dataclass(frozen=True, slots=True)
class SetInflight:
    """Map an in-flight region for the rings that start from now on; no ring is started. The old one goes."""

    fd: int
    size: int
    offset: int
    num_queues: int
    queue_size: int
    packed: bool  # False as well as long as nobody knows; whether it is large enough shows at the start then


@dataclass(frozen=True, slots=True)
class ClearInflight:
    """Unmap the in-flight region; no ring is started."""


@dataclass(frozen=True, slots=True)
class SetMtu:
    """Take over the guest's MTU, 68..65535 bytes without the Ethernet header."""

    mtu: int


@dataclass(frozen=True, slots=True)
class SendRarp:
    """Announce a MAC address (6 bytes, unicast, not zero) to the network side, never to the guest."""

    mac: bytes


@dataclass(frozen=True, slots=True)
class SetStatus:
    """The driver's status byte has changed; for information, rings start and stop without it."""

    status: int


@dataclass(frozen=True, slots=True)
class ResetDevice:
    """Bring device-internal state back to its beginning; all rings have been stopped and disabled before."""


@dataclass(frozen=True, slots=True)
class SetBackendChannel:
    """The front-end has given us a socket for our own requests; it replaces the one before."""

    fd: int


@dataclass(frozen=True, slots=True)
class ConfigRead:
    """Read the configuration space; `offset + size` lies inside; returns exactly `size` bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ConfigWrite:
    """Write to the configuration space; raises if a field is read-only. `migration`: on behalf of a live migration."""

    offset: int
    data: bytes
    migration: bool


@dataclass(frozen=True, slots=True)
class Kick:
    """Look for buffers on a started ring: a kick that came as a message."""

    index: int


@dataclass(frozen=True, slots=True)
class SaveState:
    """Begin to write the device's state to a pipe; raises if that cannot begin."""

    fd: int


@dataclass(frozen=True, slots=True)
class LoadState:
    """Begin to read a state for the device from a pipe, up to its end; raises if that cannot begin."""

    fd: int


@dataclass(frozen=True, slots=True)
class CheckState:
    """Tell how the transfer has ended (bool), or None if it is under way; raises if there was none."""


@dataclass(frozen=True, slots=True)
class GetSharedObject:
    """Give the fd of an object that the device shares under this UUID (16 bytes), borrowed; None if there is none."""

    uuid: bytes


@dataclass(frozen=True, slots=True)
class UpdateTranslation:
    """Translate [iova, iova + size), which does not pass 2^64, to memory at `address` of the front-end (or the guest).

    Raises if that does not lie in one region. `perm`: 1 read, 2 write, 3 both.
    """

    iova: int
    size: int
    address: int
    perm: int
    guest_addresses: bool


@dataclass(frozen=True, slots=True)
class InvalidateTranslation:
    """Forget what [iova, last] translates to; nothing is reached through it any more when this returns."""

    iova: int
    last: int


Effect = (
    SetFeatures
    | SetMemory
    | AdvisePostcopy
    | PrepareMemory
    | AdoptMemory
    | EndPostcopy
    | AbandonPostcopy
    | AddRegion
    | RemoveRegion
    | StartRing
    | StopRing
    | EnableRing
    | SetKick
    | SetCall
    | SetErr
    | SignalErr
    | SetRingAddresses
    | SetLog
    | ClearLog
    | MakeInflight
    | SetInflight
    | ClearInflight
    | SetMtu
    | SendRarp
    | SetStatus
    | ResetDevice
    | SetBackendChannel
    | ConfigRead
    | ConfigWrite
    | Kick
    | SaveState
    | LoadState
    | CheckState
    | GetSharedObject
    | UpdateTranslation
    | InvalidateTranslation
)
