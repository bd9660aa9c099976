"""Packets as arrays of numpy: what Python sees of many at once, without a loop over them.

All arrays are copies, so that no guest can change them any more; who asks twice copies twice, and a guest may have
changed its bytes in between. Subclasses say where packets lie, by `_length` and `_copy`, and fill `count` and
`_lengths`.
"""
from libc.stdint cimport uint8_t, uint32_t

cdef class Table:
    # An array that is used again for each burst, and its bytes.
    cdef object array
    cdef uint8_t[::1] flat
    cdef uint32_t item           # bytes of a row
    cdef bint whole              # a row that is not there as a whole is zero
    cdef bint swapped            # other byte order than ours

cdef class PacketArrays:
    cdef readonly int count
    cdef uint32_t _room          # packets that arrays are made for
    cdef object _lengths         # array [_room] of uint32
    cdef dict _heads             # tables by size
    cdef dict _fields            # tables by offset and type

    cdef int _check(self) except -1
    cdef uint32_t _length(self, uint32_t i) noexcept nogil
    cdef uint32_t _copy(self, uint32_t i, uint32_t offset, uint8_t* to, uint32_t size) noexcept nogil
    cdef object _fill(self, Table table, uint32_t offset)
