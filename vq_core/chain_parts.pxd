"""What a chain comes to in our memory: its parts, each in one piece, and bytes copied from and to them.

A chain is walked once, checked and translated; from then on only its parts count, and nothing of it is read again.
Where several chains are taken at once they share one list of parts, and each has its span of it.

    chain.pyx -> parts_walk -> parts_read, parts_write -> parts_mark

Owner: whoever has taken the chains. The memory map that the parts point into has to be held by them.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.dirty cimport dirty_t
from vq_core.queue_state cimport queue_t
from vq_core.virtio cimport gpa_t, virtq_desc_t

cdef struct part_t:
    uint8_t* host
    gpa_t addr
    uint64_t length              # bytes, not 0

cdef struct parts_t:
    part_t* items                # to be freed by the owner
    uint32_t count
    uint32_t room                # items that there is memory for

cdef struct span_t:
    uint32_t first               # of its parts: readable ones
    uint32_t middle              # ... from here on writable ones
    uint32_t end
    uint32_t steps               # descriptors read
    uint64_t readable_bytes
    uint64_t writable_bytes
    uint16_t id
    uint16_t slots

# Walk the chain that begins with `first` at `head`, and add its parts: 0; -1 and the queue is broken, or -2 without
# memory, and then there are as many parts as before. A request of more than `limit` bytes breaks the queue; of a longer
# room for the answer that much is shown.
cdef int parts_walk(parts_t* parts, span_t* span, queue_t* queue, uint16_t head, virtq_desc_t* first,
                    uint64_t limit) noexcept nogil

# Copy `length` bytes from or to the parts [first, end), from byte `offset` of them on. The caller has seen to it that
# they are there.
cdef void parts_read(parts_t* parts, uint32_t first, uint32_t end, uint64_t offset, uint8_t* to,
                     uint64_t length) noexcept nogil
cdef void parts_write(parts_t* parts, uint32_t first, uint32_t end, uint64_t offset, const uint8_t* data,
                      uint64_t length) noexcept nogil

# Log that the first `length` bytes of the parts [first, end) were written.
cdef void parts_mark(parts_t* parts, uint32_t first, uint32_t end, uint64_t length, dirty_t* log) noexcept nogil
