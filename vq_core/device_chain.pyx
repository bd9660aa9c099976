"""Chains of a driver as Python objects."""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vq_core.chain_parts cimport parts_mark, parts_read, parts_write
from vq_core.queue_state cimport BROKEN_REFUSED, queue_break, queue_t
from vq_core.ring cimport ring_give_back
from vq_core.taken cimport Taken

from weakref import ref


cdef class Segment:
    """A part of a chain that lies in one piece; exports its bytes as a buffer."""

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self._host, self._length, not self._writable, flags)
        self._views += 1

    def __releasebuffer__(self, Py_buffer* buffer):
        self._views -= 1


cdef class DeviceChain(Taken):
    """One descriptor chain: bytes that the driver has sent, and room for what the device answers.

    Notes
    -----
    Its bytes lie in guest memory, and the driver can change them meanwhile: read what decides something once, and
    judge what was read.
    Threading: one thread at a time, any one.
    Spec: VIRTIO 1.3, 2.7.5, 2.8.
    """

    @property
    def queue(self):
        """DeviceQueue: where it came from."""
        return self._queue

    @property
    def readable_bytes(self):
        """int: bytes that the driver has sent."""
        return self._span.readable_bytes

    @property
    def writable_bytes(self):
        """int: how long an answer may be; no more than the queue's limit."""
        return self._span.writable_bytes

    cdef tuple _views(self, uint32_t first, uint32_t end, bint writable):
        cdef Segment segment
        cdef uint32_t i
        self._check()
        # Those that nobody has any more go: who looks again and again into a long chain would fill the memory.
        self._shown = [shown for shown in self._shown or () if (<Segment>shown[0])._views]
        views = []
        for i in range(first, end):
            segment = Segment.__new__(Segment)
            segment._memory = self._memory
            segment._host = self._parts.items[i].host
            segment._length = <Py_ssize_t>self._parts.items[i].length
            segment._writable = writable
            view = memoryview(segment)
            self._shown.append((segment, ref(view)))
            views.append(view)
        return tuple(views)

    @property
    def readable(self):
        """tuple of memoryview: what the driver has sent, as it lies in guest memory; read-only."""
        return self._views(self._span.first, self._span.middle, False)

    @property
    def writable(self):
        """tuple of memoryview: the room for an answer, as it lies in guest memory.

        What is written there counts when `complete` is given its length.
        """
        self._touched = self._span.writable_bytes
        return self._views(self._span.middle, self._span.end, True)

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
        """Copy bytes that the driver has sent from `offset`, at most `size` of them; the place of `read` stays.

        Raises
        ------
        ValueError
            The chain is completed.
        """
        cdef uint64_t left
        self._check()
        left = self._span.readable_bytes - offset if offset < self._span.readable_bytes else 0
        if size >= 0:
            left = min(left, <uint64_t>size)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>left)
        parts_read(&self._parts, self._span.first, self._span.middle, offset, <uint8_t*>PyBytes_AS_STRING(data), left)
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
        """Write bytes of the answer at `offset`; the place of `write` stays.

        Returns
        -------
        int
            Bytes written: all of them.

        Raises
        ------
        ValueError
            There is less room, and nothing was written; or the chain is completed.
        """
        cdef uint64_t length, room = self._span.writable_bytes
        cdef Py_buffer buffer
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            self._check()            # here: what has shown its bytes may be somebody's code
            length = <uint64_t>buffer.len
            if offset > room or length > room - offset:
                raise ValueError(f"{length} bytes at {offset}; the chain has room for {room}")
            with cython.critical_section(self._queue):       # where the ring may be about to stop
                if not self._queue._lives(self):
                    return length                            # nobody waits for it any more
                parts_write(&self._parts, self._span.middle, self._span.end, offset, <const uint8_t*>buffer.buf, length)
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
        for segment, shown in self._shown:
            view = shown()
            try:
                if view is not None:
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
        cdef uint64_t used = 0 if length is None else length
        with cython.critical_section(self):
            self._check()
            if length is None:
                used = self._written
            if used > self._span.writable_bytes:
                raise ValueError(f"a length of {used} bytes; the chain has room for {self._span.writable_bytes}")
            self._release()
            self._length = used
            self._over = True
        return self._finish()

    cdef void _give_back(self, queue_t* queue) noexcept:
        if queue.log != NULL:
            parts_mark(&self._parts, self._span.middle, self._span.end, max(self._length, self._touched), queue.log)
        ring_give_back(&queue.ring, queue.ring.is_packed, self._span.id, <uint32_t>self._length, self._span.slots)

    def refuse(self):
        """Break the queue: the chain has no form that could be answered. The front-end is told, and can start it anew.

        Raises
        ------
        ValueError
            The chain is completed.

        Notes
        -----
        Threading: the thread that serves the queue.
        """
        self._check()
        self._over = True
        if self._queue._lives(self):
            queue_break(&self._queue.queue.queue, BROKEN_REFUSED, self._span.id)

    def __repr__(self):
        state = "completed" if self._over else "waiting"
        sizes = f"{self._span.readable_bytes} bytes, room for {self._span.writable_bytes}"
        return f"<chain of {self._queue.name}: {sizes}, {state}>"
