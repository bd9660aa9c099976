"""Notification arithmetic and the eventfds of a queue (VIRTIO 1.3, 2.7.7.2, 2.7.10).

Nothing here waits, whatever a hostile front-end does to the descriptors that it shares with us:
- A call is counted into its eventfd by the kernel itself (notify.pyx). A plain write would sleep on a full
  counter, and O_NONBLOCK does not help: it belongs to the open file, where the peer can clear it at any time.
- Kick descriptors are never read: they are watched edge-triggered, so that neither a blocking nor a closed one
  can hold a worker.
"""
from libc.stdint cimport uint16_t

cdef inline bint notify_crossed(uint16_t event, uint16_t now, uint16_t old) noexcept nogil:
    """Whether the step from `old` to `now` passed `event` (all modulo 2^16)."""
    return <uint16_t>(now - event - 1) < <uint16_t>(now - old)

# Add one to an eventfd, or write to a pipe whose open file is ours; fd < 0: the peer polls, nothing to do.
cdef void notify_signal(int fd) noexcept nogil
