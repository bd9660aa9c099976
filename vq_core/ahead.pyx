"""Walking chains only to see what is missing."""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t
from vq_core.iotlb cimport IOTLB_PAGE, IOTLB_READ, IOTLB_WRITE, iotlb_view
from vq_core.misses cimport MISSES_MAX
from vq_core.queue_state cimport (BROKEN_AVAIL_IDX, BROKEN_MEMORY_LOST, BROKEN_MISS, BROKEN_NOT, queue_break,
                                  queue_lost, queue_translate_part)
from vq_core.ring cimport ring_begin, ring_look, ring_next_used, ring_pass
from vq_core.virtio cimport VIRTQ_DESC_F_WRITE, gpa_t, virtq_desc_t

cdef struct look_t:
    int pieces                   # that may still be looked at
    int misses                   # that were found


cdef void _look_at(queue_t* queue, virtq_desc_t* descriptor, uint32_t perm, look_t* look) noexcept nogil:
    """See what of one descriptor is mapped, up to the end of the budget."""
    cdef uint64_t addr = descriptor.addr, left = descriptor.len, part
    cdef gpa_t ignored
    while left > 0 and look.pieces > 0 and look.misses < MISSES_MAX:
        look.pieces -= 1
        if queue_translate_part(queue, addr, left, perm, &part, &ignored) == NULL:
            look.misses += 1
            part = min(left, IOTLB_PAGE - addr % IOTLB_PAGE)
        addr += part
        left -= part


cdef int ahead_look(queue_t* queue, cursor_t cursor, int count, uint32_t perms) noexcept nogil:
    cdef bint packed = queue.ring.is_packed
    cdef chain_t chain
    cdef virtq_desc_t descriptor
    cdef look_t look
    cdef uint32_t perm, steps
    cdef int whole = 0, step
    look.pieces = AHEAD_STEPS
    look.misses = 0
    for _ in range(count):
        if (not packed and cursor.taken >= cursor.known) or ring_look(&queue.ring, packed, &cursor, &descriptor) <= 0:
            break
        chain_begin(&chain, queue, cursor.head, &descriptor)
        while True:
            steps = chain.steps
            step = chain_next(&chain, queue, &descriptor)
            look.pieces -= <int>(chain.steps - steps)        # the empty ones that it skips are work too
            if step <= 0 or look.pieces <= 0 or look.misses >= MISSES_MAX:
                break
            perm = IOTLB_WRITE if descriptor.flags & VIRTQ_DESC_F_WRITE else IOTLB_READ
            if perm & perms and descriptor.addr + descriptor.len >= descriptor.addr:
                _look_at(queue, &descriptor, perm, &look)
        if step < 0 and chain.broken == BROKEN_MISS:
            look.misses += 1     # of its table
        elif step != 0 or chain_end(&chain, queue) < 0:
            break
        if look.misses == 0:
            whole += 1
        if look.pieces <= 0 or look.misses >= MISSES_MAX:
            break
        ring_pass(&queue.ring, packed, &cursor, chain.slots)
    return whole


cdef int ahead_room(queue_t* queue) noexcept nogil:
    cdef bint packed = queue.ring.is_packed
    cdef uint64_t generation = iotlb_view(queue.iotlb).generation
    cdef uint16_t position = ring_next_used(&queue.ring, packed)
    cdef uint16_t gone = <uint16_t>(position - queue.ahead_at)
    cdef cursor_t cursor
    cdef int left = 0, available
    if queue.ahead_in != 0 and gone <= queue.ahead_count:
        left = queue.ahead_count - gone
    else:
        gone = 0
    if queue.ahead_in == generation and (queue.ahead_missed or left >= max(AHEAD_LEAST // 2, queue.ahead_want // 2)):
        return left
    queue.ahead_want = <uint16_t>max(AHEAD_LEAST, min(AHEAD_MOST, max(2 * gone, queue.ahead_want - 1)))
    available = ring_begin(&queue.ring, packed, &cursor, queue.ahead_want)
    if queue_lost(queue):
        queue_break(queue, BROKEN_MEMORY_LOST, 0)
    elif available < 0:
        queue_break(queue, BROKEN_AVAIL_IDX, queue.ring.split.shadow_avail_idx)
    if queue.broken != BROKEN_NOT:
        return 0
    queue.ahead_in = generation
    queue.ahead_at = position
    queue.missed_in = 0
    queue.ahead_count = <uint16_t>ahead_look(queue, cursor, queue.ahead_want, IOTLB_WRITE)
    queue.ahead_missed = queue.missed_in != 0
    return queue.ahead_count
