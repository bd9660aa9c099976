"""Handing over by publication: the cold side."""
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint32_t
from libc.string cimport memset
from vq_core.arch cimport vq_exchange_u32, vq_fence, vq_load_acquire_u32, vq_pause, vq_store_release_u32
from vq_core.notify cimport notify_signal

import os
import threading

cdef extern from "<sched.h>" nogil:
    int c_sched_yield "sched_yield"() noexcept

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int c_clock_gettime "clock_gettime"(int clock, timespec* now) noexcept
    int c_nanosleep "nanosleep"(const timespec* wanted, timespec* rest) noexcept
    int CLOCK_MONOTONIC

cdef enum:
    SPINS = 2000                 # about 50 microseconds: a worker that polls passes a boundary by then
    PATIENCE_S = 10              # a worker that has not passed a boundary by then is stuck


cdef void mailbox_drain(mailbox_t* mailbox) noexcept nogil:
    # Two may come here at once: a worker at its end, and a poster that saw it end.
    while vq_exchange_u32(&mailbox.draining, 1) != 0:
        vq_pause()
    # Acquire: pairs with the release of `posted`; the command stands before it.
    if vq_load_acquire_u32(&mailbox.posted) != mailbox.done:
        mailbox.run(mailbox.target, mailbox.argument)
        # Release: pairs with the poster's acquire; all effects stand before it.
        vq_store_release_u32(&mailbox.done, mailbox.done + 1)
    vq_store_release_u32(&mailbox.draining, 0)


cdef bint _finished(mailbox_t* mailbox, uint32_t ticket) noexcept nogil:
    return vq_load_acquire_u32(&mailbox.done) == ticket


cdef int _wait(mailbox_t* mailbox, uint32_t ticket, long patience_s) noexcept nogil:
    """Wait until command `ticket` is done; -1 if the worker is stuck."""
    cdef timespec start, now, pause
    cdef int spins = 0
    pause.tv_sec = 0
    pause.tv_nsec = 50000
    c_clock_gettime(CLOCK_MONOTONIC, &start)
    while not _finished(mailbox, ticket):
        if vq_load_acquire_u32(&mailbox.running) == 0:
            mailbox_drain(mailbox)
            continue
        spins += 1
        if spins < SPINS:
            vq_pause()
            continue
        c_nanosleep(&pause, NULL)     # the worker may need our core to get to its boundary
        c_clock_gettime(CLOCK_MONOTONIC, &now)
        if now.tv_sec - start.tv_sec > patience_s:
            return -1
    return 0


cdef int _withdraw(mailbox_t* mailbox, uint32_t ticket) noexcept nogil:
    """Take command `ticket` back, so that it never runs after its caller has gone; 0 if it has run meanwhile."""
    cdef int status = 0
    while vq_exchange_u32(&mailbox.draining, 1) != 0:
        vq_pause()
    if mailbox.done != ticket:
        vq_store_release_u32(&mailbox.done, ticket)
        status = -1
    vq_store_release_u32(&mailbox.draining, 0)
    return status


class StuckWorkerError(BaseException):
    """A worker does not come to a burst boundary, so nothing that it uses may be released: the process must end.

    Not an Exception, since whoever goes on after it, and closes or unmaps things, lets the worker use what it lost.
    """


cdef class Mailbox:
    """The way to a worker: one command at a time, executed at a burst boundary.

    Parameters
    ----------
    patience_s : int
        Seconds that the worker may need to get there; after that it counts as stuck, and the process must end.
    """

    def __cinit__(self, long patience_s=PATIENCE_S):
        self.patience_s = patience_s
        memset(&self.box, 0, sizeof(mailbox_t))
        self.box.epoll_fd = -1
        self.box.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def __dealloc__(self):
        if self.box.event_fd or self.box.epoll_fd:   # both 0: the arguments were refused, and nothing was opened
            self.close()

    def close(self):
        """Close the descriptor, when no worker drains the mailbox any more; may be called twice."""
        if self.box.event_fd >= 0:
            os.close(self.box.event_fd)
            self.box.event_fd = -1


cdef int handover_run(Mailbox mailbox, command_run_t run, void* target, void* argument) except -1:
    cdef mailbox_t* box
    cdef int status
    if mailbox is None:
        with nogil:
            run(target, argument)
        return 0
    if mailbox.thread and mailbox.thread == <unsigned long>PyThread_get_thread_ident():
        raise RuntimeError("a program cannot change what its own worker does: leave that to the thread that made the "
                           "pump; to end it, call request_stop")
    box = &mailbox.box
    with mailbox._lock:
        box.run = run
        box.target = target
        box.argument = argument
        # Release: pairs with the acquire in mailbox_drain.
        vq_store_release_u32(&box.posted, box.posted + 1)
        # Pairs with the fence in Worker.run: either the worker sees the command before its first round, or we see
        # that it does not run and run the command ourselves while it waits in mailbox_drain.
        vq_fence()
        with nogil:
            notify_signal(box.event_fd)
            status = _wait(box, box.posted, mailbox.patience_s)
            if status != 0:
                status = _withdraw(box, box.posted)
    if status != 0:
        raise StuckWorkerError(f"a worker has not passed a burst boundary for {mailbox.patience_s} s; "
                               "a program or port blocks it")
    return 0
