"""One ring, whatever its layout: each verb of split.pxd and packed.pxd, chosen by `packed`.

Hot loops pass `packed` as a literal, so that they exist once in the source and once a layout in the machine code; cold
code passes `ring.is_packed`. What a verb does stands at its two homes.

Both layouts know a position: how many buffers were used since some beginning, modulo 2^16.
"""
from libc.stdint cimport uint16_t, uint32_t
from vq_core.cursor cimport cursor_t
from vq_core.packed cimport (packed_ahead, packed_begin, packed_commit, packed_commit_take,
                             packed_give_back, packed_has_more, packed_is_full, packed_known,
                             packed_look, packed_more, packed_needs_call, packed_next, packed_position,
                             packed_prefetch,
                             packed_publish, packed_ready, packed_remember, packed_request_kick,
                             packed_suppress_kicks, packed_t, packed_take, packed_undecided, packed_untake,
                             packed_use)
from vq_core.split cimport (split_ahead, split_begin, split_commit, split_commit_take,
                            split_give_back, split_has_more, split_is_full, split_known,
                            split_look, split_more, split_needs_call, split_position, split_prefetch,
                            split_prefetch_used, split_publish, split_ready, split_request_kick, split_suppress_kicks,
                            split_t, split_take, split_undecided, split_use)
from vq_core.virtio cimport virtq_desc_t

cdef struct ring_t:
    bint is_packed               # VIRTIO_F_RING_PACKED was negotiated
    uint16_t num                 # entries
    split_t split                # the one that is_packed names is in use
    packed_t packed

cdef inline int ring_begin(ring_t* ring, bint packed, cursor_t* cursor, int want) noexcept nogil:
    return packed_begin(&ring.packed, cursor, want) if packed else split_begin(&ring.split, cursor, want)

cdef inline bint ring_ahead(ring_t* ring, bint packed, uint16_t count) noexcept nogil:
    return packed_ahead(&ring.packed, count) if packed else split_ahead(&ring.split, count)

cdef inline void ring_prefetch(ring_t* ring, bint packed, cursor_t* cursor, int count) noexcept nogil:
    if packed:
        packed_prefetch(&ring.packed, cursor, count)
    else:
        split_prefetch(&ring.split, cursor, count)

cdef inline void ring_prefetch_used(ring_t* ring, bint packed, int count) noexcept nogil:
    """The next `count` used elements will be written one by one; a packed ring has them where its descriptors are."""
    if not packed:
        split_prefetch_used(&ring.split, count)

cdef inline int ring_more(ring_t* ring, bint packed, cursor_t* cursor) noexcept nogil:
    return packed_more(&ring.packed, cursor) if packed else split_more(&ring.split, cursor)

cdef inline bint ring_is_full(ring_t* ring, bint packed, cursor_t* first, cursor_t* cursor) noexcept nogil:
    return packed_is_full(&ring.packed, first, cursor) if packed else split_is_full(&ring.split, first, cursor)

cdef inline void ring_remember(ring_t* ring, bint packed, cursor_t* cursor) noexcept nogil:
    """What lies before the cursor and is not taken yet is too little for a packet: wait for what comes behind it."""
    if packed:
        packed_remember(&ring.packed, cursor)    # the index of a split ring says how much there is

cdef inline int ring_look(ring_t* ring, bint packed, cursor_t* cursor, virtq_desc_t* copy) noexcept nogil:
    return packed_look(&ring.packed, cursor, copy) if packed else split_look(&ring.split, cursor, copy)

cdef inline void ring_use(ring_t* ring, bint packed, cursor_t* cursor, uint16_t id,
                          uint32_t length, uint16_t slots) noexcept nogil:
    if packed:
        packed_use(&ring.packed, cursor, id, length, slots)
    else:
        split_use(&ring.split, cursor, id, length, slots)

cdef inline void ring_commit(ring_t* ring, bint packed, cursor_t* cursor) noexcept nogil:
    if packed:
        packed_commit(&ring.packed, cursor)
    else:
        split_commit(&ring.split, cursor)

# A device that completes out of order takes and gives back instead of using.

cdef inline void ring_take(ring_t* ring, bint packed, cursor_t* cursor, uint16_t slots) noexcept nogil:
    if packed:
        packed_take(&ring.packed, cursor, slots)
    else:
        split_take(&ring.split, cursor, slots)

cdef inline void ring_pass(ring_t* ring, bint packed, cursor_t* cursor, uint16_t slots) noexcept nogil:
    """Move the cursor over a buffer of `slots` descriptors, only to look at the next one."""
    ring_take(ring, packed, cursor, slots)
    if not packed:
        cursor.head = <uint16_t>(cursor.head + slots) & ring.split.mask

cdef inline void ring_commit_take(ring_t* ring, bint packed, cursor_t* cursor) noexcept nogil:
    if packed:
        packed_commit_take(&ring.packed, cursor)
    else:
        split_commit_take(&ring.split, cursor)

cdef inline uint16_t ring_next(ring_t* ring, bint packed) noexcept nogil:
    """Where the next buffer is taken, for `ring_untake`."""
    return packed_next(&ring.packed) if packed else ring.split.last_avail_idx

cdef inline void ring_untake(ring_t* ring, bint packed, uint16_t place) noexcept nogil:
    """Go back to a place; everything before it is used, and nothing that was taken from there on is."""
    if packed:
        packed_untake(&ring.packed, place)
    else:
        ring.split.last_avail_idx = place

cdef inline void ring_give_back(ring_t* ring, bint packed, uint16_t id, uint32_t length, uint16_t slots) noexcept nogil:
    if packed:
        packed_give_back(&ring.packed, id, length, slots)
    else:
        split_give_back(&ring.split, id, length)

cdef inline uint16_t ring_position(ring_t* ring, bint packed, cursor_t* cursor) noexcept nogil:
    return packed_position(&ring.packed, cursor) if packed else split_position(&ring.split, cursor)

cdef inline int ring_known(ring_t* ring, bint packed) noexcept nogil:
    return packed_known(&ring.packed) if packed else split_known(&ring.split)

cdef inline int ring_ready(ring_t* ring, bint packed, int want) noexcept nogil:
    return packed_ready(&ring.packed, want) if packed else split_ready(&ring.split, want)

cdef inline bint ring_has_more(ring_t* ring, bint packed) noexcept nogil:
    return packed_has_more(&ring.packed) if packed else split_has_more(&ring.split)

cdef inline void ring_publish(ring_t* ring, bint packed, uint16_t position) noexcept nogil:
    if packed:
        packed_publish(&ring.packed, position)
    else:
        split_publish(&ring.split, position)

cdef inline bint ring_undecided(ring_t* ring, bint packed) noexcept nogil:
    return packed_undecided(&ring.packed) if packed else split_undecided(&ring.split)

cdef inline bint ring_needs_call(ring_t* ring, bint packed) noexcept nogil:
    return packed_needs_call(&ring.packed) if packed else split_needs_call(&ring.split)

cdef inline bint ring_suppress_kicks(ring_t* ring, bint packed) noexcept nogil:
    return packed_suppress_kicks(&ring.packed) if packed else split_suppress_kicks(&ring.split)

cdef inline void ring_request_kick(ring_t* ring, bint packed) noexcept nogil:
    if packed:
        packed_request_kick(&ring.packed)
    else:
        split_request_kick(&ring.split)

cdef inline uint16_t ring_next_used(ring_t* ring, bint packed) noexcept nogil:
    """Where to publish to so that everything that was taken is used."""
    return ring.packed.next_used if packed else ring.split.next_used

cdef inline uint16_t ring_shadow_used(ring_t* ring, bint packed) noexcept nogil:
    """What is published already."""
    return ring.packed.shadow_used if packed else ring.split.shadow_used

cdef inline bint ring_counts_slots(ring_t* ring) noexcept nogil:
    """Whether the place of the next buffer follows from the descriptors of the one before."""
    return ring.is_packed or ring.split.in_order
