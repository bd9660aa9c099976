"""Programs: functions that look at each burst on its way from port to port, and say what becomes of its packets.

    pull(source) -> program -> runs of packets with one verdict -> push(target, source or another port)

The contract is that of include/vq_program.h, with packet_t as its packet. A program that lets everything pass costs its
call; the burst then goes on as if there were none.

A program is bound for each plan that uses it (`bound`): what is bound belongs to one worker, so that one written in
Python has arrays of its own in each.
"""
from libc.stdint cimport uint16_t, uint32_t
from vq_core.packet_arrays cimport PacketArrays
from vq_core.port cimport packet_t

cdef enum:
    PROGRAM_ABI = 1
    VERDICT_PASS = 0
    VERDICT_REFLECT = 0xfffe
    VERDICT_DROP = 0xffff

ctypedef uint32_t (*program_run_t)(void* state, const packet_t* packets, uint16_t* verdicts,
                                   uint32_t count) noexcept nogil

cdef struct program_t:
    program_run_t run
    void* state

cdef class Program:
    cdef program_t program
    cdef readonly str name

    cpdef Program bound(self)

# What one worker uses of a program; ValueError if that has no function to call.
cpdef Program bind(Program program)

cdef class NativeProgram(Program):
    cdef object _keep

cdef class PythonProgram(Program):
    cdef object _function
    cdef PythonProgram _origin   # of which this one was bound; itself
    cdef readonly object error
    cdef Burst _burst

    cdef uint32_t _call(self, const packet_t* packets, uint16_t* verdicts, uint32_t count) except? 0xffffffff

cdef class Burst(PacketArrays):
    cdef const packet_t* _packets    # NULL: the call is over
    cdef unsigned long _thread       # that makes the call
    cdef object _own_lengths     # what we write; what others see is a view
    cdef uint32_t[::1] _length_row
    cdef object _verdicts
    cdef uint16_t[::1] _verdict_row
