"""Requests between a ring and Python."""
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t
from vq_core.cursor cimport cursor_t
from vq_core.dirty cimport dirty_mark
from vq_core.memory cimport memory_translate_part
from vq_core.queue cimport Queue
from vq_core.queue_state cimport (BROKEN_ADDRESS, BROKEN_AVAIL_IDX, BROKEN_HEAD, BROKEN_ID, BROKEN_MEMORY_LOST,
                                  BROKEN_REQUEST, queue_break, queue_comes_alive, queue_lost, queue_suppress_kicks,
                                  queue_t)
from vq_core.ring cimport ring_begin, ring_commit_take, ring_give_back, ring_look, ring_t, ring_take
from vq_core.served_queue cimport ServedQueue
from vq_core.virtio cimport VIRTQ_DESC_F_WRITE, gpa_t, virtq_desc_t


cdef int _copy_in(queue_t* queue, request_t* request, virtq_desc_t* descriptor, uint8_t* to,
                  uint32_t limit) noexcept nogil:
    """Copy a readable descriptor, as far as there is room, and insist that all of it lies in memory."""
    cdef gpa_t addr = descriptor.addr
    cdef uint64_t left = descriptor.len, part, room
    cdef uint8_t* host
    request.readable_bytes += left
    while left > 0:
        host = memory_translate_part(queue.memory, &queue.hint, addr, left, &part)
        if host == NULL:
            return -1
        room = min(part, <uint64_t>(limit - request.copied))
        memcpy(to + request.copied, host, room)
        request.copied += <uint32_t>room
        addr += part
        left -= part
    return 0


cdef int _keep_writable(queue_t* queue, request_t* request, virtq_desc_t* descriptor) noexcept nogil:
    """Note where an answer may go, if there is room for that, and insist that all of it lies in memory."""
    cdef gpa_t addr = descriptor.addr
    cdef uint64_t left = descriptor.len, part
    while left > 0:
        if memory_translate_part(queue.memory, &queue.hint, addr, left, &part) == NULL:
            return -1
        addr += part
        left -= part
    if request.part_count < REQUEST_PARTS_MAX:
        request.addrs[request.part_count] = descriptor.addr
        request.lengths[request.part_count] = descriptor.len
        request.writable_bytes += descriptor.len
        request.part_count += 1
    return 0


cdef int _walk(queue_t* queue, request_t* request, chain_t* chain, uint8_t* to, uint32_t limit) noexcept nogil:
    """Fill the request from a chain: 0, or -1 and the queue is broken."""
    cdef virtq_desc_t descriptor
    cdef int step, status
    while True:
        step = chain_next(chain, queue, &descriptor)
        if step <= 0:
            break
        status = -1
        if descriptor.addr + descriptor.len >= descriptor.addr:
            if descriptor.flags & VIRTQ_DESC_F_WRITE:
                status = _keep_writable(queue, request, &descriptor)
            else:
                status = _copy_in(queue, request, &descriptor, to, limit)
        if status < 0:
            queue_break(queue, BROKEN_ADDRESS, chain.id)
            return -1
    if step < 0 or chain_end(chain, queue) < 0:
        queue_break(queue, chain.broken, chain.id)
        return -1
    if queue.ring.is_packed and chain.id >= queue.ring.num:
        queue_break(queue, BROKEN_ID, chain.id)
        return -1
    return 0


cdef int request_take(queue_t* queue, request_t* request, uint8_t* to, uint32_t limit) noexcept nogil:
    cdef ring_t* ring = &queue.ring
    cdef bint packed = ring.is_packed
    cdef virtq_desc_t descriptor
    cdef cursor_t cursor
    cdef chain_t chain
    cdef int available, status
    if not queue.live and not queue_comes_alive(queue):
        return 0                 # of a disabled ring nothing is taken: no request can be served without an effect
    available = ring_begin(ring, packed, &cursor, 1)
    if queue_lost(queue):
        queue_break(queue, BROKEN_MEMORY_LOST, 0)
        return -1
    if available < 0:
        queue_break(queue, BROKEN_AVAIL_IDX, ring.split.shadow_avail_idx)
    if available <= 0:
        return available
    status = ring_look(ring, packed, &cursor, &descriptor)
    if status < 0:
        queue_break(queue, BROKEN_HEAD, ring.split.bad_head)
    if status <= 0:
        return status
    queue_suppress_kicks(queue, packed)
    request.copied = request.part_count = 0
    request.readable_bytes = request.writable_bytes = 0
    chain_begin(&chain, queue, cursor.head, &descriptor)
    if _walk(queue, request, &chain, to, limit) < 0:
        return -1
    ring_take(ring, packed, &cursor, chain.slots)
    ring_commit_take(ring, packed, &cursor)
    request.id = chain.id
    request.slots = chain.slots
    request.steps = chain.steps
    request.life = queue.lives
    return 1


cdef int64_t request_answer(queue_t* queue, request_t* request, const uint8_t* data, uint64_t length) noexcept nogil:
    cdef uint64_t done = 0, left, part
    cdef uint32_t i
    cdef gpa_t addr
    cdef uint8_t* host
    for i in range(request.part_count):
        addr = request.addrs[i]
        left = min(<uint64_t>request.lengths[i], length - done)
        while left > 0:
            host = memory_translate_part(queue.memory, &queue.hint, addr, left, &part)
            if host == NULL:     # the memory has changed since the request was taken
                queue_break(queue, BROKEN_ADDRESS, request.id)
                return -1
            memcpy(host, data + done, part)
            if queue.log != NULL:
                dirty_mark(queue.log, addr, part)
            addr += part
            done += part
            left -= part
    return <int64_t>done


cdef class Chain:
    """One request of a driver: its bytes, copied, and a place for the answer.

    Attributes
    ----------
    data : bytes
        The device-readable bytes; no more than the queue's limit.
    """

    @property
    def readable_bytes(self):
        """int: device-readable bytes that the driver sent; more than there are in `data` when they are too many."""
        return self.request.readable_bytes

    @property
    def writable_bytes(self):
        """int: how long an answer may be."""
        return self.request.writable_bytes

    @property
    def alive(self):
        """bool: it waits for its answer, and the ring that it came from still runs."""
        return self._queue is not None and self._queue._runs(&self.request)

    def complete(self, bytes answer not None=b""):
        """Answer, and give the buffer back to the driver, who sees it after `ChainQueue.publish`.

        Parameters
        ----------
        answer : bytes
            Written to the beginning of the device-writable part; at most `writable_bytes`.

        Returns
        -------
        bool
            False: the ring was stopped or broken meanwhile, and nothing was written.

        Raises
        ------
        ValueError
            The answer is too long, or the request was answered before; nothing was written.

        Notes
        -----
        With IN_ORDER requests are answered in the order in which they were taken (VIRTIO 1.3, 2.7.9).
        """
        cdef ChainQueue queue = self._queue
        cdef queue_t* ring
        cdef int64_t written
        if queue is None:
            raise ValueError("the request was answered already")
        if <uint64_t>len(answer) > self.request.writable_bytes:
            raise ValueError(f"an answer of {len(answer)} bytes; the request has room for "
                             f"{self.request.writable_bytes}")
        self._queue = None
        if not queue._runs(&self.request):
            return False
        ring = &queue.queue.queue
        written = request_answer(ring, &self.request, <const uint8_t*>PyBytes_AsString(answer), len(answer))
        if written < 0:
            return False
        ring_give_back(&ring.ring, ring.ring.is_packed, self.request.id, <uint32_t>written, self.request.slots)
        queue._outstanding -= 1
        return True

    def refuse(self):
        """Break the queue: the request has no form that could be answered. It is not given back."""
        cdef ChainQueue queue = self._queue
        if queue is not None and queue._runs(&self.request):
            queue_break(&queue.queue.queue, BROKEN_REQUEST, self.request.id)
        self._queue = None


cdef class ChainQueue(ServedQueue):
    """Serves a virtqueue in the control thread, request by request, out of copies.

    Parameters
    ----------
    queue : Queue
        A queue that no worker owns.
    limit : int
        Device-readable bytes that are copied of one request.

    Notes
    -----
    As many requests are out as the ring has entries: a driver that makes a head available twice gains nothing by it.
    """

    def __cinit__(self, Queue queue not None, limit=4096):
        self._limit = limit
        self._copy = <uint8_t*>malloc(self._limit)
        if self._copy == NULL:
            raise MemoryError("request")

    def __dealloc__(self):
        free(self._copy)

    cdef bint _runs(self, request_t* request) noexcept:
        """Whether the ring that a request came from still runs."""
        cdef queue_t* queue = &self.queue.queue
        return queue.started and queue.lives == request.life and not queue.broken

    def pop(self):
        """Take the next request.

        Returns
        -------
        Chain or None
            None if there is none, or the ring does not run, or a bad chain has just broken it.
        """
        cdef queue_t* queue = &self.queue.queue
        cdef Chain request
        if self._life != queue.lives:
            self._life = queue.lives
            self._outstanding = 0
        if self._outstanding >= queue.ring.num:
            return None
        request = Chain.__new__(Chain)
        if request_take(queue, &request.request, self._copy, self._limit) <= 0:
            return None
        self._outstanding += 1
        request._queue = self
        request.data = PyBytes_FromStringAndSize(<char*>self._copy, request.request.copied)
        return request
