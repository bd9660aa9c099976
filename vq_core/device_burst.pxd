"""Many chains that Python takes, looks at and answers as one: packets as arrays, without an object or a loop for each.

    DeviceQueue.pull -> lengths, heads, field, gather -> scatter -> complete

Each chain was checked and translated once; what it sent is copied out where it is asked for. There are no views: what a
method copies is the caller's, and after `complete` the burst has no way to guest memory any more.
"""
from libc.stdint cimport uint32_t, uint64_t
from vq_core.chain_parts cimport span_t
from vq_core.packet_arrays cimport PacketArrays
from vq_core.packet_rows cimport PacketRows
from vq_core.taken cimport Taken, TakingQueue

cdef struct answer_t:
    span_t span
    uint32_t length              # of the answer
    uint32_t touched             # bytes written

cdef class ChainRun(Taken):
    # What of a burst is given back.
    cdef answer_t* answers
    cdef uint32_t room

    cdef int reserve(self, uint32_t room) except -1

cdef class DeviceBurst(PacketArrays):
    cdef ChainRun _run
    cdef uint32_t _header        # bytes before each packet
    cdef uint64_t _bytes         # that were sent, headers included

# As many chains as wait, up to `most`, and together `most_bytes` but for the one that passes it; None: no chain waits.
cdef DeviceBurst burst_take(TakingQueue queue, uint32_t most, uint32_t header, uint64_t most_bytes)

# Write packets into chains that wait, one each, and give these back: how many packets are dealt with. One that is
# longer than the chain before it has room for is dropped, and counted.
cdef Py_ssize_t burst_send(TakingQueue queue, PacketRows packets, PacketRows headers, uint64_t* dropped) except -1
