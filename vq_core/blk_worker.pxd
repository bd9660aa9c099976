"""A worker of a block device: one thread that serves some of its queues, without the GIL.

    round:  give back what the pool has done; for each queue: take and begin, publish, call
    between two rounds lies the burst boundary: commands of the control thread are run there

No request is under way when a command runs, so nothing that it takes away (memory, ring, log) is in use. A disk that
hangs therefore holds the control thread up too, for PATIENCE_S at most.
"""
from libc.stdint cimport uint64_t
from vq_core.blk_queue cimport blk_queue_t
from vq_core.disk cimport Disk
from vq_core.handover cimport Mailbox
from vq_core.pool cimport Pool, pool_t

cdef enum:
    PATIENCE_S = 300

cdef struct blk_worker_t:
    blk_queue_t* queues
    int queue_count
    pool_t* pool
    int epoll_fd
    bint stopping
    bint busy                    # never sleep
    uint64_t empty_rounds        # counters: one writer, the worker
    uint64_t busy_cycles
    uint64_t idle_cycles
    uint64_t sleeps

cdef class BlkWorker:
    cdef blk_worker_t worker
    cdef readonly Mailbox mailbox
    cdef readonly Pool pool
    cdef readonly Disk disk
    cdef readonly tuple queues
    cdef readonly object cpu
