"""A timer that event loops can wait for (timerfd); CPython has none before 3.13."""
from cpython.exc cimport PyErr_SetFromErrno
from libc.string cimport memset

import os

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    cdef struct itimerspec:
        timespec it_interval
        timespec it_value
    int CLOCK_MONOTONIC

cdef extern from "<sys/timerfd.h>" nogil:
    int timerfd_create(int clock, int flags) noexcept
    int timerfd_settime(int fd, int flags, const itimerspec* new, itimerspec* old) noexcept
    int TFD_NONBLOCK, TFD_CLOEXEC


cdef class Timer:
    """A one-shot timer behind a descriptor that becomes readable when it expires."""

    cdef int _fd

    def __cinit__(self):
        self._fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._fd < 0:
            PyErr_SetFromErrno(OSError)

    def __dealloc__(self):
        self.close()

    def fileno(self):
        """int: the descriptor."""
        return self._fd

    def set(self, double seconds):
        """Expire once in `seconds` (at least a microsecond from now); an earlier setting is forgotten."""
        cdef itimerspec when
        memset(&when, 0, sizeof(when))
        seconds = max(seconds, 1e-6)
        when.it_value.tv_sec = <long>seconds
        when.it_value.tv_nsec = <long>((seconds - <long>seconds) * 1e9)
        if timerfd_settime(self._fd, 0, &when, NULL):
            PyErr_SetFromErrno(OSError)

    def clear(self):
        """Take note of an expiry: the descriptor is not readable any more."""
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            pass

    def close(self):
        """Close the descriptor; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
