"""Programs of several kinds, and what one in Python sees of a burst."""
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uintptr_t
from libc.string cimport memcpy, memset
from vq_core.packet_arrays cimport PacketArrays
from vq_core.port cimport BURST_MAX, packet_t

from vq_core.code_address import code_address as _code_address

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

UINT16 = np.dtype(np.uint16)

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


cpdef Program bind(Program program):
    """What one worker uses of a program.

    Raises
    ------
    ValueError
        It has no function: nobody has filled `program`, or its `bound` gave nothing.
    """
    cdef Program bound = program.bound()
    if bound is None or bound.program.run == NULL:
        raise ValueError(f"program {program.name or type(program).__name__} has no function to call: a subclass of "
                         "Program fills its field `program`, in Cython; for a function take vq.NativeProgram or "
                         "vq.PythonProgram")
    return bound


cdef class NativeProgram(Program):
    """A compiled function of the contract in ``vq_core/include/vq_program.h``.

    Parameters
    ----------
    function : int, ctypes function, cffi function, numba.cfunc, or capsule
        Its address, or something that has one: of Cython take ``module.__pyx_capi__["name"]``. It is kept as long as
        this.
    abi : int
        VQ_PROGRAM_ABI of the header that it was written by.
    state : int
        Address that it gets as its first argument; 0 for NULL. Keep what lies there for as long as the program. Of
        ctypes it is ``ctypes.addressof(state)``, of cffi ``int(ffi.cast("uintptr_t", state))``, and an array of numpy
        has it as ``array.ctypes.data``.
    name : str
        For people.

    Raises
    ------
    ValueError
        It was made for another ABI, or is nothing with an address, or no code lies there.
    TypeError
        The state is no address.
    """

    def __cinit__(self, function, *, int abi, state=0, str name=""):
        if abi != PROGRAM_ABI:
            raise ValueError(f"the program was made for ABI {abi}, this is {PROGRAM_ABI}: build it by the "
                             "vq_program.h of this version")
        self.program.run = <program_run_t><uintptr_t>_code_address(function)
        if not isinstance(state, int):
            raise TypeError(f"the state is {state!r}; it must be an address: ctypes.addressof(state), of cffi "
                            'int(ffi.cast("uintptr_t", state)), of numpy array.ctypes.data')
        self.program.state = <void*><uintptr_t>state
        self.name = name or getattr(function, "__name__", "native")
        self._keep = function


cdef class Burst(PacketArrays):
    """What a program in Python sees: up to 32 packets, valid during its call and for its thread."""

    def __cinit__(self):
        self._room = BURST_MAX
        self._own_lengths = np.zeros(BURST_MAX, np.uint32)
        self._length_row = self._own_lengths
        self._lengths = self._own_lengths.view()
        self._lengths.flags.writeable = False
        verdicts = np.zeros(BURST_MAX, np.uint16)
        self._verdict_row = verdicts
        self._verdicts = verdicts[...]       # owns nothing, so that no program can resize it under us

    cdef int _check(self) except -1:
        if self._packets == NULL:
            raise ValueError("the burst is over; a program must not keep it")
        if self._thread != <unsigned long>PyThread_get_thread_ident():
            raise ValueError("the burst belongs to the call of its program, which may end at any time; give copies of "
                             "arrays to other threads")
        return 0

    cdef uint32_t _length(self, uint32_t i) noexcept nogil:
        return self._packets[i].length

    cdef uint32_t _copy(self, uint32_t i, uint32_t offset, uint8_t* to, uint32_t size) noexcept nogil:
        cdef const packet_t* packet = &self._packets[i]
        cdef const uint8_t* data = packet.data
        cdef uint32_t here = packet.head_bytes, left = size, part, s = 0
        while left:
            if offset < here:
                part = min(left, here - offset)
                memcpy(to, data + offset, part)
                to += part
                left -= part
                offset = 0
            else:
                offset -= here
            if s == packet.more_count:
                break
            data = packet.more[s].data
            here = packet.more[s].length
            s += 1
        return size - left

    @property
    def verdicts(self):
        """numpy.ndarray of uint16, [count]: all PASS; to be written and returned."""
        self._check()
        return self._verdicts if self.count == BURST_MAX else self._verdicts[:self.count]


cdef int _read_verdicts(answer, uint16_t* verdicts, uint32_t count) except -1:
    """Take over what a program returned: whole numbers that fit, as many as packets, or it means nothing."""
    cdef const uint16_t[::1] row
    cdef const int64_t[::1] wide
    cdef uint32_t i
    found = np.asarray(answer)
    if found.ndim != 1:
        what = f"an array of {found.ndim} dimensions" if found.ndim else f"of type {type(answer).__name__}"
        raise ValueError(f"the answer of the program is {what}; return an array with a verdict for each packet, such "
                         "as numpy.full(burst.count, DROP), or None if all pass")
    if len(found) != <Py_ssize_t>count:
        raise ValueError(f"{len(found)} verdicts for {count} packets")
    if found.dtype is UINT16:
        row = np.ascontiguousarray(found)
        memcpy(verdicts, &row[0], 2 * count)
        return 0
    if found.dtype.kind not in "iu":
        remedy = "; of a mask make them by numpy.where(mask, DROP, PASS)" if found.dtype.kind == "b" else ""
        raise ValueError(f"verdicts are an array of {found.dtype}; they must be whole numbers{remedy}")
    wide = np.ascontiguousarray(found, np.int64)
    for i in range(count):
        if not 0 <= wide[i] <= VERDICT_DROP:
            raise ValueError(f"verdict {wide[i]} of packet {i}; 0 to {VERDICT_DROP} are possible")
        verdicts[i] = <uint16_t>wide[i]
    return 0


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
        cdef uint32_t i
        if self._origin.error is None:
            for i in range(count):
                burst._length_row[i] = packets[i].length
            burst.count = count
            burst._packets = packets
            burst._thread = <unsigned long>PyThread_get_thread_ident()
            try:
                answer = self._function(burst)
                if answer is None:
                    return 0
                _read_verdicts(answer, verdicts, count)
                memset(&burst._verdict_row[0], 0, 2 * BURST_MAX)
                return count
            except BaseException as error:
                self._origin.error = error
                _logger.exception("program=%s dropping=all", self.name)
            finally:
                burst._packets = NULL
        memset(verdicts, 0xff, 2 * count)
        return count
