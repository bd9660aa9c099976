"""Numbers of the two specifications, under the names that they have there.

Feature constants are bit *numbers*; `mask` makes a set of them and `has` looks into one. vhost-user carries 64 feature
bits, so virtio-net bits from 64 on cannot be negotiated and are not listed.

Spec: VIRTIO 1.3, 2.2, 5 and 6; vhost-user "Protocol features".
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple


class DeviceId(IntEnum):
    """Device types of VIRTIO 1.3, 5."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
    BALLOON = 5
    SCSI = 8
    P9 = 9
    GPU = 16
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    FS = 26
    I2C = 34
    GPIO = 41


# Device-independent feature bits (VIRTIO 1.3, 6; bits 24 and 27 are legacy, 6.3).
VIRTIO_F_NOTIFY_ON_EMPTY: Final = 24
VHOST_F_LOG_ALL: Final = 26  # vhost's own bit: the back-end marks what it writes while a migration runs
VIRTIO_F_ANY_LAYOUT: Final = 27
VIRTIO_F_INDIRECT_DESC: Final = 28
VIRTIO_F_EVENT_IDX: Final = 29
VHOST_USER_F_PROTOCOL_FEATURES: Final = 30  # vhost-user's own bit; never shown to the guest
VIRTIO_F_VERSION_1: Final = 32
VIRTIO_F_ACCESS_PLATFORM: Final = 33
VIRTIO_F_RING_PACKED: Final = 34
VIRTIO_F_IN_ORDER: Final = 35
VIRTIO_F_ORDER_PLATFORM: Final = 36
VIRTIO_F_NOTIFICATION_DATA: Final = 38
VIRTIO_F_RING_RESET: Final = 40

# virtio-net (VIRTIO 1.3, 5.1.3).
VIRTIO_NET_F_CSUM: Final = 0
VIRTIO_NET_F_GUEST_CSUM: Final = 1
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: Final = 2
VIRTIO_NET_F_MTU: Final = 3
VIRTIO_NET_F_MAC: Final = 5
VIRTIO_NET_F_GSO: Final = 6
VIRTIO_NET_F_GUEST_TSO4: Final = 7
VIRTIO_NET_F_GUEST_TSO6: Final = 8
VIRTIO_NET_F_GUEST_ECN: Final = 9
VIRTIO_NET_F_GUEST_UFO: Final = 10
VIRTIO_NET_F_HOST_TSO4: Final = 11
VIRTIO_NET_F_HOST_TSO6: Final = 12
VIRTIO_NET_F_HOST_ECN: Final = 13
VIRTIO_NET_F_HOST_UFO: Final = 14
VIRTIO_NET_F_MRG_RXBUF: Final = 15
VIRTIO_NET_F_STATUS: Final = 16
VIRTIO_NET_F_CTRL_VQ: Final = 17
VIRTIO_NET_F_CTRL_RX: Final = 18
VIRTIO_NET_F_CTRL_VLAN: Final = 19
VIRTIO_NET_F_CTRL_RX_EXTRA: Final = 20
VIRTIO_NET_F_GUEST_ANNOUNCE: Final = 21
VIRTIO_NET_F_MQ: Final = 22
VIRTIO_NET_F_CTRL_MAC_ADDR: Final = 23
VIRTIO_NET_F_DEVICE_STATS: Final = 50
VIRTIO_NET_F_HASH_TUNNEL: Final = 51
VIRTIO_NET_F_VQ_NOTF_COAL: Final = 52
VIRTIO_NET_F_NOTF_COAL: Final = 53
VIRTIO_NET_F_GUEST_USO4: Final = 54
VIRTIO_NET_F_GUEST_USO6: Final = 55
VIRTIO_NET_F_HOST_USO: Final = 56
VIRTIO_NET_F_HASH_REPORT: Final = 57
VIRTIO_NET_F_GUEST_HDRLEN: Final = 59
VIRTIO_NET_F_RSS: Final = 60
VIRTIO_NET_F_RSC_EXT: Final = 61
VIRTIO_NET_F_STANDBY: Final = 62
VIRTIO_NET_F_SPEED_DUPLEX: Final = 63

# virtio-blk (VIRTIO 1.3, 5.2.3).
VIRTIO_BLK_F_SIZE_MAX: Final = 1
VIRTIO_BLK_F_SEG_MAX: Final = 2
VIRTIO_BLK_F_GEOMETRY: Final = 4
VIRTIO_BLK_F_RO: Final = 5
VIRTIO_BLK_F_BLK_SIZE: Final = 6
VIRTIO_BLK_F_FLUSH: Final = 9
VIRTIO_BLK_F_TOPOLOGY: Final = 10
VIRTIO_BLK_F_CONFIG_WCE: Final = 11
VIRTIO_BLK_F_MQ: Final = 12
VIRTIO_BLK_F_DISCARD: Final = 13
VIRTIO_BLK_F_WRITE_ZEROES: Final = 14
VIRTIO_BLK_F_LIFETIME: Final = 15
VIRTIO_BLK_F_SECURE_ERASE: Final = 16
VIRTIO_BLK_F_ZONED: Final = 17

# vhost-user protocol features.
VHOST_USER_PROTOCOL_F_MQ: Final = 0
VHOST_USER_PROTOCOL_F_LOG_SHMFD: Final = 1
VHOST_USER_PROTOCOL_F_RARP: Final = 2
VHOST_USER_PROTOCOL_F_REPLY_ACK: Final = 3
VHOST_USER_PROTOCOL_F_MTU: Final = 4
VHOST_USER_PROTOCOL_F_BACKEND_REQ: Final = 5
VHOST_USER_PROTOCOL_F_CROSS_ENDIAN: Final = 6
VHOST_USER_PROTOCOL_F_CRYPTO_SESSION: Final = 7
VHOST_USER_PROTOCOL_F_PAGEFAULT: Final = 8
VHOST_USER_PROTOCOL_F_CONFIG: Final = 9
VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD: Final = 10
VHOST_USER_PROTOCOL_F_HOST_NOTIFIER: Final = 11
VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD: Final = 12
VHOST_USER_PROTOCOL_F_RESET_DEVICE: Final = 13
VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS: Final = 14
VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS: Final = 15
VHOST_USER_PROTOCOL_F_STATUS: Final = 16
VHOST_USER_PROTOCOL_F_XEN_MMAP: Final = 17
VHOST_USER_PROTOCOL_F_SHARED_OBJECT: Final = 18
VHOST_USER_PROTOCOL_F_DEVICE_STATE: Final = 19
VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT: Final = 20
VHOST_USER_PROTOCOL_F_GPA_ADDRESSES: Final = 21
VHOST_USER_PROTOCOL_F_SHMEM: Final = 22
VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN: Final = 23

# Device status bits (VIRTIO 1.3, 2.1); these are values, not bit numbers.
VIRTIO_CONFIG_S_ACKNOWLEDGE: Final = 1
VIRTIO_CONFIG_S_DRIVER: Final = 2
VIRTIO_CONFIG_S_DRIVER_OK: Final = 4
VIRTIO_CONFIG_S_FEATURES_OK: Final = 8
VIRTIO_CONFIG_S_NEEDS_RESET: Final = 64
VIRTIO_CONFIG_S_FAILED: Final = 128

# Flag of SET_VRING_ADDR: mark writes to the used ring in the dirty log.
VHOST_VRING_F_LOG: Final = 1

# Most entries of a virtqueue (VIRTIO 1.3, 2.6 and 2.8).
VIRTQ_SIZE_MAX: Final = 32768

VIRTIO_NET_S_LINK_UP: Final = 1
VIRTIO_NET_S_ANNOUNCE: Final = 2


def mask(*bits: int) -> int:
    """Make a feature set of bit numbers."""
    value = 0
    for bit in bits:
        value |= 1 << bit
    return value


def has(features: int, bit: int) -> bool:
    """Tell whether a feature set holds a bit number."""
    return bool(features >> bit & 1)


def _names(prefixes: tuple[str, ...]) -> dict[int, str]:
    return {
        value: name.removeprefix(prefix)
        for prefix in prefixes
        for name, value in globals().items()
        if name.startswith(prefix)
    }


_COMMON_NAMES: Final = _names(("VIRTIO_F_", "VHOST_F_", "VHOST_USER_F_"))
_DEVICE_NAMES: Final = {DeviceId.NET: _names(("VIRTIO_NET_F_",)), DeviceId.BLOCK: _names(("VIRTIO_BLK_F_",))}
_PROTOCOL_NAMES: Final = _names(("VHOST_USER_PROTOCOL_F_",))


def _spell(bits: int, names: dict[int, str]) -> list[str]:
    return [names.get(bit, f"bit{bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]


def feature_names(bits: int, device: DeviceId | None = None) -> list[str]:
    """Name the bits of a virtio feature set, lowest first.

    Parameters
    ----------
    bits
        Feature set, 64 bits.
    device
        Whose device-specific names to use; a bit without a name is spelled "bit7".
    """
    names = _DEVICE_NAMES.get(device, {}) if device is not None else {}
    return _spell(bits, names | _COMMON_NAMES)


def protocol_feature_names(bits: int) -> list[str]:
    """Name the bits of a vhost-user protocol feature set, lowest first."""
    return _spell(bits, _PROTOCOL_NAMES)


_NET_CONFIG: Final = struct.Struct("<6sHHHIBBHII")
VIRTIO_NET_CONFIG_SIZE: Final = _NET_CONFIG.size


class NetConfig(NamedTuple):
    """The virtio-net configuration space; which field counts is a matter of the negotiated features.

    Spec: VIRTIO 1.3, 5.1.4 (little-endian since VERSION_1).
    """

    mac: bytes = bytes(6)
    status: int = VIRTIO_NET_S_LINK_UP
    max_virtqueue_pairs: int = 1
    mtu: int = 1500
    speed: int = 0xFFFFFFFF  # Mb/s; all ones = unknown
    duplex: int = 0xFF  # 0 half, 1 full, 0xff unknown
    rss_max_key_size: int = 0
    rss_max_indirection_table_length: int = 0
    supported_hash_types: int = 0
    supported_tunnel_types: int = 0

    def pack(self) -> bytes:
        """Lay the fields out as the driver reads them."""
        return _NET_CONFIG.pack(*self)

    @classmethod
    def unpack(cls, space: bytes) -> NetConfig:
        """Read a configuration space; one shorter than the layout is filled with zeroes."""
        return cls._make(_NET_CONFIG.unpack(space[: _NET_CONFIG.size].ljust(_NET_CONFIG.size, b"\0")))


_BLK_CONFIG: Final = struct.Struct("<QIIHBBIBBHIB1xHIIIIIB3xIII")
VIRTIO_ID_NET: Final = 1  # device ids (VIRTIO 1.3, 5)
VIRTIO_ID_BLOCK: Final = 2

VIRTIO_BLK_CONFIG_SIZE: Final = 96  # the zoned fields at the end are not served and read as zero
VIRTIO_BLK_CONFIG_WRITEBACK: Final = 32  # offset of the only field that a driver may write
VIRTIO_BLK_SECTOR_BYTES: Final = 512  # unit of capacity and of all sector numbers, whatever blk_size is


class BlkConfig(NamedTuple):
    """The virtio-blk configuration space; which field counts is a matter of the negotiated features.

    Spec: VIRTIO 1.3, 5.2.4 (little-endian since VERSION_1).
    """

    capacity: int  # sectors
    size_max: int = 0
    seg_max: int = 0
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    blk_size: int = VIRTIO_BLK_SECTOR_BYTES
    physical_block_exp: int = 0
    alignment_offset: int = 0  # logical blocks, as the two that follow
    min_io_size: int = 0
    opt_io_size: int = 0
    writeback: int = 1
    num_queues: int = 1
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0
    max_secure_erase_sectors: int = 0
    max_secure_erase_seg: int = 0
    secure_erase_sector_alignment: int = 0

    def pack(self) -> bytes:
        """Lay the fields out as the driver reads them."""
        return _BLK_CONFIG.pack(*self).ljust(VIRTIO_BLK_CONFIG_SIZE, b"\0")
