"""Bursts of a device's queue as arrays."""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from vq_core.chain_parts cimport parts_mark, parts_read, parts_t, parts_write, span_t
from vq_core.packet_arrays cimport PacketArrays
from vq_core.packet_rows cimport PacketRows
from vq_core.queue_state cimport queue_t
from vq_core.ring cimport ring_give_back
from vq_core.taken cimport Taken, TakingQueue

import numpy as np


cdef class ChainRun(Taken):
    """Chains that were taken one behind the other."""

    def __dealloc__(self):
        free(self.answers)

    cdef int reserve(self, uint32_t room) except -1:
        self.answers = <answer_t*>calloc(room, sizeof(answer_t))
        if self.answers == NULL:
            raise MemoryError("burst")
        return 0

    cdef void _give_back(self, queue_t* queue) noexcept:
        cdef uint32_t i
        cdef answer_t* answer
        for i in range(self._chains):
            answer = &self.answers[i]
            if queue.log != NULL:
                parts_mark(&self._parts, answer.span.middle, answer.span.end, max(answer.length, answer.touched),
                           queue.log)
            ring_give_back(&queue.ring, queue.ring.is_packed, answer.span.id, answer.length, answer.span.slots)


cdef class DeviceBurst(PacketArrays):
    """Chains that were taken together, as packets: what their driver has sent, and room for an answer to each.

    Notes
    -----
    Threading: one thread at a time, any one.
    Spec: VIRTIO 1.3, 2.7.5, 2.8.

    Examples
    --------
    ::

        def handle(self, queue):
            while burst := queue.pull():
                first = burst.field(0, "u1")
                burst.scatter((first ^ 0xff)[:, None])
                burst.complete()
    """

    def __init__(self):
        raise TypeError("bursts are made by their queue alone: call pull()")

    cdef int _check(self) except -1:
        if self._run._over:
            raise ValueError("the burst was completed already; nothing of it can be used any more")
        return 0

    cdef uint32_t _length(self, uint32_t i) noexcept nogil:
        cdef uint64_t length = self._run.answers[i].span.readable_bytes
        return <uint32_t>(length - self._header) if length > self._header else 0

    cdef uint32_t _copy(self, uint32_t i, uint32_t offset, uint8_t* to, uint32_t size) noexcept nogil:
        cdef span_t* span = &self._run.answers[i].span
        cdef uint32_t length = self._length(i)
        if offset >= length:
            return 0
        size = min(size, length - offset)
        parts_read(&self._run._parts, span.first, span.middle, <uint64_t>self._header + offset, to, size)
        return size

    @property
    def queue(self):
        """DeviceQueue: where it came from."""
        return self._run._queue

    @property
    def alive(self):
        """bool: it is not completed, and the ring that it came from still runs."""
        return self._run.alive

    @property
    def headers(self):
        """numpy.ndarray of uint8, [count, header]: what stands before each packet; zeroes where that is not whole."""
        cdef uint32_t i
        cdef span_t* span
        cdef uint8_t[:, ::1] rows
        self._check()
        found = np.zeros((self.count, self._header), np.uint8)
        if self._header:
            rows = found
            for i in range(self._run._chains):
                span = &self._run.answers[i].span
                if span.readable_bytes >= self._header:
                    parts_read(&self._run._parts, span.first, span.middle, 0, &rows[i, 0], self._header)
        return found

    @property
    def rooms(self):
        """numpy.ndarray of uint32, [count]: how long the answer to each may be; no more than the queue's limit."""
        cdef uint32_t i
        cdef uint32_t[::1] row
        self._check()
        found = np.empty(self.count, np.uint32)
        row = found
        for i in range(self._run._chains):
            row[i] = <uint32_t>self._run.answers[i].span.writable_bytes
        return found

    def scatter(self, data, lengths=None):
        """Write the answer to each chain, from the beginning of its room.

        Parameters
        ----------
        data : bytes-like or array of uint8
            [count, size]: a row for each. [bytes]: one behind the other, as `gather` returns them.
        lengths : array of int, optional
            Bytes of each: of rows, all of them by default; of bytes in a line they are needed.

        Raises
        ------
        ValueError
            There is less room, or there are not as many as chains, and nothing was written; or the burst is completed.
        """
        cdef PacketRows rows = PacketRows(data, lengths)
        cdef uint32_t i, length
        cdef answer_t* answer
        self._check()
        if rows.count != self.count:
            raise ValueError(f"{rows.count} answers to {self.count} chains; each wants one, if only of no bytes")
        for i in range(self._run._chains):
            if <uint64_t>rows._lengths[i] > self._run.answers[i].span.writable_bytes:
                raise ValueError(f"{rows._lengths[i]} bytes to chain {i}; it has room for "
                                 f"{self._run.answers[i].span.writable_bytes}")
        with cython.critical_section(self._run._queue):      # where the ring may be about to stop
            if not self._run._queue._lives(self._run):
                return                                       # nobody waits for it any more
            for i in range(self._run._chains):
                answer = &self._run.answers[i]
                length = <uint32_t>rows._lengths[i]
                parts_write(&self._run._parts, answer.span.middle, answer.span.end, 0, rows.at(i), length)
                answer.length = length
                answer.touched = max(answer.touched, length)

    def complete(self, lengths=None):
        """Give all chains back to the driver, in the order in which it made them available; from any thread.

        Parameters
        ----------
        lengths : array of int, [count], optional
            Bytes of each answer; by default what `scatter` has written.

        Returns
        -------
        bool
            False: the ring was stopped or broken meanwhile, and nobody waits for the answers.

        Raises
        ------
        ValueError
            A length is more than there is room for, or the burst is completed already.
        """
        cdef uint32_t i
        cdef int64_t[::1] row
        if lengths is not None:
            lengths = np.array(lengths, np.int64)
            if lengths.shape != (self.count,):
                raise ValueError(f"lengths of shape {lengths.shape}, not ({self.count},), one for each chain")
            row = lengths
        with cython.critical_section(self):
            self._check()
            if lengths is not None:
                for i in range(self._run._chains):
                    if not 0 <= row[i] <= <int64_t>self._run.answers[i].span.writable_bytes:
                        raise ValueError(f"a length of {row[i]} bytes; chain {i} has room for "
                                         f"{self._run.answers[i].span.writable_bytes}")
                for i in range(self._run._chains):
                    self._run.answers[i].length = <uint32_t>row[i]
            self._run._over = True
        return self._run._finish()

    def __repr__(self):
        return f"<burst of {self.queue.name}: {self.count} chains, {'completed' if self._run._over else 'waiting'}>"


cdef DeviceBurst burst_take(TakingQueue queue, uint32_t most, uint32_t header, uint64_t most_bytes):
    cdef ChainRun run = ChainRun.__new__(ChainRun)
    cdef DeviceBurst burst
    cdef span_t* span
    cdef uint64_t total = 0
    cdef int status
    cdef uint32_t[::1] row
    cdef uint32_t i
    run.reserve(most)
    queue._refresh()
    while run._chains < most and total < most_bytes:
        span = &run.answers[run._chains].span
        status = queue._look(&run._parts, span)
        if status < 0 and run._chains == 0:
            raise MemoryError(f"{queue.name}: burst")
        if status <= 0:
            break
        if run._chains == 0:
            queue._bind(run)
        queue._commit(span)
        run._chains += 1
        run._weight += span.steps + (span.end - span.first)
        total += span.readable_bytes
    if run._chains == 0:
        return None
    queue._keep(run)
    burst = DeviceBurst.__new__(DeviceBurst)
    burst._run = run
    burst._header = header
    burst._bytes = total
    burst._room = run._chains
    burst.count = <int>run._chains
    lengths = np.empty(run._chains, np.uint32)
    row = lengths
    for i in range(run._chains):
        row[i] = burst._length(i)
    lengths.flags.writeable = False
    burst._lengths = lengths
    return burst


cdef Py_ssize_t burst_send(TakingQueue queue, PacketRows packets, PacketRows headers, uint64_t* dropped) except -1:
    cdef queue_t* ring_queue = &queue.queue.queue
    cdef parts_t parts
    cdef span_t span
    cdef uint64_t header = 0 if headers is None else <uint64_t>headers._lengths[0], length
    cdef Py_ssize_t i = 0, step = 0 if headers is None or headers.count == 1 else 1
    cdef int status = 0
    parts.items = NULL
    parts.count = parts.room = 0
    queue._refresh()
    while i < packets.count:
        if status == 0:
            parts.count = 0
            status = queue._look(&parts, &span)
            if status <= 0:
                break
        length = <uint64_t>packets._lengths[i]
        if header + length > span.writable_bytes:
            dropped[0] += 1
        else:
            if header:
                parts_write(&parts, span.middle, span.end, 0, headers.at(i * step), header)
            parts_write(&parts, span.middle, span.end, header, packets.at(i), length)
            queue._commit(&span)
            if ring_queue.log != NULL:
                parts_mark(&parts, span.middle, span.end, header + length, ring_queue.log)
            ring_give_back(&ring_queue.ring, ring_queue.ring.is_packed, span.id, <uint32_t>(header + length),
                           span.slots)
            queue._outstanding -= 1
            queue._held -= span.steps + (span.end - span.first)
            status = 0
        i += 1
    free(parts.items)
    if not queue._owner:
        queue._timer.set(0)      # between two turns: the next one shows it
    if status < 0 and i == 0:
        raise MemoryError(f"{queue.name}: packets")
    return i
