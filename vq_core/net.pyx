"""The checks of a virtio-net header that asks for something; headers of zeroes never come here."""
from libc.stdint cimport uint16_t, uint32_t

cdef enum:
    TCP_HEADER_MIN = 20
    UDP_HEADER = 8


cdef int net_header_check(packet_t* packet, uint32_t offers) noexcept nogil:
    cdef virtio_net_hdr_t* header = &packet.header
    cdef uint32_t wants = 0, transport, kind
    header.flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM        # 5.1.6.2.1: the device ignores the other flags
    header.num_buffers = 0
    packet.wants = 0
    if not header.flags:
        header.csum_start = header.csum_offset = 0
        if header.gso_type == 0:
            header.hdr_len = header.gso_size = 0
            return -1
        return DROP_BAD_GSO                            # 5.1.6.2: segmentation needs NEEDS_CSUM
    # 32-bit sums of 16-bit values: no wrap (CVE-2024-11614).
    if not offers & OFFLOAD_CSUM or <uint32_t>header.csum_start + header.csum_offset + 2 > packet.length:
        return DROP_BAD_CSUM
    wants = OFFLOAD_CSUM
    if header.gso_type == 0:
        header.hdr_len = header.gso_size = 0
        packet.wants = wants
        return -1
    kind = header.gso_type & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    if header.gso_type & VIRTIO_NET_HDR_GSO_ECN:
        wants |= OFFLOAD_ECN
        if kind != VIRTIO_NET_HDR_GSO_TCPV4 and kind != VIRTIO_NET_HDR_GSO_TCPV6:
            return DROP_BAD_GSO
    transport = UDP_HEADER
    if kind == VIRTIO_NET_HDR_GSO_TCPV4:
        wants |= OFFLOAD_TSO4
        transport = TCP_HEADER_MIN
    elif kind == VIRTIO_NET_HDR_GSO_TCPV6:
        wants |= OFFLOAD_TSO6
        transport = TCP_HEADER_MIN
    elif kind == VIRTIO_NET_HDR_GSO_UDP:
        wants |= OFFLOAD_UFO
    elif kind == VIRTIO_NET_HDR_GSO_UDP_L4:
        wants |= OFFLOAD_USO4 | OFFLOAD_USO6           # the header does not say which
    else:
        return DROP_BAD_GSO
    if wants & ~offers or header.gso_size == 0 or <uint32_t>header.csum_start + transport >= packet.length:
        return DROP_BAD_GSO                            # >=: no payload behind the headers
    if header.hdr_len > packet.length or header.hdr_len < header.csum_start + transport:
        header.hdr_len = <uint16_t>(header.csum_start + transport)    # a hint only; made a plausible one
    packet.wants = <uint16_t>wants
    return -1
