"""Lengths, heads, fields and bytes of many packets."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

import numpy as np

HEADS_MAX = 65536                # bytes of each packet that `heads` and `field` look at
TABLES_MAX = 16                  # of either kind that are kept


cdef class Table:
    def __cinit__(self, shape, dtype, uint32_t item, *, bint whole=False, bint swapped=False):
        made = np.zeros(shape, dtype)
        self.flat = made.view(np.uint8).reshape(-1)
        self.array = made[...]       # what others see owns nothing, so that they cannot resize it under us
        self.item = item
        self.whole = whole
        self.swapped = swapped


cdef inline void _swap(uint8_t* item, uint32_t size) noexcept nogil:
    cdef uint32_t i
    for i in range(size // 2):
        item[i], item[size - 1 - i] = item[size - 1 - i], item[i]


cdef class PacketArrays:
    """Packets of a burst, as arrays.

    Attributes
    ----------
    count : int
        Packets.

    Notes
    -----
    Arrays are copies of what lies in guest memory: look once at what decides something, and decide by that.
    """

    def __cinit__(self):
        self._heads = {}
        self._fields = {}

    cdef int _check(self) except -1:
        raise NotImplementedError

    cdef uint32_t _length(self, uint32_t i) noexcept nogil:
        return 0

    cdef uint32_t _copy(self, uint32_t i, uint32_t offset, uint8_t* to, uint32_t size) noexcept nogil:
        """Copy `size` bytes of a packet from `offset`, or as many as it has there: how many."""
        return 0

    def __len__(self):
        return self.count

    @property
    def lengths(self):
        """numpy.ndarray of uint32, [count]: bytes of each packet, Ethernet header included; read-only."""
        self._check()
        return self._lengths if <uint32_t>self.count == self._room else self._lengths[:self.count]

    def heads(self, int size):
        """The first bytes of each packet.

        Parameters
        ----------
        size : int
            1 to 65536 bytes of each; a shorter packet is filled up with zeroes.

        Returns
        -------
        numpy.ndarray of uint8, [count, size]
            Used again by the next call of this size, and by a program for the next burst: copy what is to be kept.

        Raises
        ------
        ValueError
            The size is out of range, or the burst is over.
        """
        self._check()
        if not 1 <= size <= HEADS_MAX:
            raise ValueError(f"heads of {size} bytes; 1 to {HEADS_MAX} are possible")
        table = self._heads.get(size)
        if table is None:
            if len(self._heads) >= TABLES_MAX:
                self._heads.clear()
            table = self._heads[size] = Table((self._room, size), np.uint8, size)
        return self._fill(table, 0)

    def field(self, int offset, dtype):
        """One field of each packet: its ethertype is ``field(12, ">u2")``.

        Parameters
        ----------
        offset : int
            Where it begins, bytes from the beginning of the packet.
        dtype : numpy.dtype or str
            What it is, byte order included: ``">u4"``, ``"u1"``, ``"V6"``.

        Returns
        -------
        numpy.ndarray of `dtype` in the byte order of this machine, [count]
            Zero where a packet ends before the field does. Used again by the next call for this field, and by a program
            for the next burst: copy what is to be kept.

        Raises
        ------
        ValueError
            The type has no fixed size or holds objects, the field ends behind byte 65536, or the burst is over.
        """
        self._check()
        table = self._fields.get((offset, dtype))
        if table is None:
            table = self._field_table(offset, dtype)
        return self._fill(table, <uint32_t>offset)

    def _field_table(self, int offset, dtype):
        found = np.dtype(dtype)
        if found.hasobject or found.kind not in "uifSV" or found.subdtype is not None or found.names is not None:
            raise ValueError(f"a field of type {found}; numbers, S and V are possible")
        if not (found.itemsize and 0 <= offset <= HEADS_MAX - found.itemsize):
            raise ValueError(f"a field of {found.itemsize} bytes at {offset}; it must end at byte {HEADS_MAX} or "
                             "before")
        if len(self._fields) >= TABLES_MAX:
            self._fields.clear()
        swapped = found.kind in "uif" and not found.isnative
        table = Table(self._room, found.newbyteorder("="), found.itemsize, whole=True, swapped=swapped)
        self._fields[offset, dtype] = table
        return table

    cdef object _fill(self, Table table, uint32_t offset):
        cdef uint32_t i, size = table.item, done
        cdef uint8_t* to = &table.flat[0]
        for i in range(<uint32_t>self.count):
            done = self._copy(i, offset, to, size)
            if done < size:
                done = 0 if table.whole else done
                memset(to + done, 0, size - done)
            elif table.swapped:
                _swap(to, size)
            to += size
        return table.array if <uint32_t>self.count == self._room else table.array[:self.count]

    def gather(self, which=None):
        """All bytes of packets, one behind the other.

        Parameters
        ----------
        which : array of int or bool, optional
            Numbers of the packets, in the order wanted, or a mask of `count`; all by default.

        Returns
        -------
        data : numpy.ndarray of uint8
        offsets : numpy.ndarray of int64, [packets + 1]
            Packet i of those that were wanted is ``data[offsets[i]:offsets[i + 1]]``.

        Raises
        ------
        IndexError
            There is no such packet.
        ValueError
            The burst is over.
        """
        cdef uint64_t total = 0
        cdef uint32_t i, size, done
        cdef Py_ssize_t k
        cdef int64_t[::1] numbers, places
        cdef uint8_t[::1] bytes_
        self._check()
        chosen = np.arange(self.count) if which is None else np.arange(self.count)[which]
        numbers = np.ascontiguousarray(chosen, np.int64).reshape(-1)
        offsets = np.zeros(numbers.shape[0] + 1, np.int64)
        places = offsets
        for k in range(numbers.shape[0]):
            total += self._length(<uint32_t>numbers[k])
            places[k + 1] = <int64_t>total
        data = np.empty(total, np.uint8)
        if total:
            bytes_ = data
            for k in range(numbers.shape[0]):
                i = <uint32_t>numbers[k]
                size = self._length(i)
                if size:
                    done = self._copy(i, 0, &bytes_[places[k]], size)
                    if done < size:
                        memset(&bytes_[places[k] + done], 0, size - done)
        return data, offsets
