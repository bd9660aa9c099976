"""The sink: takes packets and forgets them; `copy` moves each payload into host memory first.

`null:copy` does what a back-end that hands packets to an application does, so that a comparison with such
back-ends is fair. Its buffers are few and small enough to stay in the first-level cache.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from vq_core.arch cimport vq_copy
from vq_core.port cimport OFFLOAD_ALL, PACKET_MAX, Port, endpoint_t, packet_t

cdef enum:
    SLOTS = 8
    SLOT_BYTES = 1536

cdef struct null_t:
    uint32_t next
    uint8_t* slots               # SLOTS of SLOT_BYTES, and PACKET_MAX for longer packets; NULL: nothing is copied


cdef int _push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    cdef null_t* null = <null_t*>endpoint.port
    cdef uint64_t total = 0
    cdef uint32_t j
    cdef uint8_t* slot
    cdef packet_t* packet
    for i in range(count):
        packet = &packets[i]
        total += packet.length
        if null.slots != NULL:
            slot = null.slots + (null.next & (SLOTS - 1)) * SLOT_BYTES
            if packet.length > SLOT_BYTES:
                slot = null.slots + SLOTS * SLOT_BYTES
            null.next += 1
            vq_copy(slot, packet.data, packet.head_bytes)
            slot += packet.head_bytes
            for j in range(packet.more_count):
                memcpy(slot, packet.more[j].data, packet.more[j].length)
                slot += packet.more[j].length
    endpoint.pushed.packets += count
    endpoint.pushed.bytes += total
    return count


cdef class NullPort(Port):
    """A sink.

    Parameters
    ----------
    name : str
    copy : bool
        Copy each payload into memory of our own before it is dropped.
    endpoints : int
        How many lanes of a pump may use it at once.
    """

    cdef null_t* state

    directions = ("to_null", "from_null")

    elastic = True

    def __cinit__(self, name, bint copy=False, int endpoints=1):
        cdef int i
        cdef endpoint_t* endpoint
        self.name = name
        self.allocate(endpoints)
        self.state = <null_t*>calloc(endpoints, sizeof(null_t))
        if self.state == NULL:
            raise MemoryError("null port")
        for i in range(endpoints):
            if copy:
                self.state[i].slots = <uint8_t*>calloc(1, SLOTS * SLOT_BYTES + PACKET_MAX)
                if self.state[i].slots == NULL:
                    raise MemoryError("null port")
            endpoint = self.endpoints[i]
            endpoint.port = &self.state[i]
            endpoint.accepts = OFFLOAD_ALL
            endpoint.holds = True
            endpoint.push = _push

    @property
    def sources(self):
        """list of int: none; nothing comes from a sink."""
        return []

    def __dealloc__(self):
        cdef int i
        if self.state != NULL:
            for i in range(self.endpoint_count):
                free(self.state[i].slots)
        free(self.state)
