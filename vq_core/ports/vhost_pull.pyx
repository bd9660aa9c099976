"""From a guest: packets out of its transmitq."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from vq_core.ahead cimport ahead_look, ahead_room
from vq_core.arch cimport vq_prefetch, vq_snapshot_u16, vq_snapshot_u64
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t, chain_twin, twin_t
from vq_core.counters cimport DROP_DISABLED, DROP_SEGMENTS, DROP_TOO_LONG, DROP_TOO_SHORT
from vq_core.cursor cimport cursor_t
from vq_core.hold cimport hold_begin, hold_end, hold_on
from vq_core.iotlb cimport IOTLB_READ
from vq_core.memory cimport memory_translate_near, region_t
from vq_core.net cimport net_header_bytes, net_header_check, net_offers
from vq_core.notify cimport notify_signal
from vq_core.port cimport BURST_MAX, PACKET_MAX, SEGMENTS_MAX, burst_t, endpoint_t, packet_t
from vq_core.ports.vhost_pair cimport (BROKE, BURST_FULL, DONE, DROPPED, ERRAND_RARP, HEADER_MAX, HEADER_MIN,
                                       RARP_BYTES, pair_id_is_wrong, pair_lost, pair_no_entries, pair_t)
from vq_core.queue_state cimport (BROKEN_ADDRESS, BROKEN_HEAD, BROKEN_MEMORY_LOST, BROKEN_NOT, queue_absent,
                                  queue_break, queue_comes_alive, queue_fail, queue_flush, queue_goes, queue_publish,
                                  queue_suppress_kicks, queue_t, queue_translate_part, queue_waits)
from vq_core.ring cimport (ring_begin, ring_commit, ring_counts_slots, ring_look, ring_next_used, ring_position,
                           ring_prefetch, ring_shadow_used, ring_t, ring_use)
from vq_core.virtio cimport VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, gpa_t, virtq_desc_t

cdef enum:
    STEPS_BURST = 4096           # descriptors walked before a pull ends its burst (fairness)
    # packet.wants between the passes of a pull:
    HEADER_IS_COPIED = 0xffff    # by the slow path
    HEADER_IS_APART = 0xfffe     # not before the data; packet.header holds a pointer to it


cdef inline bint _header_asks(packet_t* packet, uint8_t* host) noexcept nogil:
    """Copy the header at `host` once; whether it asks for anything. If not, the packet's header is all zero."""
    cdef uint64_t word = vq_snapshot_u64(host)
    if not word & 0xffff:        # flags and gso_type
        (<uint64_t*>&packet.header)[0] = 0
        (<uint32_t*>&packet.header)[2] = 0
        return False
    (<uint64_t*>&packet.header)[0] = word
    (<uint32_t*>&packet.header)[2] = vq_snapshot_u16(host + 8)
    return True


cdef int _pull_chain(queue_t* queue, burst_t* burst, packet_t* packet, chain_t* chain,
                     uint32_t header_bytes) noexcept nogil:
    """Fill `packet` from any chain, its header into packet.header: DONE, DROPPED, BROKE or BURST_FULL."""
    cdef virtq_desc_t descriptor
    cdef uint8_t header[HEADER_MAX]
    cdef uint8_t* host
    cdef uint64_t part, left
    cdef gpa_t addr, ignored
    cdef uint32_t in_header = 0, segments = 0, first = burst.segment_count
    cdef uint64_t length = 0
    cdef int step
    packet.data = NULL
    packet.head_bytes = 0
    packet.more = &burst.segments[first]
    while True:
        step = chain_next(chain, queue, &descriptor)
        if step <= 0:
            break
        if descriptor.flags & VIRTQ_DESC_F_WRITE:
            continue             # nothing of a transmitq chain is written; the walk goes on to check its form
        addr = descriptor.addr
        left = descriptor.len
        if addr + left < addr:
            queue_break(queue, BROKEN_ADDRESS, chain.id)
            return BROKE
        while left > 0:
            if queue.iotlb != NULL and (length > PACKET_MAX or segments > SEGMENTS_MAX):
                break            # it will be dropped: nothing more of it is asked for
            host = queue_translate_part(queue, addr, left, IOTLB_READ, &part, &ignored)
            if host == NULL:
                queue_fail(queue, queue_absent(queue), chain.id)
                return BROKE
            addr += part
            left -= part
            if in_header < header_bytes:
                if part > header_bytes - in_header:
                    memcpy(header + in_header, host, header_bytes - in_header)
                    host += header_bytes - in_header
                    part -= header_bytes - in_header
                    in_header = header_bytes
                else:
                    memcpy(header + in_header, host, part)
                    in_header += <uint32_t>part
                    continue
            length += part
            if length > PACKET_MAX:
                continue         # dropped below; the walk goes on to check the chain's form
            if packet.data == NULL:
                packet.data = host
                packet.head_bytes = <uint32_t>part
            elif first + segments < SEGMENTS_MAX:
                burst.segments[first + segments].data = host
                burst.segments[first + segments].length = <uint32_t>part
                segments += 1
            elif first > 0:
                return BURST_FULL    # an emptier burst may hold it
            else:
                segments = SEGMENTS_MAX + 1
    if step < 0:
        queue_fail(queue, chain.broken, chain.id)
        return BROKE
    if length == 0 or length > PACKET_MAX or segments > SEGMENTS_MAX:
        queue.counters.dropped[DROP_TOO_SHORT if length == 0 else
                               DROP_TOO_LONG if length > PACKET_MAX else DROP_SEGMENTS] += 1
        return DROPPED
    packet.length = <uint32_t>length
    packet.more_count = segments
    burst.segment_count = first + segments
    memcpy(&packet.header, header, 10)
    return DONE


cdef int _discard(queue_t* queue) noexcept nogil:
    """A started but disabled transmitq: consume without side effects (vhost-user, "Ring states")."""
    cdef ring_t* ring = &queue.ring
    cdef bint packed = ring.is_packed
    cdef chain_t chain
    cdef cursor_t cursor
    cdef virtq_desc_t descriptor
    cdef uint32_t steps = 0
    cdef int available = ring_begin(ring, packed, &cursor, BURST_MAX), status
    if available <= 0:
        pair_no_entries(queue, available)
        return 0
    while <int>cursor.taken < min(available, BURST_MAX) and steps <= STEPS_BURST:
        status = ring_look(ring, packed, &cursor, &descriptor)
        if status < 0:
            queue_break(queue, BROKEN_HEAD, ring.split.bad_head)
        if status <= 0:
            break
        chain_begin(&chain, queue, cursor.head, &descriptor)
        if ring_counts_slots(ring) and \
                (chain_next(&chain, queue, &descriptor) < 0 or chain_end(&chain, queue) < 0):
            queue_fail(queue, chain.broken, chain.id)
            break
        steps += chain.steps
        if pair_id_is_wrong(queue, packed, chain.id):
            break
        ring_use(ring, packed, &cursor, chain.id, 0, chain.slots)
    ring_commit(ring, packed, &cursor)
    queue.counters.dropped[DROP_DISABLED] += cursor.taken
    queue_publish(queue, packed, ring_next_used(ring, packed))
    queue_flush(queue)
    return 0


cdef int _pull_rarp(pair_t* pair, burst_t* burst) noexcept nogil:
    """Hand over the frame that announces a guest after its migration, as if the guest had sent it."""
    cdef packet_t* packet = &burst.packets[0]
    pair.errands &= ~<uint32_t>ERRAND_RARP
    memset(packet, 0, sizeof(packet_t))
    packet.data = pair.rarp
    packet.head_bytes = packet.length = RARP_BYTES
    packet.mark = ring_shadow_used(&pair.transmitq.ring, pair.transmitq.ring.is_packed)
    burst.count = 1
    if not pair.transmitq.started:
        notify_signal(pair.transmitq.report_fd)  # the control thread may take the pair out of its worker's flows again
    return 1


cdef inline int _pull_live(queue_t* queue, bint packed, uint32_t header_bytes, burst_t* burst,
                           int limit) noexcept nogil:
    """Pull from a live transmitq; `packed` and `header_bytes` are literals."""
    cdef ring_t* ring = &queue.ring
    cdef region_t near = queue.hint[0]
    cdef uint32_t steps = 0
    cdef int available, i, kept = 0, status, cause
    cdef uint64_t total = 0
    cdef cursor_t cursor, slow
    cdef chain_t chain
    cdef virtq_desc_t descriptor
    cdef twin_t twin
    cdef packet_t* packet = burst.packets
    cdef packet_t* end
    cdef uint8_t* host
    cdef uint8_t* header
    if hold_on(&queue.hold, ring, packed, BURST_MAX):
        return 0
    available = ring_begin(ring, packed, &cursor, limit)
    if available <= 0:
        pair_no_entries(queue, available)
        return 0
    if available > limit:
        available = limit
    if pair_lost(queue):
        queue_break(queue, BROKEN_MEMORY_LOST, 0)
        return 0
    queue_suppress_kicks(queue, packed)
    ring_prefetch(ring, packed, &cursor, available)
    # First pass: heads and descriptors, each read once. The lines behind them are on their way meanwhile.
    while <int>cursor.taken < available:
        status = ring_look(ring, packed, &cursor, &descriptor)
        if status < 0:
            queue_break(queue, BROKEN_HEAD, ring.split.bad_head)
        if status <= 0:
            break
        # One test for three: plain readable descriptor, longer than the header, not above the largest packet.
        if (not descriptor.flags & (VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_WRITE)) & \
                (descriptor.len - header_bytes - 1 < PACKET_MAX):
            host = memory_translate_near(queue.memory, &queue.hint, &near, descriptor.addr, descriptor.len)
            if host != NULL:
                if pair_id_is_wrong(queue, packed, descriptor.next):
                    break
                vq_prefetch(host)
                vq_prefetch(host + header_bytes)
                packet.data = host + header_bytes
                packet.head_bytes = descriptor.len - header_bytes
                packet.length = descriptor.len - header_bytes
                packet.more_count = 0
                packet.wants = 0
                ring_use(ring, packed, &cursor, descriptor.next, 0, 1)
                packet.mark = ring_position(ring, packed, &cursor)
                packet += 1
                continue
        elif chain_twin(queue, &near, packed, cursor.head, &descriptor, &twin) and \
                ((twin.data.flags & VIRTQ_DESC_F_WRITE) == 0) & (twin.header.len == header_bytes) & \
                (twin.data.len - 1 < PACKET_MAX):
            header = memory_translate_near(queue.memory, &queue.hint, &near, twin.header.addr, header_bytes)
            host = memory_translate_near(queue.memory, &queue.hint, &near, twin.data.addr, twin.data.len)
            if header != NULL and host != NULL:
                if pair_id_is_wrong(queue, packed, twin.id):
                    break
                vq_prefetch(header)
                vq_prefetch(host)
                (<uint8_t**>&packet.header)[0] = header
                packet.data = host
                packet.head_bytes = packet.length = twin.data.len
                packet.more_count = 0
                packet.wants = HEADER_IS_APART
                ring_use(ring, packed, &cursor, twin.id, 0, twin.slots)
                packet.mark = ring_position(ring, packed, &cursor)
                packet += 1
                continue
        if steps > STEPS_BURST:
            break
        slow = cursor
        chain_begin(&chain, queue, slow.head, &descriptor)
        status = _pull_chain(queue, burst, packet, &chain, header_bytes)
        steps += chain.steps
        if status == BROKE or status == BURST_FULL or pair_id_is_wrong(queue, packed, chain.id):
            if queue.parked:     # one answer for all that is missing, not one after the other
                ahead_look(queue, cursor, available, IOTLB_READ)
            break
        ring_use(ring, packed, &slow, chain.id, 0, chain.slots)
        cursor = slow
        if status == DONE:
            packet.wants = HEADER_IS_COPIED
            packet.mark = ring_position(ring, packed, &cursor)
            packet += 1
    ring_commit(ring, packed, &cursor)
    if cursor.taken == BURST_MAX:
        hold_begin(&queue.hold)
    # Second pass: headers, each copied once.
    end = packet
    i = 0
    packet = burst.packets
    while packet != end:
        header = packet.data - header_bytes
        if packet.wants == HEADER_IS_APART:
            header = (<uint8_t**>&packet.header)[0]
            packet.wants = 0
        if packet.wants == HEADER_IS_COPIED or _header_asks(packet, header):
            cause = net_header_check(packet, net_offers(queue.features))
            if cause >= 0:
                queue.counters.dropped[cause] += 1
                i += 1
                packet += 1
                continue
            burst.wants |= packet.wants
        total += packet.length
        if kept != i:
            burst.packets[kept] = packet[0]
        kept += 1
        i += 1
        packet += 1
    burst.count = kept
    queue.counters.packets += kept
    queue.counters.bytes += total
    if kept == 0 and cursor.taken > 0:
        queue_publish(queue, packed, ring_next_used(ring, packed))
        queue_flush(queue)
    return kept


cdef int vhost_pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef queue_t* queue = pair.transmitq
    burst.count = burst.wants = burst.segment_count = 0
    if pair.errands:
        if pair.errands & ERRAND_RARP:
            return _pull_rarp(pair, burst)
        if queue_goes(pair.receiveq):
            ahead_room(pair.receiveq)
    if not queue.live and not queue_comes_alive(queue):
        # Whether it is enabled comes first: a parked one may have ceased to wait since it was asked above.
        if not queue.enabled and queue.started and queue.broken == BROKEN_NOT and not queue_waits(queue):
            return _discard(queue)
        return 0
    if queue.ring.is_packed:             # and then VERSION_1 was negotiated (queue.pyx): the header has 12 bytes
        return _pull_live(queue, True, HEADER_MAX, burst, limit)
    if net_header_bytes(queue.features) == HEADER_MAX:
        return _pull_live(queue, False, HEADER_MAX, burst, limit)
    return _pull_live(queue, False, HEADER_MIN, burst, limit)


cdef inline void _release_as(queue_t* queue, bint packed, burst_t* burst, int count) noexcept nogil:
    cdef uint16_t position
    if count == <int>burst.count:
        position = ring_next_used(&queue.ring, packed)
    else:
        position = burst.packets[count - 1].mark
        hold_end(&queue.hold)            # released in parts: its driver waits for what comes around
    if queue.started and position != ring_shadow_used(&queue.ring, packed):
        queue_publish(queue, packed, position)


cdef void vhost_release(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil:
    cdef queue_t* queue = (<pair_t*>endpoint.port).transmitq
    if queue.ring.is_packed:
        _release_as(queue, True, burst, count)
    else:
        _release_as(queue, False, burst, count)
