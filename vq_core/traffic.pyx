"""Sources, sinks and exchanges of packets, in Python's hands."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from vq_core.arch cimport vq_load_u64, vq_store_release_u32
from vq_core.driver cimport DRIVER_OK, DriverQueue, driver_used_t
from vq_core.driver import BrokenRingError
from vq_core.guest_memory cimport Block
from vq_core.net cimport net_header_bytes
from vq_core.packets cimport PACKET_LIMIT, PACKET_MIN, SPAN, totals_t
from vq_core.traffic_engine cimport (PARTS_MAX, SIZES_MAX, SLOT_HEAD, STREAMS_MAX, side_head_all, side_post_all,
                                     side_t, stream_t, traffic_run)
from vq_core.virtio cimport VIRTIO_F_INDIRECT_DESC, VIRTIO_NET_F_MRG_RXBUF, has_feature, virtq_desc_t

import os

cdef enum:
    ETHERTYPE = 0xb588               # 0x88b5 (local experimental), bytes swapped


def _stride(capacity):
    """Bytes from slot to slot: whole lines, an odd number of them, so that slots spread over all cache sets."""
    lines = (SLOT_HEAD + capacity + 63) // 64
    return 64 * (lines | 1)


def traffic_memory_bytes(queue_size, size=PACKET_LIMIT, *, pairs=1, receive_bytes=None):
    """Guest memory that an Exchange needs, rings and tables included.

    Parameters
    ----------
    queue_size : int
        Entries.
    size : int
        Largest packet, bytes.
    pairs : int
    receive_bytes : int, optional
        As for `Exchange`.

    Returns
    -------
    int
        Bytes, a multiple of 4096.
    """
    slots = _stride(size) + _stride(size if receive_bytes is None else receive_bytes) + 2 * 16 * PARTS_MAX
    return pairs * (-(-queue_size * (slots + 2 * 32) // 4096) * 4096 + 16 * 4096)


cdef class Traffic:
    """Common part of `Exchange`, `Source` and `Sink`: a thread's worth of verified traffic.

    Notes
    -----
    Threading: `run` gives up the GIL; counters may be read and `stop` called from any thread meanwhile.
    While it runs, the queues belong to the engine: their own methods raise RuntimeError.
    """

    def __cinit__(self):
        memset(&self.traffic, 0, sizeof(traffic_t))
        self._queues = []
        self._blocks = []

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.traffic.stream_count):
            free(self.traffic.streams[i].order.missing)
            free(self.traffic.streams[i].used)
            free(self.traffic.streams[i].scratch)
        free(self.traffic.streams)

    def _set_up(self, transmitqs, receiveqs, *, sizes, window, receive_bytes, descriptors, indirect, verify, poll, cpu,
                patience):
        """Make one stream of each pair (either list may be empty) and post the receive buffers."""
        cdef uint32_t i
        cdef stream_t* stream
        cdef DriverQueue queue
        sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
        if not 1 <= len(sizes) <= SIZES_MAX or not all(PACKET_MIN <= size <= PACKET_LIMIT for size in sizes):
            raise ValueError(f"packet sizes {sizes}: 1 to {SIZES_MAX} of them, each from {PACKET_MIN} to "
                             f"{PACKET_LIMIT} bytes")
        if not 1 <= descriptors <= PARTS_MAX:
            raise ValueError(f"{descriptors} descriptors a packet; 1 to {PARTS_MAX} are possible")
        if poll not in ("busy", "sleep"):
            raise ValueError(f"poll {poll!r} is neither 'busy' nor 'sleep'")
        count = max(len(transmitqs), len(receiveqs))
        if not 1 <= count <= STREAMS_MAX:
            raise ValueError(f"{count} queue pairs; 1 to {STREAMS_MAX} are possible")
        if window is not None and window < 1:
            raise ValueError(f"window {window} is not positive")
        self.traffic.streams = <stream_t*>calloc(count, sizeof(stream_t))
        if self.traffic.streams == NULL:
            raise MemoryError("streams")
        self.traffic.stream_count = count
        self.traffic.size_count = len(sizes)
        for i in range(<uint32_t>len(sizes)):
            self.traffic.sizes[i] = sizes[i]
        self.traffic.windowed = bool(transmitqs) and bool(receiveqs)
        self.traffic.verify = verify
        self.traffic.sleep = poll == "sleep"
        self.traffic.patience_ns = <uint64_t>(patience * 1e9)
        self.cpu = cpu
        largest = max(sizes)
        for i in range(self.traffic.stream_count):
            stream = &self.traffic.streams[i]
            stream.reach = self.traffic.stream_count
            entries = 0
            # 02:vq:<stream>:01 to 02:vq:<stream>:02, then the ethertype and two bytes of padding.
            source = bytes((2, 0x76, 0x71, i >> 8, i & 255, 1))
            target = bytes((2, 0x76, 0x71, i >> 8, i & 255, 2))
            words = target + source + ETHERTYPE.to_bytes(2, "little") + bytes(2)
            stream.ethernet[0] = int.from_bytes(words[:8], "little")
            stream.ethernet[1] = int.from_bytes(words[8:], "little")
            window_limit = PACKET_LIMIT
            if transmitqs:
                queue = transmitqs[i]
                needs = 1 if indirect else descriptors
                if needs > queue.size:
                    raise ValueError(f"a packet takes {needs} descriptors, the transmitq has {queue.size}")
                self._set_side(i, True, queue, largest, descriptors, indirect)
                window_limit = queue.size // needs
                entries = queue.size
            if receiveqs:
                queue = receiveqs[i]
                capacity = self._receive_capacity(queue, largest, receive_bytes)
                header = net_header_bytes(queue.features)
                needs = 1 if indirect else descriptors
                if needs > queue.size:
                    raise ValueError(f"a receive buffer takes {needs} descriptors, the receiveq has {queue.size}")
                self._set_side(i, False, queue, capacity, descriptors, indirect)
                merged = max(1, -(-(largest + header) // (capacity + header)))
                window_limit = min(window_limit, queue.size // needs // merged)
                entries = max(entries, queue.size)
                if window_limit < 1:
                    raise ValueError(f"a packet of {largest} bytes takes {merged} receive buffers, the receiveq holds "
                                     f"{queue.size // needs}; use a larger ring or receive_bytes")
            stream.window = window_limit if window is None else min(window, window_limit)
            stream.order.missing = <uint64_t*>calloc(SPAN // 64, sizeof(uint64_t))
            stream.used = <driver_used_t*>calloc(2 * entries, sizeof(driver_used_t))
            stream.scratch = <uint8_t*>calloc(PACKET_LIMIT + 64, 1)
            if stream.order.missing == NULL or stream.used == NULL or stream.scratch == NULL:
                raise MemoryError("streams")
        for i in range(self.traffic.stream_count):
            if self.traffic.streams[i].receive.queue != NULL:
                side_post_all(&self.traffic.streams[i].receive)

    def _receive_capacity(self, DriverQueue queue, largest, receive_bytes):
        """Payload bytes of a receive buffer."""
        mergeable = has_feature(queue.features, VIRTIO_NET_F_MRG_RXBUF)
        if receive_bytes is None:
            return largest
        if not PACKET_MIN <= receive_bytes <= PACKET_LIMIT:
            raise ValueError(f"receive_bytes {receive_bytes} is not from {PACKET_MIN} to {PACKET_LIMIT}")
        if receive_bytes < largest and not mergeable:
            raise ValueError(f"receive_bytes {receive_bytes} is below the packet size {largest}, and MRG_RXBUF (bit "
                             "15) is not among the receiveq's features")
        return receive_bytes

    def _set_side(self, uint32_t number, bint sending, DriverQueue queue, capacity, descriptors, indirect):
        """Give one queue of a stream its buffers."""
        cdef side_t* side = &self.traffic.streams[number].send if sending else &self.traffic.streams[number].receive
        cdef Block block
        if queue.outstanding:
            raise ValueError(f"the queue has {queue.outstanding} buffers outstanding; give a fresh one, or reset it")
        if indirect and not has_feature(queue.features, VIRTIO_F_INDIRECT_DESC):
            raise ValueError("indirect descriptors were asked for, but INDIRECT_DESC (bit 28) is not among the queue's "
                             "features")
        self._queues.append(queue)
        side.stride = _stride(capacity)
        block = queue.memory.alloc(side.stride * queue.size)
        self._blocks.append(block)
        side.queue = &queue.driver
        side.slots = block.data
        side.slots_addr = block.guest_addr
        side.header_bytes = net_header_bytes(queue.features)
        side.capacity = capacity
        side.parts = descriptors
        side.mergeable = has_feature(queue.features, VIRTIO_NET_F_MRG_RXBUF)
        if indirect:
            block = queue.memory.alloc(16 * PARTS_MAX * queue.size)
            self._blocks.append(block)
            side.tables = <virtq_desc_t*>block.data
            side.tables_addr = block.guest_addr
        if sending:
            side_head_all(side, self.traffic.streams[number].ethernet)

    def run(self, duration=None, packets=None):
        """Run until the time is over, so many packets were sent, or `stop` is called; then wait for what is under way.

        Parameters
        ----------
        duration : float, optional
            Seconds.
        packets : int, optional
            Packets to send, over all streams and since the start; for a Sink packets to receive.

        Raises
        ------
        BrokenRingError
            The device broke a ring.
        RuntimeError
            A queue is in use already.
        """
        cdef DriverQueue queue
        claimed = []
        affinity = None
        try:
            for queue in self._queues:
                queue.claim()
                claimed.append(queue)
            self.running = True
            if self.cpu is not None:
                affinity = os.sched_getaffinity(0)
                os.sched_setaffinity(0, {self.cpu})
            self.traffic.duration_ns = 0 if duration is None else int(max(1, duration * 1e9))
            self.traffic.limit = 0 if packets is None else packets
            self.traffic.error = DRIVER_OK
            with nogil:
                traffic_run(&self.traffic)
        finally:
            self.running = False
            for queue in claimed:
                queue.unclaim()
            if affinity is not None:
                os.sched_setaffinity(0, affinity)
        if self.traffic.error != DRIVER_OK:
            raise BrokenRingError(self.traffic.error, self.traffic.error_value, self.traffic.error_num)

    def stop(self):
        """Let `run` end soon, from any thread; a later `run` ends at once until `resume`."""
        vq_store_release_u32(&self.traffic.stop, 1)

    def resume(self):
        """Take `stop` back."""
        vq_store_release_u32(&self.traffic.stop, 0)

    @property
    def counters(self):
        """dict of int: sent, sent_bytes, received, received_bytes, verified, lost, duplicated, reordered, changed.

        Bytes count packets without virtio-net headers. `lost` counts sequence numbers that were passed over, and
        what was under way when nothing moved any more; a packet that comes late moves from lost to reordered.
        """
        cdef totals_t* totals = &self.traffic.totals
        cdef uint64_t changed = vq_load_u64(&totals.changed), gaps = vq_load_u64(&totals.gaps)
        return {"sent": vq_load_u64(&totals.sent), "sent_bytes": vq_load_u64(&totals.sent_bytes),
                "received": vq_load_u64(&totals.received), "received_bytes": vq_load_u64(&totals.received_bytes),
                "verified": vq_load_u64(&totals.verified), "lost": gaps - changed if gaps > changed else 0,
                "duplicated": vq_load_u64(&totals.duplicated), "reordered": vq_load_u64(&totals.reordered),
                "changed": changed}

    @property
    def seconds(self):
        """float: how long the engine has been sending (or, for a sink, receiving), without the wait at the end."""
        return vq_load_u64(&self.traffic.active_ns) / 1e9

    @property
    def window(self):
        """int: most packets under way in a stream."""
        if self.traffic.stream_count == 0:
            raise RuntimeError("there are no streams: the engine was not initialised")
        return self.traffic.streams[0].window


cdef class Exchange(Traffic):
    """Sends packets on transmitqs and expects them back on receiveqs, verified.

    Parameters
    ----------
    pairs : sequence of (DriverQueue, DriverQueue)
        (transmitq, receiveq) of each stream; they may belong to different devices.
    sizes : int or sequence of int
        Packet size in bytes, Ethernet header included, 64 to 65535; several are sent in turn.
    window : int, optional
        Most packets under way in a stream; never more than the receiveq has room for, which is the default.
    receive_bytes : int, optional
        Payload bytes of a receive buffer; by default the largest size. Smaller ones need MRG_RXBUF.
    descriptors : int
        Descriptors of a buffer, 1 to 16: 1 joins header and payload, 2 separates them, more cut the payload.
    indirect : bool
        Use indirect descriptors.
    poll : str
        ``"busy"``, or ``"sleep"``: wait for calls when nothing moves.
    cpu : int, optional
        CPU that `run` pins its thread to.
    patience : float
        Seconds without any progress after which what is under way counts as lost.

    Raises
    ------
    ValueError
        Sizes, window or features do not fit together.
    MemoryError
        The guest memory is too small; see `traffic_memory_bytes`.
    """

    def __init__(self, pairs, sizes=64, *, window=None, receive_bytes=None, descriptors=1, indirect=False, poll="busy",
                 cpu=None, patience=1.0):
        pairs = list(pairs)
        self._set_up([pair[0] for pair in pairs], [pair[1] for pair in pairs], sizes=sizes, window=window,
                     receive_bytes=receive_bytes, descriptors=descriptors, indirect=indirect, verify=True, poll=poll,
                     cpu=cpu, patience=patience)


cdef class Source(Traffic):
    """Sends packets on transmitqs and forgets about them; the parameters are those of `Exchange`."""

    def __init__(self, transmitqs, sizes=64, *, descriptors=1, indirect=False, poll="busy", cpu=None, patience=1.0):
        self._set_up(list(transmitqs), [], sizes=sizes, window=None, receive_bytes=None, descriptors=descriptors,
                     indirect=indirect, verify=False, poll=poll, cpu=cpu, patience=patience)


cdef class Sink(Traffic):
    """Receives packets on receiveqs; with `verify` they are those of a `Source`, and gaps count as lost.

    Parameters
    ----------
    receiveqs : sequence of DriverQueue
    largest : int
        Largest packet that is expected, bytes.
    verify : bool
        False: packets are counted only, whatever they are.
    """

    def __init__(self, receiveqs, largest=1514, *, receive_bytes=None, verify=False, descriptors=1, indirect=False,
                 poll="busy", cpu=None, patience=1.0):
        self._set_up([], list(receiveqs), sizes=largest, window=None, receive_bytes=receive_bytes,
                     descriptors=descriptors, indirect=indirect, verify=verify, poll=poll, cpu=cpu, patience=patience)
