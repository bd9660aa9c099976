"""Looking ahead behind an IOMMU: what buffers need is asked for before it is needed.

An answer takes a round trip through the front-end, and a packet of 64 KiB lies in 17 pages and more: asked for one by
one they would cost as many round trips. So when something is missing, everything that is missing for this and the next
buffers is noted at once; and the buffers of a receiveq are looked at before there is a packet for them, since what
cannot be delivered at once may have to be dropped.

Nothing is taken or written here, and a malformed chain only ends the look: whoever serves it finds out.

Thread: the worker that owns the queue.
"""
from libc.stdint cimport uint32_t
from vq_core.cursor cimport cursor_t
from vq_core.queue_state cimport queue_t

cdef enum:
    AHEAD_LEAST = 16             # buffers of a receiveq
    AHEAD_MOST = 128             # while the driver's traffic uses up as many between two looks
    AHEAD_STEPS = 4096           # descriptors and pieces of memory in one look (fairness)

# Note what is missing for `count` buffers from the cursor on; how many of them, up to the first miss, lack nothing.
# `perms`: which kinds of descriptors count, IOTLB_READ for device-readable ones and IOTLB_WRITE for device-writable.
cdef int ahead_look(queue_t* queue, cursor_t cursor, int count, uint32_t perms) noexcept nogil

# The next buffers of a receiveq that can be written to; it must go (`queue_goes`).
cdef int ahead_room(queue_t* queue) noexcept nogil
