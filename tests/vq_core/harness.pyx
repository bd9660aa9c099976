"""Two ports for tests, and functions that do by hand what a worker does.

    Feed(name, offers=OFFLOAD_ALL, endless=False)    a source: packets given from Python, in any segments
        .add(data, header=None, segments=())         one packet; may be called while a worker pulls
        .packet_memory(i)                            the packet's segments as writable memoryviews, to tamper with
        .pulled_count, .released_count               packets taken and given back so far
    Collect(name, accepts=0, room=None)              a target: keeps what it is given
        .take() -> list of Collected                 everything since the last call
        .pushes, .flushes, .errors                   size of each push; number of flushes; broken rules of the contract
        .accepts, .room                              may be changed between two pushes; room None: no limit
        .on_push                                     called after each push, while its packets are still borrowed
        .on_arm                                      called when its worker is about to sleep

    offload(work, feed, collect, rooms=())           pull a burst, push it through offload_push until all is dealt with
    forward(lane, feed, port, work, now_s=0)         pull a burst, and let the switch forward it
    move(source, i, target, j, limit=32, step=32)    one round of a flow: pull, push, release, flush
    arm(port, index, pull, push)                     ask an endpoint for wake-ups, as a worker does before it sleeps
    set_accepts(port, index, accepts)                what an endpoint of any port says it accepts
    twin(port, receiveq, head, first)            chain_twin for a chain whose first descriptor was read already
    Boaster(queues)                              a ChainWorker whose answers are longer than their room, which it raises
    drain(fd)                                    what a waiting driver does with an eventfd that was signalled
    measure_offload, measure_forward, measure_sum    cycles

Both ports have one endpoint and work under a real worker as well: Feed wakes it, and both may be used in a Plan or
a SwitchLane. Each segment of a packet of Feed is an allocation of its own; when it is released its bytes are
overwritten, so that a packet used after its release shows. Collect checks the contract of ports: lengths that do not
add up, more segments than a burst holds, offloads that it does not accept.
"""
import os
from collections import namedtuple

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from vq_core.arch cimport vq_cycles, vq_load_acquire_u32, vq_store_release_u32
from vq_core.chain cimport chain_twin, twin_t
from vq_core.chain_worker cimport ChainWorker, exchange_t
from vq_core.memory cimport region_t
from vq_core.net cimport net_header_check
from vq_core.offload cimport Offload, checksum_add, checksum_fold, offload_push
from vq_core.port cimport (ARM_PULL, ARM_PUSH, BURST_MAX, OFFLOAD_ALL, SEGMENTS_MAX, Port, burst_t, endpoint_t,
                           packet_t, segment_t)
from vq_core.ports.vhost cimport VhostPort
from vq_core.queue_state cimport queue_t
from vq_core.switch cimport SwitchLane, switch_forward
from vq_core.virtio cimport virtq_desc_t
from vq_core.wait cimport wait_drain

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event) noexcept
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLIN
    uint32_t EPOLLET

cdef enum:
    FEED_MAX = 65536             # packets of one Feed
    POISON = 0xdd

#: The virtio-net header as the driver would write it.
Header = namedtuple("Header", "flags gso_type hdr_len gso_size csum_start csum_offset", defaults=(0, 0, 0, 0, 0, 0))
#: A packet that a target was given: its bytes, header and wants, and the lengths of its segments.
Collected = namedtuple("Collected", "data header wants segments")


# ---- Feed ----

cdef struct feed_packet_t:
    packet_t packet
    int cause                    # why the source drops it; -1: it does not

cdef struct feed_t:
    feed_packet_t* packets
    uint32_t added               # written by the control thread, after the packet
    uint32_t next
    uint32_t pulled
    uint32_t released
    int event_fd
    int epoll_fd
    bint endless                 # begin again after the last packet, and leave released memory alone


cdef int _feed_pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    cdef feed_t* feed = <feed_t*>endpoint.port
    cdef uint32_t added = vq_load_acquire_u32(&feed.added), i
    cdef feed_packet_t* entry
    cdef packet_t* packet
    burst.count = burst.wants = burst.segment_count = 0
    while <int>burst.count < limit:
        if feed.next == added:
            if not feed.endless or added == 0:
                break
            feed.next = 0
        entry = &feed.packets[feed.next]
        if burst.segment_count + entry.packet.more_count > SEGMENTS_MAX:
            break
        feed.next += 1
        if entry.cause >= 0:
            endpoint.pulled.dropped[entry.cause] += 1
            continue
        packet = &burst.packets[burst.count]
        packet[0] = entry.packet
        packet.more = &burst.segments[burst.segment_count]
        for i in range(packet.more_count):
            packet.more[i] = entry.packet.more[i]
        packet.mark = <unsigned short>feed.next
        burst.segment_count += packet.more_count
        burst.wants |= packet.wants
        burst.count += 1
        endpoint.pulled.packets += 1
        endpoint.pulled.bytes += packet.length
    feed.pulled += burst.count
    return burst.count


cdef void _feed_release(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil:
    cdef feed_t* feed = <feed_t*>endpoint.port
    cdef packet_t* packet
    cdef uint32_t j
    cdef int i
    feed.released = feed.pulled - burst.count + count
    if feed.endless:
        return
    for i in range(count):
        packet = &burst.packets[i]
        memset(packet.data, POISON, packet.head_bytes)
        for j in range(packet.more_count):
            memset(packet.more[j].data, POISON, packet.more[j].length)


cdef int _feed_push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    return count


cdef void _no_flush(endpoint_t* endpoint) noexcept nogil:
    pass


cdef int _feed_room(endpoint_t* endpoint) noexcept nogil:
    return BURST_MAX


cdef int _feed_arm(endpoint_t* endpoint, int what) noexcept nogil:
    cdef feed_t* feed = <feed_t*>endpoint.port
    return what == ARM_PULL and (feed.endless or feed.next != vq_load_acquire_u32(&feed.added))


cdef void _feed_attach(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    cdef feed_t* feed = <feed_t*>endpoint.port
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLET
    event.data.u64 = 0
    if feed.epoll_fd >= 0:
        epoll_ctl(feed.epoll_fd, EPOLL_CTL_DEL, feed.event_fd, &event)
    feed.epoll_fd = epoll_fd
    if epoll_fd >= 0:
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, feed.event_fd, &event)


cdef class Feed(Port):
    """A source of packets given from Python.

    Parameters
    ----------
    name : str
    offers : int
        OFFLOAD_* bits that headers may ask for; others are dropped and counted, as a guest's would be.
    endless : bool
        Hand over the same packets again and again.
    """

    cdef feed_t feed
    cdef uint32_t offers

    def __cinit__(self, name="feed", uint32_t offers=OFFLOAD_ALL, bint endless=False):
        cdef endpoint_t* endpoint
        self.name = name
        self.offers = offers
        self.allocate(1)
        self.feed.endless = endless
        self.feed.epoll_fd = -1
        self.feed.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.feed.packets = <feed_packet_t*>calloc(FEED_MAX, sizeof(feed_packet_t))
        if self.feed.packets == NULL:
            raise MemoryError("feed")
        endpoint = self.endpoints[0]
        endpoint.port = &self.feed
        endpoint.pull = _feed_pull
        endpoint.push = _feed_push
        endpoint.release = _feed_release
        endpoint.flush = _no_flush
        endpoint.room = _feed_room
        endpoint.arm = _feed_arm
        endpoint.attach = _feed_attach

    def __dealloc__(self):
        cdef uint32_t i, j
        if self.feed.packets == NULL:
            return
        os.close(self.feed.event_fd)
        for i in range(self.feed.added):
            free(self.feed.packets[i].packet.data)
            for j in range(self.feed.packets[i].packet.more_count):
                free(self.feed.packets[i].packet.more[j].data)
            free(self.feed.packets[i].packet.more)
        free(self.feed.packets)

    def add(self, bytes data, header=None, segments=()):
        """Append a packet.

        Parameters
        ----------
        data : bytes
        header : Header, optional
            Checked as a driver's header is (net_header_check): what asks for too much is dropped by the source.
        segments : sequence of int
            Lengths of the first segments; what is left is the last one. Zero is possible.
        """
        cdef feed_packet_t* entry = &self.feed.packets[self.feed.added]
        cdef packet_t* packet = &entry.packet
        cdef uint32_t i, at = 0
        lengths = list(segments)
        if self.feed.added == FEED_MAX:
            raise ValueError(f"feed: {FEED_MAX} packets at most")
        if sum(lengths) > len(data) or len(lengths) > SEGMENTS_MAX:
            raise ValueError(f"feed: segments {lengths} of {len(data)} bytes")
        lengths.append(len(data) - sum(lengths))
        packet.length = len(data)
        packet.more_count = len(lengths) - 1
        packet.more = <segment_t*>calloc(len(lengths), sizeof(segment_t))
        for i, length in enumerate(lengths):
            memory = <uint8_t*>malloc(length + 1)
            memcpy(memory, <const char*>data + at, length)
            at += length
            if i == 0:
                packet.data = memory
                packet.head_bytes = length
            else:
                packet.more[i - 1].data = memory
                packet.more[i - 1].length = length
        entry.cause = -1
        if header is not None:
            packet.header.flags, packet.header.gso_type, packet.header.hdr_len = header[:3]
            packet.header.gso_size, packet.header.csum_start, packet.header.csum_offset = header[3:]
            entry.cause = net_header_check(packet, self.offers)
        vq_store_release_u32(&self.feed.added, self.feed.added + 1)
        os.eventfd_write(self.feed.event_fd, 1)

    def packet_memory(self, uint32_t index):
        """Writable views of the segments of packet `index`; valid while the Feed lives."""
        if index >= self.feed.added:
            raise IndexError(f"feed: packet {index} of {self.feed.added}")
        cdef packet_t* packet = &self.feed.packets[index].packet
        cdef uint32_t i
        views = [_view(packet.data, packet.head_bytes)]
        for i in range(packet.more_count):
            views.append(_view(packet.more[i].data, packet.more[i].length))
        return views

    @property
    def pulled_count(self):
        return self.feed.pulled

    @property
    def released_count(self):
        return self.feed.released


cdef object _view(uint8_t* data, uint32_t length):
    if length == 0:
        return memoryview(bytearray())
    return memoryview(<uint8_t[:length]>data)


# ---- Collect ----

cdef int _collect_push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    with gil:
        return (<Collect>endpoint.port).push(packets, count)


cdef void _collect_flush(endpoint_t* endpoint) noexcept nogil:
    with gil:
        (<Collect>endpoint.port).flushes += 1


cdef int _collect_room(endpoint_t* endpoint) noexcept nogil:
    cdef int room
    with gil:
        limit = (<Collect>endpoint.port).room
        room = BURST_MAX if limit is None else min(limit, BURST_MAX)
    return room


cdef int _collect_pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    burst.count = burst.wants = burst.segment_count = 0
    return 0


cdef void _collect_release(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil:
    pass


cdef int _collect_arm(endpoint_t* endpoint, int what) noexcept nogil:
    with gil:
        on_arm = (<Collect>endpoint.port).on_arm
        if on_arm is not None:
            on_arm()
    return 0


cdef void _collect_attach(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    pass


cdef class Collect(Port):
    """A target that keeps copies of its packets as Python objects.

    Parameters
    ----------
    name : str
    accepts : int
        OFFLOAD_* bits.
    room : int, optional
        Packets that it still takes; None: no limit.
    """

    cdef public object room
    cdef public object on_push   # called without arguments after each push, if not None
    cdef public object on_arm    # ... and at each arm
    cdef public int flushes
    cdef readonly list packets, pushes, errors

    def __cinit__(self, name="collect", uint32_t accepts=0, room=None):
        cdef endpoint_t* endpoint
        self.name = name
        self.room = room
        self.packets = []
        self.pushes = []
        self.errors = []
        self.allocate(1)
        endpoint = self.endpoints[0]
        endpoint.port = <void*>self
        endpoint.accepts = accepts
        endpoint.pull = _collect_pull
        endpoint.push = _collect_push
        endpoint.release = _collect_release
        endpoint.flush = _collect_flush
        endpoint.room = _collect_room
        endpoint.arm = _collect_arm
        endpoint.attach = _collect_attach

    @property
    def accepts(self):
        return self.endpoints[0].accepts

    @accepts.setter
    def accepts(self, uint32_t bits):
        self.endpoints[0].accepts = bits

    @property
    def dropped(self):
        """dict: what was dropped on the way to this port, by cause."""
        return self.endpoint_snapshot(0)[self.directions[0]]["dropped"]

    def take(self):
        """Everything that was pushed since the last call; fails if a rule of the contract was broken."""
        if self.errors:
            raise AssertionError(f"{self.name}: {self.errors}")
        packets = list(self.packets)
        del self.packets[:len(packets)]
        return packets

    cdef int push(self, packet_t* packets, int count) noexcept:
        cdef int i, taken = count if self.room is None else min(count, self.room)
        try:
            self.pushes.append(count)
            if not 0 < count <= BURST_MAX:
                self.errors.append(f"push of {count} packets")
            for i in range(taken):
                self.packets.append(self.copy(&packets[i]))
            if self.room is not None:
                self.room -= taken
        except Exception as error:
            self.errors.append(repr(error))
        self.endpoints[0].pushed.packets += taken
        if self.on_push is not None:
            try:
                self.on_push()
            except Exception as error:
                self.errors.append(repr(error))
        return taken

    cdef object copy(self, packet_t* packet):
        cdef uint32_t i
        header = Header(packet.header.flags, packet.header.gso_type, packet.header.hdr_len, packet.header.gso_size,
                        packet.header.csum_start, packet.header.csum_offset)
        parts = [packet.data[:packet.head_bytes]]
        for i in range(packet.more_count):
            parts.append(packet.more[i].data[:packet.more[i].length])
        data = b"".join(parts)
        if len(data) != packet.length:
            self.errors.append(f"{len(data)} bytes in segments of a packet of {packet.length}")
        if packet.wants & ~self.endpoints[0].accepts:
            self.errors.append(f"wants {packet.wants:#x}, accepts {self.endpoints[0].accepts:#x}")
        if bool(packet.wants) != (header.flags != 0):
            self.errors.append(f"wants {packet.wants:#x} with {header}")
        self.endpoints[0].pushed.bytes += packet.length
        return Collected(data, header, packet.wants, tuple(len(part) for part in parts))


# ---- by hand ----

def drain(int fd):
    with nogil:
        wait_drain(fd)


def set_accepts(Port port, int index, uint32_t accepts):
    """Set what an endpoint accepts as it is."""
    port.endpoints[index].accepts = accepts


def offload(Offload work, Feed feed, Port target, rooms=(), int limit=BURST_MAX):
    """Pull a burst of up to `limit`, push it, release it.

    `rooms` sets target.room before the first, second... call of offload_push; after the last one the rest is given up,
    as a guest's packets are. Without rooms there is one call. What each call dealt with is returned.
    """
    cdef burst_t* burst = <burst_t*>malloc(sizeof(burst_t))
    cdef endpoint_t* source = feed.endpoints[0]
    cdef endpoint_t* to = target.endpoints[0]
    cdef int done = 0, count, now
    dealt = []
    try:
        count = source.pull(source, burst, limit)
        for room in rooms or [None]:
            if rooms:
                target.room = room
            with nogil:
                now = offload_push(&work.work, to, burst.packets + done, count - done)
            dealt.append(now)
            done += now
            if done >= count:
                break
        with nogil:
            source.release(source, burst, count)
    finally:
        free(burst)
    return dealt


def forward(SwitchLane lane, Feed feed, int port, Offload work, uint32_t now_s=0, int limit=BURST_MAX):
    """Pull a burst of `feed`, which is `port` of the lane's switch, and forward it; what switch_forward returns."""
    cdef burst_t* burst = <burst_t*>malloc(sizeof(burst_t))
    cdef endpoint_t* source = feed.endpoints[0]
    cdef int pushed
    with nogil:
        source.pull(source, burst, limit)
        pushed = switch_forward(&lane.switch.table, &lane.lane, burst, port, &work.work, now_s)
        source.release(source, burst, burst.count)
    free(burst)
    return pushed


def move(Port source, int source_index, Port target, int target_index, int limit=BURST_MAX, int step=BURST_MAX):
    """One round of a flow between any two endpoints: (packets pulled, packets that push dealt with).

    `step` packets are pushed and released at once. What the target has no room for is given up, as a guest's packets
    are, but counted nowhere.
    """
    cdef burst_t* burst = <burst_t*>malloc(sizeof(burst_t))
    cdef endpoint_t* from_ = source.endpoints[source_index]
    cdef endpoint_t* to = target.endpoints[target_index]
    cdef int count, first = 0, size, done, dealt = 0
    with nogil:
        count = from_.pull(from_, burst, limit)
        while first < count:
            size = min(step, count - first)
            done = to.push(to, burst.packets + first, size)
            dealt += done
            first = count if done < size else first + done
            from_.release(from_, burst, first)
        to.flush(to)
        from_.flush(from_)
    free(burst)
    return count, dealt


def arm(Port port, int index, bint pull=True, bint push=False):
    """Ask for wake-ups; whether there is work already."""
    cdef endpoint_t* endpoint = port.endpoints[index]
    return bool(endpoint.arm(endpoint, (ARM_PULL if pull else 0) | (ARM_PUSH if push else 0)))


def room(Port port, int index):
    """How many packets the endpoint says a push could take; -1: nobody is there."""
    return port.endpoints[index].room(port.endpoints[index])


def twin(VhostPort port, bint receiveq, int head, first):
    """What chain_twin makes of the chain that begins with `first`, an (addr, len, flags, next) that was at `head` when
    it was read: None, or its two descriptors as (addr, len, flags), its slots and its id.
    """
    cdef queue_t* queue = port.pairs[0].receiveq if receiveq else port.pairs[0].transmitq
    cdef region_t near = queue.hint[0]
    cdef virtq_desc_t descriptor
    cdef twin_t found
    cdef bint is_twin
    descriptor.addr, descriptor.len, descriptor.flags, descriptor.next = first
    if queue.ring.is_packed:
        is_twin = chain_twin(queue, &near, True, head, &descriptor, &found)
    else:
        is_twin = chain_twin(queue, &near, False, head, &descriptor, &found)
    if not is_twin:
        return None
    return ((found.header.addr, found.header.len, found.header.flags), (found.data.addr, found.data.len,
            found.data.flags), found.slots, found.id)


def internet_checksum(bytes data):
    """The ones' complement sum of checksum_add and checksum_fold, in network order."""
    cdef unsigned short folded = checksum_fold(checksum_add(<const uint8_t*><const char*>data, <uint32_t>len(data)))
    return (<uint32_t>folded >> 8) | (folded & 0xff) << 8


# ---- cycles ----

def measure_offload(Offload work, Feed feed, Port target, int rounds):
    """Cycles of offload_push alone and packets, over `rounds` bursts of an endless feed."""
    cdef burst_t* burst = <burst_t*>malloc(sizeof(burst_t))
    cdef endpoint_t* source = feed.endpoints[0]
    cdef endpoint_t* to = target.endpoints[0]
    cdef uint64_t cycles = 0, start, packets = 0
    cdef int _
    with nogil:
        for _ in range(rounds):
            source.pull(source, burst, BURST_MAX)
            start = vq_cycles()
            packets += offload_push(&work.work, to, burst.packets, burst.count)
            cycles += vq_cycles() - start
            source.release(source, burst, burst.count)
    free(burst)
    return cycles, packets


def measure_forward(SwitchLane lane, Feed feed, int port, Offload work, int rounds):
    """Cycles of switch_forward alone and packets, over `rounds` bursts of an endless feed."""
    cdef burst_t* burst = <burst_t*>malloc(sizeof(burst_t))
    cdef endpoint_t* source = feed.endpoints[0]
    cdef uint64_t cycles = 0, start, packets = 0
    cdef int _
    with nogil:
        for _ in range(rounds):
            packets += source.pull(source, burst, BURST_MAX)
            start = vq_cycles()
            switch_forward(&lane.switch.table, &lane.lane, burst, port, &work.work, 1)
            cycles += vq_cycles() - start
            source.release(source, burst, burst.count)
    free(burst)
    return cycles, packets


cdef class Boaster(ChainWorker):
    cdef int64_t answer(self, exchange_t* exchange) noexcept nogil:
        exchange.reply_bytes += 1
        return exchange.reply_bytes


def measure_sum(bytes data, int rounds):
    """Cycles of `rounds` sums over `data`."""
    cdef const uint8_t* at = <const uint8_t*><const char*>data
    cdef uint32_t n = len(data)
    cdef uint64_t start, total = 0
    cdef int _
    start = vq_cycles()
    for _ in range(rounds):
        total += checksum_add(at, n)
    return vq_cycles() - start, total
