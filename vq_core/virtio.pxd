"""The structures and constants of the specifications, as they name them.

VIRTIO 1.3: 2.7 (split virtqueues), 2.8 (packed virtqueues), 5.1.6 (virtio-net header). All fields are little-endian;
vq runs on little-endian hosts only (vq_core/__init__.py refuses to load elsewhere).
Sizes are asserted when vq_core.queue is imported.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

# Kinds of addresses. None of them is a pointer: memory.pxd alone makes pointers of them.
ctypedef uint64_t gpa_t   # guest physical address, found in descriptors
ctypedef uint64_t uva_t   # front-end user address, found in SET_VRING_ADDR
ctypedef uint64_t iova_t  # I/O virtual address: what stands in place of both with VIRTIO_F_ACCESS_PLATFORM

cdef struct virtq_desc_t:             # 2.7.5
    gpa_t addr
    uint32_t len
    uint16_t flags
    uint16_t next

cdef struct virtq_avail_t:            # 2.7.6; ring has num entries, then used_event
    uint16_t flags
    uint16_t idx
    uint16_t ring[1]

cdef struct virtq_used_elem_t:        # 2.7.8
    uint32_t id
    uint32_t len

cdef struct virtq_used_t:             # ring has num entries, then avail_event
    uint16_t flags
    uint16_t idx
    virtq_used_elem_t ring[1]

cdef struct virtq_packed_desc_t:      # 2.8.13
    gpa_t addr
    uint32_t len
    uint16_t id
    uint16_t flags

cdef struct virtq_packed_event_t:     # 2.8.14: of the driver (avail address) and of the device (used address)
    uint16_t off_wrap                 # slot in bits 0 to 14, wrap counter in bit 15
    uint16_t flags

cdef struct virtio_net_hdr_t:         # 5.1.6, with num_buffers
    uint8_t flags
    uint8_t gso_type
    uint16_t hdr_len
    uint16_t gso_size
    uint16_t csum_start
    uint16_t csum_offset
    uint16_t num_buffers

cdef enum:
    VIRTQ_DESC_F_NEXT = 1
    VIRTQ_DESC_F_WRITE = 2
    VIRTQ_DESC_F_INDIRECT = 4
    VIRTQ_PACKED_DESC_F_AVAIL = 0x80
    VIRTQ_PACKED_DESC_F_USED = 0x8000
    VIRTQ_PACKED_EVENT_FLAG_ENABLE = 0
    VIRTQ_PACKED_EVENT_FLAG_DISABLE = 1
    VIRTQ_PACKED_EVENT_FLAG_DESC = 2
    VIRTQ_AVAIL_F_NO_INTERRUPT = 1
    VIRTQ_USED_F_NO_NOTIFY = 1
    VIRTQ_SIZE_MAX = 32768            # 2.7: "Queue Size ... maximum value is 32768"

    VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
    VIRTIO_NET_HDR_F_DATA_VALID = 2
    VIRTIO_NET_HDR_F_RSC_INFO = 4
    VIRTIO_NET_HDR_GSO_NONE = 0
    VIRTIO_NET_HDR_GSO_TCPV4 = 1
    VIRTIO_NET_HDR_GSO_UDP = 3
    VIRTIO_NET_HDR_GSO_TCPV6 = 4
    VIRTIO_NET_HDR_GSO_UDP_L4 = 5
    VIRTIO_NET_HDR_GSO_ECN = 0x80

# Feature bit numbers (not masks), by their names in the specifications.
cdef enum:
    VIRTIO_NET_F_CSUM = 0
    VIRTIO_NET_F_GUEST_CSUM = 1
    VIRTIO_NET_F_GUEST_TSO4 = 7
    VIRTIO_NET_F_GUEST_TSO6 = 8
    VIRTIO_NET_F_GUEST_ECN = 9
    VIRTIO_NET_F_GUEST_UFO = 10
    VIRTIO_NET_F_HOST_TSO4 = 11
    VIRTIO_NET_F_HOST_TSO6 = 12
    VIRTIO_NET_F_HOST_ECN = 13
    VIRTIO_NET_F_HOST_UFO = 14
    VIRTIO_NET_F_MRG_RXBUF = 15
    VHOST_F_LOG_ALL = 26
    VIRTIO_F_INDIRECT_DESC = 28
    VIRTIO_F_EVENT_IDX = 29
    VIRTIO_F_VERSION_1 = 32
    VIRTIO_F_ACCESS_PLATFORM = 33
    VIRTIO_F_RING_PACKED = 34
    VIRTIO_F_IN_ORDER = 35
    VIRTIO_NET_F_GUEST_USO4 = 54
    VIRTIO_NET_F_GUEST_USO6 = 55
    VIRTIO_NET_F_HOST_USO = 56

cdef inline bint has_feature(uint64_t features, int bit) noexcept nogil:
    """Whether feature bit number `bit` is in the set `features`."""
    return (features >> bit) & 1
