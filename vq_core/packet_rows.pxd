"""Bytes of many packets that Python hands over: rows of an array, or one behind the other."""
from libc.stdint cimport int64_t, uint8_t

cdef class PacketRows:
    cdef readonly Py_ssize_t count
    cdef const uint8_t[::1] _flat
    cdef int64_t[::1] _starts
    cdef int64_t[::1] _lengths

    cdef const uint8_t* at(self, Py_ssize_t i) noexcept nogil
