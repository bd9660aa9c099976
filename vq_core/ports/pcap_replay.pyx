"""Records of an untrusted file to borrowed packets, at full speed or at the pace of the capture."""
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from vq_core.arch cimport vq_load_u32, vq_snapshot_u32, vq_store_release_u32, vq_store_u64
from vq_core.clock cimport CLOCK_MONOTONIC, SECOND_NS, clock_now, clock_wake_at
from vq_core.counters cimport DROP_NO_TARGET, DROP_TOO_LONG, DROP_TOO_SHORT
from vq_core.epoll cimport EPOLLIN, epoll_move
from vq_core.port cimport ARM_PULL, BURST_MAX, OFFLOAD_ALL, PACKET_MAX, burst_t, endpoint_t, packet_t
from vq_core.ports.pcap_writer cimport PCAP_RECORD_BYTES, PCAP_SNAPLEN_MAX

cdef enum:
    ETHERNET_BYTES = 14
    RECORDS_BURST = 256          # records looked at before a pull ends (a file of empty records)

cdef int64_t FAR_NS = 4000000000000000000      # 126 years: a due time is never later, and sums do not overflow


cdef inline uint32_t _field(pcap_replay_t* replay, uint64_t offset) noexcept nogil:
    """One 32-bit field of the file, read once."""
    cdef uint32_t value = vq_snapshot_u32(replay.map + offset)
    if replay.swapped:
        value = value >> 24 | (value >> 8 & 0xff00) | (value << 8 & 0xff0000) | value << 24
    return value


cdef bint _fault(pcap_replay_t* replay, uint32_t fault, uint64_t value) noexcept nogil:
    replay.fault_record = replay.record
    replay.fault_offset = replay.offset
    replay.fault_value = value
    vq_store_release_u32(&replay.fault, fault)
    return False


cdef bint _read_record(pcap_replay_t* replay, pcap_record_t* record) noexcept nogil:
    """Read and check the record at `offset`; False at the end of the file or at what has to be taken for it."""
    cdef uint64_t left = replay.size - replay.offset       # offset <= size always
    if left < PCAP_RECORD_BYTES:
        return False if left == 0 else _fault(replay, FAULT_HEADER, left)
    record.stamp_ns = _field(replay, replay.offset) * SECOND_NS
    record.stamp_ns += _field(replay, replay.offset + 4) * <int64_t>replay.unit_ns
    record.captured = _field(replay, replay.offset + 8)
    record.original = _field(replay, replay.offset + 12)
    if record.captured > record.original or record.captured > PCAP_SNAPLEN_MAX:
        return _fault(replay, FAULT_LENGTH, record.captured)
    if record.captured > left - PCAP_RECORD_BYTES:
        return _fault(replay, FAULT_CUT, record.captured)
    record.data = replay.map + replay.offset + PCAP_RECORD_BYTES
    return True


cdef int64_t _due(pcap_replay_t* replay, pcap_record_t* record) noexcept nogil:
    """When the packet is to be handed out, in CLOCK_MONOTONIC; the first of a pass sets the pass's clock."""
    cdef double wait
    if replay.start_ns == 0:
        replay.start_ns = clock_now(CLOCK_MONOTONIC)
        replay.first_ns = record.stamp_ns
    wait = <double>(record.stamp_ns - replay.first_ns) / replay.speed
    if wait <= 0:                # a clock that was set back meanwhile
        return replay.start_ns
    return replay.start_ns + (FAR_NS if wait > <double>FAR_NS else <int64_t>wait)


cdef void _end_pass(pcap_replay_t* replay) noexcept nogil:
    replay.passes += 1
    if replay.kept == 0 and vq_load_u32(&replay.fault) == FAULT_NONE:
        _fault(replay, FAULT_EMPTY, 0)
    # A pass without a packet would repeat for ever without result.
    replay.done = replay.kept == 0 or (replay.loops != 0 and replay.passes == replay.loops)
    replay.offset = PCAP_HEADER_BYTES
    replay.record = replay.kept = 0
    replay.start_ns = 0


cdef inline void _look_through(pcap_replay_t* replay) noexcept nogil:
    if replay.done and replay.released_mark == replay.pulled_mark:
        vq_store_release_u32(&replay.through, 1)


cdef int _lost(pcap_replay_t* replay, burst_t* burst) noexcept nogil:
    """The file shrank: what was just read may be zeroes of the guard, and is not handed out."""
    if not replay.done:
        _fault(replay, FAULT_LOST, 0)
        replay.done = True
    burst.count = 0
    _look_through(replay)
    return 0


cdef int _pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    cdef pcap_replay_t* replay = <pcap_replay_t*>endpoint.port
    cdef pcap_record_t record
    cdef packet_t* packet
    cdef int64_t now_ns = 0
    cdef uint64_t total = 0
    cdef uint64_t cut = 0, short_count = 0, long_count = 0
    cdef int count = 0, looked = 0
    burst.count = burst.wants = burst.segment_count = 0
    if replay.done:
        return 0
    if vq_load_u32(&replay.lost):
        return _lost(replay, burst)
    if replay.speed > 0:
        now_ns = clock_now(CLOCK_MONOTONIC)
    limit = min(limit, BURST_MAX)
    while count < limit and looked < RECORDS_BURST:
        looked += 1
        if not _read_record(replay, &record):
            _end_pass(replay)
            if replay.done:
                break
            continue
        if replay.speed > 0 and _due(replay, &record) > now_ns and replay.record > 0:
            break
        replay.offset += PCAP_RECORD_BYTES + record.captured
        replay.record += 1
        if record.captured < ETHERNET_BYTES or record.captured > PACKET_MAX:
            short_count += record.captured < ETHERNET_BYTES
            long_count += record.captured > PACKET_MAX
            continue
        cut += record.captured < record.original
        packet = &burst.packets[count]
        memset(packet, 0, sizeof(packet_t))
        packet.data = record.data
        packet.head_bytes = packet.length = record.captured
        packet.mark = <uint16_t>(replay.pulled_mark + count + 1)
        total += record.captured
        replay.kept += 1
        count += 1
    if vq_load_u32(&replay.lost):
        return _lost(replay, burst)
    replay.pulled_mark += <uint16_t>count
    burst.count = count
    endpoint.pulled.packets += count
    endpoint.pulled.bytes += total
    endpoint.pulled.dropped[DROP_TOO_SHORT] += short_count
    endpoint.pulled.dropped[DROP_TOO_LONG] += long_count
    vq_store_u64(&replay.cut_count, replay.cut_count + cut)
    _look_through(replay)
    return count


cdef void _release(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil:
    cdef pcap_replay_t* replay = <pcap_replay_t*>endpoint.port
    if count == <int>burst.count:
        replay.released_mark = replay.pulled_mark
    elif count > 0:
        replay.released_mark = burst.packets[count - 1].mark
    _look_through(replay)


cdef int _push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    """A file that is replayed takes nothing; the other side of a patch may still send."""
    endpoint.pushed.dropped[DROP_NO_TARGET] += count
    return count


cdef void _flush(endpoint_t* endpoint) noexcept nogil:
    pass


cdef int _room(endpoint_t* endpoint) noexcept nogil:
    return BURST_MAX


cdef int _arm(endpoint_t* endpoint, int what) noexcept nogil:
    cdef pcap_replay_t* replay = <pcap_replay_t*>endpoint.port
    cdef pcap_record_t record
    cdef int64_t due_ns
    if replay.done or not what & ARM_PULL:
        return 0
    if replay.speed == 0 or vq_load_u32(&replay.lost) or not _read_record(replay, &record):
        return 1                 # the next pull deals with it
    due_ns = _due(replay, &record)
    if replay.record == 0 or due_ns <= clock_now(CLOCK_MONOTONIC):
        return 1
    clock_wake_at(replay.timer_fd, due_ns)
    return 0


cdef void _attach(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    cdef pcap_replay_t* replay = <pcap_replay_t*>endpoint.port
    epoll_move(replay.epoll_fd, epoll_fd, replay.timer_fd, EPOLLIN)
    replay.epoll_fd = epoll_fd


cdef void pcap_replay_wire(endpoint_t* endpoint) noexcept:
    endpoint.holds = 1
    endpoint.accepts = OFFLOAD_ALL       # dropped anyway: no work is to be done for it
    endpoint.pull = _pull
    endpoint.push = _push
    endpoint.release = _release
    endpoint.flush = _flush
    endpoint.room = _room
    endpoint.arm = _arm
    endpoint.attach = _attach
