"""What becomes of packets that a program has looked at: runs of packets with one verdict, each on its way.

    flow_round.pxd -> ask the program -> deliver to another port, or leave to the switch what passes

Owner: the worker whose plan the flow is in.
"""
from vq_core.flow cimport flow_scratch_t, flow_t
from vq_core.port cimport burst_t

# Ask the program about a burst: whether some packet does not simply pass.
cdef bint judged_ask(flow_t* flow, burst_t* burst) noexcept nogil

# As `flow_deliver`, in runs of packets with one verdict.
cdef int judged_deliver(flow_scratch_t* scratch, flow_t* flow, burst_t* burst, int first) noexcept nogil

# Leave to the switch what passes, and send the rest where the program wants it.
cdef void judged_forward(flow_scratch_t* scratch, flow_t* flow, burst_t* burst) noexcept nogil
