"""Requests of a driver that Python serves in place: no byte is copied but what the device reads or writes.

Unlike `chain_queue.pxd`, which shows a copy, a chain gives views of guest memory. The driver can change what is seen
there at any time: whoever reads a field twice may find two values. What keeps that from being dangerous:
- each descriptor is checked and translated once, when the chain is taken; nothing of it is read again;
- the chain and each view hold the memory map, which stays mapped as long as one of them lives;
- a chain is given back only when no view of it is in use any more.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vq_core.chain_parts cimport span_t
from vq_core.memory cimport MemoryMap
from vq_core.taken cimport Taken

cdef class Segment:
    # What memoryviews of a part of a chain are made of; counts them.
    cdef MemoryMap _memory
    cdef uint8_t* _host
    cdef Py_ssize_t _length
    cdef bint _writable
    cdef Py_ssize_t _views

cdef class DeviceChain(Taken):
    cdef span_t _span
    cdef uint64_t _read              # bytes that `read` has passed
    cdef uint64_t _written           # and `write`
    cdef uint64_t _touched           # where the furthest write ended
    cdef uint64_t _length            # of the answer, once it is completed
    cdef list _shown                 # segments, and weak references to the views of them that were given out

    cdef tuple _views(self, uint32_t first, uint32_t end, bint writable)
    cdef int _release(self) except -1
