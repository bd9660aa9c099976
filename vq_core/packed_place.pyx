"""Finding the place of a packed ring in the ring itself."""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_load_u16, vq_load_u64, vq_store_release_u64
from vq_core.packed cimport PACKED_WRAP_BITS, packed_following, packed_mark_tails, packed_t
from vq_core.virtio cimport (VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_PACKED_DESC_F_AVAIL,
                             VIRTQ_PACKED_DESC_F_USED)

cdef struct place_t:
    uint16_t slot
    bint wrap

cdef enum:
    CHANGES_MAX = 5              # of a burst that was not exposed: its beginning, and two unmarked chains in it

cdef struct marks_t:
    # Where the USED bits change on the way round the ring, the wrap counters taken into account: behind a device that
    # completes in order, once.
    int changes
    uint16_t slots[CHANGES_MAX]

cdef struct unfinished_t:
    # A chain that was not marked as used.
    place_t head
    uint16_t slots
    uint16_t id                  # of the buffer
    uint32_t length              # that was used, as far as that is known; else of all device-writable descriptors

cdef enum:
    AVAIL = VIRTQ_PACKED_DESC_F_AVAIL
    USED = VIRTQ_PACKED_DESC_F_USED


cdef inline uint16_t _used_bit(packed_t* ring, uint16_t slot) noexcept nogil:
    return vq_load_u16(&ring.desc[slot].flags) & USED


cdef inline void _advance(packed_t* ring, place_t* place) noexcept nogil:
    place.slot = packed_following(ring, place.slot)
    place.wrap ^= place.slot == 0


cdef marks_t _look(packed_t* ring) noexcept nogil:
    """Find the changes: all of them, or one more than there may be."""
    cdef uint16_t last = _used_bit(ring, ring.num - 1) ^ USED, bit, i     # the lap changes between it and slot 0
    cdef marks_t marks
    marks.changes = 0
    marks.slots[0] = 0                   # a guest that writes meanwhile can leave no change
    for i in range(ring.num):
        bit = _used_bit(ring, i)
        if bit != last:
            if marks.changes < CHANGES_MAX:
                marks.slots[marks.changes] = i
            marks.changes += 1
            if marks.changes > CHANGES_MAX:
                break
        last = bit
    return marks


cdef place_t _unmarked(packed_t* ring, uint16_t slot) noexcept nogil:
    """The place of a slot that is the first one that was not used."""
    cdef place_t place
    place.slot = slot
    place.wrap = _used_bit(ring, slot) == 0
    return place


cdef bint _read_unfinished(packed_t* ring, place_t* at, int most, unfinished_t* chain) noexcept nogil:
    """Read a chain that was not marked as used, and go on behind it; False if it has more than `most` slots."""
    cdef uint64_t word = 0, length = 0
    cdef uint32_t said = 0
    cdef uint16_t flags = VIRTQ_DESC_F_NEXT
    cdef bint marked = False
    chain.head = at[0]
    chain.slots = 0
    while flags & VIRTQ_DESC_F_NEXT:
        if chain.slots == most:
            return False
        word = vq_load_u64(&ring.desc[at.slot].len)  # one load: all of it comes from one moment
        flags = <uint16_t>(word >> 48)
        if flags & VIRTQ_DESC_F_WRITE:
            length += <uint32_t>word
        if chain.slots == 0:
            said = <uint32_t>word
        elif chain.slots == 1:
            marked = (flags & USED != 0) == at.wrap
        chain.slots += 1
        _advance(ring, at)
    chain.id = <uint16_t>(word >> 32)
    chain.length = said if marked and length else <uint32_t>min(length, <uint64_t>0xffffffff)
    return True


cdef void _finish(packed_t* ring, unfinished_t* chain) noexcept nogil:
    """Use a chain, as `packed_publish` would have."""
    cdef uint16_t marks = PACKED_WRAP_BITS if chain.head.wrap else 0
    cdef uint64_t flags = marks | (VIRTQ_DESC_F_WRITE if chain.length else 0)
    cdef uint64_t rest = chain.length | <uint64_t>chain.id << 32
    packed_mark_tails(ring, chain.head.slot, marks, rest | <uint64_t>chain.slots << 48)
    # Release: pairs with the driver's acquire of the flags; all other used descriptors stand before it.
    vq_store_release_u64(&ring.desc[chain.head.slot].len, rest | flags << 48)


cdef int _walk(packed_t* ring, place_t begin, int distance, bint finish) noexcept nogil:
    """Go through a burst that was not exposed, of `distance` slots or a few more; their number, 0 if it cannot be one.

    With `finish` all of its chains are used when this returns, the first of them last.
    """
    cdef unfinished_t first, chain
    cdef place_t at = begin
    cdef uint16_t flags
    cdef int covered = 0, found = 0
    while covered < distance:
        flags = vq_load_u16(&ring.desc[at.slot].flags)
        if (flags & AVAIL != 0) != at.wrap:
            return 0
        if (flags & USED != 0) == at.wrap:
            covered += 1
            _advance(ring, &at)
            continue
        if not _read_unfinished(ring, &at, ring.num - covered, &chain):
            return 0
        covered += chain.slots
        found += 1
        if found == 1:
            first = chain
        elif finish:
            _finish(ring, &chain)
    if found == 0 or found > 2:
        return 0
    if finish:
        _finish(ring, &first)
    return covered


cdef uint16_t _find(packed_t* ring, place_t* place) noexcept nogil:
    """Where a device that completes in order stopped, told by the ring itself; a fresh one says its beginning.

    Only the device changes a USED bit, to its wrap counter, when it uses a slot (`packed_publish`: each slot of a
    chain): the slots before its place differ in it from those behind. With IN_ORDER one used descriptor stands for a
    batch, and the others keep their bits: such a ring (`batch`) is not asked; only an in-flight region would know.

    A device that ended while it exposed a burst has left used descriptors behind one that is still available, which the
    driver waits for. What they were made of is overwritten, and they are done; so is the one before them, and it is
    exposed as it would have been. One store after another says its length as well; whoever died just between the two
    leaves a packet with a rest behind it.

    Returns how many slots were exposed.
    """
    cdef marks_t marks = _look(ring)
    cdef int i, distance, end
    place[0] = _unmarked(ring, marks.slots[0])
    if marks.changes <= 1 or marks.changes > CHANGES_MAX:
        return 0
    for i in range(marks.changes):
        # It began at one of the changes and went on to the one before it, round the ring: AVAIL bits tell which one.
        place[0] = _unmarked(ring, marks.slots[i])
        distance = marks.slots[i - 1 if i else marks.changes - 1] - place.slot
        if distance < 0:
            distance += ring.num
        # Twice: nothing is written before all of it was seen to be one.
        if _walk(ring, place[0], distance, False) == 0:
            continue
        distance = _walk(ring, place[0], distance, True)
        end = place.slot + distance
        if end >= ring.num:
            end -= ring.num
            place.wrap = not place.wrap
        place.slot = <uint16_t>end
        return <uint16_t>distance
    place[0] = _unmarked(ring, marks.slots[0])
    return 0


cdef bint _is_rest_of_chain(packed_t* ring, uint16_t begin, uint16_t end) noexcept nogil:
    """Whether the slots from `begin` up to `end`, round the ring, can be those of a chain behind its first one."""
    cdef uint16_t i = begin
    cdef bint more = True
    while i != end and more:
        more = vq_load_u16(&ring.desc[i].flags) & VIRTQ_DESC_F_NEXT != 0
        i = packed_following(ring, i)
    return i == end and not more


cdef void _check(packed_t* ring, place_t* place) noexcept nogil:
    """Put a place right that the ring belies.

    QEMU cannot look where a packed ring stands when its back-end is gone: it says the place at which the ring was
    stopped last, which for a guest that was migrated or paused lies any number of laps back.

    Only marks that change once, as in `_find`, count as an answer. Other devices leave the slots behind the first of a
    chain as they are: if these alone lie between the answer and what was said, that was right. Marks that are all 0 may
    be those of a fresh ring.
    """
    cdef marks_t marks = _look(ring)
    cdef place_t first = _unmarked(ring, marks.slots[0])
    if marks.changes > 1 or (first.slot == 0 and first.wrap):
        return
    if (place.slot >= first.slot) == (first.wrap == place.wrap):
        if place.slot == first.slot or _is_rest_of_chain(ring, first.slot, place.slot):
            return
    place[0] = first


cdef uint16_t packed_place(packed_t* ring, uint16_t* begin) noexcept nogil:
    cdef place_t place
    cdef uint16_t exposed = 0
    place.slot = ring.avail_slot
    place.wrap = ring.avail_flags & AVAIL != 0
    if place.slot == 0 and place.wrap:
        exposed = _find(ring, &place)
    else:
        _check(ring, &place)
    packed_go_to(ring, place.slot, place.wrap)
    begin[0] = <uint16_t>(place.slot - exposed) if place.slot >= exposed else \
        <uint16_t>(place.slot + ring.num - exposed)
    ring.moved += exposed
    return exposed


cdef void packed_go_to(packed_t* ring, uint16_t slot, bint wrap) noexcept nogil:
    ring.avail_slot = ring.used_slot = slot
    ring.avail_flags = AVAIL if wrap else USED
    ring.used_flags = PACKED_WRAP_BITS if wrap else 0
