"""The generator: a source of equal UDP packets, as fast as the target takes them, or at a rate.

The packets lie in 8 slots that are never written again, so that they stay in the first-level cache beside the lines of
rings and guests.
"""
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from vq_core.clock cimport CLOCK_MONOTONIC, SECOND_NS, clock_now, clock_timer, clock_wake_at
from vq_core.epoll cimport EPOLLIN, epoll_move
from vq_core.port cimport ARM_PULL, BURST_MAX, OFFLOAD_ALL, Port, burst_t, endpoint_t, packet_t

import struct

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd) noexcept

cdef enum:
    SLOTS = 8
    SIZE_MIN = 60                # of an Ethernet frame without its check sequence
    SIZE_MAX = 9216

cdef struct gen_t:
    uint8_t* slots
    uint32_t slot_bytes
    uint32_t size
    uint32_t next
    uint64_t left                # packets still to be sent; 2^64 - 1: without end
    uint64_t rate                # packets a second; 0: as fast as the target takes them
    uint64_t started_ns          # when the rate began to count; 0: at the first pull
    uint64_t sent                # since then
    int timer_fd
    int epoll_fd


cdef int _due(gen_t* gen, int limit) noexcept nogil:
    """How many packets the rate allows now; a target that was slow is not flooded afterwards."""
    cdef uint64_t now = <uint64_t>clock_now(CLOCK_MONOTONIC), second = SECOND_NS, elapsed, allowed
    if gen.started_ns == 0:
        gen.started_ns = now
        gen.sent = 0
    elapsed = now - gen.started_ns
    allowed = elapsed // second * gen.rate + elapsed % second * gen.rate // second + 1
    if allowed > gen.sent + 4 * BURST_MAX + gen.rate // 100:
        gen.started_ns = now                  # more than 10 ms behind: start counting anew
        gen.sent = 0
        allowed = 1
    return <int>min(<uint64_t>limit, allowed - gen.sent if allowed > gen.sent else 0)


cdef int _pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    cdef gen_t* gen = <gen_t*>endpoint.port
    cdef packet_t* packet
    cdef int i
    burst.count = burst.wants = burst.segment_count = 0
    if gen.rate:
        limit = _due(gen, limit)
        gen.sent += limit
    if <uint64_t>limit > gen.left:
        limit = <int>gen.left
    for i in range(limit):
        packet = &burst.packets[i]
        memset(packet, 0, sizeof(packet_t))
        packet.data = gen.slots + (gen.next & (SLOTS - 1)) * gen.slot_bytes
        packet.head_bytes = packet.length = gen.size
        gen.next += 1
    if gen.left != <uint64_t>-1:
        gen.left -= limit
    burst.count = limit
    endpoint.pulled.packets += limit
    endpoint.pulled.bytes += <uint64_t>limit * gen.size
    return limit


cdef int _push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    cdef uint64_t total = 0
    for i in range(count):
        total += packets[i].length
    endpoint.pushed.packets += count          # what comes back is taken and forgotten
    endpoint.pushed.bytes += total
    return count


cdef int _arm(endpoint_t* endpoint, int what) noexcept nogil:
    cdef gen_t* gen = <gen_t*>endpoint.port
    if not what & ARM_PULL or gen.left == 0:
        return 0
    if gen.rate == 0 or _due(gen, 1):
        return 1
    clock_wake_at(gen.timer_fd, clock_now(CLOCK_MONOTONIC) + <int64_t>(SECOND_NS // gen.rate) + 1)
    return 0


cdef void _attach(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    cdef gen_t* gen = <gen_t*>endpoint.port
    epoll_move(gen.epoll_fd, epoll_fd, gen.timer_fd, EPOLLIN)
    gen.epoll_fd = epoll_fd


def frame(int size):
    """The packet that `gen:` sends: Ethernet broadcast, IPv4, UDP discard, zeroes; `size` bytes."""
    payload = bytes(size - 42)
    ip = bytearray(struct.pack("!BBHHHBBH4s4s", 0x45, 0, size - 14, 0, 0, 64, 17, 0,
                               bytes((198, 18, 0, 1)), bytes((198, 18, 0, 2))))     # RFC 2544: benchmark addresses
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xffff) + (total >> 16)
    struct.pack_into("!H", ip, 10, ~((total & 0xffff) + (total >> 16)) & 0xffff)
    return (b"\x02\x00\x00\x00\x00\x02" + b"\x02\x00\x00\x00\x00\x01" + b"\x08\x00" + bytes(ip)
            + struct.pack("!HHHH", 9, 9, size - 34, 0) + payload)


cdef class GenPort(Port):
    """A source of equal packets; what is pushed to it is taken and forgotten.

    Parameters
    ----------
    name : str
    size : int
        Bytes of a packet, 60 to 9216 (Ethernet frame without its check sequence).
    count : int, optional
        How many packets each endpoint sends; None: without end.
    rate : int, optional
        Packets a second and endpoint; None: as fast as the target takes them.
    endpoints : int
        How many lanes of a pump may use it at once.
    """

    cdef gen_t* state

    directions = ("to_gen", "from_gen")

    elastic = True

    def __cinit__(self, name, int size=64, count=None, rate=None, int endpoints=1):
        cdef int i, k
        cdef gen_t* gen
        cdef endpoint_t* endpoint
        if not SIZE_MIN <= size <= SIZE_MAX:
            raise ValueError(f"{name}: size {size} is outside {SIZE_MIN} to {SIZE_MAX} bytes")
        if rate is not None and not 1 <= rate <= 10 ** 9:
            raise ValueError(f"{name}: rate {rate} is outside 1 to 10^9 packets a second")
        if count is not None and not 1 <= count < 2 ** 63:
            raise ValueError(f"{name}: count {count} is not a positive number of packets")
        self.name = name
        self.allocate(endpoints)
        self.state = <gen_t*>calloc(endpoints, sizeof(gen_t))
        if self.state == NULL:
            raise MemoryError("generator")
        for i in range(endpoints):
            self.state[i].timer_fd = self.state[i].epoll_fd = -1
        cdef bytes packet = frame(size)
        for i in range(endpoints):
            gen = &self.state[i]
            gen.size = size
            gen.slot_bytes = (size + 63) // 64 * 64
            gen.rate = 0 if rate is None else rate
            gen.left = <uint64_t>-1 if count is None else count
            gen.slots = <uint8_t*>calloc(SLOTS, gen.slot_bytes)
            if gen.slots == NULL:
                raise MemoryError("generator")
            for k in range(SLOTS):
                memcpy(gen.slots + k * gen.slot_bytes, <char*>packet, size)
            if gen.rate:
                gen.timer_fd = clock_timer()
                if gen.timer_fd < 0:
                    PyErr_SetFromErrno(OSError)
            endpoint = self.endpoints[i]
            endpoint.port = gen
            endpoint.accepts = OFFLOAD_ALL
            endpoint.holds = True
            endpoint.pull = _pull
            endpoint.push = _push
            endpoint.arm = _arm
            endpoint.attach = _attach

    def __dealloc__(self):
        cdef int i
        if self.state != NULL:
            self.close()
            for i in range(self.endpoint_count):
                free(self.state[i].slots)
        free(self.state)

    def close(self):
        """Close the timers, when no worker has an endpoint any more; may be called twice."""
        cdef int i
        for i in range(self.endpoint_count):
            if self.state[i].timer_fd >= 0:
                c_close(self.state[i].timer_fd)
                self.state[i].timer_fd = -1

    @property
    def finished(self):
        """bool: every endpoint has sent its `count`."""
        return all(self.state[i].left == 0 for i in range(self.endpoint_count))
