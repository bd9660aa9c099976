"""Watching descriptors for a worker: edge-triggered, so that nothing has to be read to make the edge go away."""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags) noexcept
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event) noexcept
    int epoll_wait(int epfd, epoll_event* events, int max, int timeout) noexcept
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    uint32_t EPOLLIN, EPOLLOUT, EPOLLET

cdef inline int epoll_move(int before, int after, int fd, uint32_t events) noexcept nogil:
    """Watch `fd` in epoll descriptor `after` and not in `before` any more (each -1: none); -1 and errno on failure.

    What cannot be watched, such as a regular file, is not.
    """
    cdef epoll_event event
    if fd < 0:
        return 0
    memset(&event, 0, sizeof(event))
    event.events = events | EPOLLET
    if before >= 0:
        epoll_ctl(before, EPOLL_CTL_DEL, fd, &event)
    return epoll_ctl(after, EPOLL_CTL_ADD, fd, &event) if after >= 0 else 0
