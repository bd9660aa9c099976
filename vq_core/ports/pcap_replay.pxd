"""Replaying a capture file: the data plane of the capture port's other direction.

    pull: the records of the mapped file, borrowed where they lie; no copy

The file is untrusted: each field of a record header is read once, and checked against the end of the file before use;
the mapping is guarded (memory.pxd), since the file may shrink meanwhile. offset <= size always.

Owner: the worker of the endpoint. The control thread maps and unmaps the file while no worker uses it, and reads
`through`, the fault and `cut_count` at any time.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.port cimport endpoint_t

cdef enum:
    PCAP_HEADER_BYTES = 24

# Why a replay ended before the end of its file; texts in pcap.pyx, in this order.
cdef enum:
    FAULT_NONE = 0
    FAULT_HEADER = 1             # the file ends inside a record header
    FAULT_CUT = 2                # the file ends inside a record
    FAULT_LENGTH = 3             # impossible captured length
    FAULT_LOST = 4               # the file was truncated under us
    FAULT_EMPTY = 5              # nothing in it can be replayed

cdef struct pcap_record_t:
    uint8_t* data
    uint32_t captured            # bytes at data
    uint32_t original            # bytes that the packet had
    int64_t stamp_ns

cdef struct pcap_replay_t:
    uint8_t* map
    uint64_t size
    uint64_t offset              # of the next record
    bint swapped                 # written on a machine of the other byte order
    uint32_t unit_ns             # of the fraction in a time stamp: 1 or 1000
    double speed                 # 0: as fast as possible
    uint32_t loops               # passes through the file; 0: for ever
    uint32_t passes
    uint64_t record              # index of the next record in this pass
    uint64_t kept                # packets of this pass
    int64_t start_ns             # CLOCK_MONOTONIC at the first packet of this pass; 0: none yet
    int64_t first_ns             # its time stamp
    bint done                    # nothing more will be pulled
    uint16_t pulled_mark
    uint16_t released_mark
    uint32_t through             # done, and everything was released
    uint32_t lost                # raised by the guard
    uint32_t fault               # FAULT_*, of the last pass that ended early
    uint64_t fault_record
    uint64_t fault_offset
    uint64_t fault_value
    uint64_t cut_count           # packets that were captured in part only
    int timer_fd                 # wakes the worker when the next packet is due
    int epoll_fd                 # where the descriptors are watched, or -1

# Fill in an endpoint whose `port` is a pcap_replay_t.
cdef void pcap_replay_wire(endpoint_t* endpoint) noexcept
