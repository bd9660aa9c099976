"""The virtio-net header (VIRTIO 1.3, 5.1.6): its size, its checks, what it asks for.

A header of a driver is copied once (by the caller) and checked here once; after that the packet's own copy
travels with it. Only what was negotiated is let through (protocol section 9.3).
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.counters cimport DROP_BAD_CSUM, DROP_BAD_GSO
from vq_core.port cimport (OFFLOAD_CSUM, OFFLOAD_ECN, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_UFO, OFFLOAD_USO4,
                           OFFLOAD_USO6, packet_t)
from vq_core.virtio cimport (VIRTIO_F_VERSION_1, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
                             VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
                             VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
                             VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
                             VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM,
                             VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
                             VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4, has_feature, virtio_net_hdr_t)

cdef inline uint32_t net_header_bytes(uint64_t features) noexcept nogil:
    """12 with VERSION_1 or MRG_RXBUF (num_buffers is there), else 10."""
    return 12 if features & (<uint64_t>1 << VIRTIO_F_VERSION_1 | <uint64_t>1 << VIRTIO_NET_F_MRG_RXBUF) else 10

cdef inline uint32_t net_accepts(uint64_t features) noexcept nogil:
    """OFFLOAD_* bits that a driver with these features takes in packets of the device."""
    cdef uint32_t accepts = 0
    if not has_feature(features, VIRTIO_NET_F_GUEST_CSUM):
        return 0                  # 5.1.3.1: all others depend on it
    accepts |= OFFLOAD_CSUM
    accepts |= OFFLOAD_TSO4 if has_feature(features, VIRTIO_NET_F_GUEST_TSO4) else 0
    accepts |= OFFLOAD_TSO6 if has_feature(features, VIRTIO_NET_F_GUEST_TSO6) else 0
    accepts |= OFFLOAD_ECN if has_feature(features, VIRTIO_NET_F_GUEST_ECN) else 0
    accepts |= OFFLOAD_UFO if has_feature(features, VIRTIO_NET_F_GUEST_UFO) else 0
    accepts |= OFFLOAD_USO4 if has_feature(features, VIRTIO_NET_F_GUEST_USO4) else 0
    accepts |= OFFLOAD_USO6 if has_feature(features, VIRTIO_NET_F_GUEST_USO6) else 0
    return accepts

cdef inline uint32_t net_offers(uint64_t features) noexcept nogil:
    """OFFLOAD_* bits that a driver with these features may ask of the device."""
    cdef uint32_t offers = 0
    offers |= OFFLOAD_CSUM if has_feature(features, VIRTIO_NET_F_CSUM) else 0
    offers |= OFFLOAD_TSO4 if has_feature(features, VIRTIO_NET_F_HOST_TSO4) else 0
    offers |= OFFLOAD_TSO6 if has_feature(features, VIRTIO_NET_F_HOST_TSO6) else 0
    offers |= OFFLOAD_ECN if has_feature(features, VIRTIO_NET_F_HOST_ECN) else 0
    offers |= OFFLOAD_UFO if has_feature(features, VIRTIO_NET_F_HOST_UFO) else 0
    offers |= (OFFLOAD_USO4 | OFFLOAD_USO6) if has_feature(features, VIRTIO_NET_F_HOST_USO) else 0
    return offers

# Check packet.header (a private copy) against the packet's length and what may be asked (OFFLOAD_* bits): fills in
# packet.wants and normalises the header; returns -1, or the DROP_* cause.
cdef int net_header_check(packet_t* packet, uint32_t offers) noexcept nogil
