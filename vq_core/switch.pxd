"""The learning switch: which port gets which packet of a burst.

    switch_forward(switch, lane, burst, source_port, offload, now_s)    all packets of a burst to their targets

One MAC table is shared by all workers, without a lock: buckets of four words of 64 bits, a word being the address
(48 bits, first byte lowest) and the port (16 bits); zero is a free way. A word is read and written whole, so an
address never comes with another's port. `seen` holds, by way, the second in which the address was last a source.
Word and second are two stores: a reader that sees one without the other takes a fresh entry for an aged one, or the
reverse, for one packet, which means a flood too many or a packet to where the address was a moment ago. Two workers
that learn in one bucket may overwrite each other: what is lost is learnt again with the next packet. Nothing is
ordered by these stores, hence relaxed ones.

A full bucket gives up the oldest entry of the port that learns, if it has one there, else the oldest of all: a guest
that invents source addresses evicts its own. `secret` keeps guests from choosing addresses of one bucket.

    burst      p0  p1  p2  p3  p4             Within one target the order of the burst is kept, floods included.
    floods      .   1   .   .   1             A set of packets is a word of bits; what goes to target t is
    masks[a]    1   .   .   1   .             masks[t] | floods. A set without gaps is pushed from the burst itself;
    masks[b]    .   .   1   .   .             another is gathered first, the floods once for all targets.

Broadcast, multicast and unknown addresses go to all other ports of the lane. One table for all VLANs; no spanning
tree, no filter for link-local multicast: two ports that are joined elsewhere make a loop.

Owners: the table belongs to all workers; a lane to one worker, and only its thread may touch it.
"""
from libc.stdint cimport uint32_t, uint64_t
from vq_core.offload cimport offload_t
from vq_core.port cimport BURST_MAX, burst_t, endpoint_t, packet_t

cdef enum:
    SWITCH_PORTS_MAX = 4096
    SWITCH_WAYS = 4
    SWITCH_BUCKET_BITS = 13
    SWITCH_BUCKETS = 8192        # 1 << SWITCH_BUCKET_BITS
    SWITCH_AGE_S = 300           # IEEE 802.1Q, 8.8.3: the recommended ageing time
    ETHERNET_HEADER = 14         # bytes; nothing shorter is a frame

cdef extern from "<time.h>" nogil:
    ctypedef int clockid_t
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(clockid_t clock, timespec* now) noexcept
    clockid_t CLOCK_MONOTONIC_COARSE

cdef struct switch_t:
    uint64_t secret              # multiplier of the hash, odd
    uint32_t age_s
    int port_count
    uint32_t* seen               # [SWITCH_BUCKETS * SWITCH_WAYS], seconds of switch_now_s
    uint64_t* words              # [SWITCH_BUCKETS * SWITCH_WAYS], a bucket within one cache line

cdef struct switch_lane_t:
    int port_count
    int member_count
    int* members                 # [member_count]: ports that the lane reaches, so that a flood visits no idle one
    endpoint_t** endpoints       # [port_count]: this worker's way into each port; NULL: it has none
    uint32_t* masks              # [port_count]: packets of the burst at hand; all zero between two bursts
    packet_t gathered[BURST_MAX]
    packet_t flooded[BURST_MAX]

cdef class Switch:
    cdef switch_t table

cdef class SwitchLane:
    cdef switch_lane_t lane
    cdef readonly Switch switch
    cdef readonly tuple members  # by port: (Port, endpoint index) or None

cdef inline uint32_t switch_now_s() noexcept nogil:
    """Seconds of the monotonic clock, by which the table ages: a few nanoseconds, no system call."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <uint32_t>now.tv_sec

# Learn from all packets of `burst`, pulled from port `source_port`, and push them to their targets, each of which is
# flushed: how many were taken (a flood counts once a target). The rest is dropped and counted, on the lane's endpoint
# of the source or of the target. The caller releases the burst. A lane without the source port forwards nothing.
cdef int switch_forward(switch_t* switch, switch_lane_t* lane, burst_t* burst, int source_port, offload_t* offload,
                        uint32_t now_s) noexcept nogil
