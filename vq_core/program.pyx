"""Programs of several kinds, and what one in Python sees of a burst."""
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetName, PyCapsule_GetPointer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uintptr_t
from libc.string cimport memcpy, memset
from vq_core.port cimport BURST_MAX, packet_t

import ctypes
import logging

import numpy as np

cdef extern from "vq_program.h" nogil:
    ctypedef struct vq_packet_t:
        uint32_t length
        uint8_t header[12]
    int VQ_PROGRAM_ABI

if sizeof(vq_packet_t) != sizeof(packet_t) or VQ_PROGRAM_ABI != PROGRAM_ABI:
    raise ImportError("vq_program.h and the engine differ")

ABI = PROGRAM_ABI
PASS = VERDICT_PASS
REFLECT = VERDICT_REFLECT
DROP = VERDICT_DROP
HEADS_MAX = 65536                # bytes of each packet that `Burst.heads` copies

# What Cython calls the type of a function that fulfils the contract, in a capsule of `__pyx_capi__`.
SIGNATURE = "uint32_t (void *, struct __pyx_t_7vq_core_4port_packet_t const *, uint16_t *, uint32_t)"

_logger = logging.getLogger("vq.program")


cdef class Program:
    """Base of programs; in Cython a subclass fills `program` in its constructor.

    Attributes
    ----------
    name : str
        For people.
    """

    cpdef Program bound(self):
        """What one worker uses: this, unless it has a state of its own in each."""
        return self


cdef class NativeProgram(Program):
    """A compiled function of the contract in ``vq_core/include/vq_program.h``.

    Parameters
    ----------
    function : int, ctypes function, numba.cfunc, or capsule
        Its address, or something that has one: of Cython take ``module.__pyx_capi__["name"]``, of cffi
        ``int(ffi.cast("uintptr_t", function))``. It is kept as long as this.
    abi : int
        VQ_PROGRAM_ABI of the header that it was written by.
    state : int
        Address that it gets as its first argument; 0 for NULL.
    name : str
        For people.

    Raises
    ------
    ValueError
        It was made for another ABI, or is nothing with an address.
    """

    def __cinit__(self, function, *, int abi, uintptr_t state=0, str name=""):
        cdef uintptr_t address
        if abi != PROGRAM_ABI:
            raise ValueError(f"the program was made for ABI {abi}, this is {PROGRAM_ABI}: build it by the "
                             "vq_program.h of this version")
        if PyCapsule_CheckExact(function):
            found = (PyCapsule_GetName(function) or b"").decode()
            if found != SIGNATURE:
                raise ValueError(f"the program is a function {found}; it must be {SIGNATURE}")
            address = <uintptr_t>PyCapsule_GetPointer(function, PyCapsule_GetName(function))
        elif isinstance(function, int):
            address = function
        elif hasattr(function, "address"):
            address = function.address
        elif isinstance(function, ctypes._CFuncPtr):
            address = ctypes.cast(function, ctypes.c_void_p).value or 0
        else:
            raise ValueError(f"the program is {function!r}; it must be an address, a ctypes function, a numba.cfunc or "
                             "a capsule of Cython")
        if not address:
            raise ValueError("the program has the address 0")
        self.program.run = <program_run_t>address
        self.program.state = <void*>state
        self.name = name or getattr(function, "__name__", "native")
        self._keep = function


cdef class Burst:
    """What a program in Python sees: up to 32 packets, valid during its call.

    Attributes
    ----------
    count : int
        Packets.
    """

    def __cinit__(self):
        self._lengths = np.zeros(BURST_MAX, np.uint32)
        self._verdicts = np.zeros(BURST_MAX, np.uint16)
        self._length_row = self._lengths
        self._heads = {}

    cdef int _check(self) except -1:
        if self._packets == NULL:
            raise ValueError("the burst is over; a program must not keep it")
        return 0

    def __len__(self):
        return self.count

    @property
    def lengths(self):
        """numpy.ndarray of uint32, [count]: bytes of each packet, Ethernet header included."""
        self._check()
        return self._lengths[:self.count]

    @property
    def verdicts(self):
        """numpy.ndarray of uint16, [count]: all PASS; to be written and returned."""
        self._check()
        return self._verdicts[:self.count]

    def heads(self, int size):
        """The first bytes of each packet, copied, so that no guest can change them any more.

        Parameters
        ----------
        size : int
            1 to 65536 bytes of each; a shorter packet is filled up with zeroes.

        Returns
        -------
        numpy.ndarray of uint8, [count, size]
            Used again for the next burst: copy what is to be kept.
        """
        cdef uint8_t[:, ::1] rows
        cdef uint32_t i, left, part, s
        cdef const packet_t* packet
        cdef uint8_t* to
        self._check()
        if not 1 <= size <= HEADS_MAX:
            raise ValueError(f"heads of {size} bytes; 1 to {HEADS_MAX} are possible")
        table = self._heads.get(size)
        if table is None:
            table = self._heads[size] = np.zeros((BURST_MAX, size), np.uint8)
        rows = table
        for i in range(<uint32_t>self.count):
            packet = &self._packets[i]
            to = &rows[i, 0]
            left = size
            part = min(left, packet.head_bytes)
            memcpy(to, packet.data, part)
            for s in range(packet.more_count):
                to += part
                left -= part
                if left == 0:
                    break
                part = min(left, packet.more[s].length)
                memcpy(to, packet.more[s].data, part)
            else:
                to += part
                left -= part
            if left:
                memset(to, 0, left)
        return table[:self.count]


cdef uint32_t _run_python(void* state, const packet_t* packets, uint16_t* verdicts, uint32_t count) noexcept with gil:
    try:
        return (<PythonProgram>state)._call(packets, verdicts, count)
    except BaseException:        # even the log has failed
        memset(verdicts, 0xff, 2 * count)
        return count


cdef class PythonProgram(Program):
    """A Python function as a program: called with a `Burst`, it returns verdicts, or None if all packets pass.

    Parameters
    ----------
    function : callable
        What it returns is an array of `count` verdicts: PASS, DROP, REFLECT, or 1 + the number of a port.
    name : str
        For people.

    Notes
    -----
    Once it has raised, or returned something else, all packets are dropped, as a filter should do that is broken;
    `error` has the exception, which is logged.
    """

    def __init__(self, function, str name=""):
        if not callable(function):
            raise ValueError(f"the program is {function!r}, which cannot be called")
        self._function = function
        self._origin = self
        self.name = name or getattr(function, "__name__", "python")

    cpdef Program bound(self):
        cdef PythonProgram made = PythonProgram.__new__(PythonProgram)
        made._function = self._function
        made._origin = self._origin
        made.name = self.name
        made._burst = Burst()
        made.program.run = _run_python
        made.program.state = <void*>made
        return made

    cdef uint32_t _call(self, const packet_t* packets, uint16_t* verdicts, uint32_t count) except? 0xffffffff:
        cdef Burst burst = self._burst
        cdef uint16_t[::1] row
        cdef uint32_t i
        if self._origin.error is None:
            for i in range(count):
                burst._length_row[i] = packets[i].length
            burst.count = count
            burst._packets = packets
            try:
                answer = self._function(burst)
                if answer is None:
                    return 0
                row = np.ascontiguousarray(answer, np.uint16)
                if row.shape[0] != <Py_ssize_t>count:
                    raise ValueError(f"{row.shape[0]} verdicts for {count} packets")
                memcpy(verdicts, &row[0], 2 * count)
                burst._verdicts[:] = 0
                return count
            except BaseException as error:
                self._origin.error = error
                _logger.exception("program=%s dropping=all", self.name)
            finally:
                burst._packets = NULL
        memset(verdicts, 0xff, 2 * count)
        return count
