"""Chains as parts that lie in one piece each."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t
from vq_core.dirty cimport dirty_mark, dirty_t
from vq_core.memory cimport memory_translate_part
from vq_core.queue_state cimport BROKEN_ADDRESS, BROKEN_ID, BROKEN_REFUSED, queue_break, queue_t
from vq_core.virtio cimport VIRTQ_DESC_F_WRITE, gpa_t, virtq_desc_t

cdef enum:
    PARTS_USUAL = 4
    NO_MEMORY = -2


cdef int _grow(parts_t* parts) noexcept nogil:
    cdef uint32_t room = parts.room * 2 if parts.room else PARTS_USUAL
    cdef part_t* grown = <part_t*>realloc(parts.items, room * sizeof(part_t))
    if grown == NULL:
        return NO_MEMORY
    parts.items = grown
    parts.room = room
    return 0


cdef int _add(parts_t* parts, queue_t* queue, virtq_desc_t* descriptor) noexcept nogil:
    """Translate a descriptor, in as many parts as it lies in: 0, BROKEN_ADDRESS or NO_MEMORY."""
    cdef gpa_t addr = descriptor.addr
    cdef uint64_t left = descriptor.len, length
    cdef part_t* part
    while left > 0:
        if parts.count == parts.room and _grow(parts) < 0:
            return NO_MEMORY
        part = &parts.items[parts.count]
        part.host = memory_translate_part(queue.memory, &queue.hint, addr, left, &length)
        if part.host == NULL:
            return BROKEN_ADDRESS
        part.addr = addr
        part.length = length
        parts.count += 1
        addr += length
        left -= length
    return 0


cdef int _take(parts_t* parts, span_t* span, queue_t* queue, virtq_desc_t* descriptor, uint64_t limit) noexcept nogil:
    """Add a descriptor, as much of it as `limit` allows, and no byte more is translated: 0, BROKEN_* or NO_MEMORY."""
    cdef int status
    if descriptor.addr + descriptor.len < descriptor.addr:
        return BROKEN_ADDRESS
    if descriptor.flags & VIRTQ_DESC_F_WRITE:        # an answer need not fill its room
        descriptor.len = <uint32_t>min(<uint64_t>descriptor.len, limit - span.writable_bytes)
        span.writable_bytes += descriptor.len
    elif descriptor.len > limit - span.readable_bytes:
        return BROKEN_REFUSED
    else:
        span.readable_bytes += descriptor.len
    status = _add(parts, queue, descriptor)
    if not descriptor.flags & VIRTQ_DESC_F_WRITE:
        span.middle = parts.count
    return status


cdef int _walk(parts_t* parts, span_t* span, queue_t* queue, chain_t* walk, uint64_t limit) noexcept nogil:
    """All descriptors: 0, BROKEN_* or NO_MEMORY."""
    cdef virtq_desc_t descriptor
    cdef int step, status
    while True:
        step = chain_next(walk, queue, &descriptor)
        if step <= 0:
            break
        status = _take(parts, span, queue, &descriptor, limit)
        if status:
            return status
    if step < 0 or chain_end(walk, queue) < 0:
        return <int>walk.broken
    if queue.ring.is_packed and walk.id >= queue.ring.num:
        return BROKEN_ID
    return 0


cdef int parts_walk(parts_t* parts, span_t* span, queue_t* queue, uint16_t head, virtq_desc_t* first,
                    uint64_t limit) noexcept nogil:
    cdef chain_t walk
    cdef int status
    span.first = span.middle = parts.count
    span.readable_bytes = span.writable_bytes = 0
    chain_begin(&walk, queue, head, first)
    status = _walk(parts, span, queue, &walk, limit)
    if status:
        parts.count = span.first
        if status == NO_MEMORY:
            return NO_MEMORY
        queue_break(queue, <uint32_t>status, walk.id)
        return -1
    span.end = parts.count
    span.steps = walk.steps
    span.id = walk.id
    span.slots = walk.slots
    return 0


cdef void parts_read(parts_t* parts, uint32_t first, uint32_t end, uint64_t offset, uint8_t* to,
                     uint64_t length) noexcept nogil:
    cdef uint64_t size
    cdef uint32_t i
    for i in range(first, end):
        if length == 0:
            break
        if offset >= parts.items[i].length:
            offset -= parts.items[i].length
            continue
        size = min(length, parts.items[i].length - offset)
        memcpy(to, parts.items[i].host + offset, size)
        to += size
        length -= size
        offset = 0


cdef void parts_write(parts_t* parts, uint32_t first, uint32_t end, uint64_t offset, const uint8_t* data,
                      uint64_t length) noexcept nogil:
    cdef uint64_t size
    cdef uint32_t i
    for i in range(first, end):
        if length == 0:
            break
        if offset >= parts.items[i].length:
            offset -= parts.items[i].length
            continue
        size = min(length, parts.items[i].length - offset)
        memcpy(parts.items[i].host + offset, data, size)
        data += size
        length -= size
        offset = 0


cdef void parts_mark(parts_t* parts, uint32_t first, uint32_t end, uint64_t length, dirty_t* log) noexcept nogil:
    cdef uint64_t size
    cdef uint32_t i
    for i in range(first, end):
        if length == 0:
            break
        size = min(length, parts.items[i].length)
        dirty_mark(log, parts.items[i].addr, size)
        length -= size
