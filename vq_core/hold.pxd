"""Holding back from a ring whose driver is in full flow.

After a full burst with less than another one behind it, the driver is writing the very lines that would be looked at:
its index, or the descriptors that follow. Each look takes them away from it, and what it then waits for costs more than
is won. So the ring is left alone for a moment, until the driver is some bursts ahead or has paused: a transmitq before
packets are pulled from it, a receiveq before its room is asked for.

Nothing waits here: the worker serves its other queues meanwhile. A packet is late by HOLD_LOOKS * HOLD_CYCLES at most,
three or four microseconds, and only behind a full burst; or by one round, if other queues make that last longer.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_cycles, vq_pause
from vq_core.ring cimport ring_ahead, ring_t

cdef enum:
    HOLD_AHEAD = 128             # buffers: what a driver should be ahead, if its ring is twice as long
    HOLD_CYCLES = 3072           # of the time stamp counter, from one look to the next
    HOLD_LOOKS = 3
    HOLD_PAUSES = 4              # a round: the driver may run on the other thread of this core

cdef struct hold_t:
    uint64_t looked_at           # time stamp of the last look, if there was one
    uint32_t looks               # that are left; 0: nothing is held back

cdef inline void hold_begin(hold_t* hold) noexcept nogil:
    """There was a full burst."""
    hold.looks = HOLD_LOOKS

cdef inline void hold_end(hold_t* hold) noexcept nogil:
    """The driver waits for what it has sent: take whatever there is."""
    hold.looks = 0

cdef inline bint hold_on(hold_t* hold, ring_t* ring, bint packed, uint16_t burst) noexcept nogil:
    """Whether to leave the ring alone in this round; not if `burst` buffers, the next full burst, are there at once."""
    cdef uint64_t now, since = 0
    cdef uint16_t wanted = burst
    if hold.looks == 0:
        return False
    now = vq_cycles()
    if hold.looks < HOLD_LOOKS:
        since = now - hold.looked_at     # wraps, and so ends the wait, where the counter was set back
        if since < HOLD_CYCLES:
            for _ in range(HOLD_PAUSES):
                vq_pause()
            return True
        wanted = max(<uint16_t>1, min(<uint16_t>HOLD_AHEAD, <uint16_t>(ring.num >> 1)))
    if since >= HOLD_LOOKS * HOLD_CYCLES or (wanted <= ring.num and ring_ahead(ring, packed, wanted)):
        hold.looks = 0
        return False
    hold.looks -= 1
    hold.looked_at = now
    return hold.looks != 0
