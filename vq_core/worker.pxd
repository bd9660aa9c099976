"""A worker: one thread that moves packets along its flows, without the GIL.

    round:  for each flow:  pull -> (offload) -> push -> release -> flush
    between two rounds lies the burst boundary: commands of the control thread are run there

A flow joins a source endpoint to a target endpoint, or to a switch that chooses targets. An endpoint
belongs to one worker; the plan (all flows of a worker) is immutable and swapped by hand-over.

Sleeping (`adaptive`): after IDLE_CYCLES without a packet the worker asks every source for a wake-up
(`arm`), looks once more, and waits in one epoll. `busy` never sleeps.
"""
from libc.stdint cimport uint64_t
from vq_core.flow cimport flow_scratch_t
from vq_core.handover cimport Mailbox
from vq_core.offload cimport Offload
from vq_core.plan cimport Plan, plan_t

cdef struct worker_t:
    plan_t* plan
    flow_scratch_t scratch
    int epoll_fd
    bint stopping
    bint busy                    # never sleep
    uint64_t empty_rounds        # counters: one writer, the worker
    uint64_t busy_cycles
    uint64_t idle_cycles
    uint64_t sleeps

cdef class Worker:
    cdef worker_t* worker
    cdef readonly Mailbox mailbox
    cdef readonly object cpu
    cdef Plan _plan
    cdef Offload _offload
