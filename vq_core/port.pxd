"""The port contract: what a worker asks of everything that packets come from or go to.

    pull(endpoint, burst, max)    -> packets borrowed into `burst`
    push(endpoint, packets, n)    -> packets dealt with (sent, or dropped and counted by the port itself);
                                     fewer than n only for want of room, and the caller then holds or drops the rest
    release(endpoint, burst, n)      the first n packets of the burst are done with: the source may reuse their
                                     buffers; n == burst.count releases everything that pull took
    flush(endpoint)                  end of a worker's round: notify, write out
    room(endpoint)                -> how many packets of one buffer each a push could take now, as far as is known;
                                     -1: nobody is there to take any; ROOM_PAUSES: none for now, whatever the guest does
    arm(endpoint, what)           -> ask for a wake-up through the worker's epoll; 1 if there is work already
    attach(endpoint, epoll_fd)       the worker takes over (-1: lets go): watch descriptors, edge-triggered

Rules
- A packet is borrowed: its segments point into the source's memory until it is released. `push` copies each packet
  once, and takes nothing else along.
- All functions run in the owning worker, without the GIL; none blocks, allocates or raises.
- Packets are handed over in order and released in order.
- `header` is the virtio-net header, copied once from the source and checked (net.pxd); a source without one leaves it
  zero. A packet whose header asks for work that the target does not accept is completed in software first
  (offload.pxd): `push` never sees it.

Directions: `pulled` counts what came in from the port (people read `from_guest`), `pushed` what went out to it.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.counters cimport counters_t
from vq_core.virtio cimport gpa_t, virtio_net_hdr_t

cdef enum:
    PORT_ABI = 1                 # of endpoint_t, burst_t and packet_t
    BURST_MAX = 32               # packets
    SEGMENTS_MAX = 1024          # segments of a burst, beyond the first of each packet
    PACKET_MAX = 65553           # bytes: 65535 of IP and an Ethernet header with a VLAN tag

# What a header may ask of a target (bits of `accepts` and `wants`).
cdef enum:
    OFFLOAD_CSUM = 1
    OFFLOAD_TSO4 = 2
    OFFLOAD_TSO6 = 4
    OFFLOAD_ECN = 8
    OFFLOAD_UFO = 16
    OFFLOAD_USO4 = 32
    OFFLOAD_USO6 = 64
    OFFLOAD_ALL = 127

cdef enum:
    ARM_PULL = 1                 # wake me when there is something to pull
    ARM_PUSH = 2                 # wake me when there is more room

cdef enum:
    ROOM_PAUSES = -2             # of room(): none, but that is not up to the guest, and will pass

cdef struct segment_t:
    uint8_t* data
    uint32_t length              # bytes

cdef struct packet_t:
    uint8_t* data                # first byte of the packet (no virtio-net header)
    segment_t* more              # the segments after the first; in the burst that the packet was pulled into
    uint32_t head_bytes          # bytes at `data`
    uint32_t length              # bytes in all
    uint32_t more_count
    uint16_t wants               # OFFLOAD_* bits that the header asks for
    uint16_t mark                # the source's own: where release() gets to with this packet
    virtio_net_hdr_t header

cdef struct burst_t:
    uint32_t count               # packets
    uint32_t wants               # OR over the packets
    uint32_t segment_count       # of `segments` in use
    packet_t packets[BURST_MAX]
    segment_t segments[SEGMENTS_MAX]

cdef struct endpoint_t:
    int (*pull)(endpoint_t* endpoint, burst_t* burst, int max) noexcept nogil
    int (*push)(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil
    void (*release)(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil
    void (*flush)(endpoint_t* endpoint) noexcept nogil
    int (*room)(endpoint_t* endpoint) noexcept nogil
    int (*arm)(endpoint_t* endpoint, int what) noexcept nogil
    void (*attach)(endpoint_t* endpoint, int epoll_fd) noexcept nogil
    void* port                   # the port's own structure
    counters_t* pulled           # one writer: the owning worker
    counters_t* pushed
    uint32_t accepts             # OFFLOAD_* that push takes as they are
    uint32_t holds               # the source keeps packets itself: a full target makes it wait instead of dropping

cdef class Port:
    """A port of a pump: a name, and one endpoint for each queue pair.

    Subclasses fill `endpoints` once, in their constructor; the array never moves.
    """
    cdef readonly str name
    cdef readonly int endpoint_count
    cdef endpoint_t** endpoints
    cdef readonly object mailboxes    # list: the Mailbox of the worker that owns each endpoint, or None

    cdef int allocate(self, int count) except -1
    cdef int adopt(self, int index, object mailbox) except -1
