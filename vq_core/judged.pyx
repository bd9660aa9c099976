"""Packets by the verdicts of a program."""
from libc.stdint cimport uint16_t
from libc.string cimport memcpy, memset
from vq_core.counters cimport DROP_NO_DESCRIPTORS, DROP_PROGRAM
from vq_core.flow cimport flow_part, flow_push, flow_scratch_t, flow_t
from vq_core.port cimport burst_t, endpoint_t, packet_t
from vq_core.program cimport VERDICT_PASS, VERDICT_REFLECT
from vq_core.switch cimport switch_forward, switch_now_s


cdef bint judged_ask(flow_t* flow, burst_t* burst) noexcept nogil:
    memset(flow.verdicts, 0, sizeof(flow.verdicts))
    return flow.program.run(flow.program.state, burst.packets, flow.verdicts, burst.count) != 0


cdef inline endpoint_t* judged_way(flow_t* flow, uint16_t verdict) noexcept nogil:
    """Where a verdict sends a packet; NULL: nowhere. Whatever the program wrote, it is one of our endpoints."""
    if verdict == VERDICT_PASS:
        return flow.target
    if verdict == VERDICT_REFLECT:
        return flow.source
    if flow.lane != NULL:
        return flow.lane.endpoints[verdict - 1] if verdict <= flow.lane.port_count else NULL
    return flow.ways[verdict - 1] if verdict <= 2 else NULL


cdef inline int judged_send(flow_scratch_t* scratch, flow_t* flow, burst_t* burst, int first, int size) noexcept nogil:
    """Send packets of one verdict on their way, or drop them: how many are dealt with; fewer than `size`: no room."""
    cdef endpoint_t* way = judged_way(flow, flow.verdicts[first])
    cdef int done
    if way == NULL:
        flow.source.pulled.dropped[DROP_PROGRAM] += size
        return size
    done = flow_push(scratch, way, &burst.packets[first], size, burst.wants)
    if done < size and not (way == flow.target and flow.held != NULL):
        way.pushed.dropped[DROP_NO_DESCRIPTORS] += size - done
        done = size
    if way != flow.target:
        way.flush(way)
    return done


cdef int judged_deliver(flow_scratch_t* scratch, flow_t* flow, burst_t* burst, int first) noexcept nogil:
    cdef int count = burst.count, end, size, done
    while first < count:
        end = first + 1
        while end < count and flow.verdicts[end] == flow.verdicts[first]:
            end += 1
        size = flow_part(flow, &burst.packets[first], end - first)
        done = judged_send(scratch, flow, burst, first, size)
        first += done
        if done < size:
            break
        flow.source.release(flow.source, burst, first)
    return first


cdef void judged_forward(flow_scratch_t* scratch, flow_t* flow, burst_t* burst) noexcept nogil:
    cdef burst_t* passed = &scratch.passed
    cdef int first = 0, end, count = burst.count
    passed.count = passed.wants = 0
    while first < count:
        end = first + 1
        if flow.verdicts[first] == VERDICT_PASS:
            memcpy(&passed.packets[passed.count], &burst.packets[first], sizeof(packet_t))
            passed.count += 1
            passed.wants |= burst.packets[first].wants
        else:
            while end < count and flow.verdicts[end] == flow.verdicts[first]:
                end += 1
            judged_send(scratch, flow, burst, first, end - first)
        first = end
    if passed.count:
        switch_forward(flow.via, flow.lane, passed, flow.source_port, scratch.offload, switch_now_s())
