"""The traffic engine: one loop for sources, sinks and exchanges."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from vq_core.arch cimport vq_load_u32, vq_pause, vq_prefetch
from vq_core.clock cimport CLOCK_MONOTONIC, clock_now
from vq_core.driver cimport (DRIVER_OK, driver_add, driver_add_as, driver_add_indirect, driver_arm, driver_disarm,
                             driver_free, driver_free_as, driver_kick, driver_kick_as, driver_next_id,
                             driver_outstanding, driver_part_t, driver_poll_used, driver_poll_used_as, driver_publish,
                             driver_publish_as)
from vq_core.packets cimport PACKET_LIMIT, order_gap, order_note, packet_fill, packet_read
from vq_core.wait cimport pollfd, wait_add, wait_any

cdef extern from "<sched.h>" nogil:
    int c_sched_yield "sched_yield"() noexcept

cdef enum:
    IDLE_YIELD = 256                 # rounds without a packet before the CPU is offered to others
    IDLE_SLEEP = 2000                # and before the engine waits for calls, if it may
    SLEEP_MS = 20                    # longest wait: the clock and the stop flag are looked at then
    DRAIN_PATIENCES = 8              # after the last packet was sent, whatever still moves


# ---- buffers ----

cdef inline uint8_t* side_payload(side_t* side, uint32_t id) noexcept nogil:
    """The payload of slot `id`."""
    return side.slots + id * side.stride + SLOT_HEAD


cdef void side_head_all(side_t* side, const uint64_t* ethernet) noexcept nogil:
    cdef uint32_t id
    for id in range(side.queue.num):
        memcpy(side_payload(side, id), ethernet, 16)


cdef void side_add_parts(side_t* side, uint32_t id, uint32_t length, bint writable) noexcept nogil:
    """Add slot `id` with its header and `length` payload bytes in a descriptor of its own each, or in more."""
    cdef driver_part_t parts[PARTS_MAX]
    cdef gpa_t addr = side.slots_addr + id * side.stride + SLOT_HEAD
    cdef uint32_t i, count = side.parts, piece
    cdef uint32_t left = length
    if count == 1:
        parts[0].addr = addr - side.header_bytes
        parts[0].len = side.header_bytes + length
    else:
        parts[0].addr = addr - side.header_bytes
        parts[0].len = side.header_bytes
        for i in range(1, count):
            piece = left // (count - i)
            parts[i].addr = addr
            parts[i].len = piece
            addr += piece
            left -= piece
    if side.tables == NULL:
        driver_add(side.queue, parts, 0 if writable else count, count if writable else 0)
    else:
        driver_add_indirect(side.queue, side.tables + id * PARTS_MAX, side.tables_addr + id * (16 * PARTS_MAX), parts,
                            0 if writable else count, count if writable else 0)


cdef inline void side_add(bint packed, side_t* side, uint32_t id, uint32_t length, bint writable) noexcept nogil:
    """Add slot `id`, the queue's next id; `writable` is a literal too. Descriptors are free: the caller has looked."""
    cdef driver_part_t part
    if side.parts == 1 and side.tables == NULL:
        part.addr = side.slots_addr + id * side.stride + SLOT_HEAD - side.header_bytes
        part.len = side.header_bytes + length
        if writable:
            driver_add_as(packed, side.queue, &part, 0, 1)
        else:
            driver_add_as(packed, side.queue, &part, 1, 0)
    else:
        side_add_parts(side, id, length, writable)


cdef inline uint32_t side_needs(side_t* side) noexcept nogil:
    """Free descriptors that a buffer takes."""
    return 1 if side.tables != NULL else side.parts


cdef void side_post_all(side_t* side) noexcept nogil:
    while driver_free(side.queue) >= side_needs(side):
        if side.queue.packed:
            side_add(True, side, driver_next_id(side.queue), side.capacity, True)
        else:
            side_add(False, side, driver_next_id(side.queue), side.capacity, True)
    driver_publish(side.queue)


# ---- the two halves of a round ----

cdef inline void stream_verify(traffic_t* traffic, stream_t* at, const uint8_t* data, uint32_t length) noexcept nogil:
    """Account for one packet of `length` bytes that came in at stream `at`."""
    cdef uint64_t number = 0
    cdef uint32_t name = 0
    cdef stream_t* stream
    traffic.totals.received += 1
    traffic.totals.received_bytes += length
    if not traffic.verify:
        return
    if not packet_read(data, length, &number, &name) or name >= at.reach:
        traffic.totals.changed += 1
        return
    stream = &traffic.streams[name]
    if traffic.windowed and number >= stream.sent:
        traffic.totals.changed += 1
        return
    order_note(&stream.order, &traffic.totals, number)


cdef inline int stream_send(bint packed, traffic_t* traffic, stream_t* stream, uint32_t number) noexcept nogil:
    """Send up to BATCH packets: how many, or -1 when the ring is broken."""
    cdef side_t* side = &stream.send
    cdef driver_t* queue = side.queue
    cdef uint32_t most = BATCH, under_way, needs = side_needs(side), id, length, i, n = 0
    cdef uint64_t left, total = 0
    cdef uint8_t* data
    if traffic.windowed:
        under_way = <uint32_t>(stream.sent - stream.order.come - stream.order.gone)
        if under_way >= stream.window:
            return 0
        if most > stream.window - under_way:
            most = stream.window - under_way
    if traffic.limit:
        left = traffic.limit - traffic.totals.sent
        if most > left:
            most = <uint32_t>left
    if driver_free_as(packed, queue) < most * needs:
        while driver_free_as(packed, queue) < queue.num:
            i = driver_poll_used_as(packed, queue, stream.used, queue.num)
            if <int>i < 0:
                return -1
            if i == 0:
                break
    while n < most and driver_free_as(packed, queue) >= needs:
        id = driver_next_id(queue)
        data = side_payload(side, id)
        length = traffic.sizes[0]
        if traffic.size_count > 1:
            length = traffic.sizes[traffic.size_at]
            traffic.size_at += 1
            if traffic.size_at == traffic.size_count:
                traffic.size_at = 0
        if length == 64:
            packet_fill(data, stream.sent, number, 64)
        else:
            packet_fill(data, stream.sent, number, length)
        stream.sent += 1
        total += length
        side_add(packed, side, id, length, False)
        n += 1
        if n % SUB_BATCH == 0:
            driver_publish_as(packed, queue)
    if n:
        driver_publish_as(packed, queue)
        driver_kick_as(packed, queue)
        # The engine is the only writer of the counters: plain sums, but one aligned store each.
        traffic.totals.sent += n
        traffic.totals.sent_bytes += total
    return <int>n


cdef int stream_merge(traffic_t* traffic, stream_t* stream, uint32_t at, uint32_t count,
                      uint32_t buffers) noexcept nogil:
    """Put the packet of `buffers` > 1 used elements from used[at] together and verify it.

    used[] holds `count` elements; more are taken as needed. Returns the new count, or -1 when the ring is broken.
    """
    cdef side_t* side = &stream.receive
    cdef uint32_t length = 0, piece, skip, i
    cdef int got
    cdef bint whole = True
    while count - at < buffers:
        # 5.1.6.4: all buffers of a packet become visible together.
        got = driver_poll_used(side.queue, stream.used + count, buffers - (count - at)) if count < side.queue.num else 0
        if got < 0:
            return -1
        if got == 0:
            whole = False
            buffers = count - at
            break
        count += got
    for i in range(buffers):
        skip = side.header_bytes if i == 0 else 0
        piece = stream.used[at + i].len
        if piece < skip or length + piece - skip > PACKET_LIMIT:
            whole = False
            break
        piece -= skip
        memcpy(stream.scratch + length, side_payload(side, stream.used[at + i].id) - side.header_bytes + skip, piece)
        length += piece
        if i + 1 < buffers and piece + skip != side.header_bytes + side.capacity:
            whole = False                    # all buffers but the last are filled (5.1.6.4)
    if whole:
        stream_verify(traffic, stream, stream.scratch, length)
    else:
        traffic.totals.received += 1
        traffic.totals.received_bytes += length
        traffic.totals.changed += traffic.verify
    return <int>count


cdef inline int stream_receive(bint packed, traffic_t* traffic, stream_t* stream) noexcept nogil:
    """Receive and verify up to BATCH buffers and post them again: how many, or -1 when the ring is broken."""
    cdef side_t* side = &stream.receive
    cdef driver_t* queue = side.queue
    cdef int count = driver_poll_used_as(packed, queue, stream.used, BATCH)
    cdef uint32_t i = 0, id, length, buffers
    cdef uint8_t* data
    if count <= 0:
        return count
    for i in range(<uint32_t>count):
        vq_prefetch(side_payload(side, stream.used[i].id))
    i = 0
    while i < <uint32_t>count:
        data = side_payload(side, stream.used[i].id)
        length = stream.used[i].len
        buffers = 1
        if length < side.header_bytes or data[-<int>side.header_bytes + 1] or data[-<int>side.header_bytes] & ~2:
            # Nothing but DATA_VALID may stand in the header of a packet that was sent without offloads (5.1.6.4).
            traffic.totals.received += 1
            traffic.totals.changed += traffic.verify
            i += 1
            continue
        if side.mergeable:
            buffers = (<uint16_t*>(data - 2))[0]
        if buffers == 1:
            stream_verify(traffic, stream, data, length - side.header_bytes)
            i += 1
        elif buffers == 0:
            traffic.totals.received += 1
            traffic.totals.changed += traffic.verify
            i += 1
        else:
            count = stream_merge(traffic, stream, i, <uint32_t>count, buffers)
            if count < 0:
                return -1
            i = i + buffers if buffers < <uint32_t>count - i else <uint32_t>count
    for _ in range(count):
        id = driver_next_id(queue)
        side_add(packed, side, id, side.capacity, True)
    driver_publish_as(packed, queue)
    driver_kick_as(packed, queue)
    return count


# ---- the loop ----

cdef void _note_error(traffic_t* traffic) noexcept nogil:
    """Remember which queue was broken."""
    cdef uint32_t i
    cdef driver_t* queues[2]
    for i in range(traffic.stream_count):
        queues[0] = traffic.streams[i].send.queue
        queues[1] = traffic.streams[i].receive.queue
        for queue in queues:
            if queue != NULL and queue.error != DRIVER_OK and traffic.error == DRIVER_OK:
                traffic.error = queue.error
                traffic.error_value = queue.error_value
                traffic.error_num = queue.num


cdef bint _drained(traffic_t* traffic) noexcept nogil:
    """Whether everything that was sent has come back, and every transmitq buffer too."""
    cdef uint32_t i
    cdef stream_t* stream
    for i in range(traffic.stream_count):
        stream = &traffic.streams[i]
        if stream.send.queue == NULL:
            continue
        if driver_outstanding(stream.send.queue) != 0:
            return False
        if traffic.windowed and stream.sent != stream.order.come + stream.order.gone:
            return False
    return True


cdef void _give_up(traffic_t* traffic) noexcept nogil:
    """Nothing moved for too long: what is under way is lost."""
    cdef uint32_t i
    cdef stream_t* stream
    for i in range(traffic.stream_count):
        stream = &traffic.streams[i]
        if stream.send.queue != NULL and traffic.windowed and stream.order.next < stream.sent:
            order_gap(&stream.order, &traffic.totals, stream.sent)


cdef void _sleep(traffic_t* traffic) noexcept nogil:
    """Wait for a call of any queue, a little while at most."""
    cdef pollfd fds[2 * STREAMS_MAX]
    cdef unsigned long count = 0
    cdef uint32_t i
    cdef bint ready = False
    cdef driver_t* queues[2]
    for i in range(traffic.stream_count):
        queues[0] = traffic.streams[i].send.queue
        queues[1] = traffic.streams[i].receive.queue
        for queue in queues:
            if queue != NULL and driver_outstanding(queue):
                ready |= driver_arm(queue)
                wait_add(&fds[count], queue.call_fd)
                count += 1
    if not ready:
        wait_any(fds, count, SLEEP_MS)
    for i in range(traffic.stream_count):
        if traffic.streams[i].send.queue != NULL:
            driver_disarm(traffic.streams[i].send.queue)
        if traffic.streams[i].receive.queue != NULL:
            driver_disarm(traffic.streams[i].receive.queue)


cdef void _begin(traffic_t* traffic) noexcept nogil:
    """Kick what was published before the run; no calls while the engine looks by itself."""
    cdef uint32_t i
    cdef driver_t* queues[2]
    for i in range(traffic.stream_count):
        queues[0] = traffic.streams[i].send.queue
        queues[1] = traffic.streams[i].receive.queue
        for queue in queues:
            if queue != NULL:
                driver_disarm(queue)
                driver_kick(queue)


cdef void traffic_run(traffic_t* traffic) noexcept nogil:
    cdef uint64_t begin = <uint64_t>clock_now(CLOCK_MONOTONIC), now = begin, moved_at = begin, ended_at = begin
    cdef uint64_t before = traffic.active_ns
    cdef uint32_t i, idle = 0, rounds = 0
    cdef int sent, received, progress
    cdef bint sending = True, progressed = False
    cdef stream_t* stream
    _begin(traffic)
    while True:
        progress = 0
        for i in range(traffic.stream_count):
            stream = &traffic.streams[i]
            if stream.receive.queue != NULL:
                if stream.receive.queue.packed:
                    received = stream_receive(True, traffic, stream)
                else:
                    received = stream_receive(False, traffic, stream)
                if received < 0:
                    _note_error(traffic)
                    return
                progress += received
            if stream.send.queue != NULL:
                if sending and stream.send.queue.packed:
                    sent = stream_send(True, traffic, stream, i)
                elif sending:
                    sent = stream_send(False, traffic, stream, i)
                else:
                    sent = driver_poll_used(stream.send.queue, stream.used, stream.send.queue.num)
                if sent < 0:
                    _note_error(traffic)
                    return
                progress += sent
        rounds += 1
        if progress:
            idle = 0
            progressed = True
        else:
            idle += 1
            vq_pause()
            if traffic.sleep and idle >= IDLE_SLEEP:
                _sleep(traffic)
                idle = 0
                rounds = 0
            elif idle % IDLE_YIELD == 0:
                c_sched_yield()
        if rounds & 63 and idle & 15 != 15:
            continue
        now = <uint64_t>clock_now(CLOCK_MONOTONIC)
        if progressed:
            moved_at = now
            progressed = False
        if sending:
            traffic.active_ns = before + (now - begin)
            if vq_load_u32(&traffic.stop) or (traffic.duration_ns and now - begin >= traffic.duration_ns) or \
                    (traffic.limit and _reached(traffic)):
                sending = False
                moved_at = ended_at = now
        if not sending and _drained(traffic):
            return
        # A device that hands over something for ever is not waited for either.
        if now - moved_at >= traffic.patience_ns or \
                (not sending and now - ended_at >= DRAIN_PATIENCES * traffic.patience_ns):
            _give_up(traffic)
            moved_at = now
            if not sending:
                return


cdef bint _reached(traffic_t* traffic) noexcept nogil:
    """Whether the limit of packets is reached: of sent ones, for a sink of received ones."""
    if traffic.streams[0].send.queue != NULL:
        return traffic.totals.sent >= traffic.limit
    return traffic.totals.received >= traffic.limit
