"""Account of the chains that are out."""
cimport cython
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint16_t, uint64_t
from libc.stdlib cimport free
from vq_core.chain_parts cimport parts_t, parts_walk, span_t
from vq_core.queue cimport Queue
from vq_core.queue_state cimport (BROKEN_AVAIL_IDX, BROKEN_DEVICE, BROKEN_HEAD, BROKEN_MEMORY_LOST, queue_break,
                                  queue_comes_alive, queue_lost, queue_suppress_kicks, queue_t)
from vq_core.ring cimport (ring_begin, ring_commit_take, ring_has_more, ring_known, ring_look, ring_next,
                           ring_next_used, ring_shadow_used, ring_t, ring_take, ring_untake)
from vq_core.served_queue cimport ServedQueue
from vq_core.virtio cimport virtq_desc_t

from collections import deque

cdef enum:
    TURN_STEPS_MAX = 1 << 14     # descriptors read in one turn, but for the chain that passes it
    HELD_MAX = 1 << 18           # weight of the chains that are out, but for the one that passes it: 6 MiB of parts

TURN_STEPS = TURN_STEPS_MAX
HELD = HELD_MAX


cdef class Taken:
    """One chain or several that were taken together, and are completed together."""

    def __init__(self):
        raise TypeError("chains are made by their queue alone: iterate over it, or call pop() or pull()")

    def __dealloc__(self):
        free(self._parts.items)

    cdef int _check(self) except -1:
        if self._over:
            raise ValueError("the chain was completed already; nothing of it can be used any more")
        return 0

    @property
    def alive(self):
        """bool: it is not completed, and the ring that it came from still runs."""
        return not self._over and self._queue._lives(self)

    cdef void _give_back(self, queue_t* queue) noexcept:
        """Note all as used, and in the dirty log what was written."""

    cdef bint _finish(self) except -1:
        """It is over: give it back, or leave that to the thread that serves the queue. False: nobody waits for it."""
        if not self._queue._lives(self):
            return False
        if self._queue._owner == <unsigned long>PyThread_get_thread_ident():
            self._queue._take_back(self)
            return True
        self._queue._later.append(self)
        self._queue._timer.set(0)
        return True


cdef class TakingQueue(ServedQueue):
    """Base of queues whose chains Python takes.

    Parameters
    ----------
    queue : Queue
        A queue that no worker owns.
    limit : int
        Bytes of the longest request: a driver that sends more breaks its queue. Of a longer room for the answer, this
        much is shown.
    """

    def __cinit__(self, Queue queue not None, limit=1 << 20):
        self.index = queue.index
        self.name = queue.name
        self._limit_bytes = limit
        self._steps = TURN_STEPS_MAX
        self._out = {}
        self._later = deque()

    cdef bint _lives(self, Taken taken) noexcept:
        cdef queue_t* queue = &self.queue.queue
        return queue.started and queue.lives == taken._life and self._life == taken._life and not queue.broken

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
        cdef Taken taken
        ServedQueue.begin(self)
        self._owner = PyThread_get_thread_ident()
        self._took = False
        self._steps = TURN_STEPS_MAX
        while self._later:
            taken = self._later.popleft()
            if self._lives(taken):
                self._take_back(taken)

    def end(self):
        """End the turn: the driver sees what was completed, and is asked to kick for what comes.

        Chains that the device has left where they are wake nobody until it takes one, or the driver kicks.
        """
        self.publish()
        self._owner = 0
        if self._took or not self.waiting:
            self.arm()

    # ---- taking ----

    cdef int _refresh(self) except -1:
        """Before a look: that it is this thread's business, and whether the ring has begun a new life."""
        cdef queue_t* queue = &self.queue.queue
        if self._owner and self._owner != <unsigned long>PyThread_get_thread_ident():
            raise RuntimeError(f"{self.name} is served by another thread now; Device.call has it do something")
        if self._life != queue.lives:
            self._life = queue.lives
            self._outstanding = 0
            self._held = 0
            self._number = 0
            self._out.clear()
        return 0

    cdef void _bind(self, Taken taken):
        """The chain that was just looked at is its first."""
        cdef queue_t* queue = &self.queue.queue
        taken._queue = self
        taken._memory = self.queue._memory
        taken._life = queue.lives
        taken._number = self._number
        taken._place = ring_next(&queue.ring, queue.ring.is_packed)

    cdef int _look(self, parts_t* parts, span_t* span) noexcept nogil:
        """Walk the next chain, and leave it in the ring: 1; 0: there is none, or the queue is broken now; -2 without
        memory.
        """
        cdef queue_t* queue = &self.queue.queue
        cdef ring_t* ring = &queue.ring
        cdef bint packed = ring.is_packed
        cdef virtq_desc_t descriptor
        cdef int status
        if not queue.live and not queue_comes_alive(queue):
            return 0
        # What waits to be published counts as well: no more is out than the ring has entries.
        if self._outstanding + <uint16_t>(ring_next_used(ring, packed) - ring_shadow_used(ring, packed)) >= ring.num:
            return 0
        if self._steps == 0 or self._held >= HELD_MAX:
            return 0
        status = ring_begin(ring, packed, &self._cursor, 1)
        if queue_lost(queue):
            queue_break(queue, BROKEN_MEMORY_LOST, 0)
            return 0
        if status < 0:
            queue_break(queue, BROKEN_AVAIL_IDX, ring.split.shadow_avail_idx)
        if status <= 0:
            return 0
        status = ring_look(ring, packed, &self._cursor, &descriptor)
        if status < 0:
            queue_break(queue, BROKEN_HEAD, ring.split.bad_head)
        if status <= 0:
            return 0
        queue_suppress_kicks(queue, packed)
        status = parts_walk(parts, span, queue, self._cursor.head, &descriptor, self._limit_bytes)
        return status if status == -2 else status == 0

    cdef void _commit(self, span_t* span) noexcept nogil:
        """The chain of the last look is taken; it counts as out."""
        cdef ring_t* ring = &self.queue.queue.ring
        ring_take(ring, ring.is_packed, &self._cursor, span.slots)
        ring_commit_take(ring, ring.is_packed, &self._cursor)
        self._number += 1
        self._outstanding += 1
        self._held += span.steps + (span.end - span.first)
        self._steps -= min(self._steps, span.steps)
        self._took = True

    cdef void _keep(self, Taken taken):
        self._out[taken._number] = taken

    cdef void _take_back(self, Taken taken):
        taken._give_back(&self.queue.queue)
        if self._held >= HELD_MAX:
            self._timer.set(0)               # what waits in the ring may be taken again, and no kick tells of it
        self._outstanding -= taken._chains
        self._held -= taken._weight
        self._out.pop(taken._number, None)

    # ---- ends ----

    def stopping(self):
        """The ring is about to stop: what was completed is shown, and what was not is left to whoever goes on.

        Returns
        -------
        int
            Chains that nobody will answer: they were taken before others that are completed.
        """
        cdef queue_t* queue = &self.queue.queue
        cdef Taken taken
        cdef uint64_t left = 0
        if not queue.started or self._life != queue.lives:
            return 0
        self.begin()
        self.publish()
        self._owner = 0
        for taken in self._out.values():
            left += taken._chains
        # Whoever goes on takes the chains behind the used ones, in the order of the ring.
        if left and not queue.broken:
            taken = self._out[min(self._out)]
            if taken._number == self._number - left:
                ring_untake(&queue.ring, queue.ring.is_packed, taken._place)
                left = 0
        with cython.critical_section(self):
            self._life = 0       # from here on no thread writes into what was taken
        self._out.clear()
        self._outstanding = 0
        self._held = 0
        return 0 if queue.broken else left

    def fail(self):
        """Break the queue: its device cannot serve it. The front-end is told, and can start it anew."""
        cdef queue_t* queue = &self.queue.queue
        if queue.started and not queue.broken:
            self.publish()                   # a driver that hears of the end looks at what was answered before it
            queue_break(queue, BROKEN_DEVICE, 0)
