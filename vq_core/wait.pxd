"""Waiting for eventfds whose other holder is not trusted, without ever blocking in a read.

O_NONBLOCK belongs to the open file, so whoever was sent the descriptor can clear it, and can take the counter away
between the poll and the read. RWF_NOWAIT belongs to the one call.
"""
from libc.stdint cimport uint64_t
from posix.uio cimport RWF_NOWAIT, iovec, preadv2
from vq_core.poll cimport POLLIN, c_poll, pollfd

cdef inline void wait_add(pollfd* at, int fd) noexcept nogil:
    """Name the eventfd that entry `at` stands for."""
    at.fd = fd
    at.events = POLLIN
    at.revents = 0

cdef inline void wait_drain(int fd) noexcept nogil:
    """Take what an eventfd has counted, if anything."""
    cdef uint64_t ignored
    cdef iovec part
    part.iov_base = &ignored
    part.iov_len = sizeof(ignored)
    preadv2(fd, &part, 1, -1, RWF_NOWAIT)

cdef inline bint wait_any(pollfd* fds, unsigned long count, int timeout_ms) noexcept nogil:
    """Wait until one of the eventfds was signalled or the time is over; whether one was. They are drained."""
    cdef unsigned long i
    if c_poll(fds, count, timeout_ms) <= 0:
        return False
    for i in range(count):
        if fds[i].revents:
            wait_drain(fds[i].fd)
    return True
