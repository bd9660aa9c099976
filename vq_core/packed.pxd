"""The packed virtqueue, device side: the only reader and writer of that layout (VIRTIO 1.3, 2.8).

The same verbs as split.pxd. One ring of descriptors serves both directions: the driver makes a descriptor available by
its AVAIL and USED bits (they differ, AVAIL is the lap's wrap counter), the device gives buffers back by overwriting
descriptors at its own place in the ring (both bits equal the wrap counter).

A buffer takes as many slots as its chain has descriptors, and so the used place moves on by that many. Used elements
wait in private memory (`elements`) until they are published: a descriptor's flags are its publication.

Positions count buffers and run freely modulo 2^16, as in the split layout; slots count descriptors.
What the device wrote is never read back; what the driver writes is read once.

Owner: the worker that owns the queue. Invariant: next_used - shadow_used <= num, the size of `elements` at least.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.arch cimport (vq_fence, vq_load_acquire_u64, vq_load_u16, vq_load_u32, vq_load_u64, vq_prefetch,
                           vq_store_release_u16, vq_store_release_u32, vq_store_release_u64, vq_store_u16,
                           vq_store_u64)
from vq_core.cursor cimport cursor_t
from vq_core.virtio cimport (VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_PACKED_DESC_F_AVAIL,
                             VIRTQ_PACKED_DESC_F_USED, VIRTQ_PACKED_EVENT_FLAG_DESC, VIRTQ_PACKED_EVENT_FLAG_DISABLE,
                             VIRTQ_PACKED_EVENT_FLAG_ENABLE, gpa_t, virtq_desc_t, virtq_packed_desc_t,
                             virtq_packed_event_t)

cdef enum:
    PACKED_WRAP_BITS = VIRTQ_PACKED_DESC_F_AVAIL | VIRTQ_PACKED_DESC_F_USED
    PACKED_WORK_BITS = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE | VIRTQ_DESC_F_INDIRECT

cdef struct packed_t:
    virtq_packed_desc_t* desc            # num entries, 16-byte aligned
    virtq_packed_event_t* driver_event   # 4-byte aligned; written by the driver
    virtq_packed_event_t* device_event   # 4-byte aligned; written by us
    uint64_t* elements                   # private, mask + 1 of them: len, id << 32, slots << 48
    gpa_t desc_addr                      # guest address of the ring, for the dirty log
    uint16_t num                         # 1 to 32768; 0: not configured
    uint16_t mask                        # of `elements`
    uint16_t avail_slot                  # next descriptor to take
    uint16_t avail_flags                 # AVAIL and USED bits that it has once it is available
    uint16_t used_slot                   # next descriptor to give back
    uint16_t used_flags                  # AVAIL and USED bits that it gets
    uint16_t next_used                   # position of the next used element to note
    uint16_t shadow_used                 # position of the next used element to publish
    uint16_t known                       # slots from avail_slot that are known to be available
    uint16_t chain_slots                 # of the buffer taken last: what a buffer takes
    bint batch                           # IN_ORDER: one used descriptor stands for all that is published at once
    uint32_t moved                       # slots published since the last decision about a call
    bint signalled_valid                 # False: no decision since the ring started
    bint event_idx                       # VIRTIO_F_EVENT_IDX was negotiated
    bint suppressing                     # the driver is asked not to kick

# ---- buffers to take ----

cdef inline bint packed_is_available(packed_t* ring, uint16_t ahead) noexcept nogil:
    """Whether the descriptor `ahead` (< num) of the next one is available."""
    cdef uint32_t slot = <uint32_t>ring.avail_slot + ahead
    cdef uint16_t flags = ring.avail_flags
    if slot >= ring.num:
        slot -= ring.num
        flags ^= PACKED_WRAP_BITS
    return vq_load_u16(&ring.desc[slot].flags) & PACKED_WRAP_BITS == flags

cdef inline int packed_known(packed_t* ring) noexcept nogil:
    """Number of slots that are known to be available, without touching the driver's lines."""
    return ring.known

cdef inline bint packed_has_more(packed_t* ring) noexcept nogil:
    """Whether there is more than is known."""
    return ring.known < ring.num and packed_is_available(ring, ring.known)

cdef inline int packed_ready(packed_t* ring, int want) noexcept nogil:
    """Number of buffers to take, as far as descriptors that can be seen make up `want`: an estimate for chains."""
    cdef int slots = ring.known, most = want * ring.chain_slots
    if slots < most:
        if most > ring.num:
            most = ring.num
        # In the order of the ring: if the last of them is available, all before it are.
        if slots < most and packed_is_available(ring, <uint16_t>(most - 1)):
            slots = most
        while slots < most and packed_is_available(ring, <uint16_t>slots):
            slots += 1
        ring.known = <uint16_t>slots
    if slots == 0:
        return 0
    return slots // ring.chain_slots if slots >= ring.chain_slots else 1

cdef inline int packed_begin(packed_t* ring, cursor_t* cursor, int want) noexcept nogil:
    """Set the cursor to the next buffer: `want`, since only looking tells how many there are."""
    cursor.taken = cursor.known = 0
    cursor.head = ring.avail_slot
    cursor.flags = ring.avail_flags
    return want

cdef inline bint packed_ahead(packed_t* ring, uint16_t count) noexcept nogil:
    """Whether `count` (up to num) slots are available, looking at the last of them alone."""
    return packed_is_available(ring, <uint16_t>(count - 1))

cdef inline void packed_prefetch(packed_t* ring, cursor_t* cursor, int count) noexcept nogil:
    """Bring the descriptors of the next `count` buffers on their way, if the last of them is there already.

    A line that the driver is still writing is better left alone.
    """
    cdef uint32_t slot = ring.avail_slot
    if count > ring.num or not packed_is_available(ring, <uint16_t>(count - 1)):
        return
    for _ in range(0, count, 4):
        vq_prefetch(&ring.desc[slot])
        slot += 4
        if slot >= ring.num:
            slot -= ring.num

cdef inline int packed_more(packed_t* ring, cursor_t* cursor) noexcept nogil:
    """Whether there may be a buffer at the cursor: always 1, `packed_look` tells."""
    return 1

cdef inline uint16_t packed_passed(packed_t* ring, uint16_t first, uint16_t head) noexcept nogil:
    """Slots from `first` to `head`, of which at least one was passed: a whole ring when they are the same."""
    cdef uint16_t passed = <uint16_t>(head - first)
    return passed if head > first else <uint16_t>(passed + ring.num)

cdef inline void packed_remember(packed_t* ring, cursor_t* cursor) noexcept nogil:
    """All before the cursor is available, the slot at the cursor is not: what is to come, comes there."""
    cdef uint16_t passed
    if cursor.taken == 0:
        return
    passed = packed_passed(ring, ring.avail_slot, cursor.head)
    if passed > ring.known:
        ring.known = passed

cdef inline bint packed_is_full(packed_t* ring, cursor_t* first, cursor_t* cursor) noexcept nogil:
    """Whether all buffers that the ring can ever hold lie between `first` and the cursor: another has no room."""
    cdef uint16_t slots
    if cursor.taken == first.taken:
        return False
    slots = <uint16_t>(ring.elements[<uint16_t>(ring.next_used + cursor.taken - 1) & ring.mask] >> 48)
    return <uint16_t>(ring.num - packed_passed(ring, first.head, cursor.head)) < slots

cdef inline void packed_unpack(virtq_desc_t* copy, uint64_t addr, uint64_t rest) noexcept nogil:
    """The two words of a packed descriptor as a split one; its `next` is the buffer id."""
    copy.addr = addr
    copy.len = <uint32_t>rest
    copy.next = <uint16_t>(rest >> 32)
    copy.flags = <uint16_t>(rest >> 48) & PACKED_WORK_BITS

cdef inline int packed_look(packed_t* ring, cursor_t* cursor, virtq_desc_t* copy) noexcept nogil:
    """Copy the first descriptor at the cursor, once: 1; 0 when it is not available. `copy.next` is its buffer id."""
    cdef virtq_packed_desc_t* desc = &ring.desc[cursor.head]
    # Acquire: pairs with the driver's release of the flags; the rest of the chain stands before them. One load for
    # flags, id and length: they cannot come from different moments.
    cdef uint64_t rest = vq_load_acquire_u64(&desc.len)
    if (rest >> 48 & PACKED_WRAP_BITS) != cursor.flags:
        return 0
    packed_unpack(copy, vq_load_u64(&desc.addr), rest)
    return 1

cdef inline void packed_use(packed_t* ring, cursor_t* cursor, uint16_t id, uint32_t length,
                            uint16_t slots) noexcept nogil:
    """Take the buffer at the cursor, `slots` descriptors, and note its used element for `packed_publish`."""
    ring.elements[<uint16_t>(ring.next_used + cursor.taken) & ring.mask] = \
        <uint64_t>length | <uint64_t>id << 32 | <uint64_t>slots << 48
    packed_take(ring, cursor, slots)

cdef inline void packed_take(packed_t* ring, cursor_t* cursor, uint16_t slots) noexcept nogil:
    """Take the buffer at the cursor, `slots` descriptors."""
    cdef uint32_t head = <uint32_t>cursor.head + slots
    if head >= ring.num:
        head -= ring.num
        cursor.flags ^= PACKED_WRAP_BITS
    cursor.head = <uint16_t>head
    cursor.taken += 1

cdef inline void packed_commit(packed_t* ring, cursor_t* cursor) noexcept nogil:
    """What the cursor has passed is taken."""
    if cursor.taken == 0:
        return
    ring.chain_slots = <uint16_t>(ring.elements[<uint16_t>(ring.next_used + cursor.taken - 1) & ring.mask] >> 48)
    packed_commit_take(ring, cursor)
    ring.next_used = <uint16_t>(ring.next_used + cursor.taken)

cdef inline void packed_commit_take(packed_t* ring, cursor_t* cursor) noexcept nogil:
    """What the cursor has passed is taken, and none of it is used yet."""
    cdef uint16_t passed
    if cursor.taken == 0:
        return
    passed = packed_passed(ring, ring.avail_slot, cursor.head)
    ring.known = <uint16_t>(ring.known - passed) if ring.known > passed else 0
    ring.avail_slot = cursor.head
    ring.avail_flags = cursor.flags

cdef inline uint16_t packed_next(packed_t* ring) noexcept nogil:
    """The slot of the next buffer, and its wrap counter in bit 15."""
    return ring.avail_slot | (0x8000 if ring.avail_flags & VIRTQ_PACKED_DESC_F_AVAIL else 0)

cdef inline void packed_untake(packed_t* ring, uint16_t place) noexcept nogil:
    """Go back to such a place, which nothing was used behind."""
    ring.avail_slot = place & 0x7fff
    ring.avail_flags = VIRTQ_PACKED_DESC_F_AVAIL if place & 0x8000 else VIRTQ_PACKED_DESC_F_USED
    ring.known = 0

cdef inline void packed_give_back(packed_t* ring, uint16_t id, uint32_t length, uint16_t slots) noexcept nogil:
    """Note the used element of a buffer that was taken, seen after `packed_publish`."""
    ring.elements[ring.next_used & ring.mask] = <uint64_t>length | <uint64_t>id << 32 | <uint64_t>slots << 48
    ring.next_used += 1

cdef inline uint16_t packed_position(packed_t* ring, cursor_t* cursor) noexcept nogil:
    """Where to publish to so that everything before the cursor is used."""
    return <uint16_t>(ring.next_used + cursor.taken)

cdef inline uint16_t packed_following(packed_t* ring, uint16_t slot) noexcept nogil:
    """The slot after `slot`."""
    return <uint16_t>(slot + 1) if slot + 1 < ring.num else 0

cdef inline void packed_descriptor(packed_t* ring, uint16_t slot, virtq_desc_t* copy) noexcept nogil:
    """Copy descriptor `slot` (< num) of a chain whose head is available, once."""
    cdef uint64_t rest = vq_load_u64(&ring.desc[slot].len)
    packed_unpack(copy, vq_load_u64(&ring.desc[slot].addr), rest)

cdef inline void packed_table_entry(virtq_desc_t* copy) noexcept nogil:
    """Turn a copied entry of an indirect table into a split one: its last two fields stand the other way round."""
    copy.flags, copy.next = copy.next & PACKED_WORK_BITS, copy.flags

# ---- buffers that were used ----

cdef inline uint64_t packed_used_word(packed_t* ring, uint64_t element) noexcept nogil:
    """Length, id and flags of a used descriptor (2.8.8: WRITE says that the length counts)."""
    cdef uint64_t flags = ring.used_flags
    if <uint32_t>element:
        flags |= VIRTQ_DESC_F_WRITE
    return element & <uint64_t>0xffffffffffff | flags << 48

cdef inline void packed_use_move(packed_t* ring, uint64_t element) noexcept nogil:
    """Move the used place over the slots of a buffer."""
    cdef uint32_t slots = <uint32_t>(element >> 48)
    cdef uint32_t slot = ring.used_slot + slots
    ring.moved += slots
    if slot >= ring.num:
        slot -= ring.num
        ring.used_flags ^= PACKED_WRAP_BITS
    ring.used_slot = <uint16_t>slot

cdef inline void packed_mark_tail(packed_t* ring, uint16_t slot, uint16_t flags) noexcept nogil:
    """Write the used mark into a slot behind the first one of its chain; its other flags stay.

    No driver looks at such a slot before it writes it anew. But a device that starts after a crash finds its place by
    the USED bits, and they tell it only if every slot that was used has the mark of its lap; how far a chain goes that
    is marked in part, it sees by NEXT.
    """
    vq_store_u16(&ring.desc[slot].flags, vq_load_u16(&ring.desc[slot].flags) & PACKED_WORK_BITS | flags)

cdef inline void packed_mark_tails(packed_t* ring, uint16_t slot, uint16_t flags, uint64_t element) noexcept nogil:
    """Mark the later slots of a chain whose first is `slot` and gets `flags`: its used element, before it is published.

    Whoever has to publish it instead finds the length in the first slot as soon as the second one is marked.
    """
    cdef uint16_t head = slot, i
    for i in range(1, <uint16_t>(element >> 48)):
        slot = packed_following(ring, slot)
        if slot == 0:
            flags ^= PACKED_WRAP_BITS
        packed_mark_tail(ring, slot, flags)
        if i == 1:
            vq_store_release_u32(&ring.desc[head].len, <uint32_t>element)

cdef inline void packed_publish_batch(packed_t* ring, uint16_t position) noexcept nogil:
    """Expose all used elements before `position` by one descriptor, that of the last (2.8.7; IN_ORDER, no lengths)."""
    cdef virtq_packed_desc_t* first = &ring.desc[ring.used_slot]
    cdef uint64_t element = 0, flags = ring.used_flags
    while ring.shadow_used != position:
        element = ring.elements[ring.shadow_used & ring.mask]
        packed_use_move(ring, element)
        ring.shadow_used += 1
    # Release: pairs with the driver's acquire of the flags; what was read from its buffers stands before it.
    vq_store_release_u64(&first.len, element & <uint64_t>0xffff00000000 | flags << 48)

cdef inline void packed_publish_next(packed_t* ring) noexcept nogil:
    """Write the next used element into its slots."""
    cdef uint64_t element = ring.elements[ring.shadow_used & ring.mask]
    if element >> 49:                                # more than one slot
        packed_mark_tails(ring, ring.used_slot, ring.used_flags, element)
    vq_store_u64(&ring.desc[ring.used_slot].len, packed_used_word(ring, element))
    packed_use_move(ring, element)
    ring.shadow_used += 1

cdef inline void packed_publish(packed_t* ring, uint16_t position) noexcept nogil:
    """Expose all used elements before `position`; the first of them last, so that the driver sees them all at once.

    The others go in the order of the ring, the later slots of a chain before its first: `packed_place` goes on from
    any moment of this.
    """
    cdef virtq_packed_desc_t* first = &ring.desc[ring.used_slot]
    cdef uint64_t element, word
    cdef uint16_t slot = ring.used_slot, flags = ring.used_flags
    if ring.shadow_used == position:
        return
    if ring.batch:
        packed_publish_batch(ring, position)
        return
    element = ring.elements[ring.shadow_used & ring.mask]
    word = packed_used_word(ring, element)
    packed_use_move(ring, element)
    ring.shadow_used += 1
    if ring.shadow_used != position:
        packed_publish_next(ring)
        if <uint32_t>element and not element >> 49:
            # From now on `packed_place` would publish the first one, and needs to know its length.
            vq_store_release_u32(&first.len, <uint32_t>element)
    if element >> 49:
        packed_mark_tails(ring, slot, flags, element)
    while ring.shadow_used != position:
        packed_publish_next(ring)
    # Release: pairs with the driver's acquire of the flags; other elements, buffers and log bits stand before it.
    vq_store_release_u64(&first.len, word)

# ---- notifications ----

cdef inline bint packed_undecided(packed_t* ring) noexcept nogil:
    """Whether something was published since the last decision about a call."""
    return ring.moved != 0 or not ring.signalled_valid

cdef inline bint packed_needs_call(packed_t* ring) noexcept nogil:
    """Whether the driver wants a call for what was published since the last decision (2.8.9, 2.8.21.3)."""
    cdef uint32_t event, moved = ring.moved
    cdef int off
    cdef bint first = not ring.signalled_valid
    # Pairs with the driver's fence between writing its event structure and reading the flags of descriptors.
    vq_fence()
    ring.moved = 0
    ring.signalled_valid = True
    event = vq_load_u32(ring.driver_event)           # read once: off_wrap, flags << 16
    if event >> 16 == VIRTQ_PACKED_EVENT_FLAG_DISABLE:
        return False
    if event >> 16 != VIRTQ_PACKED_EVENT_FLAG_DESC or not ring.event_idx or first or moved >= ring.num:
        return True
    off = event & 0x7fff
    if (event >> 15 & 1) != (ring.used_flags & VIRTQ_PACKED_DESC_F_AVAIL != 0):
        off -= ring.num                              # it names a slot of the lap before
    return ring.used_slot - <int>moved <= off < <int>ring.used_slot

cdef inline bint packed_suppress_kicks(packed_t* ring) noexcept nogil:
    """Ask the driver not to kick; whether something was stored."""
    if ring.suppressing:
        return False
    ring.suppressing = True
    vq_store_u16(&ring.device_event.flags, VIRTQ_PACKED_EVENT_FLAG_DISABLE)
    return True

cdef inline void packed_request_kick(packed_t* ring) noexcept nogil:
    """Ask for a kick at the next available buffer; look at the ring once more afterwards."""
    cdef uint32_t slot = ring.avail_slot + <uint32_t>ring.known
    cdef uint16_t flags = ring.avail_flags
    ring.suppressing = False
    if ring.event_idx:
        if slot >= ring.num:
            slot -= ring.num
            flags ^= PACKED_WRAP_BITS
        vq_store_u16(&ring.device_event.off_wrap,
                     <uint16_t>(slot | (0x8000 if flags & VIRTQ_PACKED_DESC_F_AVAIL else 0)))
        # Release: the driver reads flags first, then the place that they speak of.
        vq_store_release_u16(&ring.device_event.flags, VIRTQ_PACKED_EVENT_FLAG_DESC)
    else:
        vq_store_u16(&ring.device_event.flags, VIRTQ_PACKED_EVENT_FLAG_ENABLE)
    # Pairs with the driver's fence between writing the flags of a descriptor and reading our event structure.
    vq_fence()
