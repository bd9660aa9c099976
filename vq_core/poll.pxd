"""poll(2): what a descriptor is ready for, asked at once or waited for."""

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int c_poll "poll"(pollfd* fds, unsigned long count, int timeout_ms) noexcept
    short POLLIN, POLLOUT, POLLERR, POLLHUP, POLLNVAL
