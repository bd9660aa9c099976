"""Arrays of numpy as packets."""
from libc.stdint cimport uint8_t

import numpy as np

LENGTH_MAX = (1 << 32) - 1       # of one packet


cdef class PacketRows:
    """What is to be written for each packet.

    Parameters
    ----------
    data : bytes-like or array of uint8
        [packets, size]: a row for each. [bytes]: one behind the other, as `gather` returns them.
    lengths : array of int, optional
        Bytes of each. With rows: how much of each counts, by default all. With bytes in a line: needed, and together
        they are as many as there are.

    Raises
    ------
    ValueError
        Lengths and data do not fit together.
    """

    def __cinit__(self, data, lengths=None):
        array = np.asarray(data) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
        if array.dtype != np.uint8 or array.ndim not in (1, 2):
            raise ValueError(f"data is an array of {array.ndim} dimensions of {array.dtype}; it must be of 1 or 2, of "
                             "uint8")
        if array.ndim == 2:
            rows, size = array.shape
            sizes = np.full(rows, size, np.int64) if lengths is None else self._sizes(lengths)
            if len(sizes) != rows or (rows and sizes.max() > size):
                raise ValueError(f"{len(sizes)} lengths of up to {max(sizes, default=0)} for {rows} rows of {size} "
                                 "bytes")
            self._starts = np.arange(rows, dtype=np.int64) * size
        else:
            if lengths is None:
                raise ValueError("data is a line of bytes; give the lengths of its packets, or an array with a row for "
                                 "each")
            sizes = self._sizes(lengths)
            if sizes.sum() != array.size:
                raise ValueError(f"the lengths come to {sizes.sum()} bytes, there are {array.size}")
            self._starts = np.cumsum(sizes) - sizes
        self._lengths = sizes
        self.count = len(sizes)
        self._flat = np.ascontiguousarray(array).reshape(-1)

    def _sizes(self, lengths):
        """A copy that nobody else changes."""
        sizes = np.array(lengths)
        if sizes.ndim != 1 or sizes.dtype.kind not in "iu" and sizes.size:
            raise ValueError(f"lengths is {lengths!r}; it must be an array of whole numbers, one for each packet")
        if sizes.size and (sizes.min() < 0 or sizes.max() > LENGTH_MAX):
            raise ValueError(f"lengths are from {sizes.min()} to {sizes.max()}; 0 to {LENGTH_MAX} are possible")
        return sizes.astype(np.int64)

    cdef const uint8_t* at(self, Py_ssize_t i) noexcept nogil:
        """Where the bytes of packet i begin; of an empty one that is nowhere."""
        return &self._flat[self._starts[i]] if self._lengths[i] else NULL
