"""Offloads in software: what a packet's header asks for and its target does not take (VIRTIO 1.3, 5.1.6.2, 5.1.6.4).

    offload_push(work, target, packets, n)    the same contract as target.push, for packets of any `wants`

Packets stay in order. Those that the target accepts go to it as they are, in runs. Each other packet is copied
once into the arena of the worker, and everything is decided on that copy: a guest may change its own memory at any
time. What comes of it is staged, and pushed in batches of BURST_MAX:

    NEEDS_CSUM only     the checksum is completed in the copy
    TCPV4, TCPV6        cut into gso_size pieces: a header of its own each, and a second segment in the copy
    UDP_L4              the same, a datagram each
    UDP                 the checksum is completed, then the datagram is cut into IP fragments

    headers[slot]  +----------------------+      arena  +-----------------------------------+
                   | Ethernet IP TCP, own |             | Ethernet IP TCP | payload ...     |
                   +----------------------+             +-----------------------------------+
    staged[slot]     data ^        more -> payloads[slot] ------------------^

A target that takes checksums but not the segmentation gets pieces with NEEDS_CSUM, and only the sum of the pseudo
header is made here.

Room: when the target has no more in the middle of a packet, the rest of that packet's pieces is dropped and counted
(DROP_NO_DESCRIPTORS of target.pushed, one a piece) and the packet is dealt with; packets of which nothing was sent
are the caller's again. Headers that do not make sense are dropped as DROP_BAD_GSO of target.pushed.

Owners: one offload_t a worker; only its thread touches it, and nothing in it outlives a call but `ident`.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.port cimport BURST_MAX, endpoint_t, packet_t, segment_t

cdef enum:
    HEADERS_MAX = 512            # bytes of all headers in front of a piece's payload
    PIECES_MAX = 1366            # of one packet: 65535 / 48, the smallest segment of any stack; bounds the work
    ARENA_STEP = 24576           # bytes of copies after which a batch is pushed: what is summed is still in L1
    ARENA_BYTES = 90176          # ARENA_STEP and one largest packet (PACKET_MAX, rounded up to 64)

cdef struct offload_t:
    uint32_t staged_count
    uint32_t arena_used          # bytes
    uint32_t ident               # of the datagram fragmented last
    uint32_t _pad
    uint16_t owners[BURST_MAX]   # by slot: index of the caller's packet
    uint16_t numbers[BURST_MAX]  # by slot: which piece of it, from 0
    packet_t staged[BURST_MAX]
    segment_t payloads[BURST_MAX]
    uint8_t headers[BURST_MAX][HEADERS_MAX]
    uint8_t arena[ARENA_BYTES]

cdef class Offload:
    cdef offload_t work

# Packets dealt with (sent, or dropped and counted); fewer than `count` only for want of room.
cdef int offload_push(offload_t* work, endpoint_t* target, packet_t* packets, int count) noexcept nogil

# Sum of `bytes` bytes as 16-bit words in memory order, not folded; `bytes` up to 2^31.
cdef uint64_t checksum_add(const uint8_t* data, uint32_t bytes) noexcept nogil

cdef inline uint16_t checksum_fold(uint64_t total) noexcept nogil:
    """The ones' complement sum in 16 bits (RFC 1071), in memory order; its complement is the checksum."""
    total = (total & 0xffffffffU) + (total >> 32)       # at most 2^33 - 2
    total = (total & 0xffff) + ((total >> 16) & 0xffff) + (total >> 32)
    total = (total & 0xffff) + (total >> 16)           # at most 0x2fffd before, 0x10000 after
    return <uint16_t>((total & 0xffff) + (total >> 16))

cdef inline uint16_t swap16(uint32_t value) noexcept nogil:
    """Between host and network order."""
    return <uint16_t>((value & 0xff) << 8 | (value >> 8 & 0xff))
