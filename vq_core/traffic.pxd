"""Packets with a number and a checksum: made, sent, received and verified at speed.

A stream is one transmitq, one receiveq, or a pair of them; packets are numbered by the stream that sent them. Layout of
a packet (little-endian words of 8 bytes):

    word 0, 1    Ethernet header (destination, source, ethertype 0x88b5) and two zero bytes
    word 2       sequence number in its stream
    word 3       length in bytes, bits 0 to 31; stream, bits 32 to 47; PACKET_MAGIC, bits 48 to 63
    word 4       checksum of all other words and of the bytes behind the last whole one
    word 5 ...   a pattern of sequence number and position

Order: `next` is the number that a stream expects. A number ahead of it leaves a gap, which counts as lost at once; a
number behind it that fills a gap counts as reordered (and is no longer lost), any other as duplicated. `missing` holds
the gaps of the last SPAN numbers. A packet whose checksum, length or header is wrong is `changed`: its number is not
believed, so it leaves a gap too, which `traffic_lost` takes off again.

The window: no stream has more packets under way than its receiveq has buffers, so that a device never needs to drop.

Thread: one thread runs an engine; any thread may read the counters and set `stop`.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.driver cimport driver_part_t, driver_t, driver_used_t
from vq_core.virtio cimport gpa_t, virtq_desc_t

cdef enum:
    PACKET_MIN = 64                  # bytes
    PACKET_LIMIT = 65535
    PACKET_MAGIC = 0x7671            # "vq"
    SLOT_HEAD = 64                   # bytes of a slot before the payload: the header ends where the payload begins
    BATCH = 32                       # packets of a stream in a round
    SUB_BATCH = 8                    # packets published at once
    SPAN = 65536                     # sequence numbers whose fate is remembered
    SIZES_MAX = 256
    PARTS_MAX = 16                   # descriptors of a packet

cdef struct totals_t:                # one writer: the engine's thread
    uint64_t sent
    uint64_t sent_bytes
    uint64_t received
    uint64_t received_bytes          # without virtio-net headers
    uint64_t verified
    uint64_t gaps                    # numbers that did not come (yet), changed ones included
    uint64_t duplicated
    uint64_t reordered
    uint64_t changed

cdef struct side_t:                  # one queue of a stream with its buffers
    driver_t* queue                  # NULL: the stream has no such side
    uint8_t* slots                   # queue.num of them, one an id
    gpa_t slots_addr
    uint64_t stride                  # bytes from slot to slot
    uint32_t header_bytes            # of the virtio-net header: 10 or 12
    uint32_t capacity                # payload bytes of a slot
    uint32_t parts                   # descriptors of a buffer
    virtq_desc_t* tables             # indirect: PARTS_MAX entries an id; NULL: direct chains
    gpa_t tables_addr
    bint mergeable

cdef struct stream_t:
    side_t send
    side_t receive
    uint32_t window                  # most packets under way
    uint32_t reach                   # streams that may be named by packets that come in here
    uint64_t sent                    # next sequence number
    uint64_t come                    # unique packets of this stream that came back
    uint64_t gone                    # gaps of this stream
    uint64_t next                    # sequence number expected
    uint64_t ethernet[2]             # words 0 and 1
    uint64_t* missing                # SPAN bits
    driver_used_t* used              # room for a whole ring
    uint8_t* scratch                 # where merged packets are put together

cdef struct traffic_t:
    stream_t* streams
    uint32_t stream_count
    uint32_t size_count
    uint32_t size_at
    uint32_t sizes[SIZES_MAX]
    bint windowed                    # what is sent comes back here
    bint verify
    bint sleep                       # wait for calls when idle
    uint64_t limit                   # packets to send (or to receive, without a sending side); 0: none
    uint64_t duration_ns             # 0: until stopped
    uint64_t patience_ns             # without progress for so long: what is under way is lost
    uint64_t active_ns               # how long the engine sent, so far
    uint32_t stop                    # set by any thread
    uint32_t error                   # DRIVER_* of the queue that ended the run
    uint32_t error_value
    uint32_t error_num
    totals_t totals

cdef class Traffic:
    cdef traffic_t traffic
    cdef list _queues                # every DriverQueue, claimed while the engine runs
    cdef list _blocks                # guest memory of all slots and tables
    cdef object cpu
    cdef readonly bint running
