"""The loop of a ChainWorker, and its life."""
from cpython.exc cimport PyErr_SetFromErrno
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from vq_core.arch cimport vq_cycles, vq_fence, vq_load_u32, vq_pause, vq_store_release_u32
from vq_core.chain_queue cimport request_answer, request_t, request_take
from vq_core.epoll cimport EPOLL_CLOEXEC, EPOLLIN, epoll_create1, epoll_event, epoll_move, epoll_wait
from vq_core.handover cimport Mailbox, handover_run, mailbox_poll, mailbox_t
from vq_core.queue cimport Queue
from vq_core.queue_state cimport (BROKEN_REFUSED, queue_break, queue_flush, queue_lost, queue_publish,
                                  queue_request_kick, queue_t)
from vq_core.ring cimport ring_give_back, ring_has_more, ring_known, ring_next_used, ring_shadow_used

import os

cdef enum:
    IDLE_ROUNDS = 64             # empty rounds before the clock decides about sleeping
    IDLE_CYCLES = 150000         # about 50 microseconds: longer than a busy driver's gaps
    LOOK_MS = 10                 # between two looks at a ring whose driver does not kick
    ROUND_STEPS = 1 << 12        # descriptors of a queue that a round reads, but for the chain that passes it
    ROUND_BYTES = 1 << 20        # and bytes of it that a round copies


cdef int _serve(ChainWorker owner, chain_worker_t* worker, int index) noexcept nogil:
    """Answer what waits in one queue, up to a burst of it; the number of requests.

    Long chains end a burst early: other queues of the worker and the control thread wait for it.
    """
    cdef queue_t* queue = worker.queues[index]
    cdef bint packed = queue.ring.is_packed
    cdef request_t request
    cdef exchange_t exchange
    cdef int64_t length
    cdef uint32_t room
    cdef int count = 0
    cdef uint64_t steps = 0, copied = 0
    while count < CHAIN_BURST and steps < ROUND_STEPS and copied < ROUND_BYTES \
            and request_take(queue, &request, worker.data, worker.limit) > 0:
        count += 1
        steps += request.steps
        copied += request.copied
        exchange.queue = index
        exchange.data = worker.data
        exchange.data_bytes = request.copied
        exchange.readable_bytes = request.readable_bytes
        exchange.reply = worker.reply
        room = exchange.reply_bytes = <uint32_t>min(request.writable_bytes, <uint64_t>worker.limit)
        length = owner.answer(&exchange)
        if length < 0 or length > <int64_t>room:     # our own number: the exchange is the subclass's to write to
            queue_break(queue, BROKEN_REFUSED, request.id)
            worker.refused += 1
            break
        length = request_answer(queue, &request, worker.reply, <uint64_t>length)
        if length < 0:
            break
        worker.answered += 1
        copied += <uint64_t>length
        ring_give_back(&queue.ring, packed, request.id, <uint32_t>length, request.slots)
    if queue.started and ring_next_used(&queue.ring, packed) != ring_shadow_used(&queue.ring, packed):
        queue_publish(queue, packed, ring_next_used(&queue.ring, packed))
        queue_flush(queue)
    return count


cdef int _arm(queue_t* queue) noexcept nogil:
    """Ask for a kick; how long to sleep at most, in ms: 0 if there is something already, -1 without end."""
    cdef bint packed = queue.ring.is_packed
    if not queue.live:
        # What waits for memory that is on its way is looked at again, as a ring that nobody kicks is.
        return LOOK_MS if queue.started and queue.enabled and queue.unplaced else -1
    if ring_known(&queue.ring, packed) > 0:
        return 0
    queue_request_kick(queue)
    # Also for an impossible index, or when memory was lost: the next round breaks the ring.
    if ring_has_more(&queue.ring, packed) or queue_lost(queue):
        return 0
    return LOOK_MS if queue.kick_fd < 0 else -1


cdef void _sleep(chain_worker_t* worker, mailbox_t* mailbox) noexcept nogil:
    cdef epoll_event events[16]
    cdef int i, wait, limit = -1
    for i in range(worker.queue_count):
        wait = _arm(worker.queues[i])
        if wait >= 0 and (limit < 0 or wait < limit):
            limit = wait
    # The mailbox signals an eventfd that is watched too: what comes from here on ends the wait at once.
    if limit == 0 or vq_load_u32(&mailbox.posted) != mailbox.done:
        return
    worker.sleeps += 1
    mailbox.asleep = 1
    epoll_wait(worker.epoll_fd, events, 16, limit)
    mailbox.asleep = 0


cdef void _loop(ChainWorker owner, chain_worker_t* worker, mailbox_t* mailbox) noexcept nogil:
    cdef int i, work, empty = 0
    cdef uint64_t now, last = vq_cycles(), idle_since = last
    while True:
        mailbox_poll(mailbox)
        if worker.stopping:
            break
        work = 0
        for i in range(worker.queue_count):
            work += _serve(owner, worker, i)
        now = vq_cycles()
        mailbox.rounds += 1
        if work:
            worker.busy_cycles += now - last
            empty = 0
        else:
            worker.idle_cycles += now - last
            worker.empty_rounds += 1
            if empty == 0:
                idle_since = now
            empty += 1
            vq_pause()
            if empty > IDLE_ROUNDS and not worker.busy and now - idle_since > IDLE_CYCLES:
                _sleep(worker, mailbox)
                now = vq_cycles()
                empty = 0
        last = now


cdef void _stop(void* target, void* argument) noexcept nogil:
    (<chain_worker_t*>target).stopping = True


cdef class ChainWorker:
    """Answers requests of some queues: a base for a `cdef class` that overrides `answer`.

    Parameters
    ----------
    queues : sequence of Queue
        They belong to this worker from here on; of a device whose offer knows no IOMMU.
    limit : int
        Device-readable bytes that are copied of one request, and the longest answer.
    cpu : int, optional
        The processor to stay on; None leaves it to the kernel.
    poll : {"adaptive", "busy"}
        Sleep when there is nothing to do, or never.

    Notes
    -----
    Threading: `run` blocks without the GIL until `stop`; call it in a thread of its own. All else is for the control
    thread. The base itself gives every request back with an empty answer.
    """

    def __cinit__(self):
        self.worker.epoll_fd = self.worker.report_fd = -1
        self.queues = ()

    def __init__(self, queues, *, limit=4096, cpu=None, poll="adaptive"):
        cdef int i
        cdef Queue queue
        if self.worker.queues != NULL:
            raise ValueError("the worker has its queues already")
        if poll not in ("adaptive", "busy"):
            raise ValueError(f"poll is {poll!r}; adaptive and busy are possible")
        if not 0 <= limit <= 1 << 30:
            raise ValueError(f"limit is {limit}; 0 to {1 << 30} bytes are possible")
        wanted = tuple(queues)
        for queue in wanted:
            if queue is None or queue.mailbox is not None or queue.queue.started:
                raise ValueError("a queue belongs to a worker already or is started" if queue is not None else
                                 "a queue is None")
        self.cpu = cpu
        self.mailbox = Mailbox()
        self.worker.busy = poll == "busy"
        self.worker.limit = limit
        self.worker.data = <uint8_t*>calloc(1, limit + 1)
        self.worker.reply = <uint8_t*>calloc(1, limit + 1)
        self.worker.queues = <queue_t**>calloc(len(wanted) + 1, sizeof(queue_t*))
        if self.worker.data == NULL or self.worker.reply == NULL or self.worker.queues == NULL:
            raise MemoryError("requests")
        self.worker.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.worker.epoll_fd < 0 or epoll_move(-1, self.worker.epoll_fd, self.mailbox.box.event_fd, EPOLLIN):
            PyErr_SetFromErrno(OSError)
        self.mailbox.box.epoll_fd = self.worker.epoll_fd
        self.worker.report_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.queues = wanted
        self.worker.queue_count = len(wanted)
        for i in range(self.worker.queue_count):
            queue = wanted[i]
            self.worker.queues[i] = &queue.queue
            queue.mailbox = self.mailbox
            queue.queue.epoll_fd = self.worker.epoll_fd
            if queue.queue.report_fd < 0:
                queue.queue.report_fd = self.worker.report_fd

    def __dealloc__(self):
        free(self.worker.queues)
        free(self.worker.data)
        free(self.worker.reply)
        if self.worker.epoll_fd >= 0:
            os.close(self.worker.epoll_fd)
        if self.worker.report_fd >= 0:
            os.close(self.worker.report_fd)

    cdef int64_t answer(self, exchange_t* exchange) noexcept nogil:
        return 0

    def run(self):
        """Serve the queues until `stop`; for a thread of its own, which is bound to `cpu`."""
        if self.worker.epoll_fd < 0:
            raise ValueError("the worker was closed, or a subclass has not called __init__")
        if self.mailbox.thread:
            raise ValueError("the worker runs already, in another thread")
        # Before the GIL is given up: from here on `close` refuses.
        self.mailbox.thread = PyThread_get_thread_ident()
        try:
            if self.cpu is not None:
                os.sched_setaffinity(0, {self.cpu})
            with nogil:
                vq_store_release_u32(&self.mailbox.box.running, 1)
                vq_fence()           # pairs with the fence in handover_run
                _loop(self, &self.worker, &self.mailbox.box)
                # From here on posters drain the mailbox themselves, and nothing is under way.
                vq_store_release_u32(&self.mailbox.box.running, 0)
        finally:
            self.mailbox.thread = 0

    def stop(self):
        """End `run`."""
        handover_run(self.mailbox, _stop, &self.worker, NULL)

    def close(self):
        """Close the descriptors, after `run` has returned and all rings have stopped; may be called twice."""
        cdef Queue queue
        if self.worker.epoll_fd < 0:
            return
        if self.mailbox.thread:
            raise ValueError("the worker runs; stop it first")
        if any(queue.started for queue in self.queues):
            raise ValueError("a queue of the worker is started; stop it first")
        for queue in self.queues:
            queue.mailbox = None
            queue.queue.epoll_fd = -1
            if queue.queue.report_fd == self.worker.report_fd:
                queue.queue.report_fd = -1
        self.mailbox.box.epoll_fd = -1
        self.mailbox.close()
        os.close(self.worker.epoll_fd)
        self.worker.epoll_fd = -1
        os.close(self.worker.report_fd)
        self.worker.report_fd = -1

    @property
    def report_fd(self):
        """int or None: eventfd that is signalled when a queue breaks, unless that had one of its own before.

        A device gives it to who hosts it, as its `report_fd`, so that the log says why. None after `close`.
        """
        return self.worker.report_fd if self.worker.report_fd >= 0 else None

    def snapshot(self):
        """dict: cpu, rounds, answered, refused, empty_rounds, busy_cycles, idle_cycles, sleeps since the start."""
        return {"cpu": self.cpu, "rounds": self.mailbox.box.rounds, "answered": self.worker.answered,
                "refused": self.worker.refused, "empty_rounds": self.worker.empty_rounds,
                "busy_cycles": self.worker.busy_cycles, "idle_cycles": self.worker.idle_cycles,
                "sleeps": self.worker.sleeps}
