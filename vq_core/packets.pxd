"""Packets with a number and a checksum, and the order in which they come.

A stream is what one sender numbers. Layout of a packet (little-endian words of 8 bytes):

    word 0, 1    Ethernet header (destination, source, ethertype 0x88b5) and two zero bytes
    word 2       sequence number in its stream
    word 3       length in bytes, bits 0 to 31; stream, bits 32 to 47; PACKET_MAGIC, bits 48 to 63
    word 4       checksum of all other words and of the bytes behind the last whole one
    word 5 ...   a pattern of sequence number and position

Order: `next` is the number that a stream expects. A number ahead of it leaves a gap, which counts as lost at once; a
number behind it that fills a gap counts as reordered (and is no longer lost), any other as duplicated. `missing` holds
the gaps of the last SPAN numbers. A packet whose checksum, length or header is wrong is `changed`: its number is not
believed, so it leaves a gap too, which whoever reports lost packets takes off again.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    PACKET_MIN = 64                  # bytes
    PACKET_LIMIT = 65535
    PACKET_MAGIC = 0x7671            # "vq"
    SPAN = 65536                     # sequence numbers whose fate is remembered

cdef struct totals_t:                # what became of packets; one writer: the engine's thread
    uint64_t sent
    uint64_t sent_bytes
    uint64_t received
    uint64_t received_bytes          # without virtio-net headers
    uint64_t verified
    uint64_t gaps                    # numbers that did not come (yet), changed ones included
    uint64_t duplicated
    uint64_t reordered
    uint64_t changed

cdef struct order_t:                 # of the packets of a stream
    uint64_t next                    # sequence number expected
    uint64_t come                    # unique packets that came
    uint64_t gone                    # gaps
    uint64_t* missing                # SPAN bits

# ---- packets ----

cdef inline uint64_t packet_rotate(uint64_t value, int by) noexcept nogil:
    return value << by | value >> (64 - by)

cdef inline uint64_t packet_mix(uint64_t lane, uint64_t word) noexcept nogil:
    """One step of a lane. The rotation keeps flips of high bits from cancelling each other out in the next step."""
    return packet_rotate(lane ^ word, 29) * <uint64_t>0x9e3779b97f4a7c15

cdef inline uint64_t packet_checksum(const uint8_t* data, uint32_t length) noexcept nogil:
    """Checksum of PACKET_MIN bytes or more without word 4: four lanes, so that multiplications overlap."""
    cdef const uint64_t* word = <const uint64_t*>data
    cdef uint64_t a = <uint64_t>0x243f6a8885a308d3
    cdef uint64_t b = <uint64_t>0x13198a2e03707344
    cdef uint64_t c = <uint64_t>0xa4093822299f31d0
    cdef uint64_t d = <uint64_t>0x082efa98ec4e6c89
    cdef uint64_t rest = 0
    cdef uint32_t left = length - 64
    a = packet_mix(a, word[0])
    b = packet_mix(b, word[1])
    c = packet_mix(c, word[2])
    d = packet_mix(d, word[3])
    b = packet_mix(b, word[5])
    c = packet_mix(c, word[6])
    d = packet_mix(d, word[7])
    word += 8
    while left >= 32:
        a = packet_mix(a, word[0])
        b = packet_mix(b, word[1])
        c = packet_mix(c, word[2])
        d = packet_mix(d, word[3])
        word += 4
        left -= 32
    while left >= 8:
        a = packet_mix(a, word[0]) + d
        word += 1
        left -= 8
    if left:
        memcpy(&rest, word, left)
        b = packet_mix(b, rest)
    a = packet_mix(packet_mix(packet_mix(a, b), c), d)
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

cdef inline bint packet_read(const uint8_t* data, uint32_t length, uint64_t* number, uint32_t* stream) noexcept nogil:
    """Whether this is one of our packets, `length` bytes long and unchanged; then its number and its stream."""
    cdef const uint64_t* word = <const uint64_t*>data
    cdef uint64_t kind, checksum
    if length < PACKET_MIN:
        return False
    kind = word[3]
    number[0] = word[2]
    stream[0] = <uint32_t>(kind >> 32) & 0xffff
    if (<uint32_t>kind != length) | (kind >> 48 != PACKET_MAGIC):
        return False
    if length == 64:
        checksum = packet_checksum(data, 64)
    else:
        checksum = packet_checksum(data, length)
    return checksum == word[4]

# ---- order ----

# The numbers from order.next to `until` were passed over: lost, unless they come later.
cdef void order_gap(order_t* order, totals_t* totals, uint64_t until) noexcept nogil

# A packet that is not the expected one, or that may fill a gap: ahead, late, or a second time.
cdef void order_odd(order_t* order, totals_t* totals, uint64_t number) noexcept nogil

cdef inline void order_note(order_t* order, totals_t* totals, uint64_t number) noexcept nogil:
    """Packet `number` came."""
    if number == order.next and order.gone == 0:
        order.next = number + 1
        order.come += 1
        totals.verified += 1
    else:
        order_odd(order, totals, number)
