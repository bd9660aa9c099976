"""Translations that somebody misses, on their way to the control thread, which asks the front-end (IOTLB_MSG MISS).

Each queue has a small table, and the control thread one of its own. A slot goes round and round between two owners:

    free -> the worker notes address and permission -> noted -> the control thread asks -> asked
    noted -> the control thread finds the translation there, by an UPDATE that came meanwhile -> free
    asked -> answered by an UPDATE, or too old -> free

So the same miss is asked for once however often the worker runs into it, and whatever a guest does, MISSES_MAX
questions of a queue are open at most. No lock, no waiting: a worker whose table is full notes nothing more.

Owners: a free slot is the worker's, any other the control thread's. While a ring stands, all of it is the control
thread's.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from vq_core.virtio cimport iova_t

cdef enum:
    MISSES_MAX = 64

cdef enum:
    MISS_FREE = 0
    MISS_NOTED = 1
    MISS_ASKED = 2

cdef struct miss_t:
    uint32_t state
    uint32_t perm                # what is wanted: IOTLB_READ or IOTLB_WRITE
    iova_t iova                  # first byte that is missing in its page
    int64_t asked_ns             # CLOCK_MONOTONIC

cdef struct miss_table_t:
    miss_t slots[MISSES_MAX]

cdef struct misses_t:
    int event_fd                 # of the control thread
    uint32_t told                # it was signalled and has not looked since

# Note a miss unless that was done: True if it is noted now, False if the table is full.
cdef bint misses_note(miss_table_t* table, misses_t* misses, iova_t iova, uint32_t perm) noexcept nogil

# ---- the control thread's side ----

# The next noted slot from `start` on, MISSES_MAX if there is none.
cdef int misses_next(miss_table_t* table, int start) noexcept nogil
# Free the slots that [iova, last] with `perm` answers.
cdef void misses_answer(miss_table_t* table, iova_t iova, iova_t last, uint32_t perm) noexcept nogil
# Free the slots that were asked for before a time; how many.
cdef int misses_expire(miss_table_t* table, int64_t before_ns) noexcept nogil
cdef int misses_asked(miss_table_t* table) noexcept nogil
cdef void misses_free(miss_t* slot) noexcept nogil
# Let questions of [iova, last] be as old as if they had been asked at a time, at least; how many there are.
cdef int misses_age(miss_table_t* table, iova_t iova, iova_t last, int64_t asked_ns) noexcept nogil
# When the oldest open question was asked; `newest_ns` if none is older.
cdef int64_t misses_oldest(miss_table_t* table, int64_t newest_ns) noexcept nogil
cdef void misses_clear(miss_table_t* table) noexcept nogil

cdef class MissTable:
    cdef miss_table_t table
