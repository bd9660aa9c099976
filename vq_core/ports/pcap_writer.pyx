"""Packets to records to a file; what the disk refuses is dropped whole."""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove
from vq_core.arch cimport vq_copy, vq_store_release_u32
from vq_core.clock cimport CLOCK_MONOTONIC, CLOCK_REALTIME, SECOND_NS, clock_now, clock_wake_at
from vq_core.counters cimport DROP_IO_ERROR, DROP_TOO_LONG, DROP_TOO_SHORT
from vq_core.epoll cimport EPOLLIN, EPOLLOUT, epoll_move
from vq_core.poll cimport POLLOUT, c_poll, pollfd
from vq_core.port cimport ARM_PUSH, BURST_MAX, PACKET_MAX, burst_t, endpoint_t, packet_t

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void* data, size_t bytes) noexcept
    int c_ftruncate "ftruncate"(int fd, long length) noexcept
    long c_lseek "lseek"(int fd, long offset, int whence) noexcept
    int SEEK_SET

cdef struct record_header_t:     # PCAP_RECORD_BYTES
    uint32_t seconds
    uint32_t nanoseconds
    uint32_t captured
    uint32_t original


cdef uint32_t _settle(endpoint_t* endpoint, pcap_writer_t* writer) noexcept nogil:
    """Count the records that are in the file as a whole; returns how many bytes of the buffer they are."""
    cdef uint32_t whole = 0, size
    cdef uint64_t packets = 0, total = 0
    cdef record_header_t header
    while writer.sent - whole >= PCAP_RECORD_BYTES:
        memcpy(&header, writer.buffer + whole, PCAP_RECORD_BYTES)
        size = PCAP_RECORD_BYTES + header.captured
        if size > writer.sent - whole:
            break
        packets += 1
        total += header.original
        whole += size
    endpoint.pushed.packets += packets
    endpoint.pushed.bytes += total
    writer.committed += whole
    return whole


cdef void _lose(endpoint_t* endpoint, pcap_writer_t* writer, uint32_t whole, int error) noexcept nogil:
    """The file takes no more: take back the part of a record, count the rest of the buffer as dropped."""
    cdef uint32_t at = whole
    cdef record_header_t header
    vq_store_release_u32(&writer.error, error)
    if not writer.regular or c_ftruncate(writer.fd, <long>writer.committed) != 0 or \
            c_lseek(writer.fd, <long>writer.committed, SEEK_SET) < 0:
        writer.broken = True
    while at < writer.fill:
        memcpy(&header, writer.buffer + at, PCAP_RECORD_BYTES)
        at += PCAP_RECORD_BYTES + header.captured
        endpoint.pushed.dropped[DROP_IO_ERROR] += 1
    writer.fill = writer.sent = 0
    writer.deadline_ns = 0


cdef void _write_out(endpoint_t* endpoint) noexcept nogil:
    cdef pcap_writer_t* writer = <pcap_writer_t*>endpoint.port
    cdef ssize_t put
    cdef uint32_t whole
    cdef int error = 0
    while writer.sent < writer.fill:
        put = c_write(writer.fd, writer.buffer + writer.sent, writer.fill - writer.sent)
        if put > 0:
            writer.sent += <uint32_t>put
            continue
        error = errno
        if put == 0 or error != EINTR:
            break
    writer.blocked = False
    whole = _settle(endpoint, writer)
    if writer.sent == writer.fill:
        writer.fill = writer.sent = 0
        writer.deadline_ns = 0
    elif error == EAGAIN and not writer.regular:
        memmove(writer.buffer, writer.buffer + whole, writer.fill - whole)
        writer.fill -= whole
        writer.sent -= whole
        writer.blocked = True
        writer.deadline_ns = clock_now(CLOCK_MONOTONIC) + PCAP_DELAY_NS
        clock_wake_at(writer.timer_fd, writer.deadline_ns)
    else:
        _lose(endpoint, writer, whole, error)


cdef void pcap_writer_end(endpoint_t* endpoint) noexcept nogil:
    cdef pcap_writer_t* writer = <pcap_writer_t*>endpoint.port
    _write_out(endpoint)
    if writer.fill > 0:
        _lose(endpoint, writer, 0, EAGAIN)


cdef void _put_record(pcap_writer_t* writer, packet_t* packet, uint32_t captured, int64_t now_ns) noexcept nogil:
    cdef uint8_t* to = writer.buffer + writer.fill
    cdef uint32_t left = captured, piece, i
    cdef record_header_t header
    header.seconds = <uint32_t>(now_ns // SECOND_NS)
    header.nanoseconds = <uint32_t>(now_ns % SECOND_NS)
    header.captured = captured
    header.original = packet.length
    memcpy(to, &header, PCAP_RECORD_BYTES)       # records have any length, so their headers have any alignment
    to += PCAP_RECORD_BYTES
    piece = min(left, packet.head_bytes)
    vq_copy(to, packet.data, piece)
    for i in range(packet.more_count):
        to += piece
        left -= piece
        piece = min(left, packet.more[i].length)
        vq_copy(to, packet.more[i].data, piece)
    writer.fill += PCAP_RECORD_BYTES + captured


cdef int _push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    cdef pcap_writer_t* writer = <pcap_writer_t*>endpoint.port
    cdef int64_t now_ns
    cdef uint32_t captured
    cdef int i
    if count <= 0:
        return 0
    if writer.broken:
        endpoint.pushed.dropped[DROP_IO_ERROR] += count
        return count
    now_ns = clock_now(CLOCK_REALTIME)
    for i in range(count):
        if packets[i].length > PACKET_MAX or packets[i].length == 0:
            endpoint.pushed.dropped[DROP_TOO_LONG if packets[i].length else DROP_TOO_SHORT] += 1
            continue
        captured = min(packets[i].length, writer.snaplen)
        if PCAP_BUFFER_BYTES - writer.fill < PCAP_RECORD_BYTES + captured:
            _write_out(endpoint)
            if writer.broken:
                endpoint.pushed.dropped[DROP_IO_ERROR] += count - i
                return count
            if PCAP_BUFFER_BYTES - writer.fill < PCAP_RECORD_BYTES + captured:
                return i
        _put_record(writer, &packets[i], captured, now_ns)
    if writer.deadline_ns == 0 and writer.fill > 0:
        writer.deadline_ns = clock_now(CLOCK_MONOTONIC) + PCAP_DELAY_NS
        clock_wake_at(writer.timer_fd, writer.deadline_ns)
    return count


cdef void _flush(endpoint_t* endpoint) noexcept nogil:
    cdef pcap_writer_t* writer = <pcap_writer_t*>endpoint.port
    if writer.deadline_ns == 0:
        return
    if writer.fill > PCAP_BUFFER_BYTES // 2 and not writer.blocked:
        _write_out(endpoint)
    elif clock_now(CLOCK_MONOTONIC) >= writer.deadline_ns:
        _write_out(endpoint)


cdef int _room(endpoint_t* endpoint) noexcept nogil:
    cdef pcap_writer_t* writer = <pcap_writer_t*>endpoint.port
    cdef uint32_t slot = PCAP_RECORD_BYTES + min(writer.snaplen, <uint32_t>PACKET_MAX)
    if not writer.blocked:
        return BURST_MAX         # a full buffer is written out on the way
    return <int>min((PCAP_BUFFER_BYTES - writer.fill) // slot, <uint32_t>BURST_MAX)


cdef int _arm(endpoint_t* endpoint, int what) noexcept nogil:
    cdef pcap_writer_t* writer = <pcap_writer_t*>endpoint.port
    cdef pollfd question
    _flush(endpoint)             # the worker is about to sleep; if not due yet, the timer wakes it
    if not what & ARM_PUSH:
        return 0
    if writer.blocked:
        question.fd = writer.fd
        question.events = POLLOUT
        if c_poll(&question, 1, 0) > 0:
            _write_out(endpoint)
    return 1 if _room(endpoint) > 0 else 0


cdef int _pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    burst.count = burst.wants = burst.segment_count = 0
    return 0


cdef void _release(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil:
    pass


cdef void _attach(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    cdef pcap_writer_t* writer = <pcap_writer_t*>endpoint.port
    # A regular file cannot be watched: there is nothing to wait for.
    epoll_move(writer.epoll_fd, epoll_fd, writer.timer_fd, EPOLLIN)
    epoll_move(writer.epoll_fd, epoll_fd, writer.fd, EPOLLOUT)
    if epoll_fd < 0 and writer.fill > 0:
        _write_out(endpoint)     # nobody flushes any more
    writer.epoll_fd = epoll_fd


cdef void pcap_writer_wire(endpoint_t* endpoint) noexcept:
    endpoint.holds = 1           # no ring of a guest: nothing is gained by small bursts
    endpoint.pull = _pull
    endpoint.push = _push
    endpoint.release = _release
    endpoint.flush = _flush
    endpoint.room = _room
    endpoint.arm = _arm
    endpoint.attach = _attach
