"""Completion of checksums and segmentation in software."""
import os

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from vq_core.arch cimport vq_copy, vq_fence_release, vq_put_u16, vq_put_u32, vq_snapshot_u16, vq_snapshot_u32
from vq_core.counters cimport DROP_BAD_CSUM, DROP_BAD_GSO, DROP_NO_DESCRIPTORS, DROP_TOO_LONG
from vq_core.port cimport BURST_MAX, OFFLOAD_CSUM, PACKET_MAX, endpoint_t, packet_t
from vq_core.virtio cimport (VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
                             VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP,
                             VIRTIO_NET_HDR_GSO_UDP_L4, virtio_net_hdr_t)

cdef extern from "vq_sum.h" nogil:
    uint64_t vq_sum_words(const void* data, uint32_t count) noexcept
    void vq_sum_choose() noexcept

cdef enum:
    ETHERTYPES = 12              # offset of the first one
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_IPV6 = 0x86dd
    ETHERTYPE_VLAN = 0x8100
    ETHERTYPE_SERVICE_VLAN = 0x88a8
    VLAN_TAGS_MAX = 2

    IPV4_HEADER_MIN = 20
    IPV4_FRAGMENT = 0x3fff       # more fragments, or an offset
    IPV4_MORE_FRAGMENTS = 0x2000
    IPV4_OPTION_END = 0
    IPV4_OPTION_NOP = 1
    IPV4_OPTION_COPIED = 0x80
    IPV6_HEADER = 40
    IPV6_FRAGMENT_HEADER = 8
    IP_BYTES_MAX = 65535

    IPPROTO_HOPOPTS = 0
    IPPROTO_TCP = 6
    IPPROTO_UDP = 17
    IPPROTO_ROUTING = 43
    IPPROTO_FRAGMENT = 44
    IPPROTO_DSTOPTS = 60

    TCP_HEADER_MIN = 20
    TCP_FLAGS = 13               # offset
    TCP_FIN = 1
    TCP_PSH = 8
    TCP_CWR = 0x80
    TCP_CHECKSUM = 16            # offset
    UDP_HEADER = 8
    UDP_CHECKSUM = 6             # offset

cdef enum:
    ALL_SENT = -1                # of _flush
    IDENT_STEP = 0x9e3779b1      # odd: every value comes once before one comes again

cdef struct cut_t:
    # A packet that is being cut, as its copy says. Offsets count from the start of the frame.
    uint8_t* frame
    uint32_t length
    uint32_t network             # the IP header
    uint32_t transport           # the TCP or UDP header
    uint32_t transport_bytes     # of that header
    uint32_t checksum            # the transport's checksum field
    uint32_t body                # what is cut: payload, or the fragmentable part
    uint32_t size                # bytes of body in each piece but the last
    uint32_t pieces
    uint32_t next_header         # IPv6: the last byte in front of `body` that says what follows
    uint32_t ident               # IPv4: of the first piece
    uint32_t sequence            # TCP: of the first piece
    uint64_t pseudo              # sum of the pseudo header without its length
    uint64_t fixed               # sum of the IPv4 header without length, identification and offset
    bint ipv6

vq_sum_choose()


# ---- sums ----

cdef uint64_t checksum_add(const uint8_t* data, uint32_t count) noexcept nogil:
    cdef uint32_t words = count >> 3
    cdef uint64_t total = vq_sum_words(data, words)
    data += words << 3
    if count & 4:
        total += vq_snapshot_u32(data)
        data += 4
    if count & 2:
        total += vq_snapshot_u16(data)
        data += 2
    if count & 1:
        total += data[0]
    return total


cdef inline uint32_t _get16(const uint8_t* at) noexcept nogil:
    return <uint32_t>at[0] << 8 | at[1]


cdef inline uint16_t _without_zero(uint16_t checksum) noexcept nogil:
    """UDP says "no checksum" by zero, and means the same number by all ones (RFC 768)."""
    return checksum if checksum else 0xffff


# ---- the copy ----

cdef inline uint8_t* _linearise(offload_t* work, packet_t* packet) noexcept nogil:
    """Copy the whole packet into the arena; the caller has seen to it that it fits."""
    cdef uint8_t* frame = work.arena + work.arena_used
    cdef uint8_t* to = frame + packet.head_bytes
    cdef uint32_t i
    vq_copy(frame, packet.data, packet.head_bytes)
    for i in range(packet.more_count):
        memcpy(to, packet.more[i].data, packet.more[i].length)
        to += packet.more[i].length
    work.arena_used += (packet.length + 63) & ~<uint32_t>63
    vq_fence_release()           # the compiler may not look through the copy at the guest's memory again
    return frame


cdef inline void _complete_checksum(uint8_t* frame, uint32_t length, virtio_net_hdr_t* header) noexcept nogil:
    """Replace the pseudo header's sum in the field by the checksum of all from csum_start on.

    All protocols with a checksum at offset 6 (UDP, UDP-Lite, DCCP) may or must write all ones for zero, and all read
    both as the same number: the offset decides, and no header needs to be believed.
    """
    cdef uint16_t checksum = ~checksum_fold(checksum_add(frame + header.csum_start, length - header.csum_start))
    if header.csum_offset == UDP_CHECKSUM:
        checksum = _without_zero(checksum)
    vq_put_u16(frame + header.csum_start + header.csum_offset, checksum)


# ---- headers of a packet that is to be cut ----

cdef bint _parse_ipv4(cut_t* cut, uint32_t protocol) noexcept nogil:
    cdef uint8_t* ip = cut.frame + cut.network
    cdef uint32_t bytes
    if cut.network + IPV4_HEADER_MIN > cut.transport or ip[0] >> 4 != 4:
        return False
    bytes = <uint32_t>(ip[0] & 15) * 4
    if bytes < IPV4_HEADER_MIN or cut.network + bytes != cut.transport or ip[9] != protocol:
        return False
    if _get16(ip + 6) & IPV4_FRAGMENT or cut.length - cut.network > IP_BYTES_MAX:
        return False
    cut.ident = _get16(ip + 4)
    cut.pseudo = checksum_add(ip + 12, 8)
    return True


cdef bint _parse_ipv6(cut_t* cut, uint32_t protocol) noexcept nogil:
    """Also finds where the unfragmentable part ends: behind the hop-by-hop or routing header (RFC 8200, 4.5)."""
    cdef uint8_t* ip = cut.frame + cut.network
    cdef uint32_t at = cut.network + IPV6_HEADER, kind, next_at = cut.network + 6
    if at > cut.transport or ip[0] >> 4 != 6 or cut.length - at > IP_BYTES_MAX:
        return False
    cut.body = at
    cut.next_header = next_at
    # Each step takes 8 bytes at least, and `transport` is below HEADERS_MAX. The byte at `transport` is in the frame.
    while at < cut.transport:
        kind = cut.frame[next_at]
        if kind != IPPROTO_DSTOPTS and kind != IPPROTO_ROUTING and \
                (kind != IPPROTO_HOPOPTS or at != cut.network + IPV6_HEADER):
            return False         # also AH and fragments: nobody may cut these
        next_at = at
        at += (<uint32_t>cut.frame[at + 1] + 1) * 8
        if kind != IPPROTO_DSTOPTS:
            cut.body = at
            cut.next_header = next_at
    if at != cut.transport or cut.frame[next_at] != protocol:
        return False
    cut.pseudo = checksum_add(ip + 8, 32)
    return True


cdef bint _parse(cut_t* cut, virtio_net_hdr_t* header) noexcept nogil:
    """Read the headers of the copy; False if they do not make sense. cut.frame and cut.length are given."""
    cdef uint32_t kind = header.gso_type & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    cdef uint32_t at = ETHERTYPES, ethertype, protocol, _tags
    cdef bint tcp = kind == VIRTIO_NET_HDR_GSO_TCPV4 or kind == VIRTIO_NET_HDR_GSO_TCPV6
    if not tcp and kind != VIRTIO_NET_HDR_GSO_UDP and kind != VIRTIO_NET_HDR_GSO_UDP_L4:
        return False
    protocol = IPPROTO_TCP if tcp else IPPROTO_UDP
    cut.transport = header.csum_start
    cut.transport_bytes = TCP_HEADER_MIN if tcp else UDP_HEADER
    cut.checksum = cut.transport + (TCP_CHECKSUM if tcp else UDP_CHECKSUM)
    # The longest headers with a fragment header still fit a slot; every offset below `transport` is inside the frame.
    if cut.transport + cut.transport_bytes + IPV6_FRAGMENT_HEADER > HEADERS_MAX or \
            cut.transport + cut.transport_bytes >= cut.length or \
            <uint32_t>header.csum_start + header.csum_offset != cut.checksum:
        return False
    for _tags in range(VLAN_TAGS_MAX + 1):
        if at + 2 > cut.transport:
            return False
        ethertype = _get16(cut.frame + at)
        if ethertype != ETHERTYPE_VLAN and ethertype != ETHERTYPE_SERVICE_VLAN:
            break
        at += 4
    cut.network = at + 2
    cut.ipv6 = ethertype == ETHERTYPE_IPV6
    if ethertype == ETHERTYPE_IPV4 and kind != VIRTIO_NET_HDR_GSO_TCPV6:
        if not _parse_ipv4(cut, protocol):
            return False
    elif ethertype == ETHERTYPE_IPV6 and kind != VIRTIO_NET_HDR_GSO_TCPV4:
        if not _parse_ipv6(cut, protocol):
            return False
    else:
        return False
    cut.pseudo += swap16(protocol)
    if cut.transport - cut.network != <uint32_t>(IPV6_HEADER if cut.ipv6 else IPV4_HEADER_MIN):
        # Source routing and mobility put the pseudo header's addresses elsewhere: the driver's sum has the right ones.
        cut.pseudo = <uint64_t>vq_snapshot_u16(cut.frame + cut.checksum) + (0xffff - swap16(cut.length - cut.transport))
    cut.size = header.gso_size
    if tcp:
        cut.transport_bytes = <uint32_t>(cut.frame[cut.transport + 12] >> 4) * 4
        cut.sequence = _get16(cut.frame + cut.transport + 4) << 16 | _get16(cut.frame + cut.transport + 6)
    if kind == VIRTIO_NET_HDR_GSO_UDP:
        cut.size &= ~<uint32_t>7         # offsets of fragments count in 8 bytes
        if not cut.ipv6:
            cut.body = cut.transport
    else:
        cut.body = cut.transport + cut.transport_bytes
        if tcp and (cut.transport_bytes < TCP_HEADER_MIN or cut.body > HEADERS_MAX):
            return False
    if cut.size == 0 or cut.body >= cut.length:
        return False
    cut.pieces = (cut.length - cut.body + cut.size - 1) // cut.size
    return cut.pieces <= PIECES_MAX


# ---- staging ----

cdef int _flush(offload_t* work, endpoint_t* target, uint32_t unmade) noexcept nogil:
    """Push what is staged: ALL_SENT, or how many of the caller's packets are dealt with.

    `unmade` pieces of the packet staged last are still to be made.
    """
    cdef uint32_t count = work.staged_count, taken, owner, number, lost
    work.staged_count = 0
    if count == 0:
        return ALL_SENT
    taken = <uint32_t>target.push(target, work.staged, <int>count)
    if taken >= count:
        return ALL_SENT
    owner = work.owners[taken]
    number = work.numbers[taken]
    if number == 0:
        return <int>owner
    lost = taken
    while lost < count and work.owners[lost] == owner:
        lost += 1
    target.pushed.dropped[DROP_NO_DESCRIPTORS] += lost - taken + (unmade if lost == count else 0)
    return <int>owner + 1


cdef inline packet_t* _stage(offload_t* work, uint32_t owner, uint32_t number) noexcept nogil:
    """The next slot's packet, empty; the caller has seen to it that a slot is free."""
    cdef uint32_t slot = work.staged_count
    cdef packet_t* packet = &work.staged[slot]
    work.owners[slot] = <uint16_t>owner
    work.numbers[slot] = <uint16_t>number
    work.staged_count = slot + 1
    memset(packet, 0, sizeof(packet_t))
    return packet


cdef inline void _stage_frame(offload_t* work, uint32_t owner, uint8_t* frame, uint32_t length) noexcept nogil:
    cdef packet_t* packet = _stage(work, owner, 0)
    packet.data = frame
    packet.head_bytes = packet.length = length


cdef inline uint8_t* _stage_piece(offload_t* work, uint32_t owner, uint32_t number, cut_t* cut, uint32_t header_bytes,
                                  uint32_t bytes) noexcept nogil:
    """A piece of two segments: `header_bytes` in its slot, begun as the frame begins, and its part of the body."""
    cdef uint32_t slot = work.staged_count
    cdef packet_t* packet = _stage(work, owner, number)
    packet.data = work.headers[slot]
    packet.head_bytes = header_bytes
    packet.length = header_bytes + bytes
    packet.more = &work.payloads[slot]
    packet.more_count = 1
    work.payloads[slot].data = cut.frame + cut.body + number * cut.size
    work.payloads[slot].length = bytes
    vq_copy(packet.data, cut.frame, cut.body)
    return packet.data


cdef inline void _finish_ipv4(cut_t* cut, uint8_t* head, uint32_t ip_bytes, uint32_t ident,
                              uint32_t fragment) noexcept nogil:
    """Length, identification, fragment field and header checksum of a piece; cut.fixed holds the sum of the rest."""
    cdef uint8_t* ip = head + cut.network
    vq_put_u16(ip + 2, swap16(ip_bytes))
    vq_put_u16(ip + 4, swap16(ident))
    vq_put_u16(ip + 6, swap16(fragment))
    vq_put_u16(ip + 10, ~checksum_fold(cut.fixed + swap16(ip_bytes) + swap16(ident) + swap16(fragment)))


cdef inline void _begin_ipv4(cut_t* cut) noexcept nogil:
    """Zero in the frame what _finish_ipv4 sets, and take the sum of the rest."""
    cdef uint8_t* ip = cut.frame + cut.network
    vq_put_u32(ip + 2, 0)
    vq_put_u16(ip + 6, 0)
    vq_put_u16(ip + 10, 0)
    cut.fixed = checksum_add(ip, cut.transport - cut.network)


# ---- TSO and USO ----

cdef int _cut_segments(offload_t* work, endpoint_t* target, uint32_t owner, cut_t* cut,
                       virtio_net_hdr_t* header) noexcept nogil:
    """Stage the packet as segments or datagrams of its transport, pushing full batches: as _flush returns."""
    cdef bint udp = (header.gso_type & ~VIRTIO_NET_HDR_GSO_ECN) == VIRTIO_NET_HDR_GSO_UDP_L4
    cdef bint partial = target.accepts & OFFLOAD_CSUM
    cdef uint32_t number, bytes, transport_bytes, flags, first_flags, last_flags, fragment = 0
    cdef uint64_t total
    cdef uint16_t checksum
    cdef uint8_t* head
    cdef uint8_t* transport
    cdef packet_t* piece
    cdef int dealt
    if not cut.ipv6:
        fragment = _get16(cut.frame + cut.network + 6)
        _begin_ipv4(cut)
    vq_put_u16(cut.frame + cut.checksum, 0)
    flags = first_flags = last_flags = 0
    if not udp:
        flags = cut.frame[cut.transport + TCP_FLAGS]
        # CWR tells of one event: the first piece alone says it. FIN and PSH belong behind the last byte.
        first_flags = flags & TCP_CWR if header.gso_type & VIRTIO_NET_HDR_GSO_ECN else 0
        last_flags = flags & (TCP_FIN | TCP_PSH)
        flags &= ~(first_flags | last_flags)
    for number in range(cut.pieces):
        if work.staged_count == BURST_MAX:
            dealt = _flush(work, target, cut.pieces - number)
            if dealt != ALL_SENT:
                return dealt
        bytes = min(cut.size, cut.length - cut.body - number * cut.size)
        transport_bytes = cut.transport_bytes + bytes
        head = _stage_piece(work, owner, number, cut, cut.body, bytes)
        if cut.ipv6:
            vq_put_u16(head + cut.network + 4, swap16(cut.body - cut.network - IPV6_HEADER + bytes))
        else:
            _finish_ipv4(cut, head, cut.body - cut.network + bytes, cut.ident + number, fragment)
        transport = head + cut.transport
        if udp:
            vq_put_u16(transport + 4, swap16(transport_bytes))
        else:
            vq_put_u16(transport + 4, swap16((cut.sequence + number * cut.size) >> 16))
            vq_put_u16(transport + 6, swap16(cut.sequence + number * cut.size))
            transport[TCP_FLAGS] = <uint8_t>(flags | (first_flags if number == 0 else 0) |
                                             (last_flags if number == cut.pieces - 1 else 0))
        total = cut.pseudo + swap16(transport_bytes)
        if partial:
            piece = &work.staged[work.staged_count - 1]
            piece.wants = OFFLOAD_CSUM
            piece.header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
            piece.header.csum_start = <uint16_t>cut.transport
            piece.header.csum_offset = <uint16_t>(cut.checksum - cut.transport)
            vq_put_u16(head + cut.checksum, checksum_fold(total))
            continue
        total += checksum_add(transport, cut.transport_bytes)      # an even count: words stay words
        checksum = ~checksum_fold(total + checksum_add(cut.frame + cut.body + number * cut.size, bytes))
        vq_put_u16(head + cut.checksum, _without_zero(checksum) if udp else checksum)
    return ALL_SENT


# ---- UFO ----

cdef void _blank_options(uint8_t* ip, uint32_t header_bytes) noexcept nogil:
    """Turn the options that only a first fragment carries into no-operations (RFC 791, 3.1: the copied flag)."""
    cdef uint32_t at = IPV4_HEADER_MIN, bytes
    while at < header_bytes and ip[at] != IPV4_OPTION_END:
        if ip[at] == IPV4_OPTION_NOP:
            at += 1
            continue
        bytes = ip[at + 1] if at + 1 < header_bytes else 0
        if bytes < 2 or at + bytes > header_bytes:
            return               # malformed: it travels on as it came
        if not ip[at] & IPV4_OPTION_COPIED:
            memset(ip + at, IPV4_OPTION_NOP, bytes)
        at += bytes


cdef int _cut_fragments(offload_t* work, endpoint_t* target, uint32_t owner, cut_t* cut) noexcept nogil:
    """Stage the packet, its checksum already completed, as IP fragments: as _flush returns."""
    cdef uint32_t number, bytes, header_bytes = cut.body, fragment, ident
    cdef uint8_t* head
    cdef uint8_t* extension
    cdef uint8_t follows = 0
    cdef int dealt
    work.ident += IDENT_STEP
    ident = work.ident
    if cut.ipv6:
        header_bytes += IPV6_FRAGMENT_HEADER
        follows = cut.frame[cut.next_header]
        cut.frame[cut.next_header] = IPPROTO_FRAGMENT
    else:
        if cut.ident:
            ident = cut.ident    # a driver that meant to send it whole may have left it at zero
        _begin_ipv4(cut)
    for number in range(cut.pieces):
        if work.staged_count == BURST_MAX:
            dealt = _flush(work, target, cut.pieces - number)
            if dealt != ALL_SENT:
                return dealt
        bytes = min(cut.size, cut.length - cut.body - number * cut.size)
        head = _stage_piece(work, owner, number, cut, header_bytes, bytes)
        fragment = number * cut.size         # below 65536, and a multiple of 8
        if cut.ipv6:
            vq_put_u16(head + cut.network + 4, swap16(header_bytes - cut.network - IPV6_HEADER + bytes))
            extension = head + cut.body
            extension[0] = follows
            extension[1] = 0
            vq_put_u16(extension + 2, swap16(fragment | (number != cut.pieces - 1)))
            vq_put_u32(extension + 4, ident)
        else:
            fragment = fragment >> 3 | (IPV4_MORE_FRAGMENTS if number != cut.pieces - 1 else 0)
            _finish_ipv4(cut, head, cut.body - cut.network + bytes, ident, fragment)
            if number == 0 and cut.transport - cut.network > IPV4_HEADER_MIN:
                _blank_options(cut.frame + cut.network, cut.transport - cut.network)
                cut.fixed = checksum_add(cut.frame + cut.network, cut.transport - cut.network)
    return ALL_SENT


# ---- a packet ----

cdef int _drop(offload_t* work, endpoint_t* target, int cause) noexcept nogil:
    """Count a packet as dropped, after all before it went out: a caller that comes again with it would count twice."""
    cdef int dealt = _flush(work, target, 0)
    if dealt == ALL_SENT:
        target.pushed.dropped[cause] += 1
    return dealt


cdef int _complete(offload_t* work, endpoint_t* target, packet_t* packet, uint32_t owner) noexcept nogil:
    """Stage one packet, in as many pieces as it takes: as _flush returns. A slot and arena for it are free."""
    cdef virtio_net_hdr_t* header = &packet.header
    cdef uint32_t kind = header.gso_type & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    cdef uint8_t* frame
    cdef cut_t cut
    # Sources have checked this (net_header_check); it costs nothing to depend on no source.
    if packet.length > PACKET_MAX:
        return _drop(work, target, DROP_TOO_LONG)
    if not header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM or \
            <uint32_t>header.csum_start + header.csum_offset + 2 > packet.length:
        return _drop(work, target, DROP_BAD_CSUM)
    frame = _linearise(work, packet)
    if kind == VIRTIO_NET_HDR_GSO_NONE:
        _complete_checksum(frame, packet.length, header)
        _stage_frame(work, owner, frame, packet.length)
        return ALL_SENT
    memset(&cut, 0, sizeof(cut))
    cut.frame = frame
    cut.length = packet.length
    if not _parse(&cut, header):
        return _drop(work, target, DROP_BAD_GSO)
    if kind != VIRTIO_NET_HDR_GSO_UDP:
        return _cut_segments(work, target, owner, &cut, header)
    _complete_checksum(frame, packet.length, header)
    if cut.pieces > 1:
        return _cut_fragments(work, target, owner, &cut)
    _stage_frame(work, owner, frame, packet.length)
    return ALL_SENT


cdef int offload_push(offload_t* work, endpoint_t* target, packet_t* packets, int count) noexcept nogil:
    cdef uint32_t refused = ~target.accepts
    cdef int i = 0, run, taken, dealt
    work.staged_count = work.arena_used = 0
    while i < count:
        if packets[i].wants & refused:
            if work.staged_count == BURST_MAX or work.arena_used >= ARENA_STEP:
                dealt = _flush(work, target, 0)
                if dealt != ALL_SENT:
                    return dealt
                work.arena_used = 0
            dealt = _complete(work, target, &packets[i], <uint32_t>i)
            if dealt != ALL_SENT:
                return dealt
            i += 1
            continue
        dealt = _flush(work, target, 0)
        if dealt != ALL_SENT:
            return dealt
        work.arena_used = 0
        run = 1
        while i + run < count and not packets[i + run].wants & refused:
            run += 1
        taken = target.push(target, packets + i, run)
        if taken < run:
            return i + taken
        i += run
    dealt = _flush(work, target, 0)
    return count if dealt == ALL_SENT else dealt


cdef class Offload:
    """The memory in which one worker completes checksums and segmentation.

    Notes
    -----
    Threading: one a worker; used by that worker alone.
    Spec: VIRTIO 1.3, 5.1.6.2 and 5.1.6.4.
    """

    def __cinit__(self):
        # All else is zero already. Fragments of two workers or two runs should not meet under one identification.
        self.work.ident = int.from_bytes(os.urandom(4), "little")
