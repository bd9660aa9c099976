"""The dirty-page log of live migration (vhost-user: SET_LOG_BASE).

One bit a 4096-byte page, from guest physical address 0; bits are set by atomic OR, since other
processes set bits of the same log. Order (protocol): data first, then the bits, then the used
index that exposes the buffer; the caller's store-release of the index is the fence behind.

A NULL log means that logging is off: one predicted branch.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vq_core.arch cimport vq_fence_release, vq_load_u8, vq_load_u32, vq_or_u8
from vq_core.virtio cimport gpa_t

cdef struct dirty_t:
    uint8_t* bits
    uint64_t pages           # how many pages the log covers
    uint64_t outside         # writes beyond the log: not marked, counted (single writer: the worker)
    uint32_t lost            # the log's file was truncated (SIGBUS guard)

cdef inline void dirty_mark(dirty_t* log, gpa_t addr, uint64_t length) noexcept nogil:
    """Mark the pages of [addr, addr + length), length > 0, as dirty."""
    cdef uint64_t page = addr >> 12
    cdef uint64_t last = (addr + (length - 1)) >> 12
    if last >= log.pages or addr + (length - 1) < addr:
        log.outside += 1
        return
    vq_fence_release()       # the data stands before the bit
    while page <= last:
        vq_or_u8(&log.bits[page >> 3], <uint8_t>(1 << (page & 7)))
        page += 1

cdef inline void dirty_mark_fenced(dirty_t* log, gpa_t addr, uint64_t length) noexcept nogil:
    """As `dirty_mark`, for writes that a full fence stands behind: a bit that is set already is left alone.

    Whoever takes the bit away after we have seen it copies the page later still, and so with our writes: without the
    fence our look could come before them.
    """
    cdef uint64_t page = addr >> 12
    cdef uint64_t last = (addr + (length - 1)) >> 12
    cdef uint8_t bit
    if last >= log.pages or addr + (length - 1) < addr:
        log.outside += 1
        return
    while page <= last:
        bit = <uint8_t>(1 << (page & 7))
        if not vq_load_u8(&log.bits[page >> 3]) & bit:
            vq_or_u8(&log.bits[page >> 3], bit)
        page += 1

cdef class DirtyLog:
    cdef dirty_t log
    cdef void* _start
    cdef size_t _length
    cdef void* _guard
