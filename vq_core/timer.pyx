"""A timer that event loops can wait for (timerfd); CPython has none before 3.13."""
from cpython.exc cimport PyErr_SetFromErrno
from vq_core.clock cimport CLOCK_MONOTONIC, SECOND_NS, clock_now, clock_timer, clock_wake_at

import os


cdef class Timer:
    """A one-shot timer behind a descriptor that becomes readable when it expires."""

    cdef int _fd

    def __cinit__(self):
        self._fd = clock_timer()
        if self._fd < 0:
            PyErr_SetFromErrno(OSError)

    def __dealloc__(self):
        self.close()

    def fileno(self):
        """int: the descriptor."""
        return self._fd

    def set(self, double seconds):
        """Expire once in `seconds` (at least a microsecond from now); an earlier setting is forgotten."""
        clock_wake_at(self._fd, clock_now(CLOCK_MONOTONIC) + <long>(max(seconds, 1e-6) * SECOND_NS))

    def clear(self):
        """Take note of an expiry: the descriptor is not readable any more."""
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            pass

    def close(self):
        """Close the descriptor; may be called twice."""
        cdef int fd = self._fd
        if fd >= 0:
            self._fd = -1    # first: another thread may set the timer meanwhile, and the number may be used anew
            os.close(fd)
