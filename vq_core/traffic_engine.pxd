"""The loop that makes, sends, receives and verifies packets at speed.

A stream is one transmitq, one receiveq, or a pair of them; packets are numbered by the stream that sent them. A loop
serves its streams in turn. What it does with a ring is compiled for each layout by itself: `packed` is a literal in
every function that has it.

The window: no stream has more packets under way than its receiveq has buffers, so that a device never needs to drop.

Thread: one thread runs an engine; any thread may read the counters and set `stop`.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vq_core.driver cimport driver_t, driver_used_t
from vq_core.packets cimport order_t, totals_t
from vq_core.virtio cimport gpa_t, virtq_desc_t

cdef enum:
    SLOT_HEAD = 64                   # bytes of a slot before the payload: the header ends where the payload begins
    BATCH = 32                       # packets of a stream in a round
    SUB_BATCH = 8                    # packets published at once
    SIZES_MAX = 256
    PARTS_MAX = 16                   # descriptors of a packet
    STREAMS_MAX = 256

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
    order_t order                    # of what came back
    uint64_t ethernet[2]             # words 0 and 1
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

# Write the Ethernet header, words 0 and 1 of a packet, into every slot of a sending side.
cdef void side_head_all(side_t* side, const uint64_t* ethernet) noexcept nogil

# Post every buffer of a receiving side.
cdef void side_post_all(side_t* side) noexcept nogil

# Run until the duration, the limit or `stop` ends it, then wait for what is under way.
cdef void traffic_run(traffic_t* traffic) noexcept nogil
