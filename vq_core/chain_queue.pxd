"""A queue of requests that the control thread serves itself: few, small, and never on the way of a packet.

    in the ring -> taken, its device-readable bytes copied -> answered -> used element noted -> published

A request is copied out once, by the chain cursor with all its checks, and only the copy is looked at. What is kept of
its device-writable part are guest addresses, never pointers: they are translated when the answer is written, in the
memory of that moment. So the memory may change while a request is out, and what is answered after its ring was stopped
goes nowhere (`life`).

Owner: the control thread.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.queue_state cimport queue_t
from vq_core.served_queue cimport ServedQueue
from vq_core.virtio cimport gpa_t

cdef enum:
    REQUEST_PARTS_MAX = 64       # device-writable descriptors that an answer can fill

cdef struct request_t:
    uint16_t id                  # of the descriptor chain
    uint16_t slots
    uint32_t life                # of the ring that it was taken from
    uint32_t copied              # device-readable bytes that were copied
    uint64_t readable_bytes      # device-readable bytes that there are
    uint64_t writable_bytes      # of the parts below
    uint32_t steps               # descriptors read
    uint32_t part_count
    uint32_t lengths[REQUEST_PARTS_MAX]
    gpa_t addrs[REQUEST_PARTS_MAX]

# Take the next request, up to `limit` readable bytes of it to `to`: 1; 0 if there is none; -1 and the queue is broken.
cdef int request_take(queue_t* queue, request_t* request, uint8_t* to, uint32_t limit) noexcept nogil

# Write an answer to the beginning of the writable part, as far as that goes: its bytes, or -1 and the queue is broken.
cdef int64_t request_answer(queue_t* queue, request_t* request, const uint8_t* data, uint64_t length) noexcept nogil

cdef class Chain:
    cdef request_t request
    cdef ChainQueue _queue     # None once it is answered
    cdef readonly bytes data

cdef class ChainQueue(ServedQueue):
    cdef uint8_t* _copy          # room for the readable bytes of one request
    cdef uint32_t _limit

    cdef bint _runs(self, request_t* request) noexcept
