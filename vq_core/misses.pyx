"""The tables of what is missing."""
from libc.stdint cimport int64_t, uint32_t
from vq_core.arch cimport vq_exchange_u32, vq_load_acquire_u32, vq_load_u32, vq_store_release_u32
from vq_core.notify cimport notify_signal

cdef enum:
    PAGE_BITS = 12


cdef bint misses_note(miss_table_t* table, misses_t* misses, iova_t iova, uint32_t perm) noexcept nogil:
    cdef miss_t* slot
    cdef int i, free = -1
    for i in range(MISSES_MAX):
        slot = &table.slots[i]
        # Acquire: pairs with the release that frees a slot.
        if vq_load_acquire_u32(&slot.state) == MISS_FREE:
            free = i
        elif slot.iova >> PAGE_BITS == iova >> PAGE_BITS and slot.perm == perm:
            return True
    if free < 0:
        return False
    slot = &table.slots[free]
    slot.iova = iova
    slot.perm = perm
    # Release: pairs with the acquire in misses_next.
    vq_store_release_u32(&slot.state, MISS_NOTED)
    # The control thread takes `told` back before it looks: what it does not see is signalled anew.
    if vq_exchange_u32(&misses.told, 1) == 0:
        notify_signal(misses.event_fd)
    return True


cdef int misses_next(miss_table_t* table, int start) noexcept nogil:
    cdef int i
    for i in range(start, MISSES_MAX):
        if vq_load_acquire_u32(&table.slots[i].state) == MISS_NOTED:
            return i
    return MISSES_MAX


cdef void misses_free(miss_t* slot) noexcept nogil:
    # Release: pairs with the acquire in misses_note; our last look at the slot stands before it.
    vq_store_release_u32(&slot.state, MISS_FREE)


cdef void misses_answer(miss_table_t* table, iova_t iova, iova_t last, uint32_t perm) noexcept nogil:
    cdef miss_t* slot
    cdef int i
    for i in range(MISSES_MAX):
        slot = &table.slots[i]
        # With less than was asked for the question stays open, so that it is not asked again at once.
        if vq_load_acquire_u32(&slot.state) != MISS_FREE and iova <= slot.iova <= last and not slot.perm & ~perm:
            misses_free(slot)


cdef int misses_expire(miss_table_t* table, int64_t before_ns) noexcept nogil:
    cdef int i, count = 0
    for i in range(MISSES_MAX):
        if vq_load_u32(&table.slots[i].state) == MISS_ASKED and table.slots[i].asked_ns <= before_ns:
            misses_free(&table.slots[i])
            count += 1
    return count


cdef int misses_asked(miss_table_t* table) noexcept nogil:
    cdef int i, count = 0
    for i in range(MISSES_MAX):
        count += vq_load_u32(&table.slots[i].state) == MISS_ASKED
    return count


cdef int misses_age(miss_table_t* table, iova_t iova, iova_t last, int64_t asked_ns) noexcept nogil:
    cdef miss_t* slot
    cdef int i, count = 0
    for i in range(MISSES_MAX):
        slot = &table.slots[i]
        if vq_load_u32(&slot.state) == MISS_ASKED and iova <= slot.iova <= last:
            slot.asked_ns = min(slot.asked_ns, asked_ns)
            count += 1
    return count


cdef int64_t misses_oldest(miss_table_t* table, int64_t newest_ns) noexcept nogil:
    cdef int i
    for i in range(MISSES_MAX):
        if vq_load_u32(&table.slots[i].state) == MISS_ASKED:
            newest_ns = min(newest_ns, table.slots[i].asked_ns)
    return newest_ns


cdef void misses_clear(miss_table_t* table) noexcept nogil:
    cdef int i
    for i in range(MISSES_MAX):
        misses_free(&table.slots[i])


cdef class MissTable:
    """A table in Python's hands, so that it lives as long as anybody may look into it."""
