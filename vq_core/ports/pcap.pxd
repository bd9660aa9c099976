"""The capture port: a classic pcap file, written (pcap_writer.pxd) or replayed (pcap_replay.pxd)."""
from vq_core.port cimport Port
from vq_core.ports.pcap_replay cimport pcap_replay_t
from vq_core.ports.pcap_writer cimport pcap_writer_t

cdef class PcapPort(Port):
    cdef pcap_writer_t writer        # one of the two is in use
    cdef pcap_replay_t replay
    cdef void* guard                 # of the mapping
    cdef readonly str path
    cdef readonly bint write

    cdef void let_go(self) noexcept
