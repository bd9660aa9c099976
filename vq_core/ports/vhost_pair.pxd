"""A queue pair of a guest, and what pull and push have in common.

Owner: the worker of the endpoint; the control thread changes a pair only by hand-over.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from vq_core.port cimport endpoint_t
from vq_core.queue_state cimport BROKEN_AVAIL_IDX, BROKEN_ID, BROKEN_MEMORY_LOST, queue_break, queue_lost, queue_t
from vq_core.receive_filter cimport receive_filter_t

cdef enum:
    RARP_BYTES = 60
    HEADER_MIN = 10
    HEADER_MAX = 12

cdef enum:
    ERRAND_RARP = 1              # a frame waits to be pulled as if the guest had sent it
    ERRAND_AHEAD = 2             # there is an IOMMU: translations for the receiveq are asked for before they are needed

# Outcomes of the slow paths for one packet.
cdef enum:
    DONE = 1
    NO_ROOM = 0                  # not enough buffers now
    BROKE = -1
    BURST_FULL = -2
    DROPPED = -3                 # and counted

cdef struct pair_t:
    endpoint_t* endpoint
    queue_t* receiveq
    queue_t* transmitq
    uint32_t frame_limit             # longest frame towards the guest (NET_SET_MTU); segmentation is exempt
    uint32_t errands                 # ERRAND_* bits: what a pull has to do besides
    uint32_t walked                  # descriptors that pushes have walked the slow way since the last flush (fairness)
    uint8_t rarp[RARP_BYTES]
    receive_filter_t* filter         # set exactly while the endpoint's push is vhost_push_filtered

cdef inline bint pair_lost(queue_t* queue) noexcept nogil:
    """Whether the owner truncated guest memory or dirty log under us; looked at once a burst."""
    return queue_lost(queue)

cdef inline void pair_no_entries(queue_t* queue, int available) noexcept nogil:
    """Nothing to take: break the queue if the index is impossible, or reads as zero since its memory is gone."""
    if pair_lost(queue):
        queue_break(queue, BROKEN_MEMORY_LOST, 0)
    elif available < 0:
        queue_break(queue, BROKEN_AVAIL_IDX, queue.ring.split.shadow_avail_idx)

cdef inline bint pair_id_is_wrong(queue_t* queue, bint packed, uint16_t id) noexcept nogil:
    """Break a packed ring for a buffer id outside of it (the head of a split one is checked when it is read)."""
    if packed and id >= queue.ring.num:
        queue_break(queue, BROKEN_ID, id)
        return True
    return False
