"""The learning switch: the table, and the way of a burst to its targets."""
import os
import time

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from vq_core.arch cimport (vq_load_u32, vq_load_u64, vq_snapshot_u32, vq_snapshot_u64, vq_store_release_u32,
                           vq_store_u64)
from vq_core.counters cimport DROP_NO_DESCRIPTORS, DROP_NO_TARGET, DROP_TOO_SHORT
from vq_core.offload cimport offload_push, offload_t
from vq_core.port cimport BURST_MAX, Port, burst_t, endpoint_t, packet_t

cdef extern from * nogil:
    int vq_lowest_bit "__builtin_ctz"(unsigned int bits) noexcept
    int vq_bit_count "__builtin_popcount"(unsigned int bits) noexcept

cdef enum:
    MULTICAST = 1                # of an address's first byte, the lowest of our word
    PORT_BITS = 16
    UNKNOWN = -1


# ---- the table ----

cdef inline int _bucket(switch_t* switch, uint64_t mac) noexcept nogil:
    """Index of the bucket's first way.

    Multiply-shift hashing alone puts addresses that follow each other into few buckets with an unlucky multiplier.
    """
    cdef uint64_t mixed = mac * switch.secret
    mixed = (mixed ^ mixed >> 32) * <uint64_t>0x9e3779b97f4a7c15
    mixed = (mixed ^ mixed >> 29) * <uint64_t>0xbf58476d1ce4e5b9
    return <int>(mixed >> (64 - SWITCH_BUCKET_BITS)) * SWITCH_WAYS


cdef inline bint _aged(switch_t* switch, int way, uint32_t now_s) noexcept nogil:
    # Signed: another worker may already have written the next second.
    return <int>(now_s - vq_load_u32(&switch.seen[way])) > <int>switch.age_s


cdef inline int _find(switch_t* switch, uint64_t mac, uint32_t now_s) noexcept nogil:
    """The port of an address, or UNKNOWN."""
    cdef int first = _bucket(switch, mac), way
    cdef uint64_t word
    if mac == 0:                 # as a free way
        return UNKNOWN
    for way in range(first, first + SWITCH_WAYS):
        word = vq_load_u64(&switch.words[way])
        if word >> PORT_BITS == mac and not _aged(switch, way, now_s):
            return <int>(word & 0xffff)
    return UNKNOWN


cdef void _insert(switch_t* switch, uint64_t mac, int port, uint32_t now_s, int first) noexcept nogil:
    """Put an address into a free way, else an aged one, else the oldest of the port, else the oldest of all."""
    cdef int way, best = first
    cdef int64_t rank, best_rank = -1
    cdef uint64_t word
    for way in range(first, first + SWITCH_WAYS):
        word = vq_load_u64(&switch.words[way])
        rank = <uint32_t>(now_s - vq_load_u32(&switch.seen[way]) + 1)
        if word == 0:
            rank = <int64_t>4 << 32
        elif _aged(switch, way, now_s):
            rank += <int64_t>2 << 32
        elif <int>(word & 0xffff) == port:
            rank += <int64_t>1 << 32
        if rank > best_rank:
            best_rank = rank
            best = way
    vq_store_release_u32(&switch.seen[best], now_s)
    vq_store_u64(&switch.words[best], mac << PORT_BITS | <uint64_t>port)


cdef inline void _learn(switch_t* switch, uint64_t mac, int port, uint32_t now_s) noexcept nogil:
    """Note that `mac` lives behind `port`. What stands there already is not written: its line stays shared."""
    cdef int first, way
    cdef uint64_t word
    cdef bint found = False
    if mac & MULTICAST or mac == 0:
        return
    first = _bucket(switch, mac)
    for way in range(first, first + SWITCH_WAYS):
        word = vq_load_u64(&switch.words[way])
        if word >> PORT_BITS != mac:
            continue
        if found:                # two workers put it in at the same time: one way is enough
            vq_store_u64(&switch.words[way], 0)
            continue
        found = True
        if vq_load_u32(&switch.seen[way]) != now_s:
            vq_store_release_u32(&switch.seen[way], now_s)
        if <int>(word & 0xffff) != port:
            vq_store_u64(&switch.words[way], mac << PORT_BITS | <uint64_t>port)
    if not found:
        _insert(switch, mac, port, now_s, first)


# ---- a burst ----

cdef void _gather_addresses(packet_t* packet, uint8_t* addresses) noexcept nogil:
    """Copy the first 12 bytes of a packet whose first segment is shorter; the packet is long enough."""
    cdef uint32_t at = 0, segment = 0, left = packet.head_bytes
    cdef uint8_t* data = packet.data
    while at < 12:
        while left == 0:
            data = packet.more[segment].data
            left = packet.more[segment].length
            segment += 1
        addresses[at] = data[0]
        data += 1
        left -= 1
        at += 1


cdef inline void _push(switch_lane_t* lane, offload_t* offload, int port, packet_t* packets, int count, uint32_t wants,
                       int* pushed) noexcept nogil:
    """Push to one port; what it has no room for is dropped and counted."""
    cdef endpoint_t* target = lane.endpoints[port]
    cdef int taken
    if wants & ~target.accepts:
        taken = offload_push(offload, target, packets, count)
    else:
        taken = target.push(target, packets, count)
    target.pushed.dropped[DROP_NO_DESCRIPTORS] += count - taken
    target.flush(target)
    pushed[0] += taken


cdef inline packet_t* _select(burst_t* burst, uint32_t mask, packet_t* room) noexcept nogil:
    """The packets of `mask` (not empty) in a row: in the burst itself if they stand so there, else copied to `room`."""
    cdef int first = vq_lowest_bit(mask), n = 0
    cdef uint32_t run = mask >> first
    if run & (run + 1) == 0:
        return &burst.packets[first]
    while mask:
        room[n] = burst.packets[vq_lowest_bit(mask)]
        mask &= mask - 1
        n += 1
    return room


cdef int switch_forward(switch_t* switch, switch_lane_t* lane, burst_t* burst, int source_port, offload_t* offload,
                        uint32_t now_s) noexcept nogil:
    cdef endpoint_t* source = lane.endpoints[source_port]
    cdef uint16_t targets[BURST_MAX]
    cdef uint64_t word, destination, origin, last_destination = 0, last_origin = 0
    cdef uint32_t floods = 0, mask, i
    cdef uint8_t addresses[16]
    cdef uint8_t* at
    cdef int target_count = 0, port, last_port = UNKNOWN, pushed = 0, reached = 0, n
    cdef packet_t* packet
    cdef packet_t* flooded = NULL
    if source == NULL:
        return 0
    for i in range(burst.count):
        packet = &burst.packets[i]
        if packet.length < ETHERNET_HEADER:
            source.pulled.dropped[DROP_TOO_SHORT] += 1
            continue
        at = packet.data
        if packet.head_bytes < 12:
            _gather_addresses(packet, addresses)
            at = addresses
        # Twelve bytes, each read once; first bytes lowest, as the host is little-endian.
        word = vq_snapshot_u64(at)
        destination = word << PORT_BITS >> PORT_BITS
        origin = word >> 48 | <uint64_t>vq_snapshot_u32(at + 8) << 16
        if origin != last_origin:            # mostly one sender a burst
            last_origin = origin
            _learn(switch, origin, source_port, now_s)
            last_destination = 0             # it may have been the one that was just learnt
        if destination & MULTICAST:
            floods |= <uint32_t>1 << i
            continue
        if destination != last_destination or last_destination == 0:
            last_destination = destination
            last_port = _find(switch, destination, now_s)
        port = last_port
        if port == UNKNOWN:
            floods |= <uint32_t>1 << i
            continue
        if port == source_port or port >= lane.port_count or lane.endpoints[port] == NULL:
            source.pulled.dropped[DROP_NO_TARGET] += 1
            continue
        if lane.masks[port] == 0:
            targets[target_count] = <uint16_t>port
            target_count += 1
        lane.masks[port] |= <uint32_t>1 << i
    if floods:
        n = vq_bit_count(floods)
        for i in range(<uint32_t>lane.member_count):
            port = lane.members[i]
            if port == source_port:
                continue
            reached += 1
            if lane.masks[port]:
                continue                     # gets them in order with its own, below
            if flooded == NULL:
                flooded = _select(burst, floods, lane.flooded)
            _push(lane, offload, port, flooded, n, burst.wants, &pushed)
        if reached == 0:
            source.pulled.dropped[DROP_NO_TARGET] += n
    for i in range(<uint32_t>target_count):
        port = targets[i]
        mask = lane.masks[port] | floods
        lane.masks[port] = 0
        _push(lane, offload, port, _select(burst, mask, lane.gathered), vq_bit_count(mask), burst.wants, &pushed)
    return pushed


# ---- handles ----

cdef class Switch:
    """The MAC table of a learning switch.

    Parameters
    ----------
    port_count : int
        Ports, 1 to 4096; ports are numbered from 0.
    age_s : int
        Seconds after which an address that is not heard of is forgotten, 1 to 1,000,000 (802.1Q allows no more).

    Raises
    ------
    ValueError
        A number out of range.

    Notes
    -----
    Threading: the control thread may call every method while workers forward.
    Spec: IEEE 802.1Q, 8.8 (the filtering database); without spanning tree, and with one table for all VLANs.
    """

    def __cinit__(self, int port_count, int age_s=SWITCH_AGE_S):
        cdef void* memory = NULL
        if not 1 <= port_count <= SWITCH_PORTS_MAX:
            raise ValueError(f"switch: port_count {port_count} is not in 1 to {SWITCH_PORTS_MAX}")
        if not 1 <= age_s <= 1000000:
            raise ValueError(f"switch: age_s {age_s} is not in 1 to 1000000 seconds")
        self.table.port_count = port_count
        self.table.age_s = age_s
        self.table.secret = int.from_bytes(os.urandom(8), "little") | 1
        if posix_memalign(&memory, 64, SWITCH_BUCKETS * SWITCH_WAYS * sizeof(uint64_t)):
            raise MemoryError("switch: table")
        memset(memory, 0, SWITCH_BUCKETS * SWITCH_WAYS * sizeof(uint64_t))
        self.table.words = <uint64_t*>memory
        self.table.seen = <uint32_t*>calloc(SWITCH_BUCKETS * SWITCH_WAYS, sizeof(uint32_t))
        if self.table.seen == NULL:
            raise MemoryError("switch: table")

    def __dealloc__(self):
        free(self.table.words)
        free(self.table.seen)

    @property
    def port_count(self):
        """Ports."""
        return self.table.port_count

    @property
    def age_s(self):
        """Seconds after which an address that is not heard of is forgotten."""
        return self.table.age_s

    def entries(self, now_s=None):
        """What the switch knows.

        Parameters
        ----------
        now_s : int, optional
            Second of the monotonic clock by which entries are aged; now, if it is left out.

        Returns
        -------
        dict of str to int
            Port by address, as ``{"52:54:00:12:34:56": 0}``.
        """
        cdef int way
        cdef uint32_t now = <uint32_t>(int(time.monotonic()) if now_s is None else now_s)
        cdef uint64_t word
        found = {}
        for way in range(SWITCH_BUCKETS * SWITCH_WAYS):
            word = vq_load_u64(&self.table.words[way])
            if word and not _aged(&self.table, way, now):
                found[(word >> PORT_BITS).to_bytes(6, "little").hex(":")] = int(word & 0xffff)
        return found

    def forget(self, int port):
        """Forget all addresses behind a port.

        Call it after the last flow of the port has ended (its worker has obeyed), or the port may teach it again.

        Parameters
        ----------
        port : int

        Returns
        -------
        int
            Entries forgotten.

        Raises
        ------
        IndexError
            No such port.
        """
        cdef int way
        cdef uint64_t word
        cdef int count = 0
        if not 0 <= port < self.table.port_count:
            raise IndexError(f"switch: port {port} is not in 0 to {self.table.port_count - 1}")
        for way in range(SWITCH_BUCKETS * SWITCH_WAYS):
            word = vq_load_u64(&self.table.words[way])
            if word and <int>(word & 0xffff) == port:
                vq_store_u64(&self.table.words[way], 0)
                count += 1
        return count


cdef class SwitchLane:
    """One worker's ways into the ports of a switch.

    Parameters
    ----------
    switch : Switch
    members : sequence of ((Port, int) or None)
        By number of the port: the port and the index of its endpoint that this lane pushes to; None for a port that
        the lane does not reach. As many as the switch has ports.

    Raises
    ------
    ValueError
        Another number of members than the switch has ports.
    IndexError
        A port has no such endpoint.

    Notes
    -----
    Threading: used by one worker, which must own all these endpoints. Immutable: a worker gets another lane by
    hand-over.
    """

    def __cinit__(self, Switch switch not None, members):
        cdef Port port
        cdef int i, index
        self.members = tuple(members)
        self.switch = switch
        if len(self.members) != switch.table.port_count:
            raise ValueError(f"lane: {len(self.members)} members for a switch of {switch.table.port_count} ports")
        self.lane.port_count = switch.table.port_count
        self.lane.endpoints = <endpoint_t**>calloc(self.lane.port_count, sizeof(endpoint_t*))
        self.lane.masks = <uint32_t*>calloc(self.lane.port_count, sizeof(uint32_t))
        self.lane.members = <int*>calloc(self.lane.port_count, sizeof(int))
        if self.lane.endpoints == NULL or self.lane.masks == NULL or self.lane.members == NULL:
            raise MemoryError("lane")
        for i, member in enumerate(self.members):
            if member is None:
                continue
            port, index = member
            if not 0 <= index < port.endpoint_count:
                raise IndexError(f"lane: {port.name}: endpoint {index} of {port.endpoint_count}")
            self.lane.endpoints[i] = port.endpoints[index]
            self.lane.members[self.lane.member_count] = i
            self.lane.member_count += 1

    def __dealloc__(self):
        free(self.lane.endpoints)
        free(self.lane.masks)
        free(self.lane.members)
