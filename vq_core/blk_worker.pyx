"""The loop of a block device, and its life."""
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from vq_core.arch cimport (vq_cycles, vq_fence, vq_load_acquire_u32, vq_load_u32, vq_pause,
                           vq_store_release_u32)
from vq_core.blk_queue cimport (BLK_REQUESTS_MAX, blk_arm, blk_counters_t, blk_drop, blk_give_back, blk_publish,
                                blk_queue_t, blk_take)
from vq_core.blk_request cimport (BLK_DISCARD_SECTORS_MAX, BLK_RANGES_MAX, BLK_WRITE_ZEROES_SECTORS_MAX,
                                  blk_request_t)
from vq_core.clock cimport timespec
from vq_core.disk cimport Disk
from vq_core.epoll cimport EPOLL_CLOEXEC, EPOLLIN, epoll_create1, epoll_event, epoll_move, epoll_wait
from vq_core.handover cimport Mailbox, handover_run, mailbox_poll, mailbox_t
from vq_core.inflight cimport inflight_is_again
from vq_core.pool cimport Pool, job_t, pool_collect, pool_submit, pool_withdraw
from vq_core.queue cimport Queue
from vq_core.queue_state cimport CHANGE_SUSPEND, queue_change_t, queue_run_change, queue_t

import os

cdef extern from "<time.h>" nogil:
    int c_nanosleep "nanosleep"(const timespec* wanted, timespec* rest) noexcept

cdef enum:
    IDLE_ROUNDS = 64             # empty rounds before the clock decides about sleeping
    IDLE_CYCLES = 150000         # about 50 microseconds: longer than a busy driver's gaps
    DRAIN_NS = 20000             # between two looks while all that is under way is awaited


cdef int _collect(blk_worker_t* worker) noexcept nogil:
    """Give back what the pool has done; number of requests."""
    cdef job_t* job = pool_collect(worker.pool)
    cdef job_t* following
    cdef blk_queue_t* queue
    cdef int count = 0
    while job != NULL:
        following = job.next
        queue = <blk_queue_t*>(<blk_request_t*>job).owner
        queue.in_flight -= 1
        blk_give_back(queue, <blk_request_t*>job)
        job = following
        count += 1
    return count


cdef int _take_again(blk_worker_t* worker) noexcept nogil:
    """Go on with what was under way before a crash; number of requests."""
    cdef int i, count = 0
    for i in range(worker.queue_count):
        if inflight_is_again(worker.queues[i].queue.inflight):
            count += blk_take(&worker.queues[i])
    return count


cdef bint _under_way(blk_worker_t* worker, queue_t* alone) noexcept nogil:
    """Whether a request is being done: one of queue `alone`, or of any queue if that is NULL."""
    cdef blk_queue_t* queue
    cdef int i
    for i in range(worker.queue_count):
        queue = &worker.queues[i]
        if queue.in_flight and (alone == NULL or queue.queue == alone):
            return True
    return False


cdef queue_t* _suspended(mailbox_t* mailbox) noexcept nogil:
    """The queue that the command which waits suspends, or NULL."""
    cdef queue_change_t* change
    # Acquire: pairs with the release of `posted`; the command stands before it.
    vq_load_acquire_u32(&mailbox.posted)
    change = <queue_change_t*>mailbox.argument
    if mailbox.run == queue_run_change and change.what & CHANGE_SUSPEND:
        return <queue_t*>mailbox.target
    return NULL


cdef void _withdraw(blk_worker_t* worker, queue_t* queue) noexcept nogil:
    """Take back what a queue has in the pool and no thread has begun: it stays in flight, in the region alone."""
    cdef job_t* job = pool_withdraw(worker.pool)
    cdef job_t* following
    cdef blk_queue_t* owner
    while job != NULL:
        following = job.next
        owner = <blk_queue_t*>(<blk_request_t*>job).owner
        if owner.queue == queue:
            owner.in_flight -= 1
            blk_drop(owner, <blk_request_t*>job)
        else:
            pool_submit(worker.pool, job)
        job = following


cdef void _drain(blk_worker_t* worker, queue_t* suspended) noexcept nogil:
    """Wait until all requests are done, and publish them; of a queue to suspend, those that a thread has begun.

    A thread that has begun a request is inside the kernel, which writes to the guest's memory or to the disk until it
    comes back; nothing can call it off. Whoever serves the disk next would have its writes overwritten by ours. So
    these few are awaited even by a front-end that cannot wait.
    """
    cdef timespec pause
    cdef int i, count
    pause.tv_sec = 0
    pause.tv_nsec = DRAIN_NS
    if suspended != NULL:
        _withdraw(worker, suspended)
    while True:
        count = _collect(worker)
        if suspended == NULL:
            count += _take_again(worker)     # it was taken before a crash, and so is under way
        if not _under_way(worker, suspended):
            if count == 0:
                break
        elif count == 0:
            c_nanosleep(&pause, NULL)
    for i in range(worker.queue_count):
        blk_publish(&worker.queues[i])


cdef void _sleep(blk_worker_t* worker, mailbox_t* mailbox) noexcept nogil:
    cdef epoll_event events[16]
    cdef int i
    cdef bint work = False
    for i in range(worker.queue_count):
        work |= blk_arm(&worker.queues[i])
    # Mailbox and pool signal eventfds that are watched too: what comes from here on ends the wait at once.
    if work or vq_load_u32(&mailbox.posted) != mailbox.done or vq_load_u32(&worker.pool.done_count):
        return
    worker.sleeps += 1
    mailbox.asleep = 1
    epoll_wait(worker.epoll_fd, events, 16, -1)
    mailbox.asleep = 0


cdef void _loop(blk_worker_t* worker, mailbox_t* mailbox) noexcept nogil:
    cdef int i, work, empty = 0
    cdef uint64_t now, last = vq_cycles(), idle_since = last
    while True:
        if vq_load_u32(&mailbox.posted) != mailbox.done:
            _drain(worker, _suspended(mailbox))
            mailbox_poll(mailbox)
        if worker.stopping:
            break
        work = _collect(worker)
        for i in range(worker.queue_count):
            work += blk_take(&worker.queues[i])
            blk_publish(&worker.queues[i])
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
    (<blk_worker_t*>target).stopping = True


cdef class BlkWorker:
    """Serves queues of a block device: call `run` in a thread of its own, and `pool.serve` in some more.

    Parameters
    ----------
    disk : Disk
    queues : sequence of Queue
        They belong to this worker from here on.
    cpu : int, optional
        The processor to stay on; None leaves it to the kernel.
    poll : {"adaptive", "busy"}
        Sleep when there is nothing to do, or never.

    Notes
    -----
    Threading: `run` blocks without the GIL until `stop`. All else is for the control thread.
    """

    #: Limits of a request, for the configuration space.
    RANGES_MAX = BLK_RANGES_MAX
    DISCARD_SECTORS_MAX = BLK_DISCARD_SECTORS_MAX
    WRITE_ZEROES_SECTORS_MAX = BLK_WRITE_ZEROES_SECTORS_MAX

    def __cinit__(self, Disk disk not None, queues, cpu=None, poll="adaptive"):
        cdef int i, j
        cdef blk_queue_t* queue
        if poll not in ("adaptive", "busy"):
            raise ValueError(f"poll is {poll!r}; adaptive and busy are possible")
        self.worker.epoll_fd = -1
        self.disk = disk
        self.cpu = cpu
        self.queues = tuple(queues)
        self.pool = Pool()
        self.worker.pool = &self.pool.pool
        self.mailbox = Mailbox(PATIENCE_S)
        self.worker.busy = poll == "busy"
        self.worker.queues = <blk_queue_t*>calloc(len(self.queues) + 1, sizeof(blk_queue_t))
        if self.worker.queues == NULL:
            raise MemoryError("request queues")
        self.worker.queue_count = len(self.queues)
        for i in range(self.worker.queue_count):
            queue = &self.worker.queues[i]
            queue.queue = &(<Queue?>self.queues[i]).queue
            queue.disk = &disk.disk
            queue.pool = &self.pool.pool
            # Zeroed pages cost nothing until a request uses them.
            queue.requests = <blk_request_t*>calloc(BLK_REQUESTS_MAX, sizeof(blk_request_t))
            if queue.requests == NULL:
                raise MemoryError("requests")
            for j in range(BLK_REQUESTS_MAX):
                queue.requests[j].disk = &disk.disk
                queue.requests[j].owner = queue
                queue.requests[j].job.next = &queue.free.job if queue.free != NULL else NULL
                queue.free = &queue.requests[j]
        self.worker.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if (self.worker.epoll_fd < 0 or epoll_move(-1, self.worker.epoll_fd, self.mailbox.box.event_fd, EPOLLIN)
                or epoll_move(-1, self.worker.epoll_fd, self.pool.pool.event_fd, EPOLLIN)):
            PyErr_SetFromErrno(OSError)
        self.mailbox.box.epoll_fd = self.worker.epoll_fd
        for i in range(self.worker.queue_count):
            (<Queue>self.queues[i]).mailbox = self.mailbox
            self.worker.queues[i].queue.epoll_fd = self.worker.epoll_fd

    def __dealloc__(self):
        cdef int i
        if self.worker.queues != NULL:
            for i in range(self.worker.queue_count):
                free(self.worker.queues[i].requests)
            if self.worker.epoll_fd >= 0:
                os.close(self.worker.epoll_fd)
        free(self.worker.queues)

    def run(self):
        """Serve the queues until `stop`; for a thread of its own, which is bound to `cpu`."""
        if self.cpu is not None:
            os.sched_setaffinity(0, {self.cpu})
        with nogil:
            vq_store_release_u32(&self.mailbox.box.running, 1)
            vq_fence()           # pairs with the fence in handover_run
            _loop(&self.worker, &self.mailbox.box)
            # From here on posters drain the mailbox themselves, and nothing is under way.
            vq_store_release_u32(&self.mailbox.box.running, 0)

    def stop(self):
        """End `run` when all requests under way are done."""
        handover_run(self.mailbox, _stop, &self.worker, NULL)

    def close(self):
        """Close the descriptors, after `run` and all `pool.serve` have returned; may be called twice."""
        cdef int i
        if vq_load_u32(&self.mailbox.box.running):
            raise ValueError("the worker runs; stop it first")
        for i in range(self.worker.queue_count):
            if self.queues[i].started:
                raise ValueError("a queue of the worker is started; stop it first")
            (<Queue>self.queues[i]).mailbox = None
            self.worker.queues[i].queue.epoll_fd = -1
        self.mailbox.box.epoll_fd = -1
        self.mailbox.close()
        self.pool.close()
        if self.worker.epoll_fd >= 0:
            os.close(self.worker.epoll_fd)
            self.worker.epoll_fd = -1

    def snapshot(self):
        """dict: cpu, rounds, empty_rounds, busy_cycles, idle_cycles, sleeps since the start."""
        return {"cpu": self.cpu, "rounds": self.mailbox.box.rounds, "empty_rounds": self.worker.empty_rounds,
                "busy_cycles": self.worker.busy_cycles, "idle_cycles": self.worker.idle_cycles,
                "sleeps": self.worker.sleeps}

    def queue_snapshot(self, int index):
        """dict: reads, writes, flushes, others, read_bytes, written_bytes, failed, waited of one of its queues."""
        cdef blk_counters_t* counters
        if not 0 <= index < self.worker.queue_count:
            raise IndexError(f"queue {index} of {self.worker.queue_count}")
        counters = &self.worker.queues[index].counters
        return {"reads": counters.reads, "writes": counters.writes, "flushes": counters.flushes,
                "others": counters.others, "read_bytes": counters.read_bytes,
                "written_bytes": counters.written_bytes, "failed": counters.failed, "waited": counters.waited}
