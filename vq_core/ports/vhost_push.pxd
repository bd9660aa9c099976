"""To a guest: packets into its receiveq, the only copy of their payload.

As in vhost_pull.pxd the straight line goes in batches and everything else over the chain cursor: chains, indirect
tables, several regions, a packet over several buffers. Used elements become visible by one store at the end of a push.
"""
from vq_core.port cimport endpoint_t, packet_t

cdef int vhost_push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil
cdef int vhost_room(endpoint_t* endpoint) noexcept nogil
