"""The dirty-page log: mapping the file that the front-end shares."""
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint8_t, uint64_t
from vq_core.memory cimport memory_guard, memory_unguard

import os

cdef extern from "<sys/mman.h>" nogil:
    void* c_mmap "mmap"(void* addr, size_t length, int prot, int flags, int fd, long offset) noexcept
    int c_munmap "munmap"(void* addr, size_t length) noexcept
    int PROT_READ, PROT_WRITE, MAP_SHARED
    void* MAP_FAILED


cdef class DirtyLog:
    """A mapped dirty-page log.

    Parameters
    ----------
    fd : int
        Descriptor of the shared file; only used here, stays the caller's.
    size : int
        Bytes of the bitmap, 1 or more.
    offset : int
        Where the bitmap starts in the file, in bytes.

    Raises
    ------
    ValueError
        Size or offset are out of range, or the file is too small.
    OSError
        mmap refused the file.

    Notes
    -----
    Spec: vhost-user, SET_LOG_BASE and "Migration".
    """

    def __cinit__(self, fd, size, offset):
        cdef uint64_t page = os.sysconf("SC_PAGESIZE")
        cdef uint64_t start, skip
        if size <= 0 or offset < 0 or size + offset > 1 << 62:
            raise ValueError(f"dirty log of {size} bytes at offset {offset}: size must be positive and the sum "
                             "below 2^62")
        status = os.fstat(fd)
        file_size = status.st_size
        # Huge pages are mapped, guarded and unmapped whole or not at all; on other files a larger unit does no harm.
        if status.st_blksize % page == 0:
            page = max(page, <uint64_t>status.st_blksize)
        if size + offset > file_size:
            raise ValueError(f"dirty log needs {size + offset} bytes of its file, which has {file_size}")
        skip = offset % page
        start = offset - skip
        self._length = (size + offset - start + page - 1) // page * page
        cdef void* got = c_mmap(NULL, self._length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, <long>start)
        if got == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self._start = got
        self._guard = memory_guard(got, self._length, &self.log.lost)
        self.log.bits = <uint8_t*>got + skip
        self.log.pages = <uint64_t>size * 8

    def __dealloc__(self):
        if self._guard != NULL:
            memory_unguard(self._guard)
        if self._start != NULL:
            c_munmap(self._start, self._length)

    @property
    def lost(self):
        """bool: the owner truncated the file (SIGBUS was caught); what was marked is gone."""
        return self.log.lost != 0

    @property
    def outside(self):
        """int: how many writes fell beyond the log and are not marked in it."""
        return self.log.outside
