"""Handles of the traffic engine: what one thread sends and receives."""
from vq_core.traffic_engine cimport traffic_t

cdef class Traffic:
    cdef traffic_t traffic
    cdef list _queues                # every DriverQueue, claimed while the engine runs
    cdef list _blocks                # guest memory of all slots and tables
    cdef object cpu
    cdef readonly bint running
