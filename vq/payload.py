"""The payloads of messages: what they hold, and the codecs that lay them out. No I/O, no meaning.

Field order is wire order; all integers are in host byte order.

Spec: vhost-user, "Message Specification".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

PAYLOAD_MAX: Final = 4096  # the largest known payload has 2056 bytes
REGIONS_MAX: Final = 32
CONFIG_MAX: Final = 256
SHMEM_REGIONS_MAX: Final = 256

VRING_INDEX_MASK: Final = 0xFF
VRING_NOFD_MASK: Final = 1 << 8


class VringState(NamedTuple):
    """A ring index and a number: entries, base, enable flag."""

    ring: int
    num: int


class VringAddr(NamedTuple):
    """Where the parts of a ring are; note that `used` stands before `avail`."""

    ring: int
    flags: int
    desc: int
    used: int
    avail: int
    log_guest_addr: int


class Region(NamedTuple):
    """One memory region as it stands in a message."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


class Log(NamedTuple):
    """Where the dirty log lies in its fd."""

    mmap_size: int
    mmap_offset: int


class Iotlb(NamedTuple):
    """One translation: a miss, an update, an invalidation."""

    iova: int
    size: int
    uaddr: int
    perm: int
    type: int


class Config(NamedTuple):
    """A part of the device's configuration space; its size is the length of `data`."""

    offset: int
    flags: int
    data: bytes


class VringArea(NamedTuple):
    """Memory behind a host notifier; `word` holds the ring index and VRING_NOFD_MASK."""

    word: int
    size: int
    offset: int


class Inflight(NamedTuple):
    """Size and shape of an in-flight region."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class Transfer(NamedTuple):
    """Direction (0 save, 1 load) and phase (0 stopped) of a device state transfer."""

    direction: int
    phase: int


class Mmap(NamedTuple):
    """A part of a shared memory region of the device."""

    shmid: int
    fd_offset: int
    shm_offset: int
    len: int
    flags: int


# --- Codecs ---------------------------------------------------------------------------------------------------------


class Codec:
    """Turns payload bytes into a value and back.

    `sizes` limits what a header may announce, so that a wrong size is refused before its bytes have come.
    """

    def __init__(self, *sizes: int) -> None:
        self.sizes: tuple[int, ...] = sizes

    def fits(self, size: int) -> bool:
        """Tell whether a payload can have this many bytes."""
        return size in self.sizes

    def limit(self) -> str:
        """Say which sizes are right, for an error message."""
        return "it must be " + " or ".join(map(str, self.sizes)) + " bytes"

    def encode(self, value: Any) -> bytes:
        """Lay a value out."""
        raise NotImplementedError

    def decode(self, data: bytes) -> Any:
        """Read a value; raises ValueError if its inner sizes contradict the payload size."""
        raise NotImplementedError


class _Empty(Codec):
    def __init__(self) -> None:
        super().__init__(0)

    def encode(self, value: Any) -> bytes:
        return b""

    def decode(self, data: bytes) -> None:
        return None


class _Word(Codec):
    """One u64, as a plain int."""

    _struct: Final = struct.Struct("=Q")

    def __init__(self) -> None:
        super().__init__(8)

    def encode(self, value: Any) -> bytes:
        return self._struct.pack(value)

    def decode(self, data: bytes) -> int:
        return int(self._struct.unpack(data)[0])


class _Record(Codec):
    """A fixed layout under a named tuple."""

    def __init__(self, layout: str, make: Callable[[Iterable[Any]], Any]) -> None:
        self._struct = struct.Struct(layout)
        self._make = make
        super().__init__(self._struct.size)

    def encode(self, value: Any) -> bytes:
        return self._struct.pack(*value)

    def decode(self, data: bytes) -> Any:
        return self._make(self._struct.unpack(data))


class _Single(_Record):
    """A region after 8 bytes of padding."""

    def __init__(self) -> None:
        super().__init__("=8xQQQQ", Region._make)


class _MemTable(Codec):
    """A tuple of regions; the payload must hold `nregions`. Linux's virtio_uml always sends room for two."""

    _head: Final = struct.Struct("=I4x")
    _region: Final = struct.Struct("=QQQQ")

    def __init__(self) -> None:
        super().__init__(*(8 + 32 * n for n in range(1, REGIONS_MAX + 1)))

    def limit(self) -> str:
        return f"it must be 8 + 32 bytes for each of 1 to {REGIONS_MAX} regions"

    def encode(self, value: Any) -> bytes:
        return self._head.pack(len(value)) + b"".join(self._region.pack(*region) for region in value)

    def decode(self, data: bytes) -> tuple[Region, ...]:
        (count,) = self._head.unpack_from(data)
        if not 1 <= count <= (len(data) - 8) // 32:
            raise ValueError(f"nregions is {count}; {len(data)} bytes of payload hold {(len(data) - 8) // 32}")
        return tuple(Region._make(fields) for fields in self._region.iter_unpack(data[8 : 8 + 32 * count]))


class _Config(Codec):
    """Offset, size and flags, then `size` bytes."""

    _head: Final = struct.Struct("=III")

    def fits(self, size: int) -> bool:
        return self._head.size <= size <= PAYLOAD_MAX

    def limit(self) -> str:
        return f"it must be 12 to {PAYLOAD_MAX} bytes"

    def encode(self, value: Any) -> bytes:
        return self._head.pack(value.offset, len(value.data), value.flags) + bytes(value.data)

    def decode(self, data: bytes) -> Config:
        offset, size, flags = self._head.unpack_from(data)
        if self._head.size + size != len(data):
            raise ValueError(f"size is {size}; {len(data) - self._head.size} bytes follow")
        return Config(offset, flags, data[self._head.size :])


class _Fixed(Codec):
    """A number of bytes, kept as they are."""

    def encode(self, value: Any) -> bytes:
        return bytes(value)

    def decode(self, data: bytes) -> bytes:
        return data


class _Raw(Codec):
    """Any bytes, kept as they are."""

    def fits(self, size: int) -> bool:
        return size <= PAYLOAD_MAX

    def limit(self) -> str:
        return f"it must be up to {PAYLOAD_MAX} bytes"

    def encode(self, value: Any) -> bytes:
        return bytes(value)

    def decode(self, data: bytes) -> bytes:
        return data


class _Either(Codec):
    """Two payloads that differ in size; None stands for the empty one and int for the word."""

    def __init__(self, first: Codec, *others: Codec) -> None:
        super().__init__()
        self._codecs = (first, *others)

    def fits(self, size: int) -> bool:
        return any(codec.fits(size) for codec in self._codecs)

    def limit(self) -> str:
        return " or ".join(codec.limit() for codec in self._codecs)

    def encode(self, value: Any) -> bytes:
        if value is None:
            return b""
        return (U64 if isinstance(value, int) else self._codecs[0]).encode(value)

    def decode(self, data: bytes) -> Any:
        return next(codec for codec in self._codecs if codec.fits(len(data))).decode(data)


EMPTY: Final = _Empty()
U64: Final = _Word()
VRING_STATE: Final = _Record("=II", VringState._make)
VRING_ADDR: Final = _Record("=IIQQQQ", VringAddr._make)
MEM_TABLE: Final = _MemTable()
MEM_SINGLE: Final = _Single()
LOG: Final = _Record("=QQ", Log._make)
IOTLB: Final = _Record("=QQQBB6x", Iotlb._make)
CONFIG: Final = _Config()
VRING_AREA: Final = _Record("=QQQ", VringArea._make)
INFLIGHT: Final = _Record("=QQHH4x", Inflight._make)
UUID: Final = _Fixed(16)  # the first three components are big-endian
TRANSFER: Final = _Record("=II", Transfer._make)
MMAP: Final = _Record("=B7xQQQQ", Mmap._make)
SHMEM_CONFIG: Final = _Record(f"=I4x{SHMEM_REGIONS_MAX}Q", tuple)
RAW: Final = _Raw()
LOG_OR_WORD: Final = _Either(LOG, U64)
# Back-ends answer SET_LOG_BASE with 0, 8 or 16 bytes (DPDK, libvhost-user, rust-vmm); front-ends accept all.
LOG_REPLY: Final = _Either(LOG, U64, EMPTY)
# In a postcopy migration a word releases a table that was sent, and a table is answered with a table.
TABLE_OR_WORD: Final = _Either(MEM_TABLE, U64)
CONFIG_REPLY: Final = _Either(CONFIG, EMPTY)
