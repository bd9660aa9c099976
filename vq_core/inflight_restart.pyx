"""In-flight regions at the start of a ring."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from vq_core.arch cimport (vq_load_u8, vq_load_u16, vq_load_u32, vq_load_u64, vq_store_release_u8,
                           vq_store_release_u16, vq_store_u16)
from vq_core.inflight cimport (INFLIGHT_VERSION, InflightQueue, inflight_again_t, inflight_packed_entry_t,
                               inflight_packed_t, inflight_t)
from vq_core.packed cimport PACKED_WRAP_BITS, packed_t
from vq_core.ring cimport ring_t
from vq_core.split cimport split_t
from vq_core.virtio cimport VIRTQ_DESC_F_NEXT, VIRTQ_PACKED_DESC_F_AVAIL, VIRTQ_PACKED_DESC_F_USED


cdef int _by_counter(const void* one, const void* other) noexcept nogil:
    cdef uint64_t a = (<const inflight_again_t*>one).counter, b = (<const inflight_again_t*>other).counter
    return (a > b) - (a < b)


cdef int _order(inflight_t* inflight) except -1:
    """Bring what is to be done again into the order in which it was taken, and count on from there."""
    cdef int i
    qsort(inflight.again, inflight.again_count, sizeof(inflight_again_t), _by_counter)
    for i in range(1, inflight.again_count):
        if inflight.again[i].counter == inflight.again[i - 1].counter:
            raise ValueError(f"counter {inflight.again[i].counter} stands at two requests")
    if inflight.again_count:
        inflight.counter = inflight.again[inflight.again_count - 1].counter + 1
        if inflight.counter == 0:
            raise ValueError("a counter is at its end")
    return 0


# ---- split ----

cdef int _fresh_split(inflight_t* inflight, uint16_t used_idx) noexcept:
    cdef int i
    for i in range(inflight.size):
        if vq_load_u8(&inflight.split_entries[i].inflight):
            vq_store_release_u8(&inflight.split_entries[i].inflight, 0)
    inflight.split.features = 0
    inflight.split.desc_num = inflight.size
    inflight.split.last_batch_head = 0
    inflight.split.used_idx = used_idx
    vq_store_release_u16(&inflight.split.version, INFLIGHT_VERSION)      # last: from here on all of it counts
    return 0


cdef int _clear_last_batch(inflight_t* inflight, uint16_t exposed) except -1:
    """Clear what the last batch left marked: the used index tells that it was exposed."""
    cdef uint16_t head = inflight.last_batch_head
    for _ in range(exposed):
        if head >= inflight.size:
            raise ValueError(f"entry {head} of the last batch is outside of {inflight.size}")
        vq_store_release_u8(&inflight.split_entries[head].inflight, 0)
        inflight.slots[head] = 0
        head = vq_load_u16(&inflight.split_entries[head].next)
    return 0


cdef int _resume_split(inflight_t* inflight, split_t* ring) except -1:
    cdef uint16_t exposed = <uint16_t>(ring.shadow_used - vq_load_u16(&inflight.split.used_idx))
    cdef uint16_t count = 0
    cdef int i
    inflight.last_batch_head = vq_load_u16(&inflight.split.last_batch_head)
    for i in range(inflight.size):
        inflight.slots[i] = vq_load_u8(&inflight.split_entries[i].inflight)
        if inflight.slots[i] > 1:
            raise ValueError(f"entry {i} is marked with {inflight.slots[i]}, not 0 or 1")
        count += inflight.slots[i]
    # With nothing in flight there is nothing to lose: a driver that has begun anew is none of the region's business.
    if exposed > ring.num and count:
        raise ValueError(f"used index {ring.shadow_used} is {exposed} ahead of the recorded; the ring has {ring.num}")
    if count:
        _clear_last_batch(inflight, exposed)
    if inflight.last_batch_head >= inflight.size:
        inflight.last_batch_head = 0
    vq_store_release_u16(&inflight.split.used_idx, ring.shadow_used)
    for i in range(inflight.size):
        if not inflight.slots[i]:
            continue
        if i >= ring.num:
            raise ValueError(f"entry {i} is in flight; the ring has {ring.num}")
        inflight.entry[i] = i + 1
        inflight.again[inflight.again_count].id = i
        inflight.again[inflight.again_count].counter = vq_load_u64(&inflight.split_entries[i].counter)
        inflight.again_count += 1
    _order(inflight)
    ring.last_avail_idx = ring.shadow_avail_idx = <uint16_t>(ring.shadow_used + inflight.again_count)
    return 0


# ---- packed ----

cdef int _fresh_packed(inflight_t* inflight, packed_t* ring) noexcept:
    cdef inflight_packed_t* region = inflight.packed
    cdef int i
    for i in range(inflight.size):
        inflight.packed_entries[i].inflight = 0
        inflight.packed_entries[i].next = inflight.next[i] = i + 1
    region.features = 0
    region.desc_num = inflight.size
    region.free_head = region.old_free_head = 0
    region.used_idx = region.old_used_idx = ring.used_slot
    region.used_wrap_counter = region.old_used_wrap_counter = ring.used_flags != 0
    vq_store_release_u16(&region.version, INFLIGHT_VERSION)
    return 0


cdef int _take_marks_back(packed_t* ring, uint16_t slot, bint wrap, uint32_t count) noexcept:
    """Let the `count` slots from `slot` on look available again, where a batch that was never exposed has marked them.

    The driver did not come to them, since the first is unmarked. Once that is used by a smaller batch, it would.
    """
    cdef uint16_t used, flags
    while count > 0:
        used = PACKED_WRAP_BITS if wrap else 0
        flags = vq_load_u16(&ring.desc[slot].flags)
        if flags & PACKED_WRAP_BITS == used:
            vq_store_u16(&ring.desc[slot].flags, VIRTQ_PACKED_DESC_F_AVAIL if wrap else VIRTQ_PACKED_DESC_F_USED)
        slot += 1
        if slot == ring.num:
            slot = 0
            wrap = not wrap
        count -= 1
    return 0


cdef int _settle(inflight_t* inflight, packed_t* ring) except -1:
    """Finish the last batch if its first slot was exposed, else undo it; then the ring's used place is known.

    The wrap counters are compared as well: a batch of a whole ring leaves the place where it was.
    """
    cdef inflight_packed_t* region = inflight.packed
    cdef uint16_t slot = vq_load_u16(&region.used_idx), old_slot = vq_load_u16(&region.old_used_idx)
    cdef uint8_t wrap = vq_load_u8(&region.used_wrap_counter), old_wrap = vq_load_u8(&region.old_used_wrap_counter)
    cdef uint16_t head = vq_load_u16(&region.free_head), old_head = vq_load_u16(&region.old_free_head)
    cdef uint32_t moved
    cdef uint16_t available
    if slot >= ring.num or old_slot >= ring.num or wrap > 1 or old_wrap > 1:
        raise ValueError(f"used place {slot} (before: {old_slot}), wrap counter {wrap} (before: {old_wrap}); the ring "
                         f"has {ring.num}")
    if head > inflight.size or old_head > inflight.size:
        raise ValueError(f"first free entry {head} (before: {old_head}) is outside of {inflight.size}")
    if slot != old_slot or wrap != old_wrap:
        available = VIRTQ_PACKED_DESC_F_AVAIL if old_wrap else VIRTQ_PACKED_DESC_F_USED
        if vq_load_u16(&ring.desc[old_slot].flags) & PACKED_WRAP_BITS == available:
            moved = slot - old_slot if slot > old_slot else slot + ring.num - old_slot
            _take_marks_back(ring, old_slot, old_wrap, moved)
            slot, wrap, head = old_slot, old_wrap, old_head
        else:
            old_head = head
    head = old_head                      # what a taking that was cut has moved
    vq_store_release_u16(&region.free_head, head)
    vq_store_release_u16(&region.old_free_head, head)
    # Undoing: the wrap counter first, so that no cut leaves a place that seems to be a whole ring away. Finishing: the
    # place first, as when it was recorded.
    vq_store_release_u8(&region.used_wrap_counter, wrap)
    vq_store_release_u16(&region.used_idx, slot)
    vq_store_release_u16(&region.old_used_idx, slot)
    vq_store_release_u8(&region.old_used_wrap_counter, wrap)
    inflight.free_head = head
    ring.used_slot = slot
    ring.used_flags = PACKED_WRAP_BITS if wrap else 0
    return 0


cdef int _walk_free(inflight_t* inflight) except -1:
    """Mark the free entries in `slots` by 1, and clear what a taking that was cut has left in them."""
    cdef uint16_t index = inflight.free_head
    while index < inflight.size:
        if inflight.slots[index]:
            raise ValueError(f"the free list comes to entry {index} twice")
        inflight.slots[index] = 1
        inflight.taken_slots += 1
        if vq_load_u8(&inflight.packed_entries[index].inflight):
            vq_store_release_u8(&inflight.packed_entries[index].inflight, 0)
        inflight.next[index] = vq_load_u16(&inflight.packed_entries[index].next)
        index = inflight.next[index]
    return 0


cdef int _walk_chain(inflight_t* inflight, uint16_t head, uint16_t copy) except -1:
    """Copy the chain that begins with entry `head`, and mark its entries in `slots` by 1."""
    cdef inflight_packed_entry_t* entry = &inflight.packed_entries[head]
    cdef inflight_again_t* again = &inflight.again[inflight.again_count]
    cdef uint16_t index = head, last = vq_load_u16(&entry.last), i, flags
    again.counter = vq_load_u64(&entry.counter)
    again.head = head
    again.copy = copy
    again.slots = vq_load_u16(&entry.num)
    if not 1 <= again.slots <= inflight.num - copy:
        raise ValueError(f"entry {head}: {again.slots} descriptors more than the {inflight.num} of the ring")
    for i in range(again.slots):
        if index >= inflight.size or inflight.slots[index]:
            raise ValueError(f"entry {head}: its chain comes to entry {index}, which is none of its own")
        entry = &inflight.packed_entries[index]
        inflight.slots[index] = 1
        if i and vq_load_u8(&entry.inflight):
            raise ValueError(f"entry {head}: its chain comes to another head, {index}")
        inflight.copies[copy].addr = vq_load_u64(&entry.addr)
        inflight.copies[copy].len = vq_load_u32(&entry.len)
        inflight.copies[copy].id = again.id = vq_load_u16(&entry.id)
        flags = vq_load_u16(&entry.flags) & <uint16_t>~VIRTQ_DESC_F_NEXT
        inflight.copies[copy].flags = flags | (VIRTQ_DESC_F_NEXT if i + 1 < again.slots else 0)
        copy += 1
        if i + 1 == again.slots and index != last:
            raise ValueError(f"entry {head}: its chain ends at {index}, not at {last}")
        inflight.next[index] = vq_load_u16(&entry.next)
        index = inflight.next[index]
    if again.id >= inflight.num or inflight.entry[again.id]:
        raise ValueError(f"entry {head}: buffer id {again.id} stands twice or is outside of {inflight.num}")
    inflight.entry[again.id] = head + 1
    inflight.last[head] = last
    inflight.again_count += 1
    return 0


cdef int _resume_packed(inflight_t* inflight, packed_t* ring) except -1:
    cdef uint32_t slot, known
    cdef uint8_t mark
    cdef int i
    _settle(inflight, ring)
    _walk_free(inflight)
    known, inflight.taken_slots = inflight.taken_slots, 0
    for i in range(inflight.size):
        if inflight.slots[i]:
            continue
        mark = vq_load_u8(&inflight.packed_entries[i].inflight)
        if mark > 1:
            raise ValueError(f"entry {i} is marked with {mark}, not 0 or 1")
        if mark:
            _walk_chain(inflight, i, <uint16_t>inflight.taken_slots)
            inflight.taken_slots += inflight.again[inflight.again_count - 1].slots
    if known + inflight.taken_slots != inflight.size:
        raise ValueError(f"{known} free entries and {inflight.taken_slots} in flight, of {inflight.size}")
    for i in range(inflight.size):
        inflight.slots[i] = 0
    for i in range(inflight.again_count):
        inflight.slots[inflight.again[i].head] = inflight.again[i].slots
    _order(inflight)
    slot = ring.used_slot + inflight.taken_slots
    ring.avail_flags = VIRTQ_PACKED_DESC_F_AVAIL if ring.used_flags else VIRTQ_PACKED_DESC_F_USED
    if slot >= ring.num:
        slot -= ring.num
        ring.avail_flags ^= PACKED_WRAP_BITS
    ring.avail_slot = <uint16_t>slot
    return 0


cdef int inflight_resume(InflightQueue queue, ring_t* ring, int index) except -1:
    cdef inflight_t* inflight = &queue.inflight
    cdef uint16_t version = vq_load_u16(&inflight.packed.version if ring.is_packed else &inflight.split.version)
    try:
        if version > INFLIGHT_VERSION:
            raise ValueError(f"version {version}, not {INFLIGHT_VERSION}")
        if ring.is_packed:
            if version == 0:
                _fresh_packed(inflight, &ring.packed)
            else:
                _resume_packed(inflight, &ring.packed)
        elif version == 0:
            _fresh_split(inflight, ring.split.shadow_used)
        else:
            _resume_split(inflight, &ring.split)
    except ValueError as problem:
        raise ValueError(f"queue {index}: in-flight region: {problem}; a new one from GET_INFLIGHT_FD forgets what was "
                         "under way") from None
    return 0
