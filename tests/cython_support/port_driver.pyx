"""Drives one endpoint of a port by hand, call by call, as a worker would: for tests that look at single packets."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from vq_core.port cimport BURST_MAX, SEGMENTS_MAX, Port, burst_t, endpoint_t, packet_t, segment_t

import time


cdef class Driver:
    """The worker's side of endpoint `index` of a port.

    `pull` keeps what it pulled until `release`; both may be called in any order that the contract allows.
    """
    cdef Port port
    cdef endpoint_t* endpoint
    cdef burst_t* burst

    def __cinit__(self, Port port not None, int index=0):
        assert 0 <= index < port.endpoint_count
        self.port = port
        self.endpoint = port.endpoints[index]
        self.burst = <burst_t*>calloc(1, sizeof(burst_t))
        memset(self.burst, 0xa5, sizeof(burst_t))        # a port must not count on a clean burst

    def __dealloc__(self):
        free(self.burst)

    @property
    def accepts(self):
        return self.endpoint.accepts

    @property
    def holds(self):
        return self.endpoint.holds

    def pull(self, int limit=BURST_MAX):
        """Pull once: list of (payload, header of 12 bytes, wants)."""
        cdef int count, i
        cdef uint32_t j
        cdef packet_t* packet
        with nogil:
            count = self.endpoint.pull(self.endpoint, self.burst, limit)
        assert count == <int>self.burst.count
        result = []
        wants = 0
        for i in range(count):
            packet = &self.burst.packets[i]
            payload = packet.data[:packet.head_bytes]
            for j in range(packet.more_count):
                payload += packet.more[j].data[:packet.more[j].length]
            assert len(payload) == packet.length
            result.append((payload, (<uint8_t*>&packet.header)[:12], packet.wants))
            wants |= packet.wants
        assert wants == self.burst.wants
        return result

    def again(self):
        """The payloads of the pulled burst as they are in memory now."""
        return [self.burst.packets[i].data[:self.burst.packets[i].head_bytes] for i in range(self.burst.count)]

    def release(self, count=None):
        cdef int n = self.burst.count if count is None else count
        with nogil:
            self.endpoint.release(self.endpoint, self.burst, n)

    def take(self, int limit=BURST_MAX):
        """Pull once and release all."""
        packets = self.pull(limit)
        self.release()
        return packets

    def collect(self, int count, double timeout=5):
        """Pull and release until `count` packets have come, or fail."""
        end = time.monotonic() + timeout
        packets = []
        while len(packets) < count:
            assert time.monotonic() < end, f"{len(packets)} of {count} packets in {timeout} s"
            packets += self.take()
        return packets

    def push(self, packets):
        """Push a burst of payloads, lists of segments, or (one of them, header); returns how many were dealt with."""
        cdef packet_t* array = <packet_t*>calloc(BURST_MAX, sizeof(packet_t))
        cdef segment_t* segments = <segment_t*>calloc(BURST_MAX * SEGMENTS_MAX, sizeof(segment_t))
        cdef packet_t* packet
        cdef segment_t* segment = segments
        cdef int done, count = 0
        cdef const uint8_t* raw
        keep = []
        assert len(packets) <= BURST_MAX
        try:
            for entry in packets:
                payload, header = entry if isinstance(entry, tuple) else (entry, bytes(12))
                parts = payload if isinstance(payload, list) else [payload]
                keep.append(parts)
                assert len(parts) - 1 <= SEGMENTS_MAX and len(header) == 12
                packet = &array[count]
                raw = header
                memcpy(&packet.header, raw, 12)
                packet.more = segment
                raw = parts[0]
                packet.data = <uint8_t*>raw
                packet.head_bytes = packet.length = len(parts[0])
                for part in parts[1:]:
                    raw = part
                    segment.data = <uint8_t*>raw
                    segment.length = len(part)
                    packet.length += segment.length
                    packet.more_count += 1
                    segment += 1
                count += 1
            with nogil:
                done = self.endpoint.push(self.endpoint, array, count)
            return done
        finally:
            free(array)
            free(segments)

    def flush(self):
        with nogil:
            self.endpoint.flush(self.endpoint)

    def room(self):
        return self.endpoint.room(self.endpoint)

    def arm(self, int what):
        return self.endpoint.arm(self.endpoint, what)

    def attach(self, int epoll_fd):
        self.endpoint.attach(self.endpoint, epoll_fd)


def transfer(Port source not None, Port target not None, uint64_t packets, double timeout=30):
    """Move packets from one port to the other without the GIL until `packets` were pulled: (packets, seconds)."""
    cdef endpoint_t* a = source.endpoints[0]
    cdef endpoint_t* b = target.endpoints[0]
    cdef burst_t* burst = <burst_t*>calloc(1, sizeof(burst_t))
    cdef uint64_t moved = 0
    cdef int _round
    cdef int count, first
    start = time.perf_counter()
    while moved < packets and time.perf_counter() - start < timeout:
        with nogil:
            for _round in range(1000):
                count = a.pull(a, burst, BURST_MAX)
                first = 0
                while first < count:
                    first += b.push(b, &burst.packets[first], count - first)
                a.release(a, burst, count)
                b.flush(b)
                moved += count
                if moved >= packets:
                    break
    free(burst)
    return moved, time.perf_counter() - start


cdef class Patch:
    """Two ports joined by one thread without the GIL, until told to stop."""
    cdef Port one, other
    cdef volatile bint stopping

    def __cinit__(self, Port one not None, Port other not None):
        self.one = one
        self.other = other

    def stop(self):
        self.stopping = True

    def run(self):
        cdef endpoint_t* ends[2]
        cdef burst_t* burst = <burst_t*>calloc(1, sizeof(burst_t))
        cdef int count, first, i
        ends[0] = self.one.endpoints[0]
        ends[1] = self.other.endpoints[0]
        with nogil:
            while not self.stopping:
                for i in range(2):
                    count = ends[i].pull(ends[i], burst, BURST_MAX)
                    first = 0
                    while first < count and not self.stopping:
                        first += ends[1 - i].push(ends[1 - i], &burst.packets[first], count - first)
                    ends[i].release(ends[i], burst, count)
                    ends[1 - i].flush(ends[1 - i])
        free(burst)
