"""Handing over: how the control thread changes what a worker uses, without a lock on the way of a packet.

The control thread posts a command (a function over two pointers) and waits; the worker runs it at
its next burst boundary, when it holds no borrowed packet. When `handover_run` returns, the data
plane has obeyed: the old object may be unmapped and the front-end may be answered.

A mailbox whose worker does not run (not started yet, ended, or a test that drives ports by hand)
executes commands in the caller's thread.

Owners: `posted` is written by control threads (one at a time, under the mailbox's Python lock),
`done` by whoever drains. Both count commands and wrap.
"""
from libc.stdint cimport uint32_t, uint64_t
from vq_core.arch cimport vq_load_acquire_u32, vq_load_u32

ctypedef void (*command_run_t)(void* target, void* argument) noexcept nogil

cdef struct mailbox_t:
    uint32_t posted          # commands posted
    uint32_t running         # a worker drains it
    int event_fd             # wakes a sleeping worker
    int epoll_fd             # where the worker's descriptors are watched; -1 without a worker
    command_run_t run
    void* target
    void* argument
    char _pad[64]            # what the worker writes lies on its own line
    uint32_t done            # commands finished
    uint32_t draining        # 1 while somebody drains
    uint32_t asleep          # the worker waits in its epoll
    uint64_t rounds          # that the worker has done

cdef void mailbox_drain(mailbox_t* mailbox) noexcept nogil

cdef inline void mailbox_poll(mailbox_t* mailbox) noexcept nogil:
    """The worker's burst boundary: one load of a line that only changes when there is a command."""
    if vq_load_u32(&mailbox.posted) != vq_load_u32(&mailbox.done):
        mailbox_drain(mailbox)

cdef class Mailbox:
    cdef mailbox_t box
    cdef object _lock
    cdef unsigned long thread    # the worker's, while it runs; 0: it does not, or never calls Python
    cdef long patience_s         # a worker that has not passed a burst boundary by then is stuck

# Run run(target, argument) at a burst boundary of the mailbox's worker and wait for it; None runs it here.
# RuntimeError: the worker itself calls this, by a program, and would wait for its own end.
cdef int handover_run(Mailbox mailbox, command_run_t run, void* target, void* argument) except -1
