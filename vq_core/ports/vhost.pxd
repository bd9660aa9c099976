"""The vhost-user-net port: queue pairs of one device as endpoints of a pump.

A pair joins a transmitq (packets are pulled from it, vhost_pull.pyx) and a receiveq (packets are pushed to it,
vhost_push.pyx).

Owner: the worker of the endpoint; the control thread changes a pair only by hand-over.
"""
from vq_core.port cimport Port
from vq_core.ports.vhost_pair cimport pair_t
from vq_core.queue cimport Peer
from vq_core.receive_filter cimport ReceiveFilter

cdef class VhostPort(Port):
    cdef pair_t* pairs
    cdef readonly tuple queues       # Queue objects: 2i is receiveq i, 2i + 1 is transmitq i
    cdef readonly Peer peer          # what they share
    cdef readonly int pairs_in_use   # the others take and give nothing
    cdef ReceiveFilter _filter       # held while the pairs point to it
