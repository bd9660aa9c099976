"""Which packets a driver wants to receive (VIRTIO 1.3, 5.1.6.5.1 to 5.1.6.5.3): by address, by VLAN tag.

A filter is immutable. The control thread builds a new one for each command of the control queue and hands it over; a
port without one never comes here. The Ethernet header is copied out of the source's memory before it is looked at; a
guest that rewrites it meanwhile gets a packet past another guest's filter, which is a convenience and no wall.

Addresses stand in a table with open addressing that is never more than half full, so each look-up ends. Unicast and
multicast share it: they differ in a bit of the address.

Thread: any number of workers at once.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_snapshot_u16, vq_snapshot_u64
from vq_core.port cimport packet_t

cdef enum:
    FILTER_BITS = 8
    FILTER_SLOTS = 256
    FILTER_MACS_MAX = 128        # half of the slots
    HEAD_BYTES = 16              # addresses, and type or tag: what a filter looks at

cdef enum:
    FILTER_MAC = 0xffffffffffff  # of the first eight bytes of a frame: its destination
    FILTER_BROADCAST = 0xffffffffffff
    FILTER_MULTICAST = 1         # group bit of the first byte
    FILTER_IN_USE = 0x1000000000000      # of a slot
    ETHERTYPE_VLAN = 0x0081      # 0x8100 and the identifier, as a little-endian host reads them

# What packets of one class are let through.
cdef enum:
    PASS_LISTED = 0              # those whose address is in the table
    PASS_ALL = 1
    PASS_NONE = 2

cdef struct receive_filter_t:
    uint32_t unicast             # PASS_*
    uint32_t multicast
    uint32_t broadcast
    bint by_vlan                 # tagged packets must be of a VLAN that is listed
    uint64_t macs[FILTER_SLOTS]  # address | FILTER_IN_USE; 0: empty
    uint32_t vlans[128]          # bit map of 4096

cdef inline uint32_t filter_slot(uint64_t mac) noexcept nogil:
    """Where the search for an address begins (multiplicative hashing)."""
    return <uint32_t>((mac * <uint64_t>0x9e3779b97f4a7c15) >> (64 - FILTER_BITS))

cdef inline bint filter_lists(receive_filter_t* filter, uint64_t mac) noexcept nogil:
    """Whether the table holds an address."""
    cdef uint32_t slot = filter_slot(mac)
    while filter.macs[slot] != 0:
        if filter.macs[slot] == mac | FILTER_IN_USE:
            return True
        slot = (slot + 1) & (FILTER_SLOTS - 1)
    return False

# The first HEAD_BYTES of a packet that has them in several segments.
cdef void filter_gather(packet_t* packet, uint8_t* to) noexcept nogil

cdef inline bint filter_passes(receive_filter_t* filter, packet_t* packet) noexcept nogil:
    """Whether the driver wants the packet."""
    cdef uint8_t head[HEAD_BYTES]
    cdef uint8_t* frame = packet.data
    cdef uint64_t mac
    cdef uint32_t kind
    cdef uint16_t vlan
    if packet.head_bytes < HEAD_BYTES:
        filter_gather(packet, head)
        frame = head
    if filter.by_vlan and vq_snapshot_u16(frame + 12) == ETHERTYPE_VLAN:
        vlan = vq_snapshot_u16(frame + 14)
        vlan = (vlan >> 8 | vlan << 8) & 0xfff
        # Identifier 0 is no VLAN but a priority (802.1Q).
        if vlan != 0 and not filter.vlans[vlan >> 5] >> (vlan & 31) & 1:
            return False
    mac = vq_snapshot_u64(frame) & FILTER_MAC
    kind = filter.broadcast if mac == <uint64_t>FILTER_BROADCAST else \
        filter.multicast if mac & FILTER_MULTICAST else filter.unicast
    return kind == PASS_ALL or (kind == PASS_LISTED and filter_lists(filter, mac))

cdef class ReceiveFilter:
    cdef receive_filter_t filter
