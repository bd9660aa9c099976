"""Threads for what would block: one worker hands jobs over and collects those that are done.

A job belongs to the worker until `pool_submit`, then to the pool until `pool_collect` gives it back. The lock is held
for a few stores at a time; nothing on the way of a request that need not wait comes here.
"""
from libc.stdint cimport uint32_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef struct job_t:
    job_t* next
    void (*run)(job_t* job) noexcept nogil   # in a thread of the pool; may wait as long as it must

cdef struct pool_t:
    pthread_mutex_t lock
    pthread_cond_t submitted
    job_t* first                 # queued, oldest first
    job_t* last
    job_t* done                  # newest first
    uint32_t done_count          # for the worker's look without the lock
    uint32_t stopping
    int event_fd                 # signalled when a job is done after there was none

cdef void pool_submit(pool_t* pool, job_t* job) noexcept nogil

# All jobs that no thread has begun, oldest first, or NULL: they are the worker's again.
cdef job_t* pool_withdraw(pool_t* pool) noexcept nogil

# All jobs that are done, or NULL.
cdef job_t* pool_collect(pool_t* pool) noexcept nogil

cdef class Pool:
    cdef pool_t pool
