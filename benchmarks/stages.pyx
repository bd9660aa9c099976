"""Each stage of the way of a packet, many times between two readings of the cycle counter.

    Lane(port, index, descriptors, chains)     a started queue, and its driver played by hand: one lap fills the ring
    Copies(size)                               source and target of copies
    Burst(size, changing)                      packets to push, in memory of our own
    translate, walk, pop, used, notify, signal, header, copy, pull, pull_release, push, whole
                                               run so many laps: (cycles, units); the unit is a packet or a call
    core_cycles()                              (cycles of the core, ticks of the counter) of the same stretch of code

A lap is: fill the rings (not measured), read the counter, do the stage for all that the ring holds, read it again. So
each pair of readings stands around some 256 packets, and what the driver does is never inside. Nothing of Python runs
between them. Verbs of rings get their layout as a literal, as the engine's own loops give it.

Memory that a stage reads was just written by the same core: these are the costs of the code with all lines at hand.
What lines cost that travel between cores is told by bench_way.py.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from vq_core.arch cimport vq_copy, vq_cycles, vq_store_release_u16, vq_store_release_u64, vq_store_u16, vq_store_u64
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t
from vq_core.cursor cimport cursor_t
from vq_core.memory cimport MemoryMap, memory_t, memory_translate, memory_translate_near, region_t
from vq_core.net cimport net_header_check
from vq_core.notify cimport notify_signal
from vq_core.port cimport BURST_MAX, OFFLOAD_ALL, burst_t, endpoint_t, packet_t
from vq_core.ports.vhost cimport VhostPort
from vq_core.queue cimport Queue
from vq_core.queue_state cimport queue_publish, queue_t
from vq_core.ring cimport (ring_begin, ring_commit, ring_look, ring_needs_call, ring_next_used, ring_use)
from vq_core.virtio cimport (VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_PACKED_DESC_F_AVAIL, VIRTQ_PACKED_DESC_F_USED,
                             VIRTQ_PACKED_EVENT_FLAG_DESC, VIRTQ_PACKED_EVENT_FLAG_DISABLE, gpa_t, virtio_net_hdr_t,
                             virtq_desc_t)

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size) noexcept

cdef enum:
    NUM_MAX = 256                # entries of a ring
    LINE = 64
    COPY_ROOM = 16384            # bytes that copies move between, of each side: both fit into the first-level cache
    HEADER_BYTES = 12            # what a payload lies behind

# Whatever a stage found goes here, so that no compiler leaves out the finding.
cdef volatile uint64_t _sink = 0

NUM = NUM_MAX


# ---- the driver, by hand ----

cdef struct lane_t:
    queue_t* queue
    endpoint_t* endpoint
    virtq_desc_t image[NUM_MAX]  # the ring's descriptors as the driver writes them; packed: `next` is the buffer id
    uint32_t chains              # buffers of a lap
    uint32_t bursts              # of BURST_MAX buffers, of a lap
    uint32_t slots               # descriptors of the ring that a buffer takes
    uint16_t position            # split: avail->idx
    uint16_t flags               # packed: AVAIL and USED bits of the next lap


cdef void _fill_split(lane_t* lane) noexcept nogil:
    cdef queue_t* queue = lane.queue
    lane.position += <uint16_t>lane.chains
    if queue.ring.split.event_idx:
        # Far ahead of this lap: no call is wanted.
        vq_store_u16(&queue.ring.split.avail.ring[queue.ring.num], <uint16_t>(lane.position + 0x4000))
    vq_store_release_u16(&queue.ring.split.avail.idx, lane.position)


cdef void _fill_packed(lane_t* lane) noexcept nogil:
    cdef queue_t* queue = lane.queue
    cdef virtq_desc_t* image
    cdef uint32_t i
    if queue.ring.packed.event_idx:
        # A slot of the lap before: no call is wanted.
        vq_store_u16(&queue.ring.packed.driver_event.off_wrap,
                     0 if lane.flags & VIRTQ_PACKED_DESC_F_AVAIL else 0x8000)
    for i in range(queue.ring.num):
        image = &lane.image[i]
        vq_store_u64(&queue.ring.packed.desc[i].addr, image.addr)
        vq_store_release_u64(&queue.ring.packed.desc[i].len, <uint64_t>image.len | <uint64_t>image.next << 32 |
                             <uint64_t>(image.flags | lane.flags) << 48)
    lane.flags ^= VIRTQ_PACKED_DESC_F_AVAIL | VIRTQ_PACKED_DESC_F_USED


cdef inline void _fill(lane_t* lane) noexcept nogil:
    """Make a whole ring of buffers available."""
    if lane.queue.ring.is_packed:
        _fill_packed(lane)
    else:
        _fill_split(lane)


cdef class Lane:
    """A started queue of pair 0 of a port, with the driver's side of its ring.

    Parameters
    ----------
    port : VhostPort
    index : int
        0 receiveq, 1 transmitq. The queue must be started, with a ring of `NUM` entries that was never used.
    descriptors : sequence of (int, int, int, int)
        For each entry of the ring: guest address, length, flags, and next (packed: buffer id).
    chains : int
        Buffers that they make up, all of the same number of descriptors, one behind the other.
    """

    cdef lane_t lane
    cdef VhostPort port
    cdef Queue owner

    def __cinit__(self, VhostPort port not None, int index, descriptors, uint32_t chains):
        cdef queue_t* queue
        cdef uint32_t i
        self.port = port
        self.owner = port.queues[index]
        queue = self.lane.queue = &self.owner.queue
        self.lane.endpoint = port.endpoints[0]
        if not queue.started or queue.ring.num != NUM_MAX or len(descriptors) != NUM_MAX or NUM_MAX % chains:
            raise ValueError(f"a started ring of {NUM_MAX} entries is needed, and so many descriptors in equal chains")
        self.lane.chains = chains
        self.lane.bursts = chains // <uint32_t>BURST_MAX
        self.lane.slots = NUM_MAX // chains
        self.lane.flags = VIRTQ_PACKED_DESC_F_AVAIL
        for i, (addr, length, flags, last) in enumerate(descriptors):
            self.lane.image[i].addr = addr
            self.lane.image[i].len = length
            self.lane.image[i].flags = flags
            self.lane.image[i].next = last
        if queue.ring.is_packed:
            queue.ring.packed.driver_event.flags = (VIRTQ_PACKED_EVENT_FLAG_DESC if queue.ring.packed.event_idx else
                                                    VIRTQ_PACKED_EVENT_FLAG_DISABLE)
            return
        for i in range(NUM_MAX):
            queue.ring.split.desc[i] = self.lane.image[i]
            queue.ring.split.avail.ring[i] = <uint16_t>(i % chains * self.lane.slots)
        queue.ring.split.avail.flags = VIRTQ_AVAIL_F_NO_INTERRUPT

    def want_calls(self):
        """Let the driver ask for a call at whatever is used next (without event idx)."""
        if self.lane.queue.ring.is_packed:
            self.lane.queue.ring.packed.driver_event.flags = 0
        else:
            self.lane.queue.ring.split.avail.flags = 0


# ---- stages of the ring ----

cdef inline int _pop_burst(queue_t* queue, bint packed) noexcept nogil:
    """Take a burst of buffers of one descriptor."""
    global _sink
    cdef cursor_t cursor
    cdef virtq_desc_t descriptor
    cdef uint64_t seen = 0
    cdef int ready = ring_begin(&queue.ring, packed, &cursor, BURST_MAX)
    while <int>cursor.taken < min(ready, BURST_MAX):
        if ring_look(&queue.ring, packed, &cursor, &descriptor) <= 0:
            break
        seen += descriptor.addr + descriptor.len + descriptor.flags
        ring_use(&queue.ring, packed, &cursor, descriptor.next, 0, 1)
    ring_commit(&queue.ring, packed, &cursor)
    _sink = seen
    return cursor.taken


cdef inline uint64_t _pop_laps(lane_t* lane, bint packed, int laps, uint64_t* units) noexcept nogil:
    cdef uint64_t cycles = 0, start
    cdef queue_t* queue = lane.queue
    cdef uint32_t _burst
    for _ in range(laps):
        _fill(lane)
        start = vq_cycles()
        for _burst in range(lane.bursts):
            units[0] += _pop_burst(queue, packed)
        cycles += vq_cycles() - start
        queue_publish(queue, packed, ring_next_used(&queue.ring, packed))
    return cycles


def pop(Lane lane, int laps):
    """Look at each descriptor, note its used element, commit once a burst."""
    cdef uint64_t units = 0, cycles
    with nogil:
        if lane.lane.queue.ring.is_packed:
            cycles = _pop_laps(&lane.lane, True, laps, &units)
        else:
            cycles = _pop_laps(&lane.lane, False, laps, &units)
    return cycles, units


cdef inline uint64_t _used_laps(lane_t* lane, bint packed, int laps, uint64_t* units) noexcept nogil:
    cdef uint64_t cycles = 0, start
    cdef queue_t* queue = lane.queue
    cdef uint16_t positions[NUM_MAX]             # of bursts
    cdef uint32_t burst
    for _ in range(laps):
        _fill(lane)
        for burst in range(lane.bursts):
            units[0] += _pop_burst(queue, packed)
            positions[burst] = ring_next_used(&queue.ring, packed)
        start = vq_cycles()
        for burst in range(lane.bursts):
            queue_publish(queue, packed, positions[burst])
        cycles += vq_cycles() - start
    return cycles


def used(Lane lane, int laps):
    """Publish bursts of used elements, and log what that changes."""
    cdef uint64_t units = 0, cycles
    with nogil:
        if lane.lane.queue.ring.is_packed:
            cycles = _used_laps(&lane.lane, True, laps, &units)
        else:
            cycles = _used_laps(&lane.lane, False, laps, &units)
    return cycles, units


cdef inline uint64_t _walk_laps(lane_t* lane, bint packed, int laps, uint64_t* units, uint64_t* bytes) noexcept nogil:
    cdef uint64_t cycles = 0, start
    cdef queue_t* queue = lane.queue
    cdef cursor_t cursor
    cdef chain_t chain
    cdef virtq_desc_t descriptor
    cdef virtq_desc_t first[NUM_MAX]
    cdef uint16_t heads[NUM_MAX]
    cdef uint32_t i
    for _ in range(laps):
        _fill(lane)
        ring_begin(&queue.ring, packed, &cursor, <int>lane.chains)
        for i in range(lane.chains):
            if ring_look(&queue.ring, packed, &cursor, &first[i]) <= 0:
                return cycles
            heads[i] = cursor.head
            ring_use(&queue.ring, packed, &cursor, first[i].next, 0, <uint16_t>lane.slots)
        ring_commit(&queue.ring, packed, &cursor)
        start = vq_cycles()
        for i in range(lane.chains):
            chain_begin(&chain, queue, heads[i], &first[i])
            while chain_next(&chain, queue, &descriptor) > 0:
                bytes[0] += descriptor.len
            units[0] += chain_end(&chain, queue) == 0 and not chain.broken
        cycles += vq_cycles() - start
        queue_publish(queue, packed, ring_next_used(&queue.ring, packed))
    return cycles


def walk(Lane lane, int laps):
    """Step over every chain with the cursor: (cycles, chains, bytes that their descriptors name)."""
    cdef uint64_t units = 0, total = 0, cycles
    with nogil:
        if lane.lane.queue.ring.is_packed:
            cycles = _walk_laps(&lane.lane, True, laps, &units, &total)
        else:
            cycles = _walk_laps(&lane.lane, False, laps, &units, &total)
    return cycles, units, total


cdef inline uint64_t _notify_laps(queue_t* queue, bint packed, int laps, uint64_t* calls) noexcept nogil:
    cdef uint64_t cycles = 0, start
    for _ in range(laps):
        start = vq_cycles()
        for _ in range(NUM_MAX):
            # As if a burst had been published since the last decision.
            if packed:
                queue.ring.packed.moved = BURST_MAX
            else:
                queue.ring.split.signalled_used = <uint16_t>(queue.ring.split.shadow_used - BURST_MAX)
            calls[0] += ring_needs_call(&queue.ring, packed)
        cycles += vq_cycles() - start
    return cycles


def notify(Lane lane, int laps):
    """Decide about a call, nothing being sent: (cycles, decisions, those for a call)."""
    cdef uint64_t calls = 0, cycles
    with nogil:
        if lane.lane.queue.ring.is_packed:
            ring_needs_call(&lane.lane.queue.ring, True)         # the first decision is another one
            cycles = _notify_laps(lane.lane.queue, True, laps, &calls)
        else:
            ring_needs_call(&lane.lane.queue.ring, False)
            cycles = _notify_laps(lane.lane.queue, False, laps, &calls)
    return cycles, NUM_MAX * laps, calls


def signal(int fd, int laps):
    """Signal an eventfd: the call by itself."""
    cdef uint64_t cycles = 0, start
    with nogil:
        for _ in range(laps):
            start = vq_cycles()
            for _ in range(NUM_MAX):
                notify_signal(fd)
            cycles += vq_cycles() - start
    return cycles, NUM_MAX * laps


# ---- stages without a ring ----

cdef inline uint64_t _translate_laps(memory_t* memory, bint nearby, const gpa_t* at, uint32_t count, uint64_t length,
                                     int laps, uint64_t* found) noexcept nogil:
    cdef region_t* hint = memory.regions
    cdef region_t near = memory.regions[0]
    cdef uint64_t cycles = 0, start
    cdef uint32_t i
    for _ in range(laps):
        start = vq_cycles()
        for i in range(count):
            if nearby:
                found[0] += memory_translate_near(memory, &hint, &near, at[i], length) != NULL
            else:
                found[0] += memory_translate(memory, &hint, at[i], length) != NULL
        cycles += vq_cycles() - start
    return cycles


def translate(MemoryMap map not None, addresses, uint64_t length, bint nearby, int laps):
    """Guest addresses to pointers: (cycles, translations, those that found one).

    `nearby` is the way of loops with a region of their own at hand, otherwise there is only the queue's hint.
    """
    cdef memory_t* memory = &map.memory
    cdef gpa_t at[NUM_MAX]
    cdef uint64_t cycles, found = 0
    cdef uint32_t i, count = len(addresses)
    if count > NUM_MAX:
        raise ValueError(f"{count} addresses; {NUM_MAX} at most")
    for i in range(count):
        at[i] = addresses[i]
    with nogil:
        if nearby:
            cycles = _translate_laps(memory, True, at, count, length, laps, &found)
        else:
            cycles = _translate_laps(memory, False, at, count, length, laps, &found)
    return cycles, <uint64_t>count * laps, found


def header(fields, uint32_t length, int laps):
    """Check a header that a driver wrote: (cycles, checks, what the last one says that it wants, or -1 - cause)."""
    cdef packet_t packet
    cdef virtio_net_hdr_t wanted
    cdef uint64_t cycles = 0, start
    cdef int cause = 0
    memset(&packet, 0, sizeof(packet))
    memset(&wanted, 0, sizeof(wanted))
    wanted.flags, wanted.gso_type, wanted.hdr_len, wanted.gso_size, wanted.csum_start, wanted.csum_offset = fields
    packet.length = length
    with nogil:
        for _ in range(laps):
            start = vq_cycles()
            for _ in range(NUM_MAX):
                packet.header = wanted
                cause = net_header_check(&packet, OFFLOAD_ALL)
            cycles += vq_cycles() - start
    return cycles, NUM_MAX * laps, packet.wants if cause < 0 else -1 - cause


cdef class Copies:
    """Source and target of copies, cycled through so that all stays in the first-level cache where it can.

    Both lie as payloads do, behind a header at the beginning of a line.
    """

    cdef uint8_t* memory
    cdef readonly uint32_t size, slots, stride

    def __cinit__(self, uint32_t size):
        cdef uint32_t i
        self.size = size
        self.stride = ((size + HEADER_BYTES + LINE - 1) // LINE | 1) * LINE      # odd: lines spread over all sets
        self.slots = max(1, COPY_ROOM // self.stride)
        self.memory = <uint8_t*>aligned_alloc(LINE, 2 * self.slots * self.stride)
        if self.memory == NULL:
            raise MemoryError("copies")
        memset(self.memory, 0, 2 * self.slots * self.stride)
        for i in range(self.slots * self.stride):
            self.memory[i] = <uint8_t>(i * 31 + (i >> 8))

    def __dealloc__(self):
        free(self.memory)

    def both(self):
        """What is copied, and what came of it: two lists of bytes."""
        cdef uint8_t* start
        cdef uint32_t i
        found = []
        for i in range(2 * self.slots):
            start = self.memory + i * self.stride + HEADER_BYTES
            found.append(start[:self.size])
        return found[:self.slots], found[self.slots:]


def copy(Copies copies not None, int laps):
    """Copy payloads."""
    cdef uint8_t* source
    cdef uint8_t* target
    cdef uint32_t slot = 0, size = copies.size
    cdef uint64_t cycles = 0, start
    with nogil:
        for _ in range(laps):
            start = vq_cycles()
            for _ in range(NUM_MAX):
                source = copies.memory + slot * copies.stride + HEADER_BYTES
                target = source + copies.slots * copies.stride
                vq_copy(target, source, size)
                slot = slot + 1 if slot + 1 < copies.slots else 0
            cycles += vq_cycles() - start
    return cycles, NUM_MAX * laps


# ---- the verbs of a port ----

def pull(Lane lane, int laps):
    """Pull bursts; they are released outside of what is measured."""
    cdef burst_t* burst = <burst_t*>calloc(1, sizeof(burst_t))
    cdef endpoint_t* endpoint = lane.lane.endpoint
    cdef uint64_t cycles = 0, units = 0, start
    cdef uint32_t _burst
    if burst == NULL:
        raise MemoryError("burst")
    with nogil:
        for _ in range(laps):
            _fill(&lane.lane)
            start = vq_cycles()
            for _burst in range(lane.lane.bursts):
                units += endpoint.pull(endpoint, burst, BURST_MAX)
            cycles += vq_cycles() - start
            endpoint.release(endpoint, burst, burst.count)       # everything that was pulled
    free(burst)
    return cycles, units


def pull_release(Lane lane, int laps):
    """Pull bursts and release each."""
    cdef burst_t* burst = <burst_t*>calloc(1, sizeof(burst_t))
    cdef endpoint_t* endpoint = lane.lane.endpoint
    cdef uint64_t cycles = 0, units = 0, start
    cdef uint32_t _burst
    if burst == NULL:
        raise MemoryError("burst")
    with nogil:
        for _ in range(laps):
            _fill(&lane.lane)
            start = vq_cycles()
            for _burst in range(lane.lane.bursts):
                units += endpoint.pull(endpoint, burst, BURST_MAX)
                endpoint.release(endpoint, burst, burst.count)
            cycles += vq_cycles() - start
    free(burst)
    return cycles, units


cdef class Burst:
    """Packets of one segment in memory of our own, to be pushed.

    Parameters
    ----------
    size : int
        Bytes of each.
    changing : bool
        Their headers differ from lap to lap, so that each one is written.
    """

    cdef packet_t packets[BURST_MAX]
    cdef uint8_t* memory
    cdef readonly uint32_t size
    cdef bint changing

    def __cinit__(self, uint32_t size, bint changing=False):
        cdef uint32_t i, stride = ((size + LINE - 1) // LINE | 1) * LINE
        self.size = size
        self.changing = changing
        self.memory = <uint8_t*>aligned_alloc(LINE, BURST_MAX * stride)
        if self.memory == NULL:
            raise MemoryError("burst")
        for i in range(BURST_MAX * stride):
            self.memory[i] = <uint8_t>(i * 29 + (i >> 7) + 1)
        memset(self.packets, 0, sizeof(self.packets))
        for i in range(BURST_MAX):
            self.packets[i].data = self.memory + i * stride
            self.packets[i].head_bytes = self.packets[i].length = size

    def __dealloc__(self):
        free(self.memory)

    cdef void turn(self) noexcept nogil:
        """Give all packets the other header: none, or one that asks for a checksum."""
        cdef virtio_net_hdr_t* header
        cdef uint32_t i
        if self.changing:
            for i in range(BURST_MAX):
                header = &self.packets[i].header
                header.flags ^= 1
                header.csum_start = 34 if header.flags else 0
                header.csum_offset = 6 if header.flags else 0

    def payloads(self):
        """list of bytes: what is pushed."""
        return [self.packets[i].data[:self.size] for i in range(BURST_MAX)]


def push(Lane lane, Burst packets, int laps):
    """Push bursts, publishing each."""
    cdef endpoint_t* endpoint = lane.lane.endpoint
    cdef uint64_t cycles = 0, units = 0, start
    cdef uint32_t _burst, bursts = _packets_of(lane, packets) // <uint32_t>BURST_MAX
    with nogil:
        for _ in range(laps):
            _fill(&lane.lane)
            packets.turn()
            start = vq_cycles()
            for _burst in range(bursts):
                units += endpoint.push(endpoint, packets.packets, BURST_MAX)
            cycles += vq_cycles() - start
    return cycles, units


cdef uint32_t _packets_of(Lane lane, Burst packets) except 0:
    """Packets of a lap: as many as its buffers hold, several buffers to a packet if they are small."""
    cdef uint64_t buffer_bytes = 0
    cdef uint32_t i
    if lane.lane.image[0].flags & 4:                             # indirect: a buffer holds a packet
        return lane.lane.chains
    for i in range(lane.lane.slots):
        buffer_bytes += lane.lane.image[i].len
    return <uint32_t>(lane.lane.chains // ((packets.size + HEADER_BYTES + buffer_bytes - 1) // buffer_bytes))


def whole(Lane source, Lane target, int laps):
    """Rounds of a flow from one guest to another: pull, push, release, and both flush."""
    cdef burst_t* burst = <burst_t*>calloc(1, sizeof(burst_t))
    cdef endpoint_t* from_ = source.lane.endpoint
    cdef endpoint_t* to = target.lane.endpoint
    cdef uint64_t cycles = 0, units = 0, start
    cdef uint32_t _burst
    cdef int count
    if burst == NULL:
        raise MemoryError("burst")
    with nogil:
        for _ in range(laps):
            _fill(&source.lane)
            _fill(&target.lane)
            start = vq_cycles()
            for _burst in range(source.lane.bursts):
                count = from_.pull(from_, burst, BURST_MAX)
                units += to.push(to, burst.packets, count)
                from_.release(from_, burst, count)
                to.flush(to)
                from_.flush(from_)
            cycles += vq_cycles() - start
    free(burst)
    return cycles, units


# ---- the clock ----

def core_cycles(int rounds=100000):
    """Cycles of the core, and ticks of the counter meanwhile: six operations a round, each needing the one before."""
    global _sink
    cdef uint64_t x = 88172645463325252, start, ticks
    with nogil:
        start = vq_cycles()
        for _ in range(rounds):
            x ^= x << 13
            x ^= x >> 7
            x ^= x << 17
        ticks = vq_cycles() - start
    _sink = x
    return 6 * rounds, ticks


def ticks():
    """int: the counter."""
    return vq_cycles()
