"""By hand what the worker of a block device does in its loop, so that a test can cut it anywhere.

    take(worker, index)       begin what a ring has, without publishing; number of requests
    work(worker)              do all jobs of the pool in this thread, and give them back: the last one first
    publish(worker, index)    expose what was given back, and call the driver
    act(worker)               all of this twice, for the first ring

    prepare(queue, region, memory, num, addresses, base, features)    all that starting a ring does before ...
    resume()                                                          ... it looks at its in-flight region
"""
from libc.stdint cimport uint64_t
from libc.string cimport memset
from vq_core.blk_queue cimport blk_give_back, blk_publish, blk_queue_t, blk_take
from vq_core.blk_request cimport blk_request_t
from vq_core.blk_worker cimport BlkWorker
from vq_core.inflight cimport InflightQueue, InflightRegion
from vq_core.inflight_restart cimport inflight_resume
from vq_core.memory cimport MemoryMap
from vq_core.pool cimport job_t, pool_withdraw
from vq_core.queue cimport Queue
from vq_core.queue_state cimport queue_change_t, queue_place

cdef queue_change_t change
cdef InflightQueue tracking
cdef Queue prepared


def take(BlkWorker worker, int index):
    return blk_take(&worker.worker.queues[index])


def publish(BlkWorker worker, int index):
    blk_publish(&worker.worker.queues[index])


def work(BlkWorker worker):
    cdef job_t* job = pool_withdraw(worker.worker.pool)
    cdef job_t* done = NULL
    cdef job_t* following
    cdef blk_queue_t* queue
    count = 0
    while job != NULL:
        following = job.next
        job.run(job)
        job.next = done
        done = job
        job = following
    while done != NULL:
        following = done.next
        queue = <blk_queue_t*>(<blk_request_t*>done).owner
        queue.in_flight -= 1
        blk_give_back(queue, <blk_request_t*>done)
        done = following
        count += 1
    return count


def act(BlkWorker worker):
    for _ in range(2):
        take(worker, 0)
        publish(worker, 0)
        work(worker)
        publish(worker, 0)


def prepare(Queue queue, InflightRegion region, MemoryMap memory, int num, tuple addresses, uint64_t base,
            uint64_t features):
    global tracking, prepared
    memset(&change, 0, sizeof(change))
    prepared = queue
    queue._resolve(&change, memory, None, num, addresses, features)
    change.wanted.ring.num = num
    if change.wanted.ring.is_packed:
        queue._begin_packed(&change.wanted, num, base, features, False)
    else:
        queue._begin_split(&change.wanted, num, base, features, False)
    queue_place(&change.wanted)
    tracking = InflightQueue(region, queue.index, num, change.wanted.ring.is_packed)


def resume():
    inflight_resume(tracking, &change.wanted.ring, 0)
