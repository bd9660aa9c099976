"""Notification arithmetic and the eventfds of a queue (VIRTIO 1.3, 2.7.7.2, 2.7.10).

Calls are written to descriptors that are O_NONBLOCK (the control plane sees to it): a full
eventfd counter says EAGAIN, which is success, since the driver is already signalled.
Kick descriptors are never read: they are watched edge-triggered, so that neither a blocking nor
a closed descriptor of a hostile front-end can hold a worker.
"""
from libc.stdint cimport uint16_t, uint64_t

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void* data, size_t bytes) noexcept

cdef inline bint notify_crossed(uint16_t event, uint16_t now, uint16_t old) noexcept nogil:
    """Whether the step from `old` to `now` passed `event` (all modulo 2^16)."""
    return <uint16_t>(now - event - 1) < <uint16_t>(now - old)

cdef inline void notify_signal(int fd) noexcept nogil:
    """Add one to an eventfd (or write to a pipe); fd < 0: the peer polls, nothing to do."""
    cdef uint64_t one = 1
    if fd >= 0:
        c_write(fd, &one, 8)
