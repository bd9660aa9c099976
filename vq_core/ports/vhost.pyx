"""The port: wake-ups, and what the control plane sets."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from vq_core.ahead cimport ahead_room
from vq_core.arch cimport vq_load_u32
from vq_core.handover cimport Mailbox, handover_run
from vq_core.iotlb cimport iotlb_view
from vq_core.net cimport net_accepts
from vq_core.port cimport ARM_PULL, ARM_PUSH, Port, endpoint_t
from vq_core.ports.vhost_filter cimport vhost_push_filtered
from vq_core.ports.vhost_pair cimport ERRAND_AHEAD, ERRAND_RARP, RARP_BYTES, pair_lost, pair_t
from vq_core.ports.vhost_pull cimport vhost_pull, vhost_release
from vq_core.ports.vhost_push cimport vhost_push, vhost_room
from vq_core.queue cimport Peer, Queue
from vq_core.queue_state cimport (BROKEN_NOT, CHANGE_EPOLL, queue_apply, queue_change_t, queue_flush, queue_goes,
                                  queue_request_kick, queue_t, queue_takes, queue_waits)
from vq_core.receive_filter cimport ReceiveFilter, receive_filter_t
from vq_core.ring cimport ring_has_more, ring_known
from vq_core.virtio cimport VIRTIO_F_ACCESS_PLATFORM, has_feature

cdef enum:
    PAIRS_MAX = 128              # the fd messages carry the ring index in 8 bits


cdef void _flush(endpoint_t* endpoint) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    pair.walked = 0
    if pair.receiveq.started:
        queue_flush(pair.receiveq)
    if pair.transmitq.started:
        queue_flush(pair.transmitq)


cdef int _arm(endpoint_t* endpoint, int what) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef queue_t* queue = pair.transmitq
    cdef bint packed = queue.ring.is_packed
    if what & ARM_PULL:
        if pair.errands & ERRAND_RARP:
            return 1
        if pair.errands & ERRAND_AHEAD and queue_goes(pair.receiveq):
            queue_request_kick(pair.receiveq)        # for buffers whose translations are to be asked for
            ahead_room(pair.receiveq)
        if queue.started and queue.broken == BROKEN_NOT and not queue_waits(queue):
            if queue.unplaced:
                return 1
            if ring_known(&queue.ring, packed) > 0:
                return 1
            queue_request_kick(queue)
            # Without a kick fd nothing would wake us: the front-end has asked for polling (VHOST_USER_VRING_NOFD_MASK).
            if queue.kick_fd < 0:
                return 1
            # Also for an impossible index, or when memory was lost: the next pull breaks the ring.
            if ring_has_more(&queue.ring, packed) or pair_lost(queue):
                return 1
    if what & ARM_PUSH:
        queue = pair.receiveq
        packed = queue.ring.is_packed
        if queue.live or queue_goes(queue):
            queue_request_kick(queue)
            if queue.iotlb != NULL:
                if queue.ahead_in != iotlb_view(queue.iotlb).generation:
                    return 1         # translations have come meanwhile
                if queue.ahead_missed:
                    return 0         # whatever the driver adds stands behind what is missing
            if queue.kick_fd < 0 or ring_has_more(&queue.ring, packed):
                return 1
    return 0


cdef void _attach(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    cdef pair_t* pair = <pair_t*>endpoint.port
    cdef queue_change_t change
    memset(&change, 0, sizeof(change))
    change.what = CHANGE_EPOLL
    change.wanted.epoll_fd = epoll_fd
    queue_apply(pair.receiveq, &change)
    queue_apply(pair.transmitq, &change)


# ---- control side ----

cdef struct pair_change_t:
    uint32_t accepts
    uint32_t frame_limit
    uint32_t errands
    uint8_t* rarp


cdef void _change_pair(void* target, void* argument) noexcept nogil:
    cdef pair_t* pair = <pair_t*>target
    cdef pair_change_t* change = <pair_change_t*>argument
    if change.rarp != NULL:
        memcpy(pair.rarp, change.rarp, RARP_BYTES)
        pair.errands |= ERRAND_RARP
    else:
        pair.endpoint.accepts = change.accepts
        pair.frame_limit = change.frame_limit
        pair.errands = (pair.errands & ERRAND_RARP) | change.errands


cdef struct filter_change_t:
    receive_filter_t* filter
    int count                    # pairs of one worker
    pair_t* pairs[PAIRS_MAX]


cdef void _change_filter(void* target, void* argument) noexcept nogil:
    cdef filter_change_t* change = <filter_change_t*>argument
    cdef int i
    for i in range(change.count):
        change.pairs[i].filter = change.filter
        change.pairs[i].endpoint.push = vhost_push if change.filter == NULL else vhost_push_filtered


cdef class VhostPort(Port):
    """The queues of one vhost-user-net device, as a port of a pump.

    Parameters
    ----------
    name : str
    pairs : int
        Queue pairs, 1 to 128.
    report_fd : int, optional
        Eventfd that is signalled when a queue breaks.

    Attributes
    ----------
    queues : tuple of Queue
        Index 2i is receiveq i, 2i + 1 is transmitq i (VIRTIO 1.3, 5.1.2).
    peer : Peer
        What the queues share.
    pairs_in_use : int
        The first pairs, as many as take and give packets.
    """

    directions = ("to_guest", "from_guest")

    def __cinit__(self, name, int pairs, report_fd=None):
        cdef int i
        cdef Queue receiveq, transmitq
        cdef endpoint_t* endpoint
        if not 1 <= pairs <= PAIRS_MAX:
            raise ValueError(f"{name}: {pairs} queue pairs; 1 to {PAIRS_MAX} are possible")
        self.name = name
        self.allocate(pairs)
        self.pairs = <pair_t*>calloc(pairs, sizeof(pair_t))
        if self.pairs == NULL:
            raise MemoryError("queue pairs")
        self.peer = Peer()
        self.pairs_in_use = pairs
        queues = []
        for i in range(pairs):
            receiveq = Queue(2 * i, f"receiveq{i}", report_fd, peer=self.peer)
            transmitq = Queue(2 * i + 1, f"transmitq{i}", report_fd, batches=True, peer=self.peer)
            queues += [receiveq, transmitq]
            endpoint = self.endpoints[i]
            self.pairs[i].endpoint = endpoint
            self.pairs[i].receiveq = &receiveq.queue
            self.pairs[i].transmitq = &transmitq.queue
            self.pairs[i].frame_limit = 0xffffffff
            endpoint.port = &self.pairs[i]
            endpoint.pull = vhost_pull
            endpoint.push = vhost_push
            endpoint.release = vhost_release
            endpoint.flush = _flush
            endpoint.room = vhost_room
            endpoint.arm = _arm
            endpoint.attach = _attach
        self.queues = tuple(queues)
        for i in range(pairs):       # the queues count; the endpoint's counters are theirs
            free(self.endpoints[i].pulled)
            self.endpoints[i].pulled = &self.pairs[i].transmitq.counters
            self.endpoints[i].pushed = &self.pairs[i].receiveq.counters

    def __dealloc__(self):
        cdef int i
        if self.pairs != NULL:
            for i in range(self.endpoint_count):
                if self.pairs[i].endpoint != NULL:
                    self.endpoints[i].pulled = NULL      # not ours to free
        free(self.pairs)

    cdef int adopt(self, int index, object mailbox) except -1:
        self.mailboxes[index] = mailbox
        (<Queue>self.queues[2 * index]).mailbox = <Mailbox?>mailbox if mailbox is not None else None
        (<Queue>self.queues[2 * index + 1]).mailbox = <Mailbox?>mailbox if mailbox is not None else None
        return 0

    def configure(self, uint64_t features, mtu=None):
        """Take over what the front-end negotiated: which offloads its driver accepts, and the MTU.

        Parameters
        ----------
        features : int
            Negotiated virtio features.
        mtu : int, optional
            From NET_SET_MTU, in bytes; longer frames towards the guest are dropped, except those to be segmented.
        """
        cdef pair_change_t change
        cdef int i
        change.accepts = net_accepts(features)
        change.frame_limit = 0xffffffff if mtu is None else mtu + 18      # Ethernet header and a VLAN tag
        change.errands = ERRAND_AHEAD if has_feature(features, VIRTIO_F_ACCESS_PLATFORM) else 0
        change.rarp = NULL
        for i in range(self.endpoint_count):
            handover_run(self.mailboxes[i], _change_pair, &self.pairs[i], &change)

    def set_filter(self, ReceiveFilter filter):
        """Let only those packets through to the guest that `filter` wants; None: all."""
        cdef int i
        cdef filter_change_t change
        change.filter = NULL if filter is None else &filter.filter
        for mailbox in set(self.mailboxes):
            change.count = 0
            for i in range(self.endpoint_count):
                if self.mailboxes[i] is mailbox:
                    change.pairs[change.count] = &self.pairs[i]
                    change.count += 1
            handover_run(mailbox, _change_filter, NULL, &change)
        self._filter = filter                # now nobody uses the one before

    def use_pairs(self, int count, settle=lambda: None):
        """Have only the first `count` pairs take and give packets (VIRTIO 1.3, 5.1.6.5.5).

        The rings of the others go on as disabled ones do: what their driver sends is dropped.

        Parameters
        ----------
        count : int
            1 to all of them.
        settle : callable
            Called when the flows are to be made anew: before pairs go out of use, and after others came into it, so
            that nothing is sent where nobody takes it.
        """
        cdef int i, before = self.pairs_in_use
        if not 1 <= count <= self.endpoint_count:
            raise ValueError(f"{self.name}: {count} queue pairs; 1 to {self.endpoint_count} can be in use")
        if count < before:
            self.pairs_in_use = count
            settle()
        for i in range(2 * min(count, before), 2 * max(count, before)):
            (<Queue>self.queues[i]).set_spare(i >= 2 * count)
        if count > before:
            self.pairs_in_use = count
            settle()

    def announce(self, bytes mac not None):
        """Send one broadcast RARP from `mac` (6 bytes) into the network side (vhost-user, SEND_RARP).

        A multicast or zero address is ignored. The guest does not see the frame.
        """
        cdef pair_change_t change
        if len(mac) != 6:
            raise ValueError(f"MAC address of {len(mac)} bytes; it has 6")
        if mac[0] & 1 or mac == bytes(6):
            return
        frame = b"\xff" * 6 + mac + b"\x80\x35\x00\x01\x08\x00\x06\x04\x00\x03" + mac + bytes(4) + mac + bytes(4)
        frame = frame.ljust(RARP_BYTES, b"\0")
        change.rarp = <uint8_t*><char*>frame
        handover_run(self.mailboxes[0], _change_pair, &self.pairs[0], &change)

    @property
    def sources(self):
        """list of int: pairs whose transmitq is started (a disabled one is emptied), and pair 0 while a RARP waits."""
        return [i for i in range(self.endpoint_count)
                if self.queues[2 * i + 1].started or vq_load_u32(&self.pairs[i].errands) & ERRAND_RARP]

    @property
    def targets(self):
        """list of int: pairs in use whose receiveq takes packets."""
        return [i for i in range(self.pairs_in_use) if queue_takes(self.pairs[i].receiveq)]
