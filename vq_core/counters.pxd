"""Counters of one direction of a port or queue: one writer (the owning worker), any reader.

Readers may see a value that is a moment old, never a torn one: fields are 64 bits and aligned.
"""
from libc.stdint cimport uint64_t

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
    DROP_CAUSES = 11

cdef struct counters_t:
    uint64_t packets
    uint64_t bytes
    uint64_t dropped[DROP_CAUSES]

# {"packets", "bytes", "dropped": {cause: n}}, only causes that occurred.
cdef dict counters_snapshot(counters_t* counters)
