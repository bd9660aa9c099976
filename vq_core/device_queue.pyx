"""Chains of a driver as Python objects."""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t
from vq_core.cursor cimport cursor_t
from vq_core.dirty cimport dirty_mark
from vq_core.memory cimport memory_translate_part
from vq_core.queue cimport (BROKEN_ADDRESS, BROKEN_AVAIL_IDX, BROKEN_DEVICE, BROKEN_HEAD, BROKEN_ID,
                            BROKEN_MEMORY_LOST, BROKEN_REQUEST, Queue, queue_break, queue_comes_alive, queue_lost,
                            queue_suppress_kicks, queue_t)
from vq_core.ring cimport (ring_begin, ring_commit_take, ring_give_back, ring_has_more, ring_known, ring_look,
                           ring_next, ring_next_used, ring_shadow_used, ring_t, ring_take, ring_untake)
from vq_core.served_queue cimport ServedQueue
from vq_core.virtio cimport VIRTQ_DESC_F_WRITE, gpa_t, virtq_desc_t

from collections import deque
from threading import get_ident

cdef enum:
    SEGMENTS_USUAL = 4
    TURN_CHAINS = 64             # that one turn takes; then messages and other queues have theirs
    TURN_STEPS_MAX = 1 << 14     # descriptors read in one turn, but for the chain that passes it
    HELD_MAX = 1 << 18           # weight of the chains that are out, but for the one that passes it: 6 MiB of segments

TURN = TURN_CHAINS
TURN_STEPS = TURN_STEPS_MAX
HELD = HELD_MAX


cdef class Segment:
    """A part of a chain that lies in one piece; exports its bytes as a buffer."""

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self._host, self._length, not self._writable, flags)
        self._views += 1

    def __releasebuffer__(self, Py_buffer* buffer):
        self._views -= 1


cdef class DeviceChain:
    """One descriptor chain: bytes that the driver has sent, and room for what the device answers.

    Attributes
    ----------
    queue : DeviceQueue
        Where it came from.

    Notes
    -----
    Its bytes lie in guest memory, and the driver can change them meanwhile: read what decides something once, and
    judge what was read.
    Threading: one thread at a time, any one.
    Spec: VIRTIO 1.3, 2.7.5, 2.8.
    """

    def __dealloc__(self):
        free(self._segments)

    cdef int _grow(self, uint32_t room) noexcept nogil:
        cdef segment_t* grown = <segment_t*>realloc(self._segments, room * sizeof(segment_t))
        if grown == NULL:
            return -1
        self._segments = grown
        return 0

    cdef int _check(self) except -1:
        if self._over:
            raise ValueError("the chain was completed already; nothing of it can be used any more")
        return 0

    @property
    def readable_bytes(self):
        """int: bytes that the driver has sent."""
        return self._readable_bytes

    @property
    def writable_bytes(self):
        """int: how long an answer may be; no more than the queue's limit."""
        return self._writable_bytes

    @property
    def alive(self):
        """bool: it is not completed, and the ring that it came from still runs."""
        return not self._over and self.queue._lives(self)

    cdef tuple _views(self, uint32_t first, uint32_t end, bint writable):
        cdef Segment segment
        cdef uint32_t i
        self._check()
        if self._shown is None:
            self._shown = []
        views = []
        for i in range(first, end):
            segment = Segment.__new__(Segment)
            segment._memory = self._memory
            segment._host = self._segments[i].host
            segment._length = <Py_ssize_t>self._segments[i].length
            segment._writable = writable
            view = memoryview(segment)
            self._shown.append((segment, view))
            views.append(view)
        return tuple(views)

    @property
    def readable(self):
        """tuple of memoryview: what the driver has sent, as it lies in guest memory; read-only."""
        return self._views(0, self._readable_count, False)

    @property
    def writable(self):
        """tuple of memoryview: the room for an answer, as it lies in guest memory.

        What is written there counts when `complete` is given its length.
        """
        self._touched = self._writable_bytes
        return self._views(self._readable_count, self._count, True)

    def read(self, Py_ssize_t size=-1):
        """Copy the next bytes that the driver has sent.

        Parameters
        ----------
        size : int
            Most bytes to read; negative: all that are left.

        Returns
        -------
        bytes
            Fewer than `size` at the end.
        """
        data = self.read_at(self._read, size)
        self._read += <uint64_t>len(data)
        return data

    def read_at(self, uint64_t offset, Py_ssize_t size=-1):
        """Copy bytes that the driver has sent from `offset`; the place of `read` stays."""
        cdef uint64_t left, skip = offset, part
        cdef uint32_t i
        cdef char* to
        self._check()
        left = self._readable_bytes - offset if offset < self._readable_bytes else 0
        if size >= 0:
            left = min(left, <uint64_t>size)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>left)
        to = PyBytes_AS_STRING(data)
        for i in range(self._readable_count):
            if left == 0:
                break
            if skip >= self._segments[i].length:
                skip -= self._segments[i].length
                continue
            part = min(left, self._segments[i].length - skip)
            memcpy(to, self._segments[i].host + skip, part)
            to += part
            left -= part
            skip = 0
        return data

    def write(self, data):
        """Write the next bytes of the answer.

        Parameters
        ----------
        data : bytes-like

        Returns
        -------
        int
            Bytes written: all of them.

        Raises
        ------
        ValueError
            There is less room, and nothing was written; or the chain is completed.
        """
        cdef uint64_t written = self.write_at(self._written, data)
        self._written += written
        return written

    def write_at(self, uint64_t offset, data):
        """Write bytes of the answer at `offset`; the place of `write` stays."""
        cdef uint64_t left, skip = offset, part, length
        cdef uint32_t i
        cdef Py_buffer buffer
        cdef const char* source
        self._check()
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            length = left = <uint64_t>buffer.len
            if offset > self._writable_bytes or length > self._writable_bytes - offset:
                raise ValueError(f"{length} bytes at {offset}; the chain has room for {self._writable_bytes}")
            with cython.critical_section(self.queue):        # where the ring may be about to stop
                if not self.queue._lives(self):
                    return length                            # nobody waits for it any more
                source = <const char*>buffer.buf
                for i in range(self._readable_count, self._count):
                    if left == 0:
                        break
                    if skip >= self._segments[i].length:
                        skip -= self._segments[i].length
                        continue
                    part = min(left, self._segments[i].length - skip)
                    memcpy(self._segments[i].host + skip, source, part)
                    source += part
                    left -= part
                    skip = 0
            if offset + length > self._touched:
                self._touched = offset + length
            return length
        finally:
            PyBuffer_Release(&buffer)

    cdef int _release(self) except -1:
        """Let all views die; BufferError if one is in use."""
        cdef Segment segment
        if self._shown is None:
            return 0
        for segment, view in self._shown:
            try:
                view.release()
            except BufferError:
                pass             # something was made of it, and counts below
            if segment._views:
                raise BufferError("an array or a slice still uses a view of the chain; del that, then complete it")
        self._shown = None
        return 0

    def complete(self, length=None):
        """Give the chain back to the driver; from any thread, and in any order.

        Parameters
        ----------
        length : int, optional
            Bytes of the answer; by default as far as `write` has come.

        Returns
        -------
        bool
            False: the ring was stopped or broken meanwhile, and nobody waits for the answer.

        Raises
        ------
        ValueError
            The length is more than there is room for, or the chain is completed already.
        BufferError
            A view of it is still in use. The chain stays as it is.
        """
        cdef uint64_t used
        with cython.critical_section(self):
            self._check()
            used = self._written if length is None else length
            if used > self._writable_bytes:
                raise ValueError(f"a length of {used} bytes; the chain has room for {self._writable_bytes}")
            self._release()
            self._over = True
        if not self.queue._lives(self):
            return False
        if self.queue._owner == <unsigned long>get_ident():
            return self.queue._give_back(self, used)
        self.queue._later.append((self, used))
        self.queue._timer.set(0)
        return True

    def refuse(self):
        """Break the queue: the chain has no form that could be answered. In the thread that serves the queue."""
        self._check()
        self._over = True
        if self.queue._lives(self):
            queue_break(&self.queue.queue.queue, BROKEN_REQUEST, self._id)

    def __repr__(self):
        state = "completed" if self._over else "waiting"
        return f"<chain of {self.queue.name}: {self._readable_bytes} bytes, room for {self._writable_bytes}, {state}>"


cdef int _add(DeviceChain chain, queue_t* queue, virtq_desc_t* descriptor, uint32_t* room) noexcept nogil:
    """Translate a descriptor, in as many parts as it lies in: 0; -1 if it lies outside, -2 if there is no room."""
    cdef gpa_t addr = descriptor.addr
    cdef uint64_t left = descriptor.len, part
    cdef segment_t* segment
    while left > 0:
        if chain._count == room[0]:
            room[0] = room[0] * 2
            if chain._grow(room[0]) < 0:
                return -2
        segment = &chain._segments[chain._count]
        segment.host = memory_translate_part(queue.memory, &queue.hint, addr, left, &part)
        if segment.host == NULL:
            return -1
        segment.addr = addr
        segment.length = part
        chain._count += 1
        addr += part
        left -= part
    return 0


cdef int _take_descriptor(DeviceChain chain, queue_t* queue, virtq_desc_t* descriptor, uint32_t* room,
                          uint64_t limit) noexcept nogil:
    """Add a descriptor to the chain, as much of it as `limit` allows, and no byte more is translated: 0, or BROKEN_*;
    -2 without memory.
    """
    cdef int status
    if descriptor.addr + descriptor.len < descriptor.addr:
        return BROKEN_ADDRESS
    if descriptor.flags & VIRTQ_DESC_F_WRITE:        # an answer need not fill its room
        descriptor.len = <uint32_t>min(<uint64_t>descriptor.len, limit - chain._writable_bytes)
        chain._writable_bytes += descriptor.len
    elif descriptor.len > limit - chain._readable_bytes:
        return BROKEN_REQUEST
    else:
        chain._readable_bytes += descriptor.len
    status = _add(chain, queue, descriptor, room)
    if not descriptor.flags & VIRTQ_DESC_F_WRITE:
        chain._readable_count = chain._count
    return BROKEN_ADDRESS if status == -1 else status


cdef int _walk(DeviceChain chain, queue_t* queue, chain_t* walk, uint64_t limit) noexcept nogil:
    """Fill the chain; 0, or -1 and the queue is broken, or -2 without memory."""
    cdef virtq_desc_t descriptor
    cdef uint32_t room = SEGMENTS_USUAL
    cdef int step, status
    if chain._grow(room) < 0:
        return -2
    while True:
        step = chain_next(walk, queue, &descriptor)
        if step <= 0:
            break
        status = _take_descriptor(chain, queue, &descriptor, &room, limit)
        if status == -2:
            return -2
        if status:
            queue_break(queue, status, walk.id)
            return -1
    if step < 0 or chain_end(walk, queue) < 0:
        queue_break(queue, walk.broken, walk.id)
        return -1
    if queue.ring.is_packed and walk.id >= queue.ring.num:
        queue_break(queue, BROKEN_ID, walk.id)
        return -1
    chain._weight = walk.steps + chain._count
    return 0


cdef class DeviceQueue(ServedQueue):
    """A virtqueue of a device in Python: iterate over it for the chains that wait.

    Parameters
    ----------
    queue : Queue
        A queue that no worker owns.
    limit : int
        Bytes of the longest request: a driver that sends more breaks its queue. Of a longer room for the answer, this
        much is shown.

    Notes
    -----
    An iteration ends when no chain waits, and after `TURN` of them; the rest comes in the next turn. A turn ends early,
    for `pop` too, when it has read `TURN_STEPS` descriptors.
    As many chains are out as the ring has entries: a driver that makes a head available twice gains nothing by it. And
    the descriptors and segments of all that are out are `HELD` and one chain at most; others wait in the ring.
    """

    def __cinit__(self, Queue queue not None, limit=1 << 20):
        self.index = queue.index
        self.name = queue.name
        self._limit_bytes = limit
        self._steps = TURN_STEPS_MAX
        self._out = {}
        self._later = deque()

    cdef bint _lives(self, DeviceChain chain) noexcept:
        cdef queue_t* queue = &self.queue.queue
        return queue.started and queue.lives == chain._life and self._life == chain._life and not queue.broken

    @property
    def size(self):
        """int: entries of the ring; 0 while it does not run."""
        return self.queue.queue.ring.num if self.queue.queue.started else 0

    @property
    def outstanding(self):
        """int: chains that were taken and are not completed."""
        return self._outstanding

    @property
    def waiting(self):
        """bool: whether a chain waits to be taken."""
        cdef queue_t* queue = &self.queue.queue
        cdef bint packed = queue.ring.is_packed
        if not queue.live and not queue_comes_alive(queue):
            return False
        return ring_known(&queue.ring, packed) > 0 or ring_has_more(&queue.ring, packed) or queue_lost(queue)

    def begin(self):
        """Begin a turn: what other threads have completed meanwhile is given back."""
        ServedQueue.begin(self)
        self._owner = get_ident()
        self._budget = TURN_CHAINS
        self._steps = TURN_STEPS_MAX
        while self._later:
            chain, length = self._later.popleft()
            if self._lives(chain):
                self._give_back(chain, length)

    def end(self):
        """End the turn: the driver sees what was completed, and is asked to kick for what comes.

        Chains that the device has left where they are wake nobody until it takes one, or the driver kicks.
        """
        self.publish()
        self._owner = 0
        if self._budget < TURN_CHAINS or not self.waiting:
            self.arm()

    def __iter__(self):
        return self

    def __next__(self):
        cdef DeviceChain chain = self._take() if self._budget else None
        if chain is None:
            raise StopIteration
        return chain

    def pop(self):
        """The next chain that waits, or None; a turn ends for those who take them so by their descriptors alone."""
        return self._take()

    cdef DeviceChain _take(self):
        cdef queue_t* queue = &self.queue.queue
        cdef ring_t* ring = &queue.ring
        cdef bint packed = ring.is_packed
        cdef virtq_desc_t descriptor
        cdef cursor_t cursor
        cdef chain_t walk
        cdef DeviceChain chain
        cdef int status
        if self._life != queue.lives:
            self._life = queue.lives
            self._outstanding = 0
            self._held = 0
            self._number = 0
            self._out.clear()
        if not queue.live and not queue_comes_alive(queue):
            return None
        # What waits to be published counts as well: no more is out than the ring has entries.
        if self._outstanding + <uint16_t>(ring_next_used(ring, packed) - ring_shadow_used(ring, packed)) >= ring.num:
            return None
        if self._steps == 0 or self._held >= HELD_MAX:
            return None
        status = ring_begin(ring, packed, &cursor, 1)
        if queue_lost(queue):
            queue_break(queue, BROKEN_MEMORY_LOST, 0)
            return None
        if status < 0:
            queue_break(queue, BROKEN_AVAIL_IDX, ring.split.shadow_avail_idx)
        if status <= 0:
            return None
        status = ring_look(ring, packed, &cursor, &descriptor)
        if status < 0:
            queue_break(queue, BROKEN_HEAD, ring.split.bad_head)
        if status <= 0:
            return None
        queue_suppress_kicks(queue, packed)
        chain = DeviceChain.__new__(DeviceChain)
        chain.queue = self
        chain._memory = self.queue._memory
        chain._place = ring_next(ring, packed)
        chain_begin(&walk, queue, cursor.head, &descriptor)
        status = _walk(chain, queue, &walk, self._limit_bytes)
        if status == -2:
            raise MemoryError(f"{self.name}: chain")
        if status < 0:
            return None
        ring_take(ring, packed, &cursor, walk.slots)
        ring_commit_take(ring, packed, &cursor)
        chain._id = walk.id
        chain._slots = walk.slots
        chain._life = queue.lives
        chain._number = self._number
        self._number += 1
        self._outstanding += 1
        self._held += chain._weight
        self._steps -= min(self._steps, walk.steps)
        if self._budget:
            self._budget -= 1
        self._out[chain._number] = chain
        return chain

    cdef bint _give_back(self, DeviceChain chain, uint64_t length) except -1:
        cdef queue_t* queue = &self.queue.queue
        cdef uint64_t left, part
        cdef uint32_t i
        if queue.log != NULL:
            left = max(length, chain._touched)
            for i in range(chain._readable_count, chain._count):
                if left == 0:
                    break
                part = min(left, chain._segments[i].length)
                dirty_mark(queue.log, chain._segments[i].addr, part)
                left -= part
        ring_give_back(&queue.ring, queue.ring.is_packed, chain._id, <uint32_t>length, chain._slots)
        if self._held >= HELD_MAX:
            self._timer.set(0)               # what waits in the ring may be taken again, and no kick tells of it
        self._outstanding -= 1
        self._held -= chain._weight
        self._out.pop(chain._number, None)
        return True

    def stopping(self):
        """The ring is about to stop: what was completed is shown, and what was not is left to whoever goes on.

        Returns
        -------
        int
            Chains that nobody will answer: they were taken before others that are completed.
        """
        cdef queue_t* queue = &self.queue.queue
        cdef DeviceChain chain
        if not queue.started or self._life != queue.lives:
            return 0
        self.begin()
        self.publish()
        self._owner = 0
        left = sorted(self._out)
        # Whoever goes on takes the chains behind the used ones, in the order of the ring.
        if left and not queue.broken and left[0] == self._number - <uint64_t>len(left):
            chain = self._out[left[0]]
            ring_untake(&queue.ring, queue.ring.is_packed, chain._place)
            left = []
        with cython.critical_section(self):
            self._life = 0       # from here on no thread writes into what was taken
        self._out.clear()
        self._outstanding = 0
        self._held = 0
        return 0 if queue.broken else len(left)

    def fail(self):
        """Break the queue: its device cannot serve it. The front-end is told, and can start it anew."""
        cdef queue_t* queue = &self.queue.queue
        if queue.started and not queue.broken:
            queue_break(queue, BROKEN_DEVICE, 0)
