"""Writing a capture file: the data plane of the capture port's one direction.

    push: packets -> records in `buffer`      flush: buffer -> file, when it is half full or 100 ms old

Invariants: buffer[0] is the first byte of a record; `committed` is the length of the file up to it; `sent` bytes of
the buffer are in the file already (0 but for a pipe that is full). A regular file never keeps a part of a record.
Records are counted when they are in the file, not when they are in the buffer.

Owner: the worker of the endpoint. The control thread opens and closes the descriptors while no worker uses it, and
reads `error` at any time.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from vq_core.port cimport endpoint_t

cdef enum:
    PCAP_RECORD_BYTES = 16
    PCAP_BUFFER_BYTES = 262144
    PCAP_SNAPLEN_MAX = 262144    # what tcpdump takes for the largest sensible one
    PCAP_DELAY_NS = 100000000    # how long a record may wait in the buffer

cdef struct pcap_writer_t:
    int fd
    bint regular                 # can be cut back; else a pipe or device
    bint blocked                 # a pipe had no room
    uint32_t snaplen
    uint32_t fill                # bytes of `buffer` in use
    uint32_t sent
    uint64_t committed
    int64_t deadline_ns          # CLOCK_MONOTONIC, when the buffer has to be written; 0: it is empty
    uint32_t error               # errno of the last refused write
    bint broken                  # nothing can be written any more
    uint8_t* buffer
    int timer_fd                 # wakes the worker when the buffer is due
    int epoll_fd                 # where the descriptors are watched, or -1

# Fill in an endpoint whose `port` is a pcap_writer_t.
cdef void pcap_writer_wire(endpoint_t* endpoint) noexcept
# The last write: what a full pipe does not take is counted as dropped.
cdef void pcap_writer_end(endpoint_t* endpoint) noexcept nogil
