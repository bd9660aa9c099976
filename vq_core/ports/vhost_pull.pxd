"""From a guest: packets out of its transmitq, borrowed until they are released.

The straight line, one descriptor in one region, is handled in batches in two passes: first all heads and descriptors
(so that payload lines are prefetched), then headers. Everything else goes packet by packet over the chain cursor.

Used elements are noted when a chain is taken and become visible when the packets are released.
"""
from vq_core.port cimport burst_t, endpoint_t

cdef int vhost_pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil
cdef void vhost_release(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil
