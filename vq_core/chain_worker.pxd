"""A worker for requests of a kind that is yours: one thread that answers what comes in some queues, without the GIL.

    round:  for each queue:  take -> copy in -> answer -> copy out -> used element noted;  then publish, call
    between two rounds lies the burst boundary: commands of the control thread are run there

A subclass overrides `answer`, and sees no guest memory: a request is copied out once, with all checks of the chain, and
its answer is copied in. No request is under way when a command runs, so nothing that it takes away is in use.

Requests are answered in their order, so that a ring resumes at its used index after a crash (`HostedDevice.in_order`).
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from vq_core.handover cimport Mailbox
from vq_core.queue_state cimport queue_t

cdef enum:
    CHAIN_ABI = 1                # of exchange_t and ChainWorker.answer
    CHAIN_BURST = 32             # requests of a queue before their used elements are published

cdef struct exchange_t:
    int queue                    # index among the worker's queues
    const uint8_t* data          # the device-readable bytes, copied
    uint32_t data_bytes          # at most the worker's `limit`
    uint64_t readable_bytes      # that the driver sent; more than data_bytes when they are too many
    uint8_t* reply               # what is written here goes to the beginning of the device-writable part
    uint32_t reply_bytes         # room there: at most the driver's, and at most the worker's `limit`

cdef struct chain_worker_t:
    queue_t** queues
    int queue_count
    uint8_t* data                # room for the readable bytes of one request
    uint8_t* reply               # and for its answer
    uint32_t limit               # bytes of each
    int epoll_fd
    int report_fd                # eventfd, signalled when one of its queues breaks; -1 when closed
    bint stopping
    bint busy                    # never sleep
    uint64_t answered            # counters: one writer, the worker
    uint64_t refused
    uint64_t empty_rounds
    uint64_t busy_cycles
    uint64_t idle_cycles
    uint64_t sleeps

cdef class ChainWorker:
    cdef chain_worker_t worker
    cdef readonly Mailbox mailbox
    cdef readonly tuple queues
    cdef readonly object cpu

    # Answer one request: how many bytes of `reply` were written; less than 0: the request has no form that could be
    # answered, and the queue breaks. In the worker, without the GIL; must not block.
    cdef int64_t answer(self, exchange_t* exchange) noexcept nogil
