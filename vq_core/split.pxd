"""The split virtqueue, device side: the only reader and writer of that layout (VIRTIO 1.3, 2.7).

Every shared field has one getter or setter here. What the device wrote (used ring, avail_event)
is never read back: the shadows below are the truth. What the driver writes (descriptors,
available ring) is read once, into private copies.

packed.pxd has the same verbs for the other layout, ring.pxd chooses between them.

Owner: the worker that owns the queue; nobody else touches a split_t while its ring is started.

Positions run freely modulo 2^16; a slot is position & mask. Invariants:
    next_used - last_avail_idx  is at most 0 (we never use more than we took) at the end of a burst, and
    shadow_avail_idx - last_avail_idx <= num, and
    next_head <= mask, whatever the driver says.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport (vq_fence, vq_load_acquire_u16, vq_load_u16, vq_prefetch, vq_prefetch_write,
                           vq_snapshot16, vq_store_release_u16, vq_store_u16, vq_store_u64)
from vq_core.cursor cimport cursor_t
from vq_core.virtio cimport (VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_USED_F_NO_NOTIFY, virtq_avail_t, virtq_desc_t,
                             virtq_used_t)
from vq_core.notify cimport notify_crossed

cdef struct split_t:
    virtq_desc_t* desc            # num entries, 16-byte aligned
    virtq_avail_t* avail          # 2-byte aligned
    virtq_used_t* used            # 4-byte aligned
    uint16_t num                  # power of two; 0: not configured
    uint16_t mask                 # num - 1
    uint16_t last_avail_idx       # position of the next available entry to take
    uint16_t shadow_avail_idx     # avail->idx as last read
    uint16_t next_used            # position of the next used element to write
    uint16_t shadow_used          # used->idx as last published
    uint16_t signalled_used       # shadow_used at the last decision about a call
    bint signalled_valid          # False: no decision since the ring started
    bint event_idx                # VIRTIO_F_EVENT_IDX was negotiated
    bint suppressing              # the driver is asked not to kick
    bint in_order                 # VIRTIO_F_IN_ORDER was negotiated: descriptors are used in the order of the table
    bint in_step                  # ... and next_head is known
    uint16_t next_head            # head of the next buffer to take
    uint16_t bad_head             # for messages: the head that split_look refused last
    uint16_t* heads               # private, num of them: heads of what waits to be published as a batch; or NULL

# ---- buffers to take ----

cdef inline int split_available(split_t* ring) noexcept nogil:
    """Number of buffers to take, reading the driver's index anew; -1 if it runs ahead of the ring."""
    # Acquire: pairs with the driver's release of idx; descriptors and ring entries stand before it.
    ring.shadow_avail_idx = vq_load_acquire_u16(&ring.avail.idx)
    cdef uint16_t count = <uint16_t>(ring.shadow_avail_idx - ring.last_avail_idx)
    if count > ring.num:
        ring.shadow_avail_idx = ring.last_avail_idx
        return -1
    return count

cdef inline int split_known(split_t* ring) noexcept nogil:
    """Number of buffers to take that are known already, without touching the driver's line."""
    return <uint16_t>(ring.shadow_avail_idx - ring.last_avail_idx)

cdef inline bint split_has_more(split_t* ring) noexcept nogil:
    """Whether there is more than is known, or an impossible index."""
    cdef int known = split_known(ring)
    return split_available(ring) != known

cdef inline int split_ready(split_t* ring, int want) noexcept nogil:
    """As `split_available`, but without touching the driver's line when `want` buffers are known already."""
    cdef int count = split_known(ring)
    return count if count >= want else split_available(ring)

cdef inline bint split_ahead(split_t* ring, int count) noexcept nogil:
    """Whether `count` buffers are there to take, or an impossible index is."""
    cdef int ready = split_ready(ring, count)
    return ready < 0 or ready >= count

cdef inline int split_begin(split_t* ring, cursor_t* cursor, int want) noexcept nogil:
    """Set the cursor to the next buffer: how many there are (`want` and more are not looked for), -1 as above."""
    cdef int count = split_ready(ring, want)
    cursor.taken = cursor.flags = 0
    cursor.head = ring.next_head
    cursor.known = <uint16_t>count if count > 0 else 0
    return count

cdef inline void split_prefetch(split_t* ring, cursor_t* cursor, int count) noexcept nogil:
    """Bring the descriptors of the next `count` buffers on their way; four lie in a line when they are in order."""
    cdef int ahead
    if ring.in_step:
        for ahead in range(0, count, 4):
            vq_prefetch(&ring.desc[<uint16_t>(cursor.head + ahead) & ring.mask])
        return
    for ahead in range(0, count, 4):
        vq_prefetch(&ring.desc[vq_load_u16(&ring.avail.ring[<uint16_t>(ring.last_avail_idx + ahead) & ring.mask])
                               & ring.mask])

cdef inline void split_prefetch_used(split_t* ring, int count) noexcept nogil:
    """Bring the next `count` used elements on their way, to be written; eight lie in a line."""
    cdef int ahead
    for ahead in range(0, count + 7, 8):
        vq_prefetch_write(&ring.used.ring[<uint16_t>(ring.next_used + ahead) & ring.mask])

cdef inline int split_more(split_t* ring, cursor_t* cursor) noexcept nogil:
    """Whether there is a buffer at the cursor: 1 or 0, looking anew behind what was known; -1 as above."""
    cdef int count
    if cursor.taken < cursor.known:
        return 1
    count = split_available(ring)
    if count < 0:
        return -1
    cursor.known = <uint16_t>count
    return cursor.taken < cursor.known

cdef inline bint split_is_full(split_t* ring, cursor_t* first, cursor_t* cursor) noexcept nogil:
    """Whether all buffers that the ring can ever hold lie between `first` and the cursor."""
    return <uint16_t>(cursor.taken - first.taken) >= ring.num

cdef inline int split_look(split_t* ring, cursor_t* cursor, virtq_desc_t* copy) noexcept nogil:
    """Copy the first descriptor at the cursor (before `known`), once: 1, or -1 for a head outside the ring.

    In step with the driver the available ring is not read: the head follows from the buffer before (2.7.9).
    """
    cdef uint16_t head
    if not ring.in_step:
        head = vq_load_u16(&ring.avail.ring[<uint16_t>(ring.last_avail_idx + cursor.taken) & ring.mask])
        if head >= ring.num:
            ring.bad_head = head
            return -1
        cursor.head = head           # not before: callers may go on without this buffer, and commit the cursor
    vq_snapshot16(copy, &ring.desc[cursor.head])
    return 1

cdef inline void split_use(split_t* ring, cursor_t* cursor, uint16_t id, uint32_t length,
                           uint16_t slots) noexcept nogil:
    """Take the buffer at the cursor, `slots` descriptors, and note its used element, seen after `split_publish`."""
    cdef uint16_t slot = <uint16_t>(ring.next_used + cursor.taken) & ring.mask
    if ring.heads != NULL:
        ring.heads[slot] = cursor.head
    else:
        vq_store_u64(&ring.used.ring[slot], <uint64_t>cursor.head | <uint64_t>length << 32)
    cursor.head = <uint16_t>(cursor.head + slots) & ring.mask
    cursor.taken += 1

cdef inline void split_commit(split_t* ring, cursor_t* cursor) noexcept nogil:
    """What the cursor has passed is taken."""
    ring.next_head = cursor.head & ring.mask
    ring.in_step = ring.in_order and (ring.in_step or cursor.taken > 0)
    ring.last_avail_idx = <uint16_t>(ring.last_avail_idx + cursor.taken)
    ring.next_used = <uint16_t>(ring.next_used + cursor.taken)

# Out of order: what was taken is given back later, one by one, in any order.

cdef inline void split_take(split_t* ring, cursor_t* cursor, uint16_t slots) noexcept nogil:
    """Take the buffer at the cursor."""
    cursor.taken += 1

cdef inline void split_commit_take(split_t* ring, cursor_t* cursor) noexcept nogil:
    """What the cursor has passed is taken, and none of it is used yet."""
    ring.last_avail_idx = <uint16_t>(ring.last_avail_idx + cursor.taken)

cdef inline void split_give_back(split_t* ring, uint16_t id, uint32_t length) noexcept nogil:
    """Note the used element of a buffer that was taken, seen after `split_publish`; not with IN_ORDER."""
    vq_store_u64(&ring.used.ring[ring.next_used & ring.mask], <uint64_t>id | <uint64_t>length << 32)
    ring.next_used += 1

cdef inline uint16_t split_position(split_t* ring, cursor_t* cursor) noexcept nogil:
    """Where to publish to so that everything before the cursor is used."""
    return <uint16_t>(ring.next_used + cursor.taken)

cdef inline void split_descriptor(split_t* ring, uint16_t index, virtq_desc_t* copy) noexcept nogil:
    """Copy descriptor `index` (< num, checked by the caller) out of the table, once."""
    vq_snapshot16(copy, &ring.desc[index])

# ---- buffers that were used ----

cdef inline void split_publish(split_t* ring, uint16_t position) noexcept nogil:
    """Expose all used elements before `position`: one index store, and of a batch the element of its last (2.7.9)."""
    if ring.heads != NULL and position != ring.shadow_used:
        vq_store_u64(&ring.used.ring[ring.shadow_used & ring.mask],
                     <uint64_t>ring.heads[<uint16_t>(position - 1) & ring.mask])
    # Release: pairs with the driver's acquire of used->idx; elements, buffers and log bits stand before it.
    vq_store_release_u16(&ring.used.idx, position)
    ring.shadow_used = position

# ---- notifications ----

cdef inline bint split_undecided(split_t* ring) noexcept nogil:
    """Whether something was published since the last decision about a call."""
    return ring.shadow_used != ring.signalled_used or not ring.signalled_valid

cdef inline bint split_needs_call(split_t* ring) noexcept nogil:
    """Whether the driver wants a call for what was published since the last decision (2.7.7.2)."""
    cdef uint16_t old = ring.signalled_used
    cdef bint first = not ring.signalled_valid
    # Pairs with the driver's fence between writing used_event (or flags) and reading used->idx:
    # one of the two sides sees the other's store.
    vq_fence()
    ring.signalled_used = ring.shadow_used
    ring.signalled_valid = True
    if not ring.event_idx:
        return not (vq_load_u16(&ring.avail.flags) & VIRTQ_AVAIL_F_NO_INTERRUPT)
    return first or notify_crossed(vq_load_u16(&ring.avail.ring[ring.num]), ring.shadow_used, old)

cdef inline bint split_suppress_kicks(split_t* ring) noexcept nogil:
    """Ask the driver not to kick (2.7.10), with EVENT_IDX by leaving avail_event behind; whether it stored that."""
    if ring.suppressing:
        return False
    ring.suppressing = True
    if ring.event_idx:
        return False
    vq_store_u16(&ring.used.flags, VIRTQ_USED_F_NO_NOTIFY)
    return True

cdef inline void split_request_kick(split_t* ring) noexcept nogil:
    """Ask for a kick at the next available buffer; look at the ring once more afterwards."""
    ring.suppressing = False
    if ring.event_idx:
        # avail_event lies behind the last used element; mid-burst it names what comes after what we know.
        vq_store_u16(&ring.used.ring[ring.num], ring.shadow_avail_idx)
    else:
        vq_store_u16(&ring.used.flags, 0)
    # Pairs with the driver's fence between publishing avail->idx and reading avail_event (or flags).
    vq_fence()
