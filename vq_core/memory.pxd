"""Guest memory: the only place where a guest address becomes a pointer.

A MemoryMap is immutable. The control thread builds a new one for each memory table and
publishes it; a worker uses it between two of its burst boundaries; the old one is unmapped when
its last user (queues, views) has let go of it. So a translation needs no lock.

Invariants, established when the map is built and never checked again:
- regions are sorted by guest_addr and do not overlap, in guest_addr or in user_addr;
- guest_addr + size, user_addr + size and host + size do not overflow, size > 0;
- [host, host + size) is mapped shared, readable and writable while the map lives.

`lost` points to a flag that the SIGBUS guard (include/vq_guard.h) raises when the owner has truncated
memory of this map, or of one that it was made from: the range then holds zero pages, and whoever sees
the flag stops using the map.

In a postcopy migration a map `may_block`: who touches a page that has not come yet waits for the front-end
(userfault.pxd). Only workers and their pools do so then, never the control thread.

Threading: everything here may be used by any number of threads.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from vq_core.arch cimport vq_load_u32
from vq_core.userfault cimport Userfault
from vq_core.virtio cimport gpa_t, uva_t

cdef struct region_t:
    gpa_t guest_addr
    uint64_t size          # bytes
    uva_t user_addr
    uint8_t* host          # first byte of the region in this process

cdef struct memory_t:
    region_t* regions      # region_count of them, sorted by guest_addr
    uint32_t region_count
    uint32_t* lost         # read once a burst

cdef region_t* memory_find(memory_t* memory, gpa_t addr) noexcept nogil

cdef inline uint8_t* memory_translate(memory_t* memory, region_t** hint, gpa_t addr, uint64_t length) noexcept nogil:
    """The pointer for [addr, addr + length) if it lies inside one region, else NULL.

    `hint` is the caller's cache: the region of its last hit (never NULL). A range that spans two
    regions gives NULL; such chains go by `memory_translate_part`.
    """
    cdef region_t* region = hint[0]
    cdef uint64_t offset = addr - region.guest_addr      # wraps below the region: then >= size
    if offset >= region.size:
        region = memory_find(memory, addr)
        if region == NULL:
            return NULL
        hint[0] = region
        offset = addr - region.guest_addr
    # offset < size here, so the difference cannot wrap.
    if length > region.size - offset:
        return NULL
    return region.host + offset

cdef inline uint8_t* memory_translate_near(memory_t* memory, region_t** hint, region_t* near, gpa_t addr,
                                           uint64_t length) noexcept nogil:
    """As `memory_translate`, looking first into `near`: a loop's own copy of the region of its last hit."""
    cdef uint64_t offset = addr - near.guest_addr
    cdef uint8_t* host
    if (offset < near.size) & (length <= near.size - offset):
        return near.host + offset
    host = memory_translate(memory, hint, addr, length)
    near[0] = hint[0][0]
    return host

cdef inline uint8_t* memory_translate_part(memory_t* memory, region_t** hint, gpa_t addr, uint64_t length,
                                           uint64_t* part) noexcept nogil:
    """The pointer for `addr` and, in `part`, how many of `length` bytes (> 0) lie in its region; NULL if none."""
    cdef region_t* region = hint[0]
    cdef uint64_t offset = addr - region.guest_addr
    if offset >= region.size:
        region = memory_find(memory, addr)
        if region == NULL:
            return NULL
        hint[0] = region
        offset = addr - region.guest_addr
    part[0] = length if length <= region.size - offset else region.size - offset
    return region.host + offset

cdef inline bint memory_lost(memory_t* memory) noexcept nogil:
    """Whether the owner truncated the memory under us."""
    return vq_load_u32(memory.lost) != 0

# Whole range by front-end user address inside one region, or NULL; the region's gpa goes to `guest_addr`.
cdef uint8_t* memory_user_translate(memory_t* memory, uva_t addr, uint64_t length, gpa_t* guest_addr) noexcept nogil

# A flag that the SIGBUS guard raises when [start, start + bytes) is lost; NULL without memory. End it before munmap.
cdef void* memory_guard(void* start, uint64_t bytes, uint32_t* flag) except? NULL
cdef void memory_unguard(void* guard) noexcept

cdef class MemoryMap:
    cdef memory_t memory
    cdef object _flag         # holds what memory.lost points to; shared by all maps of a connection
    cdef list _mappings       # one _Mapping a region, sorted as the regions are
    cdef Userfault _userfault     # None but for postcopy
    cdef readonly bint may_block
    cdef object __weakref__

    cdef int _fill(self, list mappings) except -1
