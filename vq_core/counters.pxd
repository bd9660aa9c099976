"""Counters of one direction of a port or queue: one writer (the owning worker), any reader.

Readers may see a value that is a moment old, never a torn one: fields are 64 bits and aligned.
"""
from libc.stdint cimport uint32_t, uint64_t
from vq_core.arch cimport vq_log2

# Why a packet was dropped. Names for people: DROP_NAMES in counters.pyx, in this order.
cdef enum:
    DROP_DISABLED = 0            # the ring is started but disabled: consumed without side effects
    DROP_NO_DESCRIPTORS = 1      # the driver posted too few buffers
    DROP_TOO_SHORT = 2           # shorter than its virtio-net header, or no payload
    DROP_TOO_LONG = 3            # above 65535 bytes and headers, or larger than the buffers can ever be
    DROP_BAD_CSUM = 4            # csum_start + csum_offset + 2 beyond the packet, or CSUM not negotiated
    DROP_BAD_GSO = 5             # unknown or not negotiated gso_type, gso_size 0, truncated headers
    DROP_SEGMENTS = 6            # more segments than a burst can hold
    DROP_MTU = 7                 # longer than the MTU that the front-end set
    DROP_NOT_CONNECTED = 8       # the target has no front-end, or its ring is not started
    DROP_IO_ERROR = 9            # the kernel refused the packet (TAP, file)
    DROP_NO_TARGET = 10          # a switch found no other port for it
    DROP_FILTERED = 11           # the driver does not want it: address or VLAN
    DROP_PROGRAM = 12            # a program said so, or named a port that there is not
    DROP_CAUSES = 13

cdef enum:
    BURST_BINS = 6               # 1, 2 to 3, 4 to 7, 8 to 15, 16 to 31, 32 packets

cdef struct counters_t:
    uint64_t packets
    uint64_t bytes
    uint64_t cycles              # of the time stamp counter, in rounds that moved packets this way
    uint64_t empty_polls         # rounds that found nothing to pull
    uint64_t bursts[BURST_BINS]  # rounds by how many packets they moved
    uint64_t dropped[DROP_CAUSES]

cdef inline void counters_round(counters_t* counters, uint32_t count, uint64_t cycles) noexcept nogil:
    """Note a round that moved `count` packets, 1 to BURST_MAX."""
    counters.cycles += cycles
    counters.bursts[vq_log2(count)] += 1

# {"packets", "bytes", "dropped": {cause: n}}, only causes that occurred.
cdef dict counters_snapshot(counters_t* counters)

# {"busy_cycles", "cycles_per_packet", "empty_polls", "bursts": {size: n}}: what the packets cost.
cdef dict counters_work(counters_t* counters)
