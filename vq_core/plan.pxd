"""The plan of a worker: all its flows, and each endpoint that they touch once.

Immutable once a worker has it: another one is made, and swapped at a burst boundary (worker.pyx).
"""
from vq_core.flow cimport flow_t
from vq_core.port cimport Port, endpoint_t

cdef struct plan_t:
    flow_t* flows
    int flow_count
    endpoint_t** endpoints       # each endpoint of the plan once
    int endpoint_count

cdef class Plan:
    cdef plan_t plan
    cdef list keep               # lanes, and with these the switch, that the plan points into
    cdef dict _owned             # (port, endpoint index) of each endpoint, by the endpoint's address

    cdef endpoint_t* _endpoint(self, Port port, int index) except NULL
    cdef int _own(self, Port port, int index) except -1
    cdef bint _holds(self) noexcept
    cdef int _find_heirs(self, Plan old, int* heirs) except -1
