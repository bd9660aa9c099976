"""One packet under way, each of its round trips timed: the distribution of latency, not only its mean.

A packet is sent and watched until it is back; then the next one, at once or after a pause that is long enough for an
adaptive back-end to fall asleep. Each bears a number and comes back byte for byte as it was sent, or counts as changed.

Both queues hold slots of the same stride, one an id: 64 bytes that end with the virtio-net header, then the packet.
All transmitq ids share one slot, since one packet is under way at most.

Thread: one runs it; any thread may call `stop`.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from vq_core.arch cimport vq_cycles, vq_load_u32, vq_pause, vq_store_release_u32
from vq_core.clock cimport CLOCK_MONOTONIC, SECOND_NS, clock_now
from vq_core.driver cimport (DRIVER_OK, Block, DriverQueue, driver_add, driver_arm, driver_disarm, driver_free,
                             driver_kick, driver_next_id, driver_part_t, driver_poll_used, driver_publish, driver_t,
                             driver_used_t)
from vq_core.driver import BrokenRingError
from vq_core.net cimport net_header_bytes
from vq_core.wait cimport pollfd, wait_add, wait_any

import os

cdef enum:
    HEAD_BYTES = 64                  # of a slot before the packet
    PACKET_MIN = 64
    PACKET_MAX = 9216                # a packet must fit one receive buffer
    NUMBER_AT = 16                   # offset of the number: behind the Ethernet header
    RECLAIM = 16                     # transmitq buffers taken back at once
    WAIT_MS = 20                     # longest sleep: the clock and the stop flag are looked at then

# Ways a run ends.
cdef enum:
    TRIP_DONE = 0
    TRIP_LOST = 1
    TRIP_BROKEN = 2

cdef struct trip_t:
    driver_t* sending
    driver_t* receiving
    uint8_t* sent_slot
    uint8_t* slots                   # of the receiveq, one an id
    uint64_t sent_addr
    uint64_t slots_addr
    uint64_t stride
    uint32_t header_bytes
    uint32_t size
    bint sleep
    uint64_t pause_cycles
    uint64_t patience_ns
    uint64_t number                  # of the next packet
    uint64_t count                   # trips that were timed; one writer
    uint64_t changed
    uint64_t lost
    uint32_t stop


cdef inline void trip_post(trip_t* trip, uint32_t id) noexcept nogil:
    """Give the device the receive buffer of slot `id`, the next id of the receiveq."""
    cdef driver_part_t part
    part.addr = trip.slots_addr + id * trip.stride + HEAD_BYTES - trip.header_bytes
    part.len = trip.header_bytes + trip.size
    driver_add(trip.receiving, &part, 0, 1)


cdef void trip_fill(trip_t* trip) noexcept nogil:
    """Post every receive buffer."""
    while driver_free(trip.receiving) > 0:
        trip_post(trip, driver_next_id(trip.receiving))
    driver_publish(trip.receiving)


cdef inline int trip_send(trip_t* trip) noexcept nogil:
    """Send the packet with its next number: how it ended; lost if the device gives no buffer back to send with."""
    cdef driver_part_t part
    cdef driver_used_t used[RECLAIM]
    cdef uint32_t looks = 0
    cdef int64_t begin = 0
    while driver_free(trip.sending) == 0:
        if driver_poll_used(trip.sending, used, RECLAIM) < 0:
            return TRIP_BROKEN
        vq_pause()
        if looks == 0:
            begin = clock_now(CLOCK_MONOTONIC)
        elif not looks & 4095 and <uint64_t>(clock_now(CLOCK_MONOTONIC) - begin) > trip.patience_ns:
            return TRIP_LOST
        looks += 1
    memcpy(trip.sent_slot + HEAD_BYTES + NUMBER_AT, &trip.number, 8)
    part.addr = trip.sent_addr + HEAD_BYTES - trip.header_bytes
    part.len = trip.header_bytes + trip.size
    driver_add(trip.sending, &part, 1, 0)
    driver_publish(trip.sending)
    driver_kick(trip.sending)
    trip.number += 1
    return TRIP_DONE


cdef void trip_doze(trip_t* trip) noexcept nogil:
    """Wait for the receiveq's call."""
    cdef pollfd fd
    wait_add(&fd, trip.receiving.call_fd)
    if not driver_arm(trip.receiving):
        wait_any(&fd, 1, WAIT_MS)
    driver_disarm(trip.receiving)


cdef int trip_await(trip_t* trip, driver_used_t* used) noexcept nogil:
    """Wait for one packet: how it ended."""
    cdef uint32_t looks = 0
    cdef int got
    cdef int64_t begin = clock_now(CLOCK_MONOTONIC)
    while True:
        got = driver_poll_used(trip.receiving, used, 1)
        if got > 0:
            return TRIP_DONE
        if got < 0:
            return TRIP_BROKEN
        looks += 1
        if trip.sleep:
            trip_doze(trip)
        else:
            vq_pause()
            if looks & 4095:
                continue
        if <uint64_t>(clock_now(CLOCK_MONOTONIC) - begin) > trip.patience_ns:
            return TRIP_LOST


cdef inline bint trip_same(trip_t* trip, driver_used_t* used) noexcept nogil:
    """Whether what came is what was sent."""
    cdef uint8_t* slot = trip.slots + used.id * trip.stride
    if used.len != trip.header_bytes + trip.size:
        return False
    return memcmp(slot + HEAD_BYTES, trip.sent_slot + HEAD_BYTES, trip.size) == 0


cdef inline void trip_rest(trip_t* trip) noexcept nogil:
    cdef uint64_t begin = vq_cycles()
    while vq_cycles() - begin < trip.pause_cycles:
        vq_pause()


cdef int trip_run(trip_t* trip, uint64_t duration_ns, uint32_t[::1] samples) noexcept nogil:
    """Send one after the other until the time is over, the room for samples is used up, or something is wrong."""
    cdef driver_used_t used
    cdef uint64_t begin
    cdef uint64_t room = <uint64_t>samples.shape[0]
    cdef int64_t since = clock_now(CLOCK_MONOTONIC)
    cdef int ended
    driver_disarm(trip.sending)
    driver_disarm(trip.receiving)
    driver_kick(trip.receiving)
    while trip.count < room and not vq_load_u32(&trip.stop):
        begin = vq_cycles()
        ended = trip_send(trip)
        if ended == TRIP_DONE:
            ended = trip_await(trip, &used)
        begin = vq_cycles() - begin
        if ended != TRIP_DONE:
            trip.lost += ended == TRIP_LOST
            return ended
        if trip_same(trip, &used):
            samples[trip.count] = <uint32_t>begin if begin >> 32 == 0 else <uint32_t>0xffffffff
            trip.count += 1
        else:
            trip.changed += 1
        trip_post(trip, driver_next_id(trip.receiving))
        driver_publish(trip.receiving)
        driver_kick(trip.receiving)
        if trip.pause_cycles:
            trip_rest(trip)
        if <uint64_t>(clock_now(CLOCK_MONOTONIC) - since) >= duration_ns:
            break
    return TRIP_DONE


cdef double cycles_per_ns():
    """Ticks of the cycle counter in a nanosecond, from five milliseconds of both clocks."""
    cdef int64_t begin = clock_now(CLOCK_MONOTONIC), now = begin
    cdef uint64_t cycles = vq_cycles()
    with nogil:
        while now - begin < 5000000:
            vq_pause()
            now = clock_now(CLOCK_MONOTONIC)
    return (vq_cycles() - cycles) / <double>(now - begin)


cdef class RoundTrip:
    """Sends one packet at a time on a transmitq, and times how long it takes to come back on a receiveq.

    Parameters
    ----------
    transmitq, receiveq : DriverQueue
        Fresh queues, of one device or of two.
    size : int
        Bytes of the packet with its Ethernet header, 64 to 9216.
    samples : int
        Most round trips to time; `run` ends there.
    poll : {"busy", "sleep"}
        Look at the ring all the time, or sleep until the call comes.
    pause : float
        Seconds between the return of a packet and the next one, spent awake.
    cpu : int, optional
        Processor that `run` pins its thread to.
    patience : float
        Seconds after which a packet counts as lost, which ends the run.

    Raises
    ------
    ValueError
        An argument is out of range.
    MemoryError
        The guest memory is too small; `vq_core.traffic.traffic_memory_bytes` says how much is enough.

    Notes
    -----
    Threading: `run` gives up the GIL; `stop` may come from any thread.
    """

    cdef trip_t trip
    cdef DriverQueue transmitq
    cdef DriverQueue receiveq
    cdef list blocks
    cdef object cpu
    cdef object _samples
    cdef double ticks                # of the cycle counter in a nanosecond

    def __init__(self, DriverQueue transmitq not None, DriverQueue receiveq not None, size=64, *, samples=4_000_000,
                 poll="busy", pause=0.0, cpu=None, patience=1.0):
        cdef Block block
        import numpy
        if not PACKET_MIN <= size <= PACKET_MAX:
            raise ValueError(f"packet size {size} is outside {PACKET_MIN} to {PACKET_MAX} bytes")
        if poll not in ("busy", "sleep"):
            raise ValueError(f"poll {poll!r} is neither 'busy' nor 'sleep'")
        if samples < 1 or not 0 <= pause <= 10 or not patience > 0:
            raise ValueError(f"samples {samples}, pause {pause}, patience {patience}: at least 1; 0 to 10 s; above 0 s")
        if transmitq.outstanding or receiveq.outstanding:
            raise ValueError("a queue has buffers outstanding; give fresh ones, or reset them")
        memset(&self.trip, 0, sizeof(trip_t))
        self.transmitq, self.receiveq, self.cpu = transmitq, receiveq, cpu
        self.ticks = cycles_per_ns()
        self._samples = numpy.empty(samples, numpy.uint32)
        self.trip.stride = HEAD_BYTES + (size + 63) // 64 * 64
        self.trip.size = size
        self.trip.header_bytes = net_header_bytes(transmitq.features)
        self.trip.sleep = poll == "sleep"
        self.trip.pause_cycles = <uint64_t>(pause * SECOND_NS * self.ticks)
        self.trip.patience_ns = <uint64_t>(patience * SECOND_NS)
        self.trip.sending, self.trip.receiving = &transmitq.driver, &receiveq.driver
        block = transmitq.memory.alloc(self.trip.stride)
        self.trip.sent_slot, self.trip.sent_addr = block.data, block.guest_addr
        self.blocks = [block]
        # Ethernet header with the local experimental type, then a pattern in which no byte is as its neighbour.
        frame = bytes.fromhex("027671000002 027671000001 88b5") + bytes(i * 37 & 255 for i in range(size - 14))
        memoryview(block)[HEAD_BYTES:HEAD_BYTES + size] = frame
        block = receiveq.memory.alloc(self.trip.stride * receiveq.size)
        self.trip.slots, self.trip.slots_addr = block.data, block.guest_addr
        self.blocks.append(block)
        trip_fill(&self.trip)

    def run(self, duration=1.0):
        """Time round trips for `duration` seconds, adding to those of earlier runs.

        Raises
        ------
        BrokenRingError
            The device broke a ring.
        RuntimeError
            A queue is in use already.
        """
        cdef uint64_t duration_ns = <uint64_t>(duration * SECOND_NS)
        cdef uint32_t[::1] samples = self._samples
        cdef int ended
        cdef driver_t* broken
        affinity = None
        self.transmitq.claim()
        try:
            self.receiveq.claim()
            try:
                if self.cpu is not None:
                    affinity = os.sched_getaffinity(0)
                    os.sched_setaffinity(0, {self.cpu})
                with nogil:
                    ended = trip_run(&self.trip, duration_ns, samples)
            finally:
                self.receiveq.unclaim()
                if affinity is not None:
                    os.sched_setaffinity(0, affinity)
        finally:
            self.transmitq.unclaim()
        if ended == TRIP_BROKEN:
            broken = self.trip.receiving if self.trip.receiving.error != DRIVER_OK else self.trip.sending
            raise BrokenRingError(broken.error, broken.error_value, broken.num)

    def stop(self):
        """Let `run` end soon."""
        vq_store_release_u32(&self.trip.stop, 1)

    def forget(self):
        """Throw away what was timed so far: the warm-up."""
        self.trip.count = 0

    @property
    def counters(self):
        """dict of int: verified, lost, changed."""
        return {"verified": self.trip.count, "lost": self.trip.lost, "changed": self.trip.changed}

    @property
    def nanoseconds(self):
        """ndarray of float64: the round trips, in order."""
        return self._samples[:self.trip.count] / self.ticks
