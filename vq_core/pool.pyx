"""The threads' side of a pool, and its life."""
from libc.stdint cimport uint64_t
from vq_core.arch cimport vq_load_u32, vq_store_release_u32

import os

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t* lock, void* attributes) noexcept
    int pthread_mutex_destroy(pthread_mutex_t* lock) noexcept
    int pthread_mutex_lock(pthread_mutex_t* lock) noexcept
    int pthread_mutex_unlock(pthread_mutex_t* lock) noexcept
    int pthread_cond_init(pthread_cond_t* condition, void* attributes) noexcept
    int pthread_cond_destroy(pthread_cond_t* condition) noexcept
    int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* lock) noexcept
    int pthread_cond_signal(pthread_cond_t* condition) noexcept
    int pthread_cond_broadcast(pthread_cond_t* condition) noexcept

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void* data, size_t bytes) noexcept


cdef void pool_submit(pool_t* pool, job_t* job) noexcept nogil:
    job.next = NULL
    pthread_mutex_lock(&pool.lock)
    if pool.first == NULL:
        pool.first = job
    else:
        pool.last.next = job
    pool.last = job
    pthread_cond_signal(&pool.submitted)
    pthread_mutex_unlock(&pool.lock)


cdef job_t* pool_withdraw(pool_t* pool) noexcept nogil:
    cdef job_t* waiting
    pthread_mutex_lock(&pool.lock)
    waiting = pool.first
    pool.first = NULL
    pthread_mutex_unlock(&pool.lock)
    return waiting


cdef job_t* pool_collect(pool_t* pool) noexcept nogil:
    cdef job_t* done
    if vq_load_u32(&pool.done_count) == 0:
        return NULL
    pthread_mutex_lock(&pool.lock)
    done = pool.done
    pool.done = NULL
    vq_store_release_u32(&pool.done_count, 0)
    pthread_mutex_unlock(&pool.lock)
    return done


cdef void _serve(pool_t* pool) noexcept nogil:
    cdef job_t* job
    cdef uint64_t one = 1
    cdef bint was_empty
    pthread_mutex_lock(&pool.lock)
    while True:
        while pool.first == NULL and not pool.stopping:
            pthread_cond_wait(&pool.submitted, &pool.lock)
        job = pool.first
        if job == NULL:
            break
        pool.first = job.next
        pthread_mutex_unlock(&pool.lock)
        job.run(job)
        pthread_mutex_lock(&pool.lock)
        was_empty = pool.done == NULL
        job.next = pool.done
        pool.done = job
        vq_store_release_u32(&pool.done_count, pool.done_count + 1)
        if was_empty:
            c_write(pool.event_fd, &one, 8)      # our own eventfd, and each worker's wait is one edge of it
    pthread_mutex_unlock(&pool.lock)


cdef class Pool:
    """Threads that do what would block: call `serve` in each of them.

    Notes
    -----
    Threading: `serve` blocks without the GIL until `stop`, and finishes what was submitted before.
    """

    def __cinit__(self):
        self.pool.event_fd = -1
        pthread_mutex_init(&self.pool.lock, NULL)
        pthread_cond_init(&self.pool.submitted, NULL)
        self.pool.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __dealloc__(self):
        self.close()
        pthread_cond_destroy(&self.pool.submitted)
        pthread_mutex_destroy(&self.pool.lock)

    def serve(self):
        """Do jobs until `stop`; for a thread of its own."""
        with nogil:
            _serve(&self.pool)

    def stop(self):
        """End all threads that serve."""
        with nogil:
            pthread_mutex_lock(&self.pool.lock)
            self.pool.stopping = 1
            pthread_cond_broadcast(&self.pool.submitted)
            pthread_mutex_unlock(&self.pool.lock)

    def close(self):
        """Close the descriptor, when no thread serves any more; may be called twice."""
        if self.pool.event_fd >= 0:
            os.close(self.pool.event_fd)
            self.pool.event_fd = -1
