"""The TAP port: each queue of a TAP device of the Linux kernel is an endpoint.

Packets carry a virtio-net header of 12 bytes both ways (IFF_VNET_HDR), so checksum and segmentation
offloads pass between a guest and the host's stack untouched.

The kernel hands out one packet a read and takes one a write; a TAP has no other way. Packets are read one behind the
other into one buffer of the queue, which starts from its beginning again when all of them are released: a burst
of small packets lies in a few neighbouring pages.

Owner: the worker of the endpoint, for every field but `fd`, which is opened and closed by the control thread while
no worker uses the endpoint. `error` is written by the worker and read by anybody.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec
from vq_core.port cimport PACKET_MAX, Port

cdef enum:
    TAP_HEADER_BYTES = 12
    TAP_SLOT_BYTES = PACKET_MAX + 1              # a read that fills it was cut
    TAP_BUFFER_BYTES = 262144 + TAP_SLOT_BYTES   # a burst ends early when no slot is left
    TAP_VECTORS = 64                             # of one write; what more segments hold is joined first
    TAP_QUEUES_MAX = 256                         # MAX_TAP_QUEUES of the kernel

cdef struct tap_queue_t:
    int fd                       # O_NONBLOCK
    int epoll_fd                 # where fd is watched, or -1
    uint32_t error               # errno after which the device is gone; 0: it is there
    bint blocked                 # the last write had no room
    uint32_t used                # bytes of `buffer` that unreleased packets occupy
    uint16_t pulled_mark         # mark of the last packet handed out
    uint16_t released_mark       # mark of the last packet released
    uint32_t backoff             # pulls to skip after the next empty read
    uint32_t skip                # pulls still to skip
    uint64_t reads               # system calls
    uint64_t writes
    uint8_t* buffer              # TAP_BUFFER_BYTES
    uint8_t* joined              # PACKET_MAX bytes: the tail of a packet with too many segments
    iovec vectors[TAP_VECTORS]

cdef class TapPort(Port):
    cdef tap_queue_t* queues
    cdef readonly str ifname
    cdef readonly int accepts
    cdef readonly int offloads
