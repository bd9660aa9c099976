"""The push of a pair with a receive filter."""
from vq_core.counters cimport DROP_FILTERED
from vq_core.port cimport endpoint_t, packet_t
from vq_core.ports.vhost_pair cimport pair_t
from vq_core.ports.vhost_push cimport vhost_push
from vq_core.queue_state cimport queue_comes_alive
from vq_core.receive_filter cimport filter_passes


cdef int vhost_push_filtered(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    """Push the wanted packets, in runs of those that follow each other, since nothing is moved in a burst."""
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef int done = 0, end, pushed
    if not pair.receiveq.live and not queue_comes_alive(pair.receiveq):
        return vhost_push(endpoint, packets, count)      # nobody is there: counted as such
    while done < count:
        end = done
        while end < count and filter_passes(pair.filter, &packets[end]):
            end += 1
        if end > done:
            pushed = vhost_push(endpoint, &packets[done], end - done)
            done += pushed
            if done < end:
                break            # no room: the caller waits or drops the rest
        if done < count:         # the one that ended the run: asked again it might give another answer
            pair.receiveq.counters.dropped[DROP_FILTERED] += 1
            done += 1
    return done
