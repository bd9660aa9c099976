"""Virtqueues of devices in Python."""
from libc.stdint cimport uint32_t
from vq_core.device_burst cimport DeviceBurst, burst_send, burst_take
from vq_core.device_chain cimport DeviceChain
from vq_core.packet_rows cimport PacketRows
from vq_core.taken cimport TakingQueue

cdef enum:
    TURN_CHAINS = 64             # that an iteration takes in one turn; then messages and other queues have theirs
    TURN_PULLED = 1024           # ... and that `pull` takes
    TURN_BYTES = 1 << 24         # ... and bytes, but for the chain that passes it
    PULL_MAX = 256               # chains of one burst
    HEADER_MAX = 65536

TURN = TURN_CHAINS


cdef class DeviceQueue(TakingQueue):
    """A virtqueue of a device in Python: iterate over it for the chains that wait, or pull and push packets.

    Parameters
    ----------
    queue : Queue
        A queue that no worker owns.
    limit : int
        Bytes of the longest request: a driver that sends more breaks its queue. Of a longer room for the answer, this
        much is shown.

    Notes
    -----
    An iteration ends when no chain waits, and after `TURN` of them; the rest comes in the next turn. A turn ends early,
    for `pop` too, when it has read `vq_core.taken.TURN_STEPS` descriptors. Pulling ends after 1024 chains or 16 MiB.
    As many chains are out as the ring has entries: a driver that makes a head available twice gains nothing by it. And
    the descriptors and parts of all that are out are `vq_core.taken.HELD` and one chain at most; others wait.
    """

    def begin(self):
        """Begin a turn: what other threads have completed meanwhile is given back."""
        TakingQueue.begin(self)
        self._budget = TURN_CHAINS
        self._bursts = TURN_PULLED
        self._bytes = TURN_BYTES

    @property
    def dropped(self):
        """int: packets that were longer than a chain had room for, since the beginning."""
        return self._dropped

    def __repr__(self):
        return f"<queue of a device: {self.name}>"

    def __iter__(self):
        return self

    def __next__(self):
        cdef DeviceChain chain = self._take() if self._budget else None
        if chain is None:
            raise StopIteration
        self._budget -= 1
        return chain

    def pop(self):
        """The next chain that waits, or None; a turn ends for those who take them so by their descriptors alone."""
        return self._take()

    cdef DeviceChain _take(self):
        cdef DeviceChain chain = DeviceChain.__new__(DeviceChain)
        cdef int status
        self._refresh()
        status = self._look(&chain._parts, &chain._span)
        if status < 0:
            raise MemoryError(f"{self.name}: chain")
        if status == 0:
            return None
        self._bind(chain)
        self._commit(&chain._span)
        chain._chains = 1
        chain._weight = chain._span.steps + chain._span.end
        self._keep(chain)
        return chain

    def pull(self, int most=PULL_MAX, *, int header=0):
        """Take chains that wait, all at once.

        Parameters
        ----------
        most : int
            1 to 256 chains.
        header : int
            Bytes before each packet, for `headers` alone: 12 in front of one of virtio-net.

        Returns
        -------
        DeviceBurst or None
            None: no chain waits, or the turn is over and the rest comes in the next one.

        Raises
        ------
        ValueError
            A number is out of range.

        Notes
        -----
        Threading: where `handle` is called, the control thread.
        """
        cdef DeviceBurst burst
        if not (1 <= most <= PULL_MAX and 0 <= header <= HEADER_MAX):
            raise ValueError(f"most is {most}, header is {header}; 1 to {PULL_MAX} chains with headers of up to "
                             f"{HEADER_MAX} bytes are possible")
        if self._bursts == 0 or self._bytes == 0:
            return None
        burst = burst_take(self, min(<uint32_t>most, self._bursts), <uint32_t>header, self._bytes)
        if burst is not None:
            self._bursts -= <uint32_t>burst.count
            self._bytes -= min(self._bytes, burst._bytes)
        return burst

    def push(self, data, lengths=None, *, header=b""):
        """Send packets to the driver: each is written into the next chain that waits, which is completed.

        Parameters
        ----------
        data : bytes-like or array of uint8
            [packets, size]: a row for each. [bytes]: one behind the other, as `gather` returns them.
        lengths : array of int, optional
            Bytes of each: of rows, all of them by default; of bytes in a line they are needed.
        header : bytes-like or array of uint8
            What stands before each packet: the same for all, or a row for each. virtio-net wants 12 bytes, the last two
            of which say 1 (VIRTIO 1.3, 5.1.6.4).

        Returns
        -------
        int
            How many of the packets are dealt with; for the others no chain waits. One that is longer than the next
            chain has room for is dropped, and counted by `dropped`.

        Raises
        ------
        ValueError
            Data, lengths and header do not fit together.

        Notes
        -----
        Threading: where `handle` is called, the control thread; another one uses `Device.call`.
        """
        cdef PacketRows packets = PacketRows(data, lengths), headers = None
        rows = memoryview(header)
        if rows.nbytes:
            headers = PacketRows(header, None if rows.ndim == 2 else [rows.nbytes])
            if rows.ndim == 2 and headers.count != packets.count:
                raise ValueError(f"{headers.count} headers for {packets.count} packets")
        return burst_send(self, packets, headers, &self._dropped)
