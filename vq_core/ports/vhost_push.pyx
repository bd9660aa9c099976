"""To a guest: packets into its receiveq."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from vq_core.ahead cimport ahead_room
from vq_core.arch cimport (vq_copy, vq_fence, vq_prefetch, vq_prefetch_write, vq_put_u16, vq_put_u32, vq_put_u64,
                           vq_snapshot_u32, vq_snapshot_u64)
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t, chain_twin, twin_t
from vq_core.counters cimport DROP_DISABLED, DROP_MTU, DROP_NOT_CONNECTED, DROP_TOO_LONG
from vq_core.cursor cimport cursor_t
from vq_core.dirty cimport dirty_mark, dirty_mark_fenced
from vq_core.hold cimport hold_begin, hold_on
from vq_core.iotlb cimport IOTLB_WRITE
from vq_core.memory cimport memory_translate_near, region_t
from vq_core.net cimport net_header_bytes
from vq_core.port cimport BURST_MAX, ROOM_PAUSES, endpoint_t, packet_t
from vq_core.ports.vhost_pair cimport (BROKE, DONE, DROPPED, HEADER_MAX, HEADER_MIN, NO_ROOM, pair_id_is_wrong,
                                       pair_lost, pair_no_entries, pair_t)
from vq_core.queue_state cimport (BROKEN_ADDRESS, BROKEN_AVAIL_IDX, BROKEN_DIRECTION, BROKEN_HEAD, BROKEN_LOOP,
                                  BROKEN_MEMORY_LOST, BROKEN_MISS, BROKEN_NOT, queue_absent, queue_break,
                                  queue_comes_alive, queue_fail, queue_pauses, queue_publish, queue_suppress_kicks,
                                  queue_t, queue_translate_part)
from vq_core.ring cimport (ring_begin, ring_commit, ring_is_full, ring_look, ring_more, ring_next_used, ring_prefetch,
                           ring_prefetch_used, ring_ready, ring_remember, ring_shadow_used, ring_t, ring_use)
from vq_core.virtio cimport (VIRTIO_NET_F_MRG_RXBUF, VIRTQ_DESC_F_WRITE, gpa_t, has_feature, virtio_net_hdr_t,
                             virtq_desc_t)

cdef enum:
    STEPS_PUSH = 4096            # descriptors walked by the slow path before a push ends (fairness)
    STEPS_ROUND = 16384          # and before all pushes between two flushes end: a filter or segmentation makes many
    STEPS_PACKET = 65536         # descriptors walked for one push before the ring is broken
    EXPECT_MAX = 2048            # bytes of a payload: more lines than that a core cannot wait for at once
    ROOM_ENOUGH = 64             # buffers: more than anybody asks for at once (a burst, a worker's NEED_MAX)


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
    """Fill one descriptor as far as the packet goes: bytes written, or -1 for an address without memory.

    `offset` counts the bytes of header and packet before it; where the two bytes of num_buffers (10 and 11) go is
    noted in `count`, since their value is known only at the end.
    """
    cdef gpa_t addr = descriptor.addr, guest_addr
    cdef uint64_t left = descriptor.len, part, piece, done = 0
    cdef uint8_t* host
    while left > 0 and _reader_step(reader):
        host = queue_translate_part(queue, addr, left, IOTLB_WRITE, &part, &guest_addr)
        if host == NULL:
            return -1
        piece = part if part < reader.left else reader.left
        if offset + done <= 10 and offset + done + piece > 10:
            count.host[0] = host + (10 - offset - done)
            count.addr[0] = guest_addr + (10 - offset - done)
        if offset + done <= 11 and offset + done + piece > 11:
            count.host[1] = host + (11 - offset - done)
            count.addr[1] = guest_addr + (11 - offset - done)
        memcpy(host, reader.data, piece)
        if queue.log != NULL:
            dirty_mark(queue.log, guest_addr, piece)
        reader.data += piece
        reader.left -= <uint32_t>piece
        addr += piece
        left -= piece
        done += piece
    return <int>done


cdef int _cannot(queue_t* queue, uint32_t cause, uint16_t head) noexcept nogil:
    """Break the queue, or wait for a translation as one waits for room."""
    queue_fail(queue, cause, head)
    return NO_ROOM if cause == BROKEN_MISS else BROKE


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
            if descriptor.addr + descriptor.len < descriptor.addr:
                queue_break(queue, BROKEN_ADDRESS, cursor.head)
                return BROKE
            part = _write_part(queue, &descriptor, &reader, written, &count)
            if part < 0:
                return _cannot(queue, queue_absent(queue), cursor.head)
            in_chain += part
            written += part
        if step < 0 or chain_end(&chain, queue) < 0:
            return _cannot(queue, chain.broken, cursor.head)
        steps += chain.steps
        walked[0] += chain.steps
        if not room or steps > STEPS_PACKET:
            queue_break(queue, BROKEN_LOOP if room else BROKEN_DIRECTION, cursor.head)
            return BROKE
        if pair_id_is_wrong(queue, packed, chain.id):
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
    cdef uint32_t need, frame_limit, walked = 0, before
    cdef int ready, done = 0, run, j, status, sent = 0
    cdef uint64_t total = 0
    cdef cursor_t cursor, slow
    cdef virtq_desc_t descriptor
    cdef twin_t twin
    cdef uint16_t slots
    cdef uint8_t* header
    cdef uint8_t* host
    cdef uint8_t* headers[BURST_MAX]
    cdef uint8_t* hosts[BURST_MAX]       # of the payloads
    cdef gpa_t header_addrs[BURST_MAX]   # only with a log
    cdef gpa_t addrs[BURST_MAX]          # of payloads apart from their headers; spans[] is header_bytes then
    cdef uint32_t spans[BURST_MAX]       # bytes written at header_addrs[]
    cdef packet_t* packet
    ready = ring_begin(ring, packed, &cursor, count)
    if ready <= 0:
        pair_no_entries(queue, ready)
        return 0 if queue.broken == BROKEN_NOT else _push_refused(queue, packets, count)
    if pair_lost(queue):
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
            if (descriptor.flags == VIRTQ_DESC_F_WRITE) & (descriptor.len >= need) & (packet.length <= frame_limit):
                header = memory_translate_near(queue.memory, &queue.hint, &near, descriptor.addr, descriptor.len)
                if header == NULL or (packed and descriptor.next >= ring.num):
                    break
                host = header + header_bytes
                slots = 1
                if queue.log != NULL:
                    header_addrs[run] = descriptor.addr
                    spans[run] = need
            elif packet.length <= frame_limit and \
                    chain_twin(queue, &near, packed, cursor.head, &descriptor, &twin) and \
                    ((twin.data.flags & VIRTQ_DESC_F_WRITE) != 0) & (twin.header.len == header_bytes) & \
                    (twin.data.len >= packet.length):
                header = memory_translate_near(queue.memory, &queue.hint, &near, twin.header.addr, header_bytes)
                host = memory_translate_near(queue.memory, &queue.hint, &near, twin.data.addr, twin.data.len)
                if header == NULL or host == NULL or (packed and twin.id >= ring.num):
                    break
                descriptor.next = twin.id
                slots = twin.slots
                if queue.log != NULL:
                    header_addrs[run] = twin.header.addr
                    addrs[run] = twin.data.addr
                    spans[run] = header_bytes
            else:
                break
            headers[run] = header
            hosts[run] = host
            vq_prefetch(header)
            vq_prefetch_write(host)
            ring_use(ring, packed, &cursor, descriptor.next, need, slots)
            run += 1
        packet = &packets[done]
        for j in range(run):
            if j + 1 < run:
                _expect_payload(hosts[j + 1], packet[1].length)
            _put_header(headers[j], &packet.header, header_bytes)
            _put_payload(hosts[j], packet)
            total += packet.length
            packet += 1
        if queue.log != NULL and run > 0:
            vq_fence()           # pairs with whoever takes bits of the log away before it copies their pages
            for j in range(run):
                dirty_mark_fenced(queue.log, header_addrs[j], spans[j])
                if spans[j] == header_bytes:
                    dirty_mark_fenced(queue.log, addrs[j], packets[done + j].length)
        done += run
        sent += run
        if done < count:
            packet = &packets[done]
            if packet.length > pair.frame_limit and packet.header.gso_type == 0:
                queue.counters.dropped[DROP_MTU] += 1
                done += 1
                continue
            if walked > STEPS_PUSH or pair.walked > STEPS_ROUND:
                break            # as without room: the rest waits or is dropped
            slow = cursor
            before = walked
            status = _push_chain(queue, packet, header_bytes, &slow, &walked)
            pair.walked += walked - before
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
    if cursor.taken == BURST_MAX:
        hold_begin(&queue.hold)
    if ring_next_used(ring, packed) != ring_shadow_used(ring, packed):
        queue_publish(queue, packed, ring_next_used(ring, packed))
    queue.counters.packets += sent
    queue.counters.bytes += total
    return done


cdef int vhost_push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef queue_t* queue = pair.receiveq
    if not queue.live and not queue_comes_alive(queue):
        return 0 if queue_pauses(queue) else _push_refused(queue, packets, count)
    if queue.ring.is_packed:
        return _push_live(pair, queue, True, HEADER_MAX, packets, count)
    if net_header_bytes(queue.features) == HEADER_MAX:
        return _push_live(pair, queue, False, HEADER_MAX, packets, count)
    return _push_live(pair, queue, False, HEADER_MIN, packets, count)


cdef int vhost_room(endpoint_t* endpoint) noexcept nogil:
    cdef queue_t* queue = (<pair_t*>endpoint.port).receiveq
    cdef int ready
    if not queue.live:
        if not queue_comes_alive(queue):
            return ROOM_PAUSES if queue_pauses(queue) else -1
        if queue.iotlb != NULL:
            ready = ahead_room(queue)
            return ROOM_PAUSES if ready == 0 and queue.ahead_missed else ready
    if hold_on(&queue.hold, &queue.ring, queue.ring.is_packed, BURST_MAX):
        return 0
    ready = ring_ready(&queue.ring, queue.ring.is_packed, ROOM_ENOUGH)
    if ready <= 0:
        pair_no_entries(queue, ready)
        return 0
    return ready
