"""A virtqueue that the control thread serves: its kicks and a timer are what an event loop waits for.

Owner: the control thread, whose queue has no mailbox. The kick descriptor is watched in an epoll descriptor of the
queue's own, beside the timer.
"""
from libc.stdint cimport uint32_t
from vq_core.queue cimport Queue

cdef class ServedQueue:
    cdef readonly Queue queue
    cdef int _epoll_fd
    cdef object _timer
    cdef uint32_t _outstanding   # chains of this life that are not answered
    cdef uint32_t _life          # that was seen last
    cdef uint32_t _begun         # the life of which `begun` has told
