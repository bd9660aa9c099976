"""One request queue of a virtio-blk device: taking requests from the ring, giving them back as they are done.

    free -> taken from the ring -> (done at once | in the pool) -> used element noted -> free

Requests are given back in whatever order they are done. As many are under way as there are slots here and entries in
the ring: a driver that makes a head available twice gains nothing by it.

Owner: the worker. The control thread changes the queue only by hand-over, and the worker lets nothing change before all
requests are done.
"""
from libc.stdint cimport uint64_t
from vq_core.blk_request cimport blk_request_t
from vq_core.disk cimport disk_t
from vq_core.pool cimport pool_t
from vq_core.queue_state cimport queue_t

cdef enum:
    BLK_REQUESTS_MAX = 128       # under way at once
    BLK_BURST = 16               # taken before used elements are published

cdef struct blk_counters_t:      # one writer: the worker
    uint64_t reads
    uint64_t writes
    uint64_t flushes
    uint64_t others              # get id, discard, write zeroes
    uint64_t read_bytes
    uint64_t written_bytes
    uint64_t failed              # any of these, and what is not supported
    uint64_t waited              # that went to the pool

cdef struct blk_queue_t:
    queue_t* queue
    disk_t* disk
    pool_t* pool
    blk_request_t* requests      # BLK_REQUESTS_MAX of them
    blk_request_t* free          # linked by job.next; the one used last comes first, its lines are in the cache
    int in_flight                # in the pool
    blk_counters_t counters

# Take and begin what the driver has made available; the number of requests.
cdef int blk_take(blk_queue_t* queue) noexcept nogil

# Note the used element of a request that is done.
cdef void blk_give_back(blk_queue_t* queue, blk_request_t* request) noexcept nogil

# Let go of a request that was not done.
cdef void blk_drop(blk_queue_t* queue, blk_request_t* request) noexcept nogil

# Expose what was given back since the last time, and call the driver if it wants that.
cdef void blk_publish(blk_queue_t* queue) noexcept nogil

# Ask for a kick; True if there is something to take already.
cdef bint blk_arm(blk_queue_t* queue) noexcept nogil
