"""A flow: packets of one source endpoint on their way to one target, or to a switch that chooses targets.

    flow_round.pxd: pull -> (judged.pxd) -> here: (offload) -> push -> release

A source that holds packets itself (TAP, file, generator) is only pulled from when the target has room,
and what a target could not take then waits in the flow's own burst: nothing is dropped for want of
buffers. Packets of a guest stay in its transmitq for a moment (PATIENCE_CYCLES) when the target is a ring
without room, since dropping costs TCP far more than waiting; a target that does not make room by then is not
waited for again before it has some, and what it cannot take is dropped and counted.

Between two rings of guests a burst is pushed and released in parts (sub-bursts), so that either side goes on early.

Owner: the worker whose plan the flow is in.
"""
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from vq_core.counters cimport DROP_NO_DESCRIPTORS
from vq_core.offload cimport offload_push, offload_t
from vq_core.port cimport BURST_MAX, burst_t, endpoint_t, packet_t
from vq_core.program cimport program_t
from vq_core.switch cimport switch_lane_t, switch_t

cdef enum:
    NEED_MAX = 44                # buffers of 1.5 KiB for a packet of 64 KiB
    PATIENCE_CYCLES = 10000000   # about 4 ms: a guest that is busy elsewhere comes back by then
    PAUSE_CYCLES = 300000000     # about 100 ms, for a target that waits for something else than its guest
    SUB_BURST = 16               # packets published at once while both ends are rings of guests, by default
    SUB_BURST_BYTES = 704        # a packet: when all are of full Ethernet length, half of a sub-burst is published

cdef struct flow_t:
    endpoint_t* source
    endpoint_t* target           # NULL: the switch decides
    switch_t* via
    switch_lane_t* lane
    int source_port              # index of the source's port in the switch
    int step                     # packets pushed and released at once
    burst_t* held                # own burst of a source that holds; else NULL
    int held_at                  # first packet of `held` that is not pushed; -1: none waits
    bint waiting                 # for room in the target
    int room                     # what the target said of it then, where packets are held
    bint patient                 # a ring towards a ring: packets stay in the source for a moment
    bint tired                   # waiting was in vain; not again before there is room
    int need                     # buffers that a packet may take: 1, or many after one that was to be segmented
    int most                     # the most room that the target has shown: a small ring never has more
    uint64_t waiting_since       # cycles
    program_t* program           # looks at each burst; NULL: none
    endpoint_t* ways[2]          # of a patch: this worker's way into each port, by number; a switch has its lane's
    bint judged                  # some packet of the burst at hand does not simply pass
    uint16_t verdicts[BURST_MAX]

cdef struct flow_scratch_t:
    # What the flows of a worker use in turns.
    offload_t* offload
    burst_t burst
    burst_t passed               # what a program leaves to the switch

cdef inline int flow_push(flow_scratch_t* scratch, endpoint_t* target, packet_t* packets, int count,
                          uint32_t wants) noexcept nogil:
    if wants & ~target.accepts:
        return offload_push(scratch.offload, target, packets, count)
    return target.push(target, packets, count)

cdef inline int flow_part(flow_t* flow, packet_t* packets, int left) noexcept nogil:
    """How many of the `left` packets to publish at once: a sub-burst, or less of it when they are long."""
    cdef int i, most = min(flow.step, left)
    cdef int64_t bytes_left = <int64_t>flow.step * SUB_BURST_BYTES
    if flow.step == BURST_MAX:
        return left
    for i in range(most):
        bytes_left -= packets[i].length
        if bytes_left <= 0:
            return i + 1
    return most

cdef inline int flow_deliver(flow_scratch_t* scratch, flow_t* flow, burst_t* burst, int first) noexcept nogil:
    """Push and release packets `first` and up; where it stopped for want of room (burst.count: all done)."""
    cdef endpoint_t* source = flow.source
    cdef int count = burst.count, size, done
    while first < count:
        size = flow_part(flow, &burst.packets[first], count - first)
        done = flow_push(scratch, flow.target, &burst.packets[first], size, burst.wants)
        first += done
        if done < size:
            if flow.held != NULL:
                break
            flow.target.pushed.dropped[DROP_NO_DESCRIPTORS] += count - first
            first = count
        source.release(source, burst, first)
    return first
