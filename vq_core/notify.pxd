"""Notification arithmetic and the eventfds of a queue (VIRTIO 1.3, 2.7.7.2, 2.7.10).

Nothing here waits, whatever a hostile front-end does to the descriptors that it shares with us:
- A call is counted into its eventfd by the kernel itself (notify.pyx). A plain write would sleep on a full
  counter, and O_NONBLOCK does not help: it belongs to the open file, where the peer can clear it at any time.
- Kick descriptors are never read: they are watched edge-triggered, so that neither a blocking nor a closed one
  can hold a worker.
- Whoever waits for an eventfd is woken by whoever signals it, one after the other: a peer that lets millions of epoll
  entries wait for its call makes each call last half a second. Once a signal has taken long, which may have been us
  waiting for the processor, the processor's time for all that follow is measured, and when it adds up there are none.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_cycles, vq_load_u32, vq_store_release_u32

cdef enum:
    SIGNAL_CYCLES = 300000           # about 100 microseconds; a signal takes two or three

cdef struct peer_t:                  # a front-end, for all queues that it has
    uint32_t watched                 # a signal has taken long
    uint32_t muted                   # too many have
    uint64_t spent_ns                # what signals have taken too long

cdef inline bint notify_crossed(uint16_t event, uint16_t now, uint16_t old) noexcept nogil:
    """Whether the step from `old` to `now` passed `event` (all modulo 2^16)."""
    return <uint16_t>(now - event - 1) < <uint16_t>(now - old)

# Add one to an eventfd, or write to a Unix stream socket or to a pipe whose open file is ours; fd < 0: the peer polls,
# nothing to do.
cdef void notify_signal(int fd) noexcept nogil

# Whether a descriptor of a peer, if it is a socket, is one of those.
cdef bint notify_usable(int fd) noexcept nogil

cdef inline bint notify_peer(peer_t* peer, int fd) noexcept nogil:
    """As `notify_signal`, to a peer that may want to hold us; not if it is muted. Whether it was muted by this."""
    cdef uint64_t began
    if vq_load_u32(&peer.watched):
        return notify_measured(peer, fd)
    began = vq_cycles()
    notify_signal(fd)
    if vq_cycles() - began > SIGNAL_CYCLES:
        vq_store_release_u32(&peer.watched, 1)
    return False

# Signal, unless it is muted, a peer that is watched.
cdef bint notify_measured(peer_t* peer, int fd) noexcept nogil
