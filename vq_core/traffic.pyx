"""The traffic engine: one loop for sources, sinks and exchanges."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from vq_core.arch cimport vq_load_u32, vq_load_u64, vq_pause, vq_prefetch, vq_store_release_u32
from vq_core.driver cimport (DRIVER_OK, Block, DriverQueue, driver_add, driver_add_indirect, driver_arm, driver_disarm,
                             driver_free, driver_kick, driver_next_id, driver_outstanding, driver_poll_used,
                             driver_publish)
from vq_core.driver import BrokenRingError
from vq_core.net cimport net_header_bytes
from vq_core.virtio cimport VIRTIO_F_INDIRECT_DESC, VIRTIO_NET_F_MRG_RXBUF, has_feature

import os

cdef extern from "<sched.h>" nogil:
    int c_sched_yield "sched_yield"() noexcept

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int c_clock_gettime "clock_gettime"(int clock, timespec* now) noexcept
    int CLOCK_MONOTONIC

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void* data, size_t bytes) noexcept

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int c_poll "poll"(pollfd* fds, unsigned long count, int timeout_ms) noexcept
    short POLLIN

# Odd multipliers: a multiplication by them loses nothing, so that a changed word always changes its lane.
cdef enum:
    ETHERTYPE = 0xb588               # 0x88b5 (local experimental), bytes swapped
cdef enum:
    IDLE_YIELD = 256                 # rounds without a packet before the CPU is offered to others
    IDLE_SLEEP = 2000                # and before the engine waits for calls, if it may
    SLEEP_MS = 20                    # longest wait: the clock and the stop flag are looked at then
    STREAMS_MAX = 256


# ---- packets ----

cdef inline uint64_t _rotate(uint64_t value, int by) noexcept nogil:
    return value << by | value >> (64 - by)

cdef inline uint64_t _mix(uint64_t lane, uint64_t word) noexcept nogil:
    """One step of a lane. The rotation keeps flips of high bits from cancelling each other out in the next step."""
    return _rotate(lane ^ word, 29) * <uint64_t>0x9e3779b97f4a7c15


cdef inline uint64_t packet_checksum(const uint8_t* data, uint32_t length) noexcept nogil:
    """Checksum of PACKET_MIN bytes or more without word 4: four lanes, so that multiplications overlap."""
    cdef const uint64_t* word = <const uint64_t*>data
    cdef uint64_t a = <uint64_t>0x243f6a8885a308d3
    cdef uint64_t b = <uint64_t>0x13198a2e03707344
    cdef uint64_t c = <uint64_t>0xa4093822299f31d0
    cdef uint64_t d = <uint64_t>0x082efa98ec4e6c89
    cdef uint64_t rest = 0
    cdef uint32_t left = length - 64
    a = _mix(a, word[0])
    b = _mix(b, word[1])
    c = _mix(c, word[2])
    d = _mix(d, word[3])
    b = _mix(b, word[5])
    c = _mix(c, word[6])
    d = _mix(d, word[7])
    word += 8
    while left >= 32:
        a = _mix(a, word[0])
        b = _mix(b, word[1])
        c = _mix(c, word[2])
        d = _mix(d, word[3])
        word += 4
        left -= 32
    while left >= 8:
        a = _mix(a, word[0]) + d
        word += 1
        left -= 8
    if left:
        memcpy(&rest, word, left)
        b = _mix(b, rest)
    a = _mix(_mix(_mix(a, b), c), d)
    return a ^ a >> 32


cdef inline void packet_fill(uint8_t* data, uint64_t sequence, uint32_t stream, uint32_t length) noexcept nogil:
    """Write a packet behind its Ethernet header, which stands in the buffer already."""
    cdef uint64_t* word = <uint64_t*>data
    cdef uint64_t value = sequence * <uint64_t>0xd1342543de82ef95
    cdef uint32_t i, count = length >> 3
    word[2] = sequence
    word[3] = <uint64_t>length | <uint64_t>stream << 32 | <uint64_t>PACKET_MAGIC << 48
    for i in range(5, count):
        word[i] = value
        value += <uint64_t>0x9e3779b97f4a7c15
    if length & 7:
        memcpy(&word[count], &value, length & 7)
    word[4] = packet_checksum(data, length)


# ---- order ----

cdef void order_gap(traffic_t* traffic, stream_t* stream, uint64_t until) noexcept nogil:
    """The numbers from stream.next to `until` were passed over: lost, unless they come later."""
    cdef uint64_t number = stream.next
    if until - number > SPAN:
        number = until - SPAN                # what lies further back is forgotten: lost for good
    while number < until:
        stream.missing[(number & (SPAN - 1)) >> 6] |= <uint64_t>1 << (number & 63)
        number += 1
    stream.gone += until - stream.next
    traffic.totals.gaps += until - stream.next
    stream.next = until


cdef void order_odd(traffic_t* traffic, stream_t* stream, uint64_t number) noexcept nogil:
    """A packet that is not the expected one: ahead, late, or a second time."""
    cdef uint64_t bit = <uint64_t>1 << (number & 63)
    cdef uint64_t* place = &stream.missing[(number & (SPAN - 1)) >> 6]
    if number >= stream.next:
        if stream.next != number:
            order_gap(traffic, stream, number)
        place[0] &= ~bit                     # whatever stood there SPAN numbers ago is forgotten
        stream.next = number + 1
        stream.come += 1
        traffic.totals.verified += 1
    elif stream.next - number <= SPAN and place[0] & bit:
        place[0] &= ~bit
        stream.gone -= 1
        stream.come += 1
        traffic.totals.gaps -= 1
        traffic.totals.reordered += 1
        traffic.totals.verified += 1
    else:
        traffic.totals.duplicated += 1


cdef inline void packet_verify(traffic_t* traffic, stream_t* at, const uint8_t* data, uint32_t length) noexcept nogil:
    """Account for one packet of `length` bytes that came in at stream `at`."""
    cdef const uint64_t* word = <const uint64_t*>data
    cdef uint64_t kind, number
    cdef uint32_t name
    cdef stream_t* stream
    traffic.totals.received += 1
    traffic.totals.received_bytes += length
    if not traffic.verify:
        return
    if length < PACKET_MIN:
        traffic.totals.changed += 1
        return
    kind = word[3]
    number = word[2]
    name = <uint32_t>(kind >> 32) & 0xffff
    if (<uint32_t>kind != length) | (kind >> 48 != PACKET_MAGIC) | (name >= at.reach):
        traffic.totals.changed += 1
        return
    if length == 64:
        kind = packet_checksum(data, 64)
    else:
        kind = packet_checksum(data, length)
    stream = &traffic.streams[name]
    if kind != word[4] or (traffic.windowed and number >= stream.sent):
        traffic.totals.changed += 1
        return
    if number == stream.next and stream.gone == 0:
        stream.next = number + 1
        stream.come += 1
        traffic.totals.verified += 1
    else:
        order_odd(traffic, stream, number)


# ---- buffers ----

cdef inline uint8_t* side_payload(side_t* side, uint32_t id) noexcept nogil:
    return side.slots + id * side.stride + SLOT_HEAD


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


cdef inline void side_add(side_t* side, uint32_t id, uint32_t length, bint writable) noexcept nogil:
    """Add slot `id`, the queue's next id; `writable` is a literal. The caller has seen that descriptors are free."""
    cdef driver_part_t part
    if side.parts == 1 and side.tables == NULL:
        part.addr = side.slots_addr + id * side.stride + SLOT_HEAD - side.header_bytes
        part.len = side.header_bytes + length
        if writable:
            driver_add(side.queue, &part, 0, 1)
        else:
            driver_add(side.queue, &part, 1, 0)
    else:
        side_add_parts(side, id, length, writable)


cdef inline uint32_t side_needs(side_t* side) noexcept nogil:
    """Free descriptors that a buffer takes."""
    return 1 if side.tables != NULL else side.parts


# ---- the two halves of a round ----

cdef inline int stream_send(traffic_t* traffic, stream_t* stream, uint32_t number) noexcept nogil:
    """Send up to BATCH packets: how many, or -1 when the ring is broken."""
    cdef side_t* side = &stream.send
    cdef driver_t* queue = side.queue
    cdef uint32_t most = BATCH, under_way, needs = side_needs(side), id, length, i, n = 0
    cdef uint64_t left, total = 0
    cdef uint8_t* data
    if traffic.windowed:
        under_way = <uint32_t>(stream.sent - stream.come - stream.gone)
        if under_way >= stream.window:
            return 0
        if most > stream.window - under_way:
            most = stream.window - under_way
    if traffic.limit:
        left = traffic.limit - traffic.totals.sent
        if most > left:
            most = <uint32_t>left
    if driver_free(queue) < most * needs:
        while driver_free(queue) < queue.num:
            i = driver_poll_used(queue, stream.used, queue.num)
            if <int>i < 0:
                return -1
            if i == 0:
                break
    while n < most and driver_free(queue) >= needs:
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
        side_add(side, id, length, False)
        n += 1
        if n % SUB_BATCH == 0:
            driver_publish(queue)
    if n:
        driver_publish(queue)
        driver_kick(queue)
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
        packet_verify(traffic, stream, stream.scratch, length)
    else:
        traffic.totals.received += 1
        traffic.totals.received_bytes += length
        traffic.totals.changed += traffic.verify
    return <int>count


cdef inline int stream_receive(traffic_t* traffic, stream_t* stream) noexcept nogil:
    """Receive and verify up to BATCH buffers and post them again: how many, or -1 when the ring is broken."""
    cdef side_t* side = &stream.receive
    cdef driver_t* queue = side.queue
    cdef int count = driver_poll_used(queue, stream.used, BATCH)
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
            packet_verify(traffic, stream, data, length - side.header_bytes)
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
        side_add(side, id, side.capacity, True)
    driver_publish(queue)
    driver_kick(queue)
    return count


# ---- the loop ----

cdef uint64_t _now_ns() noexcept nogil:
    cdef timespec now
    c_clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


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
        if traffic.windowed and stream.sent != stream.come + stream.gone:
            return False
    return True


cdef void _give_up(traffic_t* traffic) noexcept nogil:
    """Nothing moved for too long: what is under way is lost."""
    cdef uint32_t i
    cdef stream_t* stream
    for i in range(traffic.stream_count):
        stream = &traffic.streams[i]
        if stream.send.queue != NULL and traffic.windowed and stream.next < stream.sent:
            order_gap(traffic, stream, stream.sent)


cdef void _sleep(traffic_t* traffic) noexcept nogil:
    """Wait for a call of any queue, a little while at most."""
    cdef pollfd fds[2 * STREAMS_MAX]
    cdef unsigned long count = 0
    cdef uint32_t i
    cdef uint64_t ignored
    cdef bint ready = False
    cdef driver_t* queues[2]
    for i in range(traffic.stream_count):
        queues[0] = traffic.streams[i].send.queue
        queues[1] = traffic.streams[i].receive.queue
        for queue in queues:
            if queue != NULL and driver_outstanding(queue):
                ready |= driver_arm(queue)
                fds[count].fd = queue.call_fd
                fds[count].events = POLLIN
                count += 1
    if not ready and c_poll(fds, count, SLEEP_MS) > 0:
        for i in range(count):
            if fds[i].revents:
                c_read(fds[i].fd, &ignored, 8)
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
    cdef uint64_t begin = _now_ns(), now = begin, moved_at = begin, before = traffic.active_ns
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
                received = stream_receive(traffic, stream)
                if received < 0:
                    _note_error(traffic)
                    return
                progress += received
            if stream.send.queue != NULL:
                if sending:
                    sent = stream_send(traffic, stream, i)
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
        now = _now_ns()
        if progressed:
            moved_at = now
            progressed = False
        if sending:
            traffic.active_ns = before + (now - begin)
            if vq_load_u32(&traffic.stop) or (traffic.duration_ns and now - begin >= traffic.duration_ns) or \
                    (traffic.limit and _reached(traffic)):
                sending = False
                moved_at = now
        if not sending and _drained(traffic):
            return
        if now - moved_at >= traffic.patience_ns:
            _give_up(traffic)
            moved_at = now
            if not sending:
                return


cdef bint _reached(traffic_t* traffic) noexcept nogil:
    """Whether the limit of packets is reached: of sent ones, for a sink of received ones."""
    if traffic.streams[0].send.queue != NULL:
        return traffic.totals.sent >= traffic.limit
    return traffic.totals.received >= traffic.limit


# ---- handles ----

def _stride(capacity):
    """Bytes from slot to slot: whole lines, an odd number of them, so that slots spread over all cache sets."""
    lines = (SLOT_HEAD + capacity + 63) // 64
    return 64 * (lines | 1)


def traffic_memory_bytes(queue_size, size=PACKET_LIMIT, *, pairs=1, receive_bytes=None):
    """Guest memory that an Exchange needs, rings and tables included.

    Parameters
    ----------
    queue_size : int
        Entries.
    size : int
        Largest packet, bytes.
    pairs : int
    receive_bytes : int, optional
        As for `Exchange`.

    Returns
    -------
    int
        Bytes, a multiple of 4096.
    """
    slots = _stride(size) + _stride(size if receive_bytes is None else receive_bytes) + 2 * 16 * PARTS_MAX
    return pairs * (-(-queue_size * (slots + 2 * 32) // 4096) * 4096 + 16 * 4096)


cdef class Traffic:
    """Common part of `Exchange`, `Source` and `Sink`: a thread's worth of verified traffic.

    Notes
    -----
    Threading: `run` gives up the GIL; counters may be read and `stop` called from any thread meanwhile.
    While it runs, the queues belong to the engine: their own methods raise RuntimeError.
    """

    def __cinit__(self):
        memset(&self.traffic, 0, sizeof(traffic_t))
        self._queues = []
        self._blocks = []

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.traffic.stream_count):
            free(self.traffic.streams[i].missing)
            free(self.traffic.streams[i].used)
            free(self.traffic.streams[i].scratch)
        free(self.traffic.streams)

    def _set_up(self, transmitqs, receiveqs, *, sizes, window, receive_bytes, descriptors, indirect, verify, poll, cpu,
                patience):
        """Make one stream of each pair (either list may be empty) and post the receive buffers."""
        cdef uint32_t i
        cdef stream_t* stream
        cdef DriverQueue queue
        sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
        if not 1 <= len(sizes) <= SIZES_MAX or not all(PACKET_MIN <= size <= PACKET_LIMIT for size in sizes):
            raise ValueError(f"packet sizes {sizes}: 1 to {SIZES_MAX} of them, each from {PACKET_MIN} to "
                             f"{PACKET_LIMIT} bytes")
        if not 1 <= descriptors <= PARTS_MAX:
            raise ValueError(f"{descriptors} descriptors a packet; 1 to {PARTS_MAX} are possible")
        if poll not in ("busy", "sleep"):
            raise ValueError(f"poll {poll!r} is neither 'busy' nor 'sleep'")
        count = max(len(transmitqs), len(receiveqs))
        if not 1 <= count <= STREAMS_MAX:
            raise ValueError(f"{count} queue pairs; 1 to {STREAMS_MAX} are possible")
        if window is not None and window < 1:
            raise ValueError(f"window {window} is not positive")
        self.traffic.streams = <stream_t*>calloc(count, sizeof(stream_t))
        if self.traffic.streams == NULL:
            raise MemoryError("streams")
        self.traffic.stream_count = count
        self.traffic.size_count = len(sizes)
        for i in range(<uint32_t>len(sizes)):
            self.traffic.sizes[i] = sizes[i]
        self.traffic.windowed = bool(transmitqs) and bool(receiveqs)
        self.traffic.verify = verify
        self.traffic.sleep = poll == "sleep"
        self.traffic.patience_ns = <uint64_t>(patience * 1e9)
        self.cpu = cpu
        largest = max(sizes)
        for i in range(self.traffic.stream_count):
            stream = &self.traffic.streams[i]
            stream.reach = self.traffic.stream_count
            entries = 0
            # 02:vq:<stream>:01 to 02:vq:<stream>:02, then the ethertype and two bytes of padding.
            source = bytes((2, 0x76, 0x71, i >> 8, i & 255, 1))
            target = bytes((2, 0x76, 0x71, i >> 8, i & 255, 2))
            words = target + source + ETHERTYPE.to_bytes(2, "little") + bytes(2)
            stream.ethernet[0] = int.from_bytes(words[:8], "little")
            stream.ethernet[1] = int.from_bytes(words[8:], "little")
            window_limit = PACKET_LIMIT
            if transmitqs:
                queue = transmitqs[i]
                needs = 1 if indirect else descriptors
                if needs > queue.size:
                    raise ValueError(f"a packet takes {needs} descriptors, the transmitq has {queue.size}")
                self._set_side(i, True, queue, largest, descriptors, indirect)
                window_limit = queue.size // needs
                entries = queue.size
            if receiveqs:
                queue = receiveqs[i]
                capacity = self._receive_capacity(queue, largest, receive_bytes)
                header = net_header_bytes(queue.features)
                needs = 1 if indirect else descriptors
                if needs > queue.size:
                    raise ValueError(f"a receive buffer takes {needs} descriptors, the receiveq has {queue.size}")
                self._set_side(i, False, queue, capacity, descriptors, indirect)
                merged = max(1, -(-(largest + header) // (capacity + header)))
                window_limit = min(window_limit, queue.size // needs // merged)
                entries = max(entries, queue.size)
                if window_limit < 1:
                    raise ValueError(f"a packet of {largest} bytes takes {merged} receive buffers, the receiveq holds "
                                     f"{queue.size // needs}; use a larger ring or receive_bytes")
            stream.window = window_limit if window is None else min(window, window_limit)
            stream.missing = <uint64_t*>calloc(SPAN // 64, sizeof(uint64_t))
            stream.used = <driver_used_t*>calloc(2 * entries, sizeof(driver_used_t))
            stream.scratch = <uint8_t*>calloc(PACKET_LIMIT + 64, 1)
            if stream.missing == NULL or stream.used == NULL or stream.scratch == NULL:
                raise MemoryError("streams")
        for i in range(self.traffic.stream_count):
            self._post(i)

    def _receive_capacity(self, DriverQueue queue, largest, receive_bytes):
        """Payload bytes of a receive buffer."""
        mergeable = has_feature(queue.features, VIRTIO_NET_F_MRG_RXBUF)
        if receive_bytes is None:
            return largest
        if not PACKET_MIN <= receive_bytes <= PACKET_LIMIT:
            raise ValueError(f"receive_bytes {receive_bytes} is not from {PACKET_MIN} to {PACKET_LIMIT}")
        if receive_bytes < largest and not mergeable:
            raise ValueError(f"receive_bytes {receive_bytes} is below the packet size {largest}, and MRG_RXBUF (bit "
                             "15) is not among the receiveq's features")
        return receive_bytes

    def _set_side(self, uint32_t number, bint sending, DriverQueue queue, capacity, descriptors, indirect):
        """Give one queue of a stream its buffers."""
        cdef side_t* side = &self.traffic.streams[number].send if sending else &self.traffic.streams[number].receive
        cdef uint32_t id
        cdef Block block
        cdef uint64_t* words
        if queue.outstanding:
            raise ValueError(f"the queue has {queue.outstanding} buffers outstanding; give a fresh one, or reset it")
        if indirect and not has_feature(queue.features, VIRTIO_F_INDIRECT_DESC):
            raise ValueError("indirect descriptors were asked for, but INDIRECT_DESC (bit 28) is not among the queue's "
                             "features")
        self._queues.append(queue)
        side.stride = _stride(capacity)
        block = queue.memory.alloc(side.stride * queue.size)
        self._blocks.append(block)
        side.queue = &queue.driver
        side.slots = block.data
        side.slots_addr = block.guest_addr
        side.header_bytes = net_header_bytes(queue.features)
        side.capacity = capacity
        side.parts = descriptors
        side.mergeable = has_feature(queue.features, VIRTIO_NET_F_MRG_RXBUF)
        if indirect:
            block = queue.memory.alloc(16 * PARTS_MAX * queue.size)
            self._blocks.append(block)
            side.tables = <virtq_desc_t*>block.data
            side.tables_addr = block.guest_addr
        if sending:
            for id in range(queue.driver.num):
                words = <uint64_t*>side_payload(side, id)
                words[0] = self.traffic.streams[number].ethernet[0]
                words[1] = self.traffic.streams[number].ethernet[1]

    def _post(self, uint32_t number):
        """Fill the receiveq of a stream with buffers."""
        cdef side_t* side = &self.traffic.streams[number].receive
        if side.queue == NULL:
            return
        while driver_free(side.queue) >= side_needs(side):
            side_add(side, driver_next_id(side.queue), side.capacity, True)
        driver_publish(side.queue)

    def run(self, duration=None, packets=None):
        """Run until the time is over, so many packets were sent, or `stop` is called; then wait for what is under way.

        Parameters
        ----------
        duration : float, optional
            Seconds.
        packets : int, optional
            Packets to send, over all streams and since the start; for a Sink packets to receive.

        Raises
        ------
        BrokenRingError
            The device broke a ring.
        RuntimeError
            A queue is in use already.
        """
        cdef DriverQueue queue
        claimed = []
        affinity = None
        try:
            for queue in self._queues:
                queue.claim()
                claimed.append(queue)
            self.running = True
            if self.cpu is not None:
                affinity = os.sched_getaffinity(0)
                os.sched_setaffinity(0, {self.cpu})
            self.traffic.duration_ns = 0 if duration is None else int(max(1, duration * 1e9))
            self.traffic.limit = 0 if packets is None else packets
            self.traffic.error = DRIVER_OK
            with nogil:
                traffic_run(&self.traffic)
        finally:
            self.running = False
            for queue in claimed:
                queue.unclaim()
            if affinity is not None:
                os.sched_setaffinity(0, affinity)
        if self.traffic.error != DRIVER_OK:
            raise BrokenRingError(self.traffic.error, self.traffic.error_value, self.traffic.error_num)

    def stop(self):
        """Let `run` end soon, from any thread; a later `run` ends at once until `resume`."""
        vq_store_release_u32(&self.traffic.stop, 1)

    def resume(self):
        """Take `stop` back."""
        vq_store_release_u32(&self.traffic.stop, 0)

    @property
    def counters(self):
        """dict of int: sent, sent_bytes, received, received_bytes, verified, lost, duplicated, reordered, changed.

        Bytes count packets without virtio-net headers. `lost` counts sequence numbers that were passed over, and
        what was under way when nothing moved any more; a packet that comes late moves from lost to reordered.
        """
        cdef totals_t* totals = &self.traffic.totals
        cdef uint64_t changed = vq_load_u64(&totals.changed), gaps = vq_load_u64(&totals.gaps)
        return {"sent": vq_load_u64(&totals.sent), "sent_bytes": vq_load_u64(&totals.sent_bytes),
                "received": vq_load_u64(&totals.received), "received_bytes": vq_load_u64(&totals.received_bytes),
                "verified": vq_load_u64(&totals.verified), "lost": gaps - changed if gaps > changed else 0,
                "duplicated": vq_load_u64(&totals.duplicated), "reordered": vq_load_u64(&totals.reordered),
                "changed": changed}

    @property
    def seconds(self):
        """float: how long the engine has been sending (or, for a sink, receiving), without the wait at the end."""
        return vq_load_u64(&self.traffic.active_ns) / 1e9

    @property
    def window(self):
        """int: most packets under way in a stream."""
        return self.traffic.streams[0].window


cdef class Exchange(Traffic):
    """Sends packets on transmitqs and expects them back on receiveqs, verified.

    Parameters
    ----------
    pairs : sequence of (DriverQueue, DriverQueue)
        (transmitq, receiveq) of each stream; they may belong to different devices.
    sizes : int or sequence of int
        Packet size in bytes, Ethernet header included, 64 to 65535; several are sent in turn.
    window : int, optional
        Most packets under way in a stream; never more than the receiveq has room for, which is the default.
    receive_bytes : int, optional
        Payload bytes of a receive buffer; by default the largest size. Smaller ones need MRG_RXBUF.
    descriptors : int
        Descriptors of a buffer, 1 to 16: 1 joins header and payload, 2 separates them, more cut the payload.
    indirect : bool
        Use indirect descriptors.
    poll : str
        ``"busy"``, or ``"sleep"``: wait for calls when nothing moves.
    cpu : int, optional
        CPU that `run` pins its thread to.
    patience : float
        Seconds without any progress after which what is under way counts as lost.

    Raises
    ------
    ValueError
        Sizes, window or features do not fit together.
    MemoryError
        The guest memory is too small; see `traffic_memory_bytes`.
    """

    def __init__(self, pairs, sizes=64, *, window=None, receive_bytes=None, descriptors=1, indirect=False, poll="busy",
                 cpu=None, patience=1.0):
        pairs = list(pairs)
        self._set_up([pair[0] for pair in pairs], [pair[1] for pair in pairs], sizes=sizes, window=window,
                     receive_bytes=receive_bytes, descriptors=descriptors, indirect=indirect, verify=True, poll=poll,
                     cpu=cpu, patience=patience)


cdef class Source(Traffic):
    """Sends packets on transmitqs and forgets about them; the parameters are those of `Exchange`."""

    def __init__(self, transmitqs, sizes=64, *, descriptors=1, indirect=False, poll="busy", cpu=None, patience=1.0):
        self._set_up(list(transmitqs), [], sizes=sizes, window=None, receive_bytes=None, descriptors=descriptors,
                     indirect=indirect, verify=False, poll=poll, cpu=cpu, patience=patience)


cdef class Sink(Traffic):
    """Receives packets on receiveqs; with `verify` they are those of a `Source`, and gaps count as lost.

    Parameters
    ----------
    receiveqs : sequence of DriverQueue
    largest : int
        Largest packet that is expected, bytes.
    verify : bool
        False: packets are counted only, whatever they are.
    """

    def __init__(self, receiveqs, largest=1514, *, receive_bytes=None, verify=False, descriptors=1, indirect=False,
                 poll="busy", cpu=None, patience=1.0):
        self._set_up([], list(receiveqs), sizes=largest, window=None, receive_bytes=receive_bytes,
                     descriptors=descriptors, indirect=indirect, verify=verify, poll=poll, cpu=cpu, patience=patience)
