"""Requests of a driver that Python serves in place: no byte is copied but what the device reads or writes.

    in the ring -> taken, all of it translated -> read and written in guest memory -> noted as used -> published

Unlike `chain_queue.pxd`, which shows a copy, a chain gives views of guest memory. The driver can change what is seen
there at any time: whoever reads a field twice may find two values. What keeps that from being dangerous:
- each descriptor is checked and translated once, when the chain is taken; nothing of it is read again;
- the chain and each view hold the memory map, which stays mapped as long as one of them lives;
- a chain is given back only when no view of it is in use any more.

A hostile driver can make the same long chain available as often as its ring has entries. What that costs is counted in
descriptors read and segments found (`_weight` of a chain): a turn takes so much of it, and so much may be out.

Owner: the control thread. `DeviceChain.complete` may come from any thread: another one's is
only noted, and carried out by the owner.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.memory cimport MemoryMap
from vq_core.served_queue cimport ServedQueue
from vq_core.virtio cimport gpa_t

cdef struct segment_t:
    uint8_t* host
    gpa_t addr
    uint64_t length              # bytes, not 0

cdef class Segment:
    # What memoryviews of a part of a chain are made of; counts them.
    cdef MemoryMap _memory
    cdef uint8_t* _host
    cdef Py_ssize_t _length
    cdef bint _writable
    cdef Py_ssize_t _views

cdef class DeviceChain:
    cdef readonly DeviceQueue queue
    cdef MemoryMap _memory
    cdef segment_t* _segments
    cdef uint32_t _count
    cdef uint32_t _readable_count    # of the segments; the others are writable
    cdef uint64_t _readable_bytes
    cdef uint64_t _writable_bytes
    cdef uint64_t _read              # bytes that `read` has passed
    cdef uint64_t _written           # and `write`
    cdef uint64_t _touched           # where the furthest write ended
    cdef uint16_t _id
    cdef uint16_t _slots
    cdef uint16_t _place             # of the ring, where it was taken; packed: with the wrap counter in bit 15
    cdef uint32_t _life
    cdef uint32_t _weight            # descriptors read and segments found: what it costs in time and memory
    cdef uint64_t _number            # chains of this life that were taken before
    cdef bint _over                  # completed or refused
    cdef list _shown                 # segments and views of them that were given out

    cdef int _grow(self, uint32_t room) noexcept nogil
    cdef int _check(self) except -1
    cdef tuple _views(self, uint32_t first, uint32_t end, bint writable)
    cdef int _release(self) except -1

cdef class DeviceQueue(ServedQueue):
    cdef readonly int index
    cdef readonly str name
    cdef uint64_t _limit_bytes
    cdef uint32_t _budget            # chains that may still be taken in this turn
    cdef uint32_t _steps             # descriptors that may still be read in this turn
    cdef uint64_t _held              # weight of the chains that are out
    cdef uint64_t _number
    cdef dict _out                   # chains that are not completed, by number
    cdef object _later               # what other threads completed: (chain, length)
    cdef unsigned long _owner        # thread that serves the queue now; 0: none

    cdef DeviceChain _take(self)
    cdef bint _lives(self, DeviceChain chain) noexcept
    cdef bint _give_back(self, DeviceChain chain, uint64_t length) except -1
