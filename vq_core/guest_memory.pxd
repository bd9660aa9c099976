"""Guest memory that is ours: for driver-side rings, their buffers, and whatever a front-end shares.

Thread: under the GIL; the bytes belong to whoever uses the rings.
"""
from libc.stdint cimport uint8_t, uint64_t

cdef class Region:
    """One region of guest memory: a sealed memfd and our mapping of it."""
    cdef readonly object guest_addr      # int, bytes, like the following
    cdef readonly object user_addr
    cdef readonly object size
    cdef readonly object mmap_offset
    cdef readonly int fd                 # -1 once closed
    cdef uint8_t* start                  # of the mapping
    cdef size_t length
    cdef uint8_t* data                   # start + mmap_offset
    cdef uint64_t used                   # bytes that the allocator gave out
    cdef dict blocks                     # free blocks by size

cdef class Block:
    """Bytes of guest memory that nobody else uses; given back when the last reference (or view) is dropped."""
    cdef readonly object guest_addr
    cdef readonly object size
    cdef Region region
    cdef uint64_t offset
    cdef uint64_t room                   # bytes that it occupies
    cdef uint8_t* data

cdef class GuestMemory:
    cdef list _regions
