"""Chains that were taken from a ring and are not given back: what keeps account of them, whatever Python makes of them.

    look (walked, checked, translated) -> commit -> kept as a `Taken` -> completed -> given back -> published

A hostile driver can make the same long chain available as often as its ring has entries. What that costs is counted in
descriptors read and parts found (the weight of a chain): a turn takes so much of it, and so much may be out.

Owner: the control thread. `Taken._finish` may come from any thread: another one's is only noted, and carried out by the
owner.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.chain_parts cimport parts_t, span_t
from vq_core.cursor cimport cursor_t
from vq_core.memory cimport MemoryMap
from vq_core.queue_state cimport queue_t
from vq_core.served_queue cimport ServedQueue

cdef class Taken:
    cdef TakingQueue _queue
    cdef MemoryMap _memory           # held, so that the parts are mapped
    cdef parts_t _parts
    cdef uint16_t _place             # of the ring, where it was taken; packed: with the wrap counter in bit 15
    cdef uint32_t _life
    cdef uint32_t _chains
    cdef uint64_t _weight            # descriptors read and parts found: what it costs in time and memory
    cdef uint64_t _number            # chains of this life that were taken before
    cdef bint _over                  # completed or refused

    cdef int _check(self) except -1
    cdef void _give_back(self, queue_t* queue) noexcept
    cdef bint _finish(self) except -1

cdef class TakingQueue(ServedQueue):
    cdef readonly int index
    cdef readonly str name
    cdef uint64_t _limit_bytes
    cdef uint32_t _steps             # descriptors that may still be read in this turn
    cdef bint _took                  # something, in this turn
    cdef uint64_t _held              # weight of the chains that are out
    cdef uint64_t _number
    cdef dict _out                   # what is not completed, by number
    cdef object _later               # what other threads completed
    cdef unsigned long _owner        # thread that serves the queue now; 0: none
    cdef cursor_t _cursor            # from `_look` to `_commit`

    cdef bint _lives(self, Taken taken) noexcept
    cdef int _look(self, parts_t* parts, span_t* span) noexcept nogil
    cdef void _commit(self, span_t* span) noexcept nogil
    cdef int _refresh(self) except -1
    cdef void _bind(self, Taken taken)
    cdef void _keep(self, Taken taken)
    cdef void _take_back(self, Taken taken)
