"""One request of a virtio-blk driver: what a descriptor chain asks for, and doing it (VIRTIO 1.3, 5.2.6).

    taken -> blk_parse -> blk_begin -> (done at once, or a thread of the pool runs it) -> blk_finish -> given back

Everything that the guest says is copied once while its chain is walked: type, sector, ranges to discard. The data is
moved by the kernel, straight between the file and the guest's buffers.

Owner: the worker of the queue; from `pool_submit` to `pool_collect` the pool's thread. The guest's memory stays mapped
as long as a request is under way, since the worker lets nothing change before all are done.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec
from vq_core.chain cimport chain_t
from vq_core.disk cimport disk_t
from vq_core.pool cimport job_t
from vq_core.queue_state cimport queue_t
from vq_core.virtio cimport gpa_t

cdef enum:
    BLK_PARTS_MAX = 256          # pieces of memory: seg_max, with room for buffers that lie over regions
    BLK_RANGES_MAX = 16          # max_discard_seg and max_write_zeroes_seg
    BLK_DISCARD_SECTORS_MAX = 1 << 22            # of a range: 2 GiB
    BLK_WRITE_ZEROES_SECTORS_MAX = 1 << 15       # 16 MiB, which may have to be written out
    BLK_AT_ONCE_BYTES = 131072   # what a worker moves itself; longer requests go to the pool, side by side

cdef enum:
    VIRTIO_BLK_T_IN = 0
    VIRTIO_BLK_T_OUT = 1
    VIRTIO_BLK_T_FLUSH = 4
    VIRTIO_BLK_T_GET_ID = 8
    VIRTIO_BLK_T_DISCARD = 11
    VIRTIO_BLK_T_WRITE_ZEROES = 13

    VIRTIO_BLK_S_OK = 0
    VIRTIO_BLK_S_IOERR = 1
    VIRTIO_BLK_S_UNSUPP = 2

    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

cdef struct blk_header_t:        # 5.2.6, the first 16 device-readable bytes
    uint32_t type
    uint32_t reserved
    uint64_t sector

cdef struct blk_range_t:         # 5.2.6, a segment of DISCARD and WRITE_ZEROES
    uint64_t sector
    uint32_t num_sectors
    uint32_t flags

cdef struct blk_request_t:
    job_t job                    # first, so that a job is its request
    disk_t* disk
    void* owner                  # the blk_queue_t that it is a request of
    uint32_t type
    uint16_t id                  # of the descriptor chain
    uint16_t slots
    uint8_t result               # VIRTIO_BLK_S_*
    bint too_many                # more than BLK_PARTS_MAX
    uint64_t sector
    uint64_t readable_bytes      # without the header
    uint64_t writable_bytes      # without the status
    uint32_t written             # bytes from the start of the writable part, when it has succeeded
    uint8_t* status              # last device-writable byte
    gpa_t status_addr
    int readable_count           # parts that are device-readable; the others follow
    int count
    int range_count
    blk_range_t ranges[BLK_RANGES_MAX]
    gpa_t addrs[BLK_PARTS_MAX]   # of each part, for the dirty log
    iovec parts[BLK_PARTS_MAX]

# Fill the request from a chain: 0, or -1 and the queue is broken, or parked.
cdef int blk_parse(blk_request_t* request, queue_t* queue, chain_t* chain) noexcept nogil

# Do it if that needs no waiting: True, and `result` stands. False: `job.run` must be run in another thread.
cdef bint blk_begin(blk_request_t* request) noexcept nogil

# Write the status and log what was written; the length for the used element.
cdef uint32_t blk_finish(blk_request_t* request, queue_t* queue) noexcept nogil
