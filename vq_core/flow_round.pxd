"""One round of a flow: how much to pull, whom to ask, where it goes, and what that cost.

Owner: the worker whose plan the flow is in.
"""
from libc.stdint cimport uint32_t, uint64_t
from vq_core.counters cimport counters_round
from vq_core.flow cimport NEED_MAX, PATIENCE_CYCLES, PAUSE_CYCLES, flow_deliver, flow_scratch_t, flow_t
from vq_core.judged cimport judged_ask, judged_deliver, judged_forward
from vq_core.port cimport BURST_MAX, OFFLOAD_CSUM, ROOM_PAUSES, burst_t, endpoint_t
from vq_core.switch cimport switch_forward, switch_now_s

cdef inline int flow_patience(flow_t* flow, uint64_t now) noexcept nogil:
    """How many packets to pull from a ring towards a ring; 0: wait a moment, the target has no room."""
    cdef int room = flow.target.room(flow.target)
    cdef int need = flow.need
    if need > 1:
        flow.most = max(flow.most, room)
        need = max(1, min(need, flow.most // 2))
    if room < need:
        if flow.tired or (room < 0 and room != ROOM_PAUSES):
            return BURST_MAX
        if not flow.waiting:
            flow.waiting = True
            flow.waiting_since = now
        if now - flow.waiting_since < <uint64_t>(PAUSE_CYCLES if room == ROOM_PAUSES else PATIENCE_CYCLES):
            return 0
        flow.tired = True
        flow.waiting = False
        return BURST_MAX
    flow.tired = False
    flow.waiting = False
    if need == 1:
        return min(room, BURST_MAX)
    return max(1, min(room // need, BURST_MAX))

cdef inline int flow_round(flow_scratch_t* scratch, flow_t* flow, uint64_t now) noexcept nogil:
    """One round of a flow; number of packets that moved."""
    cdef endpoint_t* source = flow.source
    cdef endpoint_t* target = flow.target
    cdef burst_t* burst = &scratch.burst
    cdef int count, first = 0, limit = BURST_MAX
    if flow.held != NULL:
        burst = flow.held
        if target != NULL:
            flow.room = target.room(target)
            limit = min(limit, flow.room)
            flow.waiting = limit <= 0
            if flow.waiting:
                return 0
    elif flow.patient:
        limit = flow_patience(flow, now)
        if limit == 0:
            return 0
    if flow.held_at >= 0:
        first = flow.held_at
    elif source.pull(source, burst, limit) == 0:
        source.pulled.empty_polls += 1
        return 0
    elif flow.program != NULL:
        flow.judged = judged_ask(flow, burst)
    if flow.patient:
        flow.need = NEED_MAX if burst.wants & ~<uint32_t>OFFLOAD_CSUM else 1
    count = burst.count - first
    if target == NULL:
        if flow.judged:
            judged_forward(scratch, flow, burst)
        else:
            switch_forward(flow.via, flow.lane, burst, flow.source_port, scratch.offload, switch_now_s())
        source.release(source, burst, burst.count)
        source.flush(source)
        return count
    if flow.judged:
        first = judged_deliver(scratch, flow, burst, first)
        # Verdicts are of one burst: the heir of this flow may have no program that would make new ones.
        flow.judged = first < <int>burst.count
    else:
        first = flow_deliver(scratch, flow, burst, first)
    if first < <int>burst.count:
        count -= burst.count - first
        flow.held_at = first
        flow.waiting = True
    else:
        flow.held_at = -1
    target.flush(target)
    if source != target:
        source.flush(source)
    return count

cdef inline void flow_account(flow_t* flow, int moved, uint64_t cycles) noexcept nogil:
    """Note on both ends what a round of a flow moved and cost."""
    counters_round(flow.source.pulled, <uint32_t>moved, cycles)
    if flow.target != NULL:
        counters_round(flow.target.pushed, <uint32_t>moved, cycles)
