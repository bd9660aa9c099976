"""The way of a packet through a guest's queues."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from vq_core.arch cimport (vq_copy, vq_fence, vq_load_u32, vq_prefetch, vq_prefetch_write, vq_put_u16, vq_put_u32,
                           vq_put_u64, vq_snapshot_u16, vq_snapshot_u32, vq_snapshot_u64)
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t
from vq_core.counters cimport (DROP_DISABLED, DROP_MTU, DROP_NOT_CONNECTED, DROP_SEGMENTS, DROP_TOO_LONG,
                               DROP_TOO_SHORT)
from vq_core.cursor cimport cursor_t
from vq_core.dirty cimport dirty_mark, dirty_mark_fenced
from vq_core.handover cimport Mailbox, handover_run
from vq_core.hold cimport hold_begin, hold_end, hold_on
from vq_core.memory cimport memory_lost, memory_translate_near, memory_translate_part, region_t
from vq_core.net cimport net_accepts, net_header_bytes, net_header_check, net_offers
from vq_core.notify cimport notify_signal
from vq_core.port cimport (ARM_PULL, ARM_PUSH, BURST_MAX, PACKET_MAX, SEGMENTS_MAX, Port, burst_t, endpoint_t, packet_t)
from vq_core.queue cimport (BROKEN_ADDRESS, BROKEN_AVAIL_IDX, BROKEN_DIRECTION, BROKEN_HEAD, BROKEN_ID,
                            BROKEN_LOOP, BROKEN_MEMORY_LOST, BROKEN_NOT, CHANGE_EPOLL, Queue, queue_apply, queue_break,
                            queue_change_t, queue_flush, queue_publish, queue_request_kick, queue_suppress_kicks,
                            queue_t)
from vq_core.ring cimport (ring_begin, ring_commit, ring_counts_slots, ring_has_more, ring_is_full, ring_known,
                           ring_look, ring_more, ring_next_used, ring_position, ring_prefetch,
                           ring_prefetch_used, ring_ready, ring_remember, ring_shadow_used, ring_t, ring_use)
from vq_core.virtio cimport (VIRTIO_NET_F_MRG_RXBUF, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE,
                             gpa_t, has_feature, virtio_net_hdr_t, virtq_desc_t)

cdef enum:
    HEADER_MIN = 10
    HEADER_MAX = 12
    STEPS_BURST = 4096           # descriptors walked before a pull ends its burst (fairness)
    STEPS_PUSH = 4096            # descriptors walked by the slow path before a push ends (fairness)
    STEPS_PACKET = 65536         # descriptors walked for one push before the ring is broken
    HEADER_IS_COPIED = 0xffff    # packet.wants between the passes of a pull: the slow path has copied the header
    EXPECT_MAX = 2048            # bytes of a payload: more lines than that a core cannot wait for at once
    ROOM_ENOUGH = 64             # buffers: more than anybody asks for at once (a burst, a worker's NEED_MAX)

# Outcomes of the slow paths for one packet.
cdef enum:
    DONE = 1
    NO_ROOM = 0                  # not enough buffers now
    BROKE = -1
    BURST_FULL = -2
    DROPPED = -3                 # and counted


cdef inline bint _lost(queue_t* queue) noexcept nogil:
    """Whether the owner truncated guest memory or dirty log under us; looked at once a burst."""
    return memory_lost(queue.memory) or (queue.log != NULL and vq_load_u32(&queue.log.lost) != 0)


cdef void _no_entries(queue_t* queue, int available) noexcept nogil:
    """Nothing to take: break the queue if the index is impossible, or reads as zero since its memory is gone."""
    if _lost(queue):
        queue_break(queue, BROKEN_MEMORY_LOST, 0)
    elif available < 0:
        queue_break(queue, BROKEN_AVAIL_IDX, queue.ring.split.shadow_avail_idx)


# ---- transmitq: pull ----

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
    cdef gpa_t addr
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
            host = memory_translate_part(queue.memory, &queue.hint, addr, left, &part)
            if host == NULL:
                queue_break(queue, BROKEN_ADDRESS, chain.id)
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
        queue_break(queue, chain.broken, chain.id)
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


cdef inline bint _id_is_wrong(queue_t* queue, bint packed, uint16_t id) noexcept nogil:
    """Break a packed ring for a buffer id outside of it (the head of a split one is checked when it is read)."""
    if packed and id >= queue.ring.num:
        queue_break(queue, BROKEN_ID, id)
        return True
    return False


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
        _no_entries(queue, available)
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
            queue_break(queue, chain.broken, chain.id)
            break
        steps += chain.steps
        if _id_is_wrong(queue, packed, chain.id):
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
    pair.rarp_pending = 0
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
    cdef packet_t* packet = burst.packets
    cdef packet_t* end
    cdef uint8_t* host
    if hold_on(&queue.hold, ring, packed, BURST_MAX):
        return 0
    available = ring_begin(ring, packed, &cursor, limit)
    if available <= 0:
        _no_entries(queue, available)
        return 0
    if available > limit:
        available = limit
    if _lost(queue):
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
                if _id_is_wrong(queue, packed, descriptor.next):
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
        if steps > STEPS_BURST:
            break
        slow = cursor
        chain_begin(&chain, queue, slow.head, &descriptor)
        status = _pull_chain(queue, burst, packet, &chain, header_bytes)
        steps += chain.steps
        if status == BROKE or status == BURST_FULL or _id_is_wrong(queue, packed, chain.id):
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
        if packet.wants == HEADER_IS_COPIED or _header_asks(packet, packet.data - header_bytes):
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


cdef int _pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef queue_t* queue = pair.transmitq
    burst.count = burst.wants = burst.segment_count = 0
    if pair.rarp_pending:
        return _pull_rarp(pair, burst)
    if not queue.live:
        if queue.started and queue.broken == BROKEN_NOT:
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


cdef void _release(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil:
    cdef queue_t* queue = (<pair_t*>endpoint.port).transmitq
    if queue.ring.is_packed:
        _release_as(queue, True, burst, count)
    else:
        _release_as(queue, False, burst, count)


# ---- receiveq: push ----

cdef inline void _put_header(uint8_t* host, virtio_net_hdr_t* header, uint32_t header_bytes) noexcept nogil:
    """Write the header, with num_buffers 1, unless it stands there already: the line stays shared then."""
    cdef uint64_t word = (<uint64_t*>header)[0]
    cdef uint32_t tail = header.csum_offset | <uint32_t>1 << 16
    if vq_snapshot_u64(host) != word:
        vq_put_u64(host, word)
    if header_bytes == HEADER_MAX:
        if vq_snapshot_u32(host + 8) != tail:
            vq_put_u32(host + 8, tail)
    else:
        vq_put_u16(host + 8, header.csum_offset)


cdef inline void _expect_payload(uint8_t* host, uint32_t length) noexcept nogil:
    """Bring the lines of a payload behind its first one on their way, to be written while the one before is copied."""
    cdef uint32_t at
    for at in range(64, min(length, <uint32_t>EXPECT_MAX), 64):
        vq_prefetch_write(host + at)


cdef inline void _put_payload(uint8_t* host, packet_t* packet) noexcept nogil:
    """Copy all segments of the packet to `host`, which has room for packet.length bytes."""
    cdef uint32_t i
    vq_copy(host, packet.data, packet.head_bytes)
    if packet.more_count:
        host += packet.head_bytes
        for i in range(packet.more_count):
            memcpy(host, packet.more[i].data, packet.more[i].length)
            host += packet.more[i].length


cdef struct reader_t:
    # What is still to be written of header and packet, in order.
    uint8_t* data
    uint32_t left                # bytes at data
    packet_t* packet
    uint32_t segment             # of packet.more: the next one
    bint in_header


cdef struct count_t:
    # Where the two bytes of num_buffers went.
    uint8_t* host[2]
    gpa_t addr[2]


cdef inline bint _reader_step(reader_t* reader) noexcept nogil:
    """Make sure that there are bytes at reader.data; False at the end."""
    while reader.left == 0:
        if reader.in_header:
            reader.in_header = False
            reader.data = reader.packet.data
            reader.left = reader.packet.head_bytes
        elif reader.segment < reader.packet.more_count:
            reader.data = reader.packet.more[reader.segment].data
            reader.left = reader.packet.more[reader.segment].length
            reader.segment += 1
        else:
            return False
    return True


cdef int _write_part(queue_t* queue, virtq_desc_t* descriptor, reader_t* reader, uint64_t offset,
                     count_t* count) noexcept nogil:
    """Fill one descriptor as far as the packet goes: bytes written, or -1 for an address outside memory.

    `offset` counts the bytes of header and packet before it; where the two bytes of num_buffers (10 and 11) go is
    noted in `count`, since their value is known only at the end.
    """
    cdef gpa_t addr = descriptor.addr
    cdef uint64_t left = descriptor.len, part, piece, done = 0
    cdef uint8_t* host
    if addr + left < addr:
        return -1
    while left > 0 and _reader_step(reader):
        host = memory_translate_part(queue.memory, &queue.hint, addr, left, &part)
        if host == NULL:
            return -1
        piece = part if part < reader.left else reader.left
        if offset + done <= 10 and offset + done + piece > 10:
            count.host[0] = host + (10 - offset - done)
            count.addr[0] = addr + (10 - offset - done)
        if offset + done <= 11 and offset + done + piece > 11:
            count.host[1] = host + (11 - offset - done)
            count.addr[1] = addr + (11 - offset - done)
        memcpy(host, reader.data, piece)
        if queue.log != NULL:
            dirty_mark(queue.log, addr, piece)
        reader.data += piece
        reader.left -= <uint32_t>piece
        addr += piece
        left -= piece
        done += piece
    return <int>done


cdef int _push_chain(queue_t* queue, packet_t* packet, uint32_t header_bytes, cursor_t* cursor,
                     uint32_t* walked) noexcept nogil:
    """Write one packet into as many chains as it needs: DONE, NO_ROOM, DROPPED or BROKE.

    Unless it is DONE the caller throws `cursor` away: the chains stay available. What was written into them does not
    count, since buffers are only written before they are used (protocol section 9.2).
    The descriptors that it read are added to `walked`, also those of chains that stay available.
    """
    cdef ring_t* ring = &queue.ring
    cdef bint packed = ring.is_packed
    cdef chain_t chain
    cdef virtq_desc_t descriptor
    cdef reader_t reader
    cdef cursor_t begin = cursor[0]
    cdef virtio_net_hdr_t header = packet.header
    cdef count_t count
    cdef uint64_t need = header_bytes + <uint64_t>packet.length, written = 0
    cdef uint32_t in_chain, steps = 0
    cdef int buffers = 0, part, step
    cdef bint mergeable = has_feature(queue.features, VIRTIO_NET_F_MRG_RXBUF)
    cdef bint room
    header.num_buffers = 1
    count.host[0] = count.host[1] = NULL
    count.addr[0] = count.addr[1] = 0
    reader.data = <uint8_t*>&header
    reader.left = header_bytes
    reader.packet = packet
    reader.segment = 0
    reader.in_header = True
    while written < need:
        if buffers > 0 and not mergeable:
            return DROPPED       # larger than the chain
        step = ring_more(ring, packed, cursor)
        if step > 0:
            step = ring_look(ring, packed, cursor, &descriptor)
            if step < 0:
                queue_break(queue, BROKEN_HEAD, ring.split.bad_head)
                return BROKE
        elif step < 0:
            queue_break(queue, BROKEN_AVAIL_IDX, ring.split.shadow_avail_idx)
            return BROKE
        if step == 0:            # a full ring that is too small stays too small
            if ring_is_full(ring, packed, &begin, cursor):
                return DROPPED
            ring_remember(ring, packed, cursor)
            return NO_ROOM
        chain_begin(&chain, queue, cursor.head, &descriptor)
        in_chain = 0
        room = False
        step = 1
        while written < need:
            step = chain_next(&chain, queue, &descriptor)
            if step <= 0:
                break
            if not descriptor.flags & VIRTQ_DESC_F_WRITE:
                continue
            room = True
            part = _write_part(queue, &descriptor, &reader, written, &count)
            if part < 0:
                queue_break(queue, BROKEN_ADDRESS, cursor.head)
                return BROKE
            in_chain += part
            written += part
        if step < 0 or chain_end(&chain, queue) < 0:
            queue_break(queue, chain.broken, cursor.head)
            return BROKE
        steps += chain.steps
        walked[0] += chain.steps
        if not room or steps > STEPS_PACKET:
            queue_break(queue, BROKEN_LOOP if room else BROKEN_DIRECTION, cursor.head)
            return BROKE
        if _id_is_wrong(queue, packed, chain.id):
            return BROKE
        ring_use(ring, packed, cursor, chain.id, in_chain, chain.slots)
        buffers += 1
        if buffers > <int>ring.num:
            queue_break(queue, BROKEN_LOOP, cursor.head)     # a packed ring that its driver refills meanwhile
            return BROKE
    if buffers > 1:              # num_buffers is 1 in what was written; both bytes were met, since need > 12
        count.host[0][0] = <uint8_t>(buffers & 0xff)
        count.host[1][0] = <uint8_t>(buffers >> 8)
        if queue.log != NULL:    # again: a migration may have copied the page after it was marked first
            dirty_mark(queue.log, count.addr[0], 1)
            dirty_mark(queue.log, count.addr[1], 1)
    return DONE


cdef int _push_refused(queue_t* queue, packet_t* packets, int count) noexcept nogil:
    """The ring takes nothing: count everything as dropped."""
    queue.counters.dropped[DROP_DISABLED if queue.started and not queue.enabled else DROP_NOT_CONNECTED] += count
    return count


cdef inline int _push_live(pair_t* pair, queue_t* queue, bint packed, uint32_t header_bytes, packet_t* packets,
                           int count) noexcept nogil:
    """Push to a live receiveq; `packed` and `header_bytes` are literals."""
    cdef ring_t* ring = &queue.ring
    cdef region_t near = queue.hint[0]
    cdef uint32_t need, frame_limit, walked = 0
    cdef int ready, done = 0, run, j, status, sent = 0
    cdef uint64_t total = 0
    cdef cursor_t cursor, slow
    cdef virtq_desc_t descriptor
    cdef uint8_t* host
    cdef uint8_t* hosts[BURST_MAX]
    cdef gpa_t addrs[BURST_MAX]
    cdef packet_t* packet
    ready = ring_begin(ring, packed, &cursor, count)
    if ready <= 0:
        _no_entries(queue, ready)
        return 0 if queue.live else _push_refused(queue, packets, count)
    if _lost(queue):
        queue_break(queue, BROKEN_MEMORY_LOST, 0)
        return _push_refused(queue, packets, count)
    queue_suppress_kicks(queue, packed)
    ring_prefetch(ring, packed, &cursor, min(ready, count))
    ring_prefetch_used(ring, packed, min(ready, count))
    frame_limit = pair.frame_limit
    while done < count:
        run = 0
        while done + run < count and <int>cursor.taken < ready and run < BURST_MAX:
            packet = &packets[done + run]
            if ring_look(ring, packed, &cursor, &descriptor) <= 0:
                break            # the slow path says so
            need = header_bytes + packet.length
            if (descriptor.flags != VIRTQ_DESC_F_WRITE) | (descriptor.len < need) | (packet.length > frame_limit):
                break
            host = memory_translate_near(queue.memory, &queue.hint, &near, descriptor.addr, descriptor.len)
            if host == NULL or (packed and descriptor.next >= ring.num):
                break
            hosts[run] = host
            if queue.log != NULL:
                addrs[run] = descriptor.addr
            vq_prefetch(host)
            vq_prefetch_write(host + header_bytes)
            ring_use(ring, packed, &cursor, descriptor.next, need, 1)
            run += 1
        packet = &packets[done]
        for j in range(run):
            if j + 1 < run:
                _expect_payload(hosts[j + 1] + header_bytes, packet[1].length)
            _put_header(hosts[j], &packet.header, header_bytes)
            _put_payload(hosts[j] + header_bytes, packet)
            total += packet.length
            packet += 1
        if queue.log != NULL and run > 0:
            vq_fence()           # pairs with whoever takes bits of the log away before it copies their pages
            for j in range(run):
                dirty_mark_fenced(queue.log, addrs[j], header_bytes + <uint64_t>packets[done + j].length)
        done += run
        sent += run
        if done < count:
            packet = &packets[done]
            if packet.length > pair.frame_limit and packet.header.gso_type == 0:
                queue.counters.dropped[DROP_MTU] += 1
                done += 1
                continue
            if walked > STEPS_PUSH:
                break            # as without room: the rest waits or is dropped
            slow = cursor
            status = _push_chain(queue, packet, header_bytes, &slow, &walked)
            if status == NO_ROOM:
                break
            if status == BROKE:
                done += _push_refused(queue, packet, count - done)
                break
            if status == DONE:
                cursor = slow
                ready = max(ready, <int>cursor.known) if not packed else ready
                total += packet.length
                sent += 1
            else:
                queue.counters.dropped[DROP_TOO_LONG] += 1
            done += 1
    ring_commit(ring, packed, &cursor)
    if ring_next_used(ring, packed) != ring_shadow_used(ring, packed):
        queue_publish(queue, packed, ring_next_used(ring, packed))
    queue.counters.packets += sent
    queue.counters.bytes += total
    return done


cdef int _push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef queue_t* queue = pair.receiveq
    if not queue.live:
        return _push_refused(queue, packets, count)
    if queue.ring.is_packed:
        return _push_live(pair, queue, True, HEADER_MAX, packets, count)
    if net_header_bytes(queue.features) == HEADER_MAX:
        return _push_live(pair, queue, False, HEADER_MAX, packets, count)
    return _push_live(pair, queue, False, HEADER_MIN, packets, count)


# ---- both ----

cdef void _flush(endpoint_t* endpoint) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    if pair.receiveq.started:
        queue_flush(pair.receiveq)
    if pair.transmitq.started:
        queue_flush(pair.transmitq)


cdef int _room(endpoint_t* endpoint) noexcept nogil:
    cdef queue_t* queue = (<pair_t*>endpoint.port).receiveq
    cdef int ready
    if not queue.live:
        return -1
    ready = ring_ready(&queue.ring, queue.ring.is_packed, ROOM_ENOUGH)
    if ready <= 0:
        _no_entries(queue, ready)
        return 0
    return ready


cdef int _arm(endpoint_t* endpoint, int what) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef queue_t* queue = pair.transmitq
    cdef bint packed = queue.ring.is_packed
    if what & ARM_PULL:
        if pair.rarp_pending:
            return 1
        if queue.started and queue.broken == BROKEN_NOT:
            if ring_known(&queue.ring, packed) > 0:
                return 1
            queue_request_kick(queue)
            # Also for an impossible index, or when memory was lost: the next pull breaks the ring.
            if ring_has_more(&queue.ring, packed) or _lost(queue):
                return 1
    if what & ARM_PUSH:
        queue = pair.receiveq
        packed = queue.ring.is_packed
        if queue.live:
            queue_request_kick(queue)
            if ring_has_more(&queue.ring, packed):
                return 1
    return 0


cdef void _attach(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef queue_change_t change
    memset(&change, 0, sizeof(change))
    change.what = CHANGE_EPOLL
    change.wanted.epoll_fd = epoll_fd
    queue_apply(pair.receiveq, &change)
    queue_apply(pair.transmitq, &change)


# ---- control side ----

cdef struct pair_change_t:
    uint32_t accepts
    uint32_t frame_limit
    uint8_t* rarp


cdef void _change_pair(void* target, void* argument) noexcept nogil:
    cdef pair_t* pair = <pair_t*>target
    cdef pair_change_t* change = <pair_change_t*>argument
    if change.rarp != NULL:
        memcpy(pair.rarp, change.rarp, RARP_BYTES)
        pair.rarp_pending = 1
    else:
        pair.endpoint.accepts = change.accepts
        pair.frame_limit = change.frame_limit


cdef class VhostPort(Port):
    """The queues of one vhost-user-net device, as a port of a pump.

    Parameters
    ----------
    name : str
    pairs : int
        Queue pairs, 1 to 128.
    report_fd : int, optional
        Eventfd that is signalled when a queue breaks.

    Attributes
    ----------
    queues : tuple of Queue
        Index 2i is receiveq i, 2i + 1 is transmitq i (VIRTIO 1.3, 5.1.2).
    """

    directions = ("to_guest", "from_guest")

    def __cinit__(self, name, int pairs, report_fd=None):
        cdef int i
        cdef Queue receiveq, transmitq
        cdef endpoint_t* endpoint
        if not 1 <= pairs <= 128:
            raise ValueError(f"{name}: {pairs} queue pairs; 1 to 128 are possible")
        self.name = name
        self.allocate(pairs)
        self.pairs = <pair_t*>calloc(pairs, sizeof(pair_t))
        if self.pairs == NULL:
            raise MemoryError("queue pairs")
        queues = []
        for i in range(pairs):
            receiveq = Queue(2 * i, f"receiveq{i}", report_fd)
            transmitq = Queue(2 * i + 1, f"transmitq{i}", report_fd, batches=True)
            queues += [receiveq, transmitq]
            endpoint = self.endpoints[i]
            self.pairs[i].endpoint = endpoint
            self.pairs[i].receiveq = &receiveq.queue
            self.pairs[i].transmitq = &transmitq.queue
            self.pairs[i].frame_limit = 0xffffffff
            endpoint.port = &self.pairs[i]
            endpoint.pull = _pull
            endpoint.push = _push
            endpoint.release = _release
            endpoint.flush = _flush
            endpoint.room = _room
            endpoint.arm = _arm
            endpoint.attach = _attach
        self.queues = tuple(queues)
        for i in range(pairs):       # the queues count; the endpoint's counters are theirs
            free(self.endpoints[i].pulled)
            self.endpoints[i].pulled = &self.pairs[i].transmitq.counters
            self.endpoints[i].pushed = &self.pairs[i].receiveq.counters

    def __dealloc__(self):
        cdef int i
        if self.pairs != NULL:
            for i in range(self.endpoint_count):
                if self.pairs[i].endpoint != NULL:
                    self.endpoints[i].pulled = NULL      # not ours to free
        free(self.pairs)

    cdef int adopt(self, int index, object mailbox) except -1:
        self.mailboxes[index] = mailbox
        (<Queue>self.queues[2 * index]).mailbox = <Mailbox?>mailbox if mailbox is not None else None
        (<Queue>self.queues[2 * index + 1]).mailbox = <Mailbox?>mailbox if mailbox is not None else None
        return 0

    def configure(self, uint64_t features, mtu=None):
        """Take over what the front-end negotiated: which offloads its driver accepts, and the MTU.

        Parameters
        ----------
        features : int
            Negotiated virtio features.
        mtu : int, optional
            From NET_SET_MTU, in bytes; longer frames towards the guest are dropped, except those to be segmented.
        """
        cdef pair_change_t change
        cdef int i
        change.accepts = net_accepts(features)
        change.frame_limit = 0xffffffff if mtu is None else mtu + 18      # Ethernet header and a VLAN tag
        change.rarp = NULL
        for i in range(self.endpoint_count):
            handover_run(self.mailboxes[i], _change_pair, &self.pairs[i], &change)

    def announce(self, bytes mac not None):
        """Send one broadcast RARP from `mac` (6 bytes) into the network side (vhost-user, SEND_RARP).

        A multicast or zero address is ignored. The guest does not see the frame.
        """
        cdef pair_change_t change
        if len(mac) != 6:
            raise ValueError(f"MAC address of {len(mac)} bytes; it has 6")
        if mac[0] & 1 or mac == bytes(6):
            return
        frame = b"\xff" * 6 + mac + b"\x80\x35\x00\x01\x08\x00\x06\x04\x00\x03" + mac + bytes(4) + mac + bytes(4)
        frame = frame.ljust(RARP_BYTES, b"\0")
        change.rarp = <uint8_t*><char*>frame
        handover_run(self.mailboxes[0], _change_pair, &self.pairs[0], &change)

    @property
    def sources(self):
        """list of int: pairs whose transmitq is started (a disabled one is emptied), and pair 0 while a RARP waits."""
        return [i for i in range(self.endpoint_count)
                if self.pairs[i].transmitq.started or vq_load_u32(&self.pairs[i].rarp_pending)]

    @property
    def targets(self):
        """list of int: pairs whose receiveq takes packets."""
        return [i for i in range(self.endpoint_count) if self.pairs[i].receiveq.live]
