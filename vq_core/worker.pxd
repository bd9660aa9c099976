"""A worker: one thread that moves packets along its flows, without the GIL.

    round:  for each flow:  pull -> (offload) -> push -> release -> flush
    between two rounds lies the burst boundary: commands of the control thread are run there

A flow joins a source endpoint to a target endpoint, or to a switch that chooses targets. An endpoint
belongs to one worker; the plan (all flows of a worker) is immutable and swapped by hand-over.

Sleeping (`adaptive`): after IDLE_CYCLES without a packet the worker asks every source for a wake-up
(`arm`), looks once more, and waits in one epoll. `busy` never sleeps.

A source that holds packets itself (TAP, file, generator) is only pulled from when the target has room,
and what a target could not take then waits in the flow's own burst: nothing is dropped for want of
buffers. Packets of a guest stay in its transmitq for a moment (PATIENCE_CYCLES) when the target is a ring
without room, since dropping costs TCP far more than waiting; a target that does not make room by then is not
waited for again before it has some, and what it cannot take is dropped and counted.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.handover cimport Mailbox
from vq_core.offload cimport Offload, offload_t
from vq_core.port cimport BURST_MAX, Port, burst_t, endpoint_t
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

cdef struct plan_t:
    flow_t* flows
    int flow_count
    endpoint_t** endpoints       # each endpoint of the plan once
    int endpoint_count

cdef struct worker_t:
    plan_t* plan
    offload_t* offload
    burst_t burst
    burst_t passed               # what a program leaves to the switch
    int epoll_fd
    bint stopping
    bint busy                    # never sleep
    uint64_t empty_rounds        # counters: one writer, the worker
    uint64_t busy_cycles
    uint64_t idle_cycles
    uint64_t sleeps

cdef class Plan:
    cdef plan_t plan
    cdef list keep               # lanes, and with these the switch, that the plan points into
    cdef dict _owned             # (port, endpoint index) of each endpoint, by the endpoint's address

    cdef endpoint_t* _endpoint(self, Port port, int index) except NULL
    cdef int _own(self, Port port, int index) except -1
    cdef bint _holds(self) noexcept
    cdef int _find_heirs(self, Plan old, int* heirs) except -1

cdef class Worker:
    cdef worker_t* worker
    cdef readonly Mailbox mailbox
    cdef readonly object cpu
    cdef Plan _plan
    cdef Offload _offload
