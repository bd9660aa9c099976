"""Finding the place of a packed ring in the ring itself."""
from libc.stdint cimport uint16_t
from vq_core.arch cimport vq_load_u16
from vq_core.packed cimport PACKED_WRAP_BITS, packed_t
from vq_core.virtio cimport VIRTQ_DESC_F_NEXT, VIRTQ_PACKED_DESC_F_AVAIL, VIRTQ_PACKED_DESC_F_USED


cdef bint _is_rest_of_chain(packed_t* ring, uint16_t begin, uint16_t end) noexcept nogil:
    """Whether the slots from `begin` up to `end`, round the ring, can be those of a chain behind its first one."""
    cdef uint16_t i = begin
    cdef bint more = True
    while i != end and more:
        more = vq_load_u16(&ring.desc[i].flags) & VIRTQ_DESC_F_NEXT != 0
        i = i + 1 if i + 1 < ring.num else 0
    return i == end and not more


cdef void _find(packed_t* ring, uint16_t* slot, bint* wrap) noexcept nogil:
    """Where a device that completes in order stopped, told by the ring itself; a fresh one says its beginning.

    Only the device changes a USED bit, to its wrap counter, when it uses a slot (`packed_publish`: each slot of a
    chain): the slots before its place differ in it from those behind. What this cannot tell:

    - With IN_ORDER one used descriptor stands for a batch, and the others keep their bits. Such a ring (`batch`) is not
      asked; only an in-flight region would know after a crash.
    - A burst is exposed by its first slot, which is written last. A crash in between is seen by that slot, and the
      burst is done again, unless the burst begins in slot 0 or goes over the end of the ring.
    """
    cdef uint16_t first = vq_load_u16(&ring.desc[0].flags) & VIRTQ_PACKED_DESC_F_USED
    cdef uint16_t i
    for i in range(1, ring.num):
        if vq_load_u16(&ring.desc[i].flags) & VIRTQ_PACKED_DESC_F_USED != first:
            slot[0] = i
            wrap[0] = first != 0
            return
    slot[0] = 0
    wrap[0] = first == 0


cdef void _check(packed_t* ring, uint16_t* slot, bint* wrap) noexcept nogil:
    """Put a place right that the ring belies.

    QEMU cannot look where a packed ring stands when its back-end is gone: it says the place at which the ring was
    stopped last, which for a guest that was migrated or paused lies any number of laps back.

    Only marks that change once, as in `_find`, count as an answer. Other devices leave the slots behind the first of a
    chain as they are: if these alone lie between the answer and what was said, that was right. Marks that change
    nowhere and are all 0 may be those of a fresh ring.
    """
    cdef uint16_t first = vq_load_u16(&ring.desc[0].flags) & VIRTQ_PACKED_DESC_F_USED
    cdef uint16_t last = first, flags, i, found = 0
    cdef int changes = 0
    for i in range(1, ring.num):
        flags = vq_load_u16(&ring.desc[i].flags) & VIRTQ_PACKED_DESC_F_USED
        if flags != last:
            changes += 1
            found = i
            last = flags
    if changes > 1 or (changes == 0 and first == 0):
        return
    cdef bint lap = first != 0 if changes else False
    if (slot[0] >= found) == (lap == wrap[0]):
        if slot[0] == found or _is_rest_of_chain(ring, found, slot[0]):
            return
    slot[0] = found
    wrap[0] = lap


cdef void packed_place(packed_t* ring) noexcept nogil:
    cdef uint16_t slot = ring.avail_slot
    cdef bint wrap = ring.avail_flags & VIRTQ_PACKED_DESC_F_AVAIL != 0
    if slot == 0 and wrap:
        _find(ring, &slot, &wrap)
    else:
        _check(ring, &slot, &wrap)
    packed_go_to(ring, slot, wrap)


cdef void packed_go_to(packed_t* ring, uint16_t slot, bint wrap) noexcept nogil:
    ring.avail_slot = ring.used_slot = slot
    ring.avail_flags = VIRTQ_PACKED_DESC_F_AVAIL if wrap else VIRTQ_PACKED_DESC_F_USED
    ring.used_flags = PACKED_WRAP_BITS if wrap else 0
