"""To a guest that does not want everything: what a receive filter lets through goes on to vhost_push.pyx.

A pair without a filter has `vhost_push` as its endpoint's push and knows nothing of this one.
"""
from vq_core.port cimport endpoint_t, packet_t

cdef int vhost_push_filtered(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil
