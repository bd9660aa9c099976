"""What other Cython code may rely on: the port contract. Its version is PORT_ABI.

    from vq_core cimport PORT_ABI, Port, burst_t, endpoint_t, packet_t, segment_t
"""
from vq_core.port cimport (ARM_PULL, ARM_PUSH, BURST_MAX, OFFLOAD_ALL, OFFLOAD_CSUM, OFFLOAD_ECN, OFFLOAD_TSO4,
                           OFFLOAD_TSO6, OFFLOAD_UFO, OFFLOAD_USO4, OFFLOAD_USO6, PACKET_MAX, PORT_ABI, SEGMENTS_MAX,
                           Port, burst_t, endpoint_t, packet_t, segment_t)
