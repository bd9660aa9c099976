"""Requests between a ring and the pool."""
from vq_core.ahead cimport ahead_look
from vq_core.blk_request cimport (VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, blk_begin,
                                  blk_finish, blk_parse, blk_request_t)
from vq_core.chain cimport chain_begin, chain_t
from vq_core.inflight cimport (inflight_again_t, inflight_give_back, inflight_is_again, inflight_lost,
                               inflight_published, inflight_publishing, inflight_t, inflight_take)
from vq_core.packed cimport packed_descriptor
from vq_core.split cimport split_descriptor
from vq_core.cursor cimport cursor_t
from vq_core.iotlb cimport IOTLB_READ, IOTLB_WRITE
from vq_core.pool cimport pool_submit
from vq_core.queue_state cimport (BROKEN_AVAIL_IDX, BROKEN_HEAD, BROKEN_ID, BROKEN_IN_FLIGHT, BROKEN_MEMORY_LOST,
                                  queue_break, queue_comes_alive, queue_flush, queue_goes, queue_lost, queue_publish,
                                  queue_request_kick, queue_suppress_kicks, queue_t)
from vq_core.ring cimport (ring_begin, ring_commit_take, ring_give_back, ring_has_more, ring_known, ring_look,
                           ring_next_used, ring_shadow_used, ring_t, ring_take)
from vq_core.virtio cimport virtq_desc_t, virtq_packed_desc_t


cdef inline int _room(blk_queue_t* queue) noexcept nogil:
    """How many requests may be taken now."""
    return min(BLK_BURST, min(BLK_REQUESTS_MAX, <int>queue.queue.ring.num) - queue.in_flight)


cdef inline void _count(blk_queue_t* queue, blk_request_t* request) noexcept nogil:
    cdef bint done = request.result == VIRTIO_BLK_S_OK
    if not done:
        queue.counters.failed += 1
    if request.type == VIRTIO_BLK_T_IN:
        queue.counters.reads += 1
        if done:
            queue.counters.read_bytes += request.writable_bytes
    elif request.type == VIRTIO_BLK_T_OUT:
        queue.counters.writes += 1
        if done:
            queue.counters.written_bytes += request.readable_bytes
    elif request.type == VIRTIO_BLK_T_FLUSH:
        queue.counters.flushes += 1
    else:
        queue.counters.others += 1


cdef void blk_give_back(blk_queue_t* queue, blk_request_t* request) noexcept nogil:
    ring_give_back(&queue.queue.ring, queue.queue.ring.is_packed, request.id, blk_finish(request, queue.queue),
                   request.slots)
    inflight_give_back(queue.queue.inflight, request.id)
    _count(queue, request)
    blk_drop(queue, request)


cdef void blk_drop(blk_queue_t* queue, blk_request_t* request) noexcept nogil:
    request.job.next = &queue.free.job if queue.free != NULL else NULL
    queue.free = request


cdef void blk_publish(blk_queue_t* queue) noexcept nogil:
    cdef ring_t* ring = &queue.queue.ring
    cdef bint packed = ring.is_packed
    if queue.queue.started and ring_next_used(ring, packed) != ring_shadow_used(ring, packed):
        inflight_publishing(queue.queue.inflight, ring)
        queue_publish(queue.queue, packed, ring_next_used(ring, packed))
        inflight_published(queue.queue.inflight, ring)
        queue_flush(queue.queue)


cdef inline void _begin(blk_queue_t* blk, blk_request_t* request) noexcept nogil:
    """Begin a request that was taken."""
    blk.free = <blk_request_t*>request.job.next
    if blk_begin(request):
        blk_give_back(blk, request)
    else:
        blk.in_flight += 1
        blk.counters.waited += 1
        pool_submit(blk.pool, &request.job)


cdef inline bint _parse_again(blk_queue_t* blk, blk_request_t* request, inflight_again_t* again,
                              bint packed) noexcept nogil:
    """Fill the request from a chain that was taken before a crash; False: not now, or the queue is broken.

    The copied descriptors of a packed chain stand in for its ring: one of them follows another.
    """
    cdef queue_t* queue = blk.queue
    cdef ring_t* ring = &queue.ring
    cdef virtq_packed_desc_t* desc = ring.packed.desc
    cdef virtq_desc_t descriptor
    cdef chain_t chain
    cdef int status
    if packed:
        ring.packed.desc = &queue.inflight.copies[again.copy]
        packed_descriptor(&ring.packed, 0, &descriptor)
        chain_begin(&chain, queue, 0, &descriptor)
    else:
        split_descriptor(&ring.split, again.id, &descriptor)
        chain_begin(&chain, queue, again.id, &descriptor)
    status = blk_parse(request, queue, &chain)
    ring.packed.desc = desc
    return status >= 0


cdef int _take_again(blk_queue_t* blk, bint packed) noexcept nogil:
    """Begin what the in-flight region tells of once more, in its order; the number of requests."""
    cdef inflight_t* inflight = blk.queue.inflight
    cdef blk_request_t* request
    cdef int count = 0, room = _room(blk)
    while count < room and inflight_is_again(inflight):
        request = blk.free
        if not _parse_again(blk, request, &inflight.again[inflight.again_next], packed):
            break
        inflight.again_next += 1
        _begin(blk, request)
        count += 1
    return count


cdef inline int _take(blk_queue_t* blk, bint packed) noexcept nogil:
    """Take from a live ring; `packed` is a literal."""
    cdef queue_t* queue = blk.queue
    cdef ring_t* ring = &queue.ring
    cdef blk_request_t* request
    cdef virtq_desc_t descriptor
    cdef cursor_t cursor
    cdef chain_t chain
    cdef int room = _room(blk), available, status
    if room <= 0:
        return 0
    if inflight_lost(queue.inflight):
        queue_break(queue, BROKEN_MEMORY_LOST, 0)
        return 0
    if inflight_is_again(queue.inflight):
        return _take_again(blk, packed)
    available = ring_begin(ring, packed, &cursor, room)
    if queue_lost(queue):
        queue_break(queue, BROKEN_MEMORY_LOST, 0)
        return 0
    if available < 0:
        queue_break(queue, BROKEN_AVAIL_IDX, ring.split.shadow_avail_idx)
    if available <= 0:
        return 0
    queue_suppress_kicks(queue, packed)
    available = min(available, room)
    while <int>cursor.taken < available:
        status = ring_look(ring, packed, &cursor, &descriptor)
        if status < 0:
            queue_break(queue, BROKEN_HEAD, ring.split.bad_head)
        if status <= 0:
            break
        chain_begin(&chain, queue, cursor.head, &descriptor)
        request = blk.free
        if blk_parse(request, queue, &chain) < 0:
            if queue.parked:     # one answer for all that is missing, not one after the other
                ahead_look(queue, cursor, available, IOTLB_READ | IOTLB_WRITE)
            break
        if packed and chain.id >= ring.num:
            queue_break(queue, BROKEN_ID, chain.id)
            break
        if not inflight_take(queue.inflight, ring, cursor.head, chain.slots, chain.id):
            queue_break(queue, BROKEN_IN_FLIGHT, chain.id)
            break
        ring_take(ring, packed, &cursor, chain.slots)
        _begin(blk, request)
    ring_commit_take(ring, packed, &cursor)
    return cursor.taken


cdef int blk_take(blk_queue_t* queue) noexcept nogil:
    if not queue.queue.live and not queue_comes_alive(queue.queue):
        return 0                 # of a disabled ring nothing is taken: no request can be done without an effect
    if queue.queue.ring.is_packed:
        return _take(queue, True)
    return _take(queue, False)


cdef bint blk_arm(blk_queue_t* queue) noexcept nogil:
    cdef ring_t* ring = &queue.queue.ring
    cdef bint packed = ring.is_packed
    if not (queue.queue.live or queue_goes(queue.queue)) or _room(queue) <= 0:
        return False             # what is under way wakes us when it is done
    if inflight_is_again(queue.queue.inflight):
        return True
    if queue.queue.kick_fd < 0 or ring_known(ring, packed) > 0:
        return True              # without a kick fd nobody would wake us: the ring is polled
    queue_request_kick(queue.queue)
    # Also for an impossible index, or when memory was lost: taking breaks the ring.
    return ring_has_more(ring, packed) or queue_lost(queue.queue)
