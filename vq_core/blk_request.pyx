"""From a descriptor chain to reads and writes of a disk."""
from libc.errno cimport EAGAIN, EFAULT, EOPNOTSUPP
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.uio cimport RWF_NOWAIT
from vq_core.arch cimport vq_load_u32, vq_load_u64, vq_store_release_u32
from vq_core.blk_queue cimport blk_queue_t
from vq_core.chain cimport chain_next, chain_t
from vq_core.dirty cimport dirty_mark
from vq_core.disk cimport (DISK_ID_BYTES, SECTOR_BYTES, disk_discard, disk_flush, disk_read, disk_t, disk_write,
                           disk_write_zeroes)
from vq_core.iotlb cimport IOTLB_READ, IOTLB_WRITE
from vq_core.pool cimport job_t
from vq_core.queue_state cimport (BROKEN_ADDRESS, BROKEN_REQUEST, queue_absent, queue_break, queue_fail, queue_t,
                                  queue_translate_part)
from vq_core.virtio cimport VIRTQ_DESC_F_WRITE, gpa_t, virtq_desc_t


# ---- what the guest asks for ----

cdef inline void _add_part(blk_request_t* request, uint8_t* host, gpa_t addr, uint64_t length) noexcept nogil:
    if request.count == BLK_PARTS_MAX:
        request.too_many = True      # it fails; the walk goes on to find its status byte
        return
    request.parts[request.count].iov_base = host
    request.parts[request.count].iov_len = length
    request.addrs[request.count] = addr
    request.count += 1


cdef int blk_parse(blk_request_t* request, queue_t* queue, chain_t* chain) noexcept nogil:
    cdef blk_header_t header
    cdef virtq_desc_t descriptor
    cdef uint8_t* host
    cdef uint64_t part, left, in_header = 0
    cdef gpa_t addr, guest_addr
    cdef int step
    request.count = request.readable_count = request.range_count = 0
    request.readable_bytes = request.writable_bytes = 0
    request.too_many = False
    request.status = NULL
    request.written = 1
    while True:
        step = chain_next(chain, queue, &descriptor)
        if step <= 0:
            break
        addr = descriptor.addr
        left = descriptor.len
        if addr + left < addr:
            queue_break(queue, BROKEN_ADDRESS, chain.id)
            return -1
        if request.too_many and queue.iotlb != NULL:
            addr += left - 1     # where the status byte may be; nothing else of it is asked for
            left = 1
        while left > 0:
            host = queue_translate_part(queue, addr, left, IOTLB_WRITE if descriptor.flags & VIRTQ_DESC_F_WRITE
                                        else IOTLB_READ, &part, &guest_addr)
            if host == NULL:
                queue_fail(queue, queue_absent(queue), chain.id)
                return -1
            if descriptor.flags & VIRTQ_DESC_F_WRITE:
                _add_part(request, host, guest_addr, part)
                request.writable_bytes += part
                request.status = host + (part - 1)
                request.status_addr = guest_addr + (part - 1)
            elif in_header < sizeof(blk_header_t):
                part = min(part, sizeof(blk_header_t) - in_header)
                memcpy(<char*>&header + in_header, host, part)
                in_header += part
            else:
                _add_part(request, host, guest_addr, part)
                request.readable_bytes += part
                request.readable_count = request.count
            addr += part
            left -= part
    if step < 0:
        queue_fail(queue, chain.broken, chain.id)
        return -1
    if in_header < sizeof(blk_header_t) or request.status == NULL:
        queue_break(queue, BROKEN_REQUEST, chain.id)
        return -1
    # The status byte is not data. With too many parts the last one may not be here, and none is used.
    request.writable_bytes -= 1
    if not request.too_many:
        request.parts[request.count - 1].iov_len -= 1
        if request.parts[request.count - 1].iov_len == 0:
            request.count -= 1
    request.type = header.type
    request.sector = header.sector
    request.id = chain.id
    request.slots = chain.slots
    return 0


# ---- whether it may be done ----

cdef inline bint _inside(disk_t* disk, uint64_t sector, uint64_t count) noexcept nogil:
    """Whether the disk has these sectors; nothing overflows, since the count is compared first."""
    cdef uint64_t capacity = vq_load_u64(&disk.capacity)
    return count <= capacity and sector <= capacity - count


cdef uint8_t _check_transfer(blk_request_t* request, uint64_t length) noexcept nogil:
    if length % SECTOR_BYTES or not _inside(request.disk, request.sector, length // SECTOR_BYTES):
        return VIRTIO_BLK_S_IOERR
    return VIRTIO_BLK_S_OK


cdef uint8_t _check_ranges(blk_request_t* request) noexcept nogil:
    """Copy the ranges out of the guest's memory, and check the copy."""
    cdef uint64_t size = request.readable_bytes, done = 0
    cdef uint32_t known_flags = 0, most = BLK_DISCARD_SECTORS_MAX
    cdef blk_range_t* wanted
    cdef int i
    if size == 0 or size % sizeof(blk_range_t) or size > sizeof(request.ranges):
        return VIRTIO_BLK_S_IOERR
    for i in range(request.readable_count):
        memcpy(<char*>request.ranges + done, request.parts[i].iov_base, request.parts[i].iov_len)
        done += request.parts[i].iov_len
    request.range_count = <int>(size // sizeof(blk_range_t))
    if request.type == VIRTIO_BLK_T_WRITE_ZEROES:
        known_flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        most = BLK_WRITE_ZEROES_SECTORS_MAX
    for i in range(request.range_count):
        wanted = &request.ranges[i]
        if wanted.flags & ~known_flags:
            return VIRTIO_BLK_S_UNSUPP
        if wanted.num_sectors > most or not _inside(request.disk, wanted.sector, wanted.num_sectors):
            return VIRTIO_BLK_S_IOERR
    return VIRTIO_BLK_S_OK


cdef uint8_t _check(blk_request_t* request) noexcept nogil:
    """VIRTIO_BLK_S_OK, or why the request fails without being tried."""
    cdef uint32_t type = request.type
    if request.too_many:
        return VIRTIO_BLK_S_IOERR
    if type == VIRTIO_BLK_T_IN:
        return _check_transfer(request, request.writable_bytes)
    if type == VIRTIO_BLK_T_FLUSH or type == VIRTIO_BLK_T_GET_ID:
        return VIRTIO_BLK_S_OK
    if type != VIRTIO_BLK_T_OUT and type != VIRTIO_BLK_T_DISCARD and type != VIRTIO_BLK_T_WRITE_ZEROES:
        return VIRTIO_BLK_S_UNSUPP
    if request.disk.read_only:
        return VIRTIO_BLK_S_IOERR
    return _check_transfer(request, request.readable_bytes) if type == VIRTIO_BLK_T_OUT else _check_ranges(request)


# ---- doing it ----

cdef int _read(blk_request_t* request, int flags) noexcept nogil:
    return disk_read(request.disk, &request.parts[request.readable_count], request.count - request.readable_count,
                     request.sector * SECTOR_BYTES, request.writable_bytes, flags)


cdef int _write(blk_request_t* request, int flags) noexcept nogil:
    return disk_write(request.disk, request.parts, request.readable_count, request.sector * SECTOR_BYTES,
                      request.readable_bytes, flags)


cdef int _each_range(blk_request_t* request) noexcept nogil:
    cdef blk_range_t* wanted
    cdef uint64_t offset, length
    cdef int i, error = 0
    for i in range(request.range_count):
        wanted = &request.ranges[i]
        offset, length = wanted.sector * SECTOR_BYTES, wanted.num_sectors * <uint64_t>SECTOR_BYTES
        if length == 0:
            continue
        if request.type == VIRTIO_BLK_T_DISCARD:
            error = disk_discard(request.disk, offset, length)
        else:
            error = disk_write_zeroes(request.disk, offset, length,
                                      wanted.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0)
        if error:
            break
    return error


cdef void _settle(blk_request_t* request, int error) noexcept nogil:
    """Note how it ended."""
    request.result = VIRTIO_BLK_S_OK if error == 0 else VIRTIO_BLK_S_IOERR
    if error == EFAULT:
        # Its addresses were checked, so the owner has truncated the memory, and the kernel came upon it before the
        # guard could. The map is that of its start: it is not replaced while a request is under way.
        vq_store_release_u32((<blk_queue_t*>request.owner).queue.memory.lost, 1)
    if error == 0 and request.type == VIRTIO_BLK_T_IN:
        request.written = <uint32_t>request.writable_bytes + 1     # a chain has less than 2^32 bytes


cdef void _run(job_t* job) noexcept nogil:
    """In a thread of the pool."""
    cdef blk_request_t* request = <blk_request_t*>job
    if request.type == VIRTIO_BLK_T_IN:
        _settle(request, _read(request, 0))
    elif request.type == VIRTIO_BLK_T_OUT:
        _settle(request, _write(request, 0))
    elif request.type == VIRTIO_BLK_T_FLUSH:
        _settle(request, disk_flush(request.disk))
    else:
        _settle(request, _each_range(request))


cdef void _give_id(blk_request_t* request) noexcept nogil:
    cdef uint64_t done = 0, part
    cdef int i
    for i in range(request.readable_count, request.count):
        part = min(request.parts[i].iov_len, DISK_ID_BYTES - done)
        memcpy(request.parts[i].iov_base, request.disk.id + done, part)
        done += part
    request.result = VIRTIO_BLK_S_OK
    request.written = <uint32_t>done + (1 if done == request.writable_bytes else 0)


cdef inline bint _try_read(blk_request_t* request) noexcept nogil:
    """Read what is in memory; True when that was all, or when it failed."""
    cdef disk_t* disk = request.disk
    cdef int error
    if not disk.ready and vq_load_u32(&disk.no_nowait_read):
        return False
    error = _read(request, 0 if disk.ready else RWF_NOWAIT)
    if not disk.ready and error == EOPNOTSUPP:
        vq_store_release_u32(&disk.no_nowait_read, 1)
        return False
    if error == EAGAIN:
        return False
    _settle(request, error)
    return True


cdef inline bint _try_write(blk_request_t* request) noexcept nogil:
    """Write into memory, unless the write must reach the medium; True when it is done, or has failed."""
    cdef disk_t* disk = request.disk
    cdef int error
    if not disk.ready and (vq_load_u32(&disk.stable) or vq_load_u32(&disk.no_nowait_write)):
        return False
    error = _write(request, 0 if disk.ready else RWF_NOWAIT)
    if not disk.ready and error == EOPNOTSUPP:
        vq_store_release_u32(&disk.no_nowait_write, 1)
        return False
    if error == EAGAIN:
        return False
    _settle(request, error)
    return True


cdef bint blk_begin(blk_request_t* request) noexcept nogil:
    request.job.run = _run
    request.result = _check(request)
    if request.result != VIRTIO_BLK_S_OK:
        return True
    if request.type == VIRTIO_BLK_T_IN:
        return request.writable_bytes <= BLK_AT_ONCE_BYTES and _try_read(request)
    if request.type == VIRTIO_BLK_T_OUT:
        return request.readable_bytes <= BLK_AT_ONCE_BYTES and _try_write(request)
    if request.type == VIRTIO_BLK_T_GET_ID:
        _give_id(request)
        return True
    return request.type == VIRTIO_BLK_T_FLUSH and request.disk.ready


cdef uint32_t blk_finish(blk_request_t* request, queue_t* queue) noexcept nogil:
    cdef int i
    request.status[0] = request.result
    if queue.log != NULL:
        # A request that failed may have been written in part, so all of it is marked.
        if request.type == VIRTIO_BLK_T_IN or request.type == VIRTIO_BLK_T_GET_ID:
            for i in range(request.readable_count, request.count):
                dirty_mark(queue.log, request.addrs[i], request.parts[i].iov_len)
        dirty_mark(queue.log, request.status_addr, 1)
    return request.written
