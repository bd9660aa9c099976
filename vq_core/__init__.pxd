"""What other Cython code may rely on. PORT_ABI is the version of the port contract, CHAIN_ABI that of requests,
PROGRAM_ABI that of programs between ports.

    from vq_core cimport PORT_ABI, Port, burst_t, endpoint_t, packet_t, segment_t      # packets: a port of a pump
    from vq_core cimport PROGRAM_ABI, VERDICT_DROP, Program, packet_t                  # what happens between two ports
    from vq_core cimport CHAIN_ABI, ChainWorker, Queue, exchange_t                     # requests: a device of your own

`examples/cython_device` has one of each. Below both, for those who walk descriptor chains themselves: `queue_t`, and a
cursor over a chain (`chain_begin`, `chain_next`, `chain_end`), with the rules that vq_core/chain.pxd and
vq_core/queue.pxd tell.
"""
from vq_core.chain cimport chain_begin, chain_end, chain_next, chain_t
from vq_core.chain_worker cimport CHAIN_ABI, ChainWorker, exchange_t
from vq_core.port cimport (ARM_PULL, ARM_PUSH, BURST_MAX, OFFLOAD_ALL, OFFLOAD_CSUM, OFFLOAD_ECN, OFFLOAD_TSO4,
                           OFFLOAD_TSO6, OFFLOAD_UFO, OFFLOAD_USO4, OFFLOAD_USO6, PACKET_MAX, PORT_ABI, SEGMENTS_MAX,
                           Port, burst_t, endpoint_t, packet_t, segment_t)
from vq_core.program cimport PROGRAM_ABI, VERDICT_DROP, VERDICT_PASS, VERDICT_REFLECT, Program, program_run_t
from vq_core.queue cimport Queue
from vq_core.queue_state cimport queue_t
