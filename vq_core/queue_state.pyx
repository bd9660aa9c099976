"""What happens to a queue_t at a burst boundary of its owner: changes, its place, its end."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_load_u16, vq_store_release_u32
from vq_core.epoll cimport EPOLLIN, epoll_move
from vq_core.hold cimport hold_end
from vq_core.iotlb cimport iotlb_translate_part, iotlb_view, iotlb_view_t
from vq_core.misses cimport misses_note
from vq_core.notify cimport notify_peer, notify_signal
from vq_core.packed_place cimport packed_place
from vq_core.ring cimport ring_t
from vq_core.split cimport split_t
from vq_core.virtio cimport gpa_t


cdef void _point(ring_t* ring, ring_t* wanted) noexcept nogil:
    """Take over where the parts of the ring lie."""
    ring.split.desc = wanted.split.desc
    ring.split.avail = wanted.split.avail
    ring.split.used = wanted.split.used
    ring.packed.desc = wanted.packed.desc
    ring.packed.driver_event = wanted.packed.driver_event
    ring.packed.device_event = wanted.packed.device_event
    ring.packed.desc_addr = wanted.packed.desc_addr


cdef void queue_break(queue_t* queue, uint32_t cause, uint32_t head) noexcept nogil:
    if queue.broken == BROKEN_NOT:
        queue.live = False
        queue.broken_at = head
        vq_store_release_u32(&queue.broken, cause)   # pairs with the acquire in Queue.poll_report
        notify_peer(queue.peer, queue.err_fd)
        notify_signal(queue.report_fd)


cdef void _decide_life(queue_t* queue) noexcept nogil:
    queue.live = queue.started and queue.enabled and queue.broken == BROKEN_NOT and not queue.unplaced \
        and queue.iotlb == NULL


cdef void queue_place(queue_t* queue) noexcept nogil:
    cdef split_t* split = &queue.ring.split
    cdef uint32_t what = queue.unplaced
    cdef uint16_t begin, exposed
    queue.unplaced = 0
    if queue.ring.is_packed:
        if what & PLACE_AVAIL:
            exposed = packed_place(&queue.ring.packed, &begin)
            if queue.log != NULL and queue.log_ring:
                queue_log_used(queue, True, begin, exposed)
    elif what & PLACE_USED:
        split.next_used = split.shadow_used = split.signalled_used = vq_load_u16(&split.used.idx)  # read once
        if what & PLACE_AVAIL:
            split.last_avail_idx = split.shadow_avail_idx = split.next_used
    _decide_life(queue)


cdef void queue_fail(queue_t* queue, uint32_t cause, uint32_t head) noexcept nogil:
    if cause == BROKEN_MISS:
        queue.parked = True
        queue.parked_in = queue.missed_in
    else:
        queue_break(queue, cause, head)


cdef uint8_t* queue_iotlb_part(queue_t* queue, uint64_t addr, uint64_t length, uint32_t perm, uint64_t* part,
                               gpa_t* guest_addr) noexcept nogil:
    cdef iotlb_view_t* view = iotlb_view(queue.iotlb)
    cdef uint8_t* host = iotlb_translate_part(view, addr, length, perm, part, guest_addr)
    if host == NULL:
        queue.missed_in = view.generation
        misses_note(queue.misses, &queue.iotlb.misses, addr, perm)
    return host


cdef void queue_apply(queue_t* queue, queue_change_t* change) noexcept nogil:
    """Take over what the control thread wants; runs at a burst boundary of the owner."""
    cdef queue_t* wanted = &change.wanted
    cdef uint32_t what = change.what
    if what & (CHANGE_KICK | CHANGE_START | CHANGE_EPOLL):
        # Never read: each kick is one edge, and a closed peer is one as well.
        epoll_move(queue.epoll_fd, -1, queue.kick_fd, EPOLLIN)
        if what & (CHANGE_KICK | CHANGE_START):
            queue.kick_fd = wanted.kick_fd
        if what & CHANGE_EPOLL:
            queue.epoll_fd = wanted.epoll_fd
        epoll_move(-1, queue.epoll_fd, queue.kick_fd, EPOLLIN)
    if what & (CHANGE_CALL | CHANGE_START):
        queue.call_fd = wanted.call_fd
    if what & (CHANGE_ERR | CHANGE_START):
        queue.err_fd = wanted.err_fd
    if what & (CHANGE_LOG | CHANGE_START):
        queue.log = wanted.log
        queue.log_ring = wanted.log_ring
        queue.log_guest_addr = wanted.log_guest_addr
    if what & CHANGE_START:
        queue.ring = wanted.ring
        queue.memory = wanted.memory
        queue.hint = wanted.hint
        queue.iotlb = wanted.iotlb
        queue.misses = wanted.misses
        queue.ahead_in = 0
        queue.features = wanted.features
        queue.indirect_limit = wanted.indirect_limit
        queue.unplaced = wanted.unplaced
        queue.inflight = wanted.inflight
        queue.broken = BROKEN_NOT
        queue.reported = 0
        queue.lives += 1
        hold_end(&queue.hold)
        queue.started = True
    if what & CHANGE_MEMORY:
        _point(&queue.ring, &wanted.ring)
        queue.memory = wanted.memory
        queue.hint = wanted.hint
        queue.unmapped = wanted.unmapped
        queue.started = not wanted.unmapped
    if what & CHANGE_ENABLED:
        queue.enabled = wanted.enabled
    if what & CHANGE_STOP:
        epoll_move(queue.epoll_fd, -1, queue.kick_fd, EPOLLIN)
        queue.started = queue.unmapped = False
        queue.unplaced = 0
        queue.kick_fd = queue.call_fd = -1
        queue.memory = NULL
        queue.hint = NULL
        queue.log = NULL
        queue.inflight = NULL
        queue.iotlb = NULL
        queue.misses = NULL
        _point(&queue.ring, &wanted.ring)        # nowhere
    queue.parked = False
    _decide_life(queue)


cdef void queue_run_change(void* target, void* argument) noexcept nogil:
    queue_apply(<queue_t*>target, <queue_change_t*>argument)
