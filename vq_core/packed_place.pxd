"""Where a packed ring goes on: in the split layout the ring says so, in the packed one its marks must be read.

Threads: the owner of the ring.
Spec: VIRTIO 1.3, 2.8.1 (wrap counters); vhost-user, "Reconnect and in-flight", SET_VRING_BASE.
"""
from libc.stdint cimport uint16_t
from vq_core.packed cimport packed_t

# Put a started ring right that goes on where another back-end stopped, all of whose buffers were used. How many slots
# from the one in which it began were exposed, because the other one ended while it did that.
cdef uint16_t packed_place(packed_t* ring, uint16_t* begin) noexcept nogil

# Let a ring go on at a slot, with both wrap counters.
cdef void packed_go_to(packed_t* ring, uint16_t slot, bint wrap) noexcept nogil
