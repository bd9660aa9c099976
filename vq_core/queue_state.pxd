"""One virtqueue: ring, memory, dirty log, notification, counters, broken cause.

A queue_t belongs to one worker at a time (or to nobody, then to the control thread). The control
thread changes it only by `handover_run`: it fills a queue_change_t, and the worker copies the
fields over at its next burst boundary (`queue_apply`).

Life of a ring (vhost-user "Ring states"): two flags, started and enabled. `live` sums up what the
hot path asks: started, enabled, not broken, and no IOMMU in between. A guest that breaks its ring makes the queue
*broken*: sticky until the ring is stopped; the err eventfd is signalled once and the control
thread is told by `report_fd`. Everyone else's traffic goes on.

Behind an IOMMU (iotlb.pxd) a queue is never `live`; `queue_goes` says instead whether it can be served. When a
translation is missing its queue is *parked*: nothing of it is consumed, and it is left alone until there is a new view
of the translations. When the ring itself is not mapped any more the queue is *unmapped*: it has no pointers, so for
workers it is not started, but it keeps its indices and goes on when its memory is there again.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_load_u32
from vq_core.counters cimport counters_t
from vq_core.dirty cimport dirty_mark, dirty_t
from vq_core.hold cimport hold_t
from vq_core.inflight cimport inflight_t
from vq_core.iotlb cimport iotlb_t, iotlb_view
from vq_core.memory cimport memory_lost, memory_t, memory_translate_part, region_t
from vq_core.misses cimport miss_table_t
from vq_core.notify cimport notify_peer, peer_t
from vq_core.ring cimport ring_needs_call, ring_publish, ring_request_kick, ring_suppress_kicks, ring_t, ring_undecided
from vq_core.virtio cimport gpa_t

# Why a queue broke. Texts and spec sections: BROKEN_CAUSES in queue.pyx, in this order.
cdef enum:
    BROKEN_NOT = 0
    BROKEN_AVAIL_IDX = 1         # available index more than num ahead
    BROKEN_HEAD = 2              # head outside the descriptor table
    BROKEN_NEXT = 3              # next outside the descriptor table
    BROKEN_LOOP = 4              # more descriptors than a chain may have
    BROKEN_INDIRECT = 5          # malformed indirect descriptor
    BROKEN_ORDER = 6             # device-readable after device-writable
    BROKEN_LENGTH = 7            # chain of 2^32 bytes or more
    BROKEN_ADDRESS = 8           # address outside the guest's memory
    BROKEN_MEMORY_LOST = 9       # the owner truncated the memory under us
    BROKEN_DIRECTION = 10        # no device-readable (transmitq) or no device-writable (receiveq) descriptor
    BROKEN_ID = 11               # packed: buffer id outside the ring
    BROKEN_SIGNAL = 12           # call fd that takes too long to signal
    BROKEN_REQUEST = 13          # no whole header or no room for the status
    BROKEN_IN_FLIGHT = 14        # made available again before it was used; noticed where there is an in-flight region
    BROKEN_DEVICE = 15           # what serves the queue has failed
    BROKEN_REFUSED = 16          # a device of the embedder's refuses it: too long, or of no form that it knows
    BROKEN_MISS = 255            # not broken: a translation is missing (`queue_fail`)

# What a started ring must still read of its memory to know its place. With postcopy the reading may last, so that it is
# left to the worker.
cdef enum:
    PLACE_USED = 1               # split: where the used side stands
    PLACE_AVAIL = 2              # the available side goes on where the used side stands

cdef struct queue_t:
    ring_t ring
    memory_t* memory
    region_t* hint               # last region hit; never NULL while started
    dirty_t* log                 # NULL: LOG_ALL is off
    bint live                    # started and enabled and not broken, its place is known, and no IOMMU
    bint started                 # the ring may be touched
    bint enabled
    bint log_ring                # VRING_F_LOG: used ring stores are logged at log_guest_addr
    gpa_t log_guest_addr
    uint64_t features            # as negotiated
    uint32_t indirect_limit      # most descriptors of an indirect table
    int call_fd                  # -1: the driver polls
    int kick_fd
    int err_fd
    int report_fd                # the control thread's eventfd; -1: nobody listens
    peer_t* peer                 # never NULL
    int epoll_fd                 # the worker's, where kick_fd is watched; -1: no worker
    uint32_t unplaced            # PLACE_* bits
    uint32_t broken              # one of BROKEN_*
    uint32_t broken_at           # the head (or available index) in question
    uint32_t reported            # broken was told to the control thread
    uint32_t lives               # how often the ring was started
    uint64_t calls               # notifications sent
    uint64_t calls_suppressed    # and those that the driver did not want
    hold_t hold                  # whether the driver is being left alone
    counters_t counters
    inflight_t* inflight         # NULL: no region; only devices that complete out of order look here
    iotlb_t* iotlb               # NULL: addresses of descriptors are guest addresses
    miss_table_t* misses         # with an IOMMU: where to note what it does not know
    bint parked                  # with an IOMMU: something was missing in the view `parked_in`
    bint unmapped                # started for the front-end, but the ring is not mapped
    uint64_t missed_in           # generation of the view that the last miss was seen in
    uint64_t parked_in
    uint64_t ahead_in            # ... and of the last look ahead (ahead.pyx); 0: there was none
    uint16_t ahead_at            # position that it began at
    uint16_t ahead_count         # buffers from there on that are mapped
    uint16_t ahead_want          # how far it looked
    bint ahead_missed            # and whether it found something that is not mapped

# Read from the ring where it goes on; waits as long as its memory makes it wait.
cdef void queue_place(queue_t* queue) noexcept nogil

cdef inline bint queue_comes_alive(queue_t* queue) noexcept nogil:
    """Whether a queue that is not live can be served: its worker has just found its place, or it is behind an IOMMU."""
    if queue.unplaced and queue.started:
        queue_place(queue)
    return queue.live or queue_goes(queue)

cdef inline bint queue_takes(queue_t* queue) noexcept nogil:
    """For the control thread: whether the queue is live, or will be as soon as its worker has found its place."""
    return (queue.started or queue.unmapped) and queue.enabled and queue.broken == BROKEN_NOT

cdef inline void queue_publish(queue_t* queue, bint packed, uint16_t position) noexcept nogil:
    """Expose the used elements before `position`, and log what that changed."""
    cdef uint16_t slot = queue.ring.packed.used_slot if packed else queue.ring.split.shadow_used
    cdef uint32_t moved = queue.ring.packed.moved
    ring_publish(&queue.ring, packed, position)
    if queue.log != NULL and queue.log_ring:
        # After the stores: a page that is copied between a mark and its store would be clean and stale.
        queue_log_used(queue, packed, slot, queue.ring.packed.moved - moved)

cdef inline void queue_log_used(queue_t* queue, bint packed, uint16_t slot, uint32_t slots) noexcept nogil:
    """Log what was published from `slot` on: in the packed layout so many slots, else all there is."""
    cdef uint16_t slot_mask = queue.ring.split.mask
    cdef uint32_t part
    if packed:
        # Each descriptor under its own guest address; log_guest_addr is that of the event structure.
        while slots > 0:
            part = min(slots, <uint32_t>(queue.ring.num - slot))
            dirty_mark(queue.log, queue.ring.packed.desc_addr + 16 * <uint64_t>slot, 16 * <uint64_t>part)
            slots -= part
            slot = 0
        return
    slots = <uint16_t>(queue.ring.split.shadow_used - slot)
    slot &= slot_mask
    while slots > 0:
        part = min(slots, <uint32_t>(queue.ring.num - slot))
        dirty_mark(queue.log, queue.log_guest_addr + 4 + 8 * <uint64_t>slot, 8 * <uint64_t>part)
        slots -= part
        slot = 0
    dirty_mark(queue.log, queue.log_guest_addr, 4)

cdef inline void queue_suppress_kicks(queue_t* queue, bint packed) noexcept nogil:
    """Ask for no kicks, and log the store that says so: flags or the device's event structure."""
    cdef bint told = ring_suppress_kicks(&queue.ring, packed)
    if told and queue.log != NULL and queue.log_ring:
        dirty_mark(queue.log, queue.log_guest_addr, 4 if packed else 2)

cdef inline void queue_request_kick(queue_t* queue) noexcept nogil:
    """Ask for a kick, and log the store that says so: flags, avail_event or the device's event structure."""
    cdef uint64_t event = 0
    ring_request_kick(&queue.ring, queue.ring.is_packed)
    if queue.log != NULL and queue.log_ring:
        if not queue.ring.is_packed and queue.ring.split.event_idx:
            event = 4 + 8 * <uint64_t>queue.ring.num
        dirty_mark(queue.log, queue.log_guest_addr + event, 4 if queue.ring.is_packed else 2)

# Stop the queue for good (until its ring is stopped): bad input of the guest, or a peer that makes signals last.
cdef void queue_break(queue_t* queue, uint32_t cause, uint32_t head) noexcept nogil

# As `queue_break`, but for BROKEN_MISS the queue is parked.
cdef void queue_fail(queue_t* queue, uint32_t cause, uint32_t head) noexcept nogil

# ---- addresses ----

# The part of `queue_translate_part` behind an IOMMU; what is missing is noted.
cdef uint8_t* queue_iotlb_part(queue_t* queue, uint64_t addr, uint64_t length, uint32_t perm, uint64_t* part,
                               gpa_t* guest_addr) noexcept nogil

cdef inline uint8_t* queue_translate_part(queue_t* queue, uint64_t addr, uint64_t length, uint32_t perm, uint64_t* part,
                                          gpa_t* guest_addr) noexcept nogil:
    """The pointer for an address that a descriptor holds, for the slow paths, which alone serve a queue with an IOMMU.

    Parameters
    ----------
    length
        Bytes, more than 0.
    perm
        IOTLB_READ or IOTLB_WRITE: what is going to be done to the memory.
    part
        How many of the bytes lie together there.
    guest_addr
        Their guest physical address, for the dirty log.

    Returns
    -------
    uint8_t*
        NULL, and `queue_fail` with `queue_absent` is due.
    """
    if queue.iotlb != NULL:
        return queue_iotlb_part(queue, addr, length, perm, part, guest_addr)
    guest_addr[0] = addr
    return memory_translate_part(queue.memory, &queue.hint, addr, length, part)

cdef inline uint32_t queue_absent(queue_t* queue) noexcept nogil:
    """What an address without a translation means: the driver's fault, or something to wait for."""
    return BROKEN_ADDRESS if queue.iotlb == NULL else BROKEN_MISS

cdef inline bint queue_waits(queue_t* queue) noexcept nogil:
    """Whether the queue is parked; not any more when there is a new view of the translations."""
    if queue.parked and iotlb_view(queue.iotlb).generation != queue.parked_in:
        queue.parked = False
    return queue.parked

cdef inline bint queue_goes(queue_t* queue) noexcept nogil:
    """Whether a queue that is not `live` can be served all the same: behind an IOMMU."""
    return queue.iotlb != NULL and queue.started and queue.enabled and queue.broken == BROKEN_NOT \
        and not queue.unplaced and not queue_waits(queue)

cdef inline bint queue_pauses(queue_t* queue) noexcept nogil:
    """Whether the queue will go on as soon as translations are there: what is for it can wait."""
    return queue.enabled and queue.broken == BROKEN_NOT and (queue.unmapped or queue.parked)

cdef inline void queue_flush(queue_t* queue) noexcept nogil:
    """Call the driver if it wants to know of what was published since the last flush."""
    if not ring_undecided(&queue.ring, queue.ring.is_packed):
        return
    if ring_needs_call(&queue.ring, queue.ring.is_packed):
        queue.calls += 1
        if notify_peer(queue.peer, queue.call_fd):
            queue_break(queue, BROKEN_SIGNAL, 0)
    else:
        queue.calls_suppressed += 1

cdef inline bint queue_lost(queue_t* queue) noexcept nogil:
    """Whether the owner truncated guest memory or dirty log under us; looked at once a burst."""
    return memory_lost(queue.memory) or (queue.log != NULL and vq_load_u32(&queue.log.lost) != 0)

# What the control thread wants changed; applied at a burst boundary.
cdef enum:
    CHANGE_START = 1             # ring, indices, memory, log, features, fds
    CHANGE_STOP = 2
    CHANGE_ENABLED = 4
    CHANGE_KICK = 8
    CHANGE_CALL = 16
    CHANGE_ERR = 32
    CHANGE_MEMORY = 64           # memory and ring pointers, or none (unmapped); indices stay
    CHANGE_LOG = 128             # log, log_ring, log_guest_addr
    CHANGE_EPOLL = 256
    CHANGE_SUSPEND = 512         # with STOP: what is under way need not be done, the region tells of it

cdef struct queue_change_t:
    uint32_t what                # CHANGE_* bits
    queue_t wanted               # the fields that `what` names

cdef void queue_apply(queue_t* queue, queue_change_t* change) noexcept nogil

# The command by which a change comes to a worker: its target is the queue, its argument the change.
cdef void queue_run_change(void* target, void* argument) noexcept nogil
