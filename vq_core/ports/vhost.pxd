"""The vhost-user-net port: queue pairs of one device as endpoints of a pump.

A pair joins a transmitq (packets are pulled from it) and a receiveq (packets are pushed to it). The
straight line, one descriptor in one region, is handled in batches in two passes: first all heads and
descriptors (so that payload lines are prefetched), then headers and copies. Everything else goes packet
by packet over the chain cursor.

Used elements are written when a chain is taken and become visible by one index store: for the
transmitq when the packets are released, for the receiveq at the end of a push.

Owner: the worker of the endpoint; the control thread changes a pair only by hand-over.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vq_core.port cimport Port, endpoint_t
from vq_core.queue cimport Queue, queue_t

cdef enum:
    RARP_BYTES = 60

cdef struct pair_t:
    endpoint_t* endpoint
    queue_t* receiveq
    queue_t* transmitq
    uint32_t frame_limit             # longest frame towards the guest (NET_SET_MTU); segmentation is exempt
    uint32_t rarp_pending            # a frame waits to be pulled as if the guest had sent it
    uint8_t rarp[RARP_BYTES]

cdef class VhostPort(Port):
    cdef pair_t* pairs
    cdef readonly tuple queues       # Queue objects: 2i is receiveq i, 2i + 1 is transmitq i
