"""Virtqueues as the control plane sees them: start, stop, change, report."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from vq_core.arch cimport vq_exchange_u32, vq_load_acquire_u32, vq_load_u16, vq_load_u32, vq_load_u64
from vq_core.counters cimport counters_snapshot, counters_work
from vq_core.dirty cimport DirtyLog, dirty_mark
from vq_core.handover cimport Mailbox, handover_run
from vq_core.inflight cimport InflightQueue, InflightRegion
from vq_core.inflight_restart cimport inflight_resume
from vq_core.iotlb cimport IOTLB_READ, IOTLB_WRITE, Iotlb
from vq_core.memory cimport MemoryMap, memory_translate, memory_user_translate, region_t
from vq_core.misses cimport MissTable
from vq_core.notify cimport notify_peer, notify_signal, notify_usable, peer_t
from vq_core.packed cimport packed_has_more, packed_t
from vq_core.packed_place cimport packed_go_to
from vq_core.port cimport BURST_MAX
from vq_core.queue_state cimport (BROKEN_NOT, CHANGE_CALL, CHANGE_ENABLED, CHANGE_ERR, CHANGE_KICK, CHANGE_LOG,
                                  CHANGE_MEMORY, CHANGE_START, CHANGE_STOP, CHANGE_SUSPEND, PLACE_AVAIL, PLACE_USED,
                                  queue_change_t, queue_place, queue_run_change, queue_t, queue_takes)
from vq_core.ring cimport ring_t
from vq_core.split cimport split_t
from vq_core.virtio cimport (VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
                             VIRTQ_PACKED_DESC_F_AVAIL, VIRTQ_SIZE_MAX, gpa_t, has_feature, virtio_net_hdr_t,
                             virtq_avail_t, virtq_desc_t, virtq_packed_desc_t, virtq_packed_event_t, virtq_used_elem_t,
                             virtq_used_t)

# Text and section of each BROKEN_* cause, in their order.
BROKEN_CAUSES = (
    ("not broken", ""),
    ("available index more than queue_size ahead", "VIRTIO 1.3, 2.7.13.3"),
    ("head outside queue_size", "VIRTIO 1.3, 2.7.6"),
    ("next outside the descriptor table", "VIRTIO 1.3, 2.7.5"),
    ("more descriptors than a chain may have", "VIRTIO 1.3, 2.7.5"),
    ("malformed indirect descriptor", "VIRTIO 1.3, 2.7.5.3"),
    ("device-readable descriptor after a device-writable one", "VIRTIO 1.3, 2.7.4.2"),
    ("descriptor chain of 2^32 bytes or more", "VIRTIO 1.3, 2.7.5"),
    ("address outside the guest's memory", "VIRTIO 1.3, 2.7.5"),
    ("guest memory, dirty log or in-flight region was truncated by its owner",
     "vhost-user, SET_MEM_TABLE, SET_LOG_BASE and SET_INFLIGHT_FD"),
    ("descriptor chain without a buffer in the direction of the queue", "VIRTIO 1.3, 5.1.6"),
    ("buffer id outside queue_size", "VIRTIO 1.3, 2.8"),
    ("call descriptor takes too long to signal: too many wait for it", "vhost-user, SET_VRING_CALL"),
    ("request without a whole header or without a byte for its status", "VIRTIO 1.3, 5.2.6 and 5.1.6.5"),
    ("buffer made available again before it was used", "VIRTIO 1.3, 2.7.13.1 and 2.8.21.1"),
    ("what serves it in the back-end has failed", "VIRTIO 1.3, 2.1.2"),
    ("request that its device does not take: too long, or of no form that it knows", "VIRTIO 1.3, 2.1.2"),
)

if (sizeof(virtq_desc_t), sizeof(virtq_used_elem_t), sizeof(virtq_packed_desc_t), sizeof(virtq_packed_event_t),
        sizeof(virtio_net_hdr_t)) != (16, 8, 16, 4, 12):
    raise ImportError("this compiler lays the structures of the specification out differently")


cdef int _elements(int num) noexcept:
    """Room for used elements: a power of two, for a whole ring and a burst at least."""
    cdef int room = 2 * BURST_MAX
    while room < num:
        room *= 2
    return room


cdef int _fd(object fd) except -2:
    return -1 if fd is None else fd


cdef int _signal_fd(object fd) except -2:
    """A descriptor that is to be signalled; ValueError if that is no way to signal anybody."""
    if not notify_usable(_fd(fd)):
        raise ValueError("a call or err descriptor is a socket, and not a Unix stream socket")
    return _fd(fd)


def ring_parts(int num, tuple addresses, uint64_t features):
    """What a ring consists of.

    Parameters
    ----------
    num : int
        Entries.
    addresses : tuple of int
        Of descriptor table, available ring and used ring; packed: descriptor ring, driver and device event structure.
    features : int
        Negotiated virtio features.

    Returns
    -------
    tuple of (name, address, alignment, length, perm)
        Bytes; `perm` is 1 for what is only read, 3 for what is written as well.
    """
    # The event fields are always there in drivers of 1.0 and later, but a legal ring may end without them when they are
    # not negotiated.
    event_bytes = 2 if has_feature(features, VIRTIO_F_EVENT_IDX) else 0
    desc, avail, used = addresses
    if has_feature(features, VIRTIO_F_RING_PACKED):
        return (("descriptor ring", desc, 16, 16 * num, IOTLB_READ | IOTLB_WRITE),
                ("driver event structure", avail, 4, 4, IOTLB_READ),
                ("device event structure", used, 4, 4, IOTLB_READ | IOTLB_WRITE))
    return (("descriptor table", desc, 16, 16 * num, IOTLB_READ),
            ("available ring", avail, 2, 4 + 2 * num + event_bytes, IOTLB_READ),
            ("used ring", used, 4, 4 + 8 * num + event_bytes, IOTLB_READ | IOTLB_WRITE))


cdef void _nothing(void* target, void* argument) noexcept nogil:
    pass


def settle(Iotlb iotlb not None, queues):
    """Return when no worker of these queues uses what `iotlb` has dropped.

    Each passes a burst boundary, where it holds nothing that came from guest memory.
    """
    for mailbox in {(<Queue?>queue).mailbox for queue in queues} - {None}:
        handover_run(<Mailbox>mailbox, _nothing, NULL, NULL)
    iotlb._reclaim()


def wake(queues):
    """Let the workers of these queues look again: there are new translations."""
    for mailbox in {(<Queue?>queue).mailbox for queue in queues} - {None}:
        notify_signal((<Mailbox>mailbox).box.event_fd)


cdef class Queue:
    """One virtqueue of a device, as the control plane handles it.

    Parameters
    ----------
    index : int
        Index among the device's virtqueues.
    name : str
        Name for people, for instance ``"receiveq0"``.
    report_fd : int, optional
        Eventfd that is signalled when the queue breaks; see `poll_report`.
    batches : bool
        The device writes into no buffer of this queue, so that with IN_ORDER a whole batch may be given back by one
        used element (VIRTIO 1.3, 2.7.9 and 2.8.7).
    peer : Peer, optional
        Shared by the queues of one front-end; see `muted`.

    Notes
    -----
    Threading: methods are for the control thread. Each returns when the owning worker has obeyed, so
    that what it replaced (map, log, descriptor) is free. Descriptors stay the caller's and must stay
    open until they are replaced or the ring is stopped.
    Spec: vhost-user "Ring states", VIRTIO 1.3, 2.7.
    """

    def __cinit__(self, int index, str name, report_fd=None, bint batches=False, Peer peer=None):
        memset(&self.queue, 0, sizeof(queue_t))
        self._peer = Peer() if peer is None else peer
        self.queue.peer = &self._peer.peer
        self._batches = batches
        self.index = index
        self.name = name
        self.queue.kick_fd = self.queue.call_fd = self.queue.err_fd = self.queue.epoll_fd = -1
        self.queue.report_fd = _fd(report_fd)

    def __dealloc__(self):
        free(self._elements)

    cdef int _change(self, queue_change_t* change) except -1:
        handover_run(self.mailbox, queue_run_change, &self.queue, change)
        return 0

    cdef uint8_t* _find(self, MemoryMap memory, Iotlb iotlb, uint64_t address, uint64_t length, uint32_t perm,
                        gpa_t* guest_addr) except? NULL:
        """The pointer of a part of the ring, whatever kind its address is; NULL if it does not lie there in one piece.
        """
        cdef region_t* hint
        if iotlb is not None:
            return iotlb._locate(address, length, perm, guest_addr)
        if not self._guest_addresses:
            return memory_user_translate(&memory.memory, address, length, guest_addr)
        hint = memory.memory.regions
        guest_addr[0] = address
        return memory_translate(&memory.memory, &hint, address, length)

    cdef int _resolve(self, queue_change_t* change, MemoryMap memory, Iotlb iotlb, int num, tuple addresses,
                      uint64_t features) except -1:
        """Fill in the pointers of ring and memory; ValueError if a part does not lie in one region."""
        cdef gpa_t guest_addr, desc_addr = 0
        cdef ring_t* ring = &change.wanted.ring
        ring.is_packed = has_feature(features, VIRTIO_F_RING_PACKED)
        pointers = []
        for part, address, alignment, length, perm in ring_parts(num, addresses, features):
            found = <uintptr_t>self._find(memory, iotlb, address, length, perm, &guest_addr)
            if not found:
                where = "one memory region" if iotlb is None else "one piece of memory behind the IOMMU"
                raise ValueError(f"queue {self.index}: {part} at {address:#x} ({length} bytes) does not lie in {where}")
            if address % alignment or found % alignment:
                raise ValueError(f"queue {self.index}: {part} at {address:#x} is not aligned to {alignment} bytes")
            if not pointers:
                desc_addr = guest_addr
            pointers.append(found)
        if ring.is_packed:
            ring.packed.desc = <virtq_packed_desc_t*><uintptr_t>pointers[0]
            ring.packed.driver_event = <virtq_packed_event_t*><uintptr_t>pointers[1]
            ring.packed.device_event = <virtq_packed_event_t*><uintptr_t>pointers[2]
            ring.packed.desc_addr = desc_addr
        else:
            ring.split.desc = <virtq_desc_t*><uintptr_t>pointers[0]
            ring.split.avail = <virtq_avail_t*><uintptr_t>pointers[1]
            ring.split.used = <virtq_used_t*><uintptr_t>pointers[2]
        if iotlb is None:
            change.wanted.memory = &memory.memory
            change.wanted.hint = memory.memory.regions
        else:
            change.wanted.memory = &iotlb.iotlb.nowhere
            change.wanted.hint = &iotlb.iotlb.nothing
        return 0

    def start(self, MemoryMap memory not None, int num, uint64_t desc, uint64_t avail, uint64_t used, uint64_t base,
              uint64_t features, *,
              kick_fd=None, call_fd=None, err_fd=None, bint enabled=False, DirtyLog log=None, log_guest_addr=None,
              bint in_order=True, InflightRegion inflight=None, Iotlb iotlb=None, bint guest_addresses=False):
        """Start the ring.

        Parameters
        ----------
        memory : MemoryMap
        num : int
            Ring size in entries, 1 to 32768; in the split layout a power of two.
        desc, avail, used : int
            Front-end user addresses of the three parts; in the packed layout of descriptor ring, driver event
            structure and device event structure.
        base : int
            Split: next available entry (bits 0 to 15 count). Packed: next available slot in bits 0 to 14, its wrap
            counter in bit 15; the used side starts there too.
        features : int
            Negotiated virtio features; RING_PACKED decides the layout.
        kick_fd, call_fd, err_fd : int, optional
            Descriptors, O_NONBLOCK; None: the peer polls, or nobody listens.
        enabled : bool
        log : DirtyLog, optional
            Where written pages are marked; None: no logging.
        log_guest_addr : int, optional
            Where used ring stores are logged; None: VRING_F_LOG is not set.
        iotlb : Iotlb, optional
            All addresses are I/O virtual, those above and those in descriptors; `memory` is what it translates to. All
            of the ring must be mapped.
        guest_addresses : bool
            The addresses above are guest addresses (vhost-user, VHOST_USER_PROTOCOL_F_GPA_ADDRESSES).
        in_order : bool
            The device completes in order and has no in-flight region: resume where the ring says that it stopped
            when that differs from `base`, since the requests between were lost in a crash (protocol 6.3). A packed
            ring is asked only when `base` is the very beginning, which is what QEMU says after a crash, and not when
            used buffers are given back in batches.
        inflight : InflightRegion, optional
            Where requests that are taken are recorded. One that tells of requests of before says where the ring begins
            as well, and `base` counts for nothing.

        Raises
        ------
        ValueError
            Size, alignment or placement of a part is wrong, or the in-flight region contradicts itself.
        """
        cdef queue_change_t change
        cdef uint64_t* elements = NULL
        if not 1 <= num <= VIRTQ_SIZE_MAX:
            raise ValueError(f"queue {self.index}: size {num} is not from 1 to {VIRTQ_SIZE_MAX}")
        if self.started:
            raise ValueError(f"queue {self.index} is started; stop it first")
        memset(&change, 0, sizeof(change))
        self._guest_addresses = guest_addresses
        self._resolve(&change, memory, iotlb, num, (desc, avail, used), features)
        change.what = CHANGE_START | CHANGE_ENABLED
        change.wanted.ring.num = num
        elements = <uint64_t*>calloc(_elements(num), sizeof(uint64_t))
        if elements == NULL:
            raise MemoryError(f"queue {self.index}")
        free(self._elements)                 # of an earlier start: nobody uses it any more
        self._elements = elements
        if change.wanted.ring.is_packed:
            change.wanted.ring.packed.elements = elements
            self._begin_packed(&change.wanted, num, base, features, in_order)
        else:
            if self._batches and has_feature(features, VIRTIO_F_IN_ORDER):
                change.wanted.ring.split.heads = <uint16_t*>elements
            self._begin_split(&change.wanted, num, base, features, in_order)
        change.wanted.features = features
        change.wanted.indirect_limit = max(num, 1024)
        change.wanted.enabled = enabled and not self._spare
        change.wanted.kick_fd = _fd(kick_fd)
        change.wanted.call_fd = _signal_fd(call_fd)
        change.wanted.err_fd = _signal_fd(err_fd)
        self._fill_log(<uintptr_t>&change, log, log_guest_addr)
        # Behind what may refuse the start, and behind the log: placing a packed ring can write to it.
        if not memory.may_block:
            queue_place(&change.wanted)
        self._begin = 0 if change.wanted.ring.is_packed else change.wanted.ring.split.last_avail_idx
        tracking = self._place_inflight(&change, inflight)
        if change.wanted.ring.is_packed:
            self._fresh = (change.wanted.ring.packed.avail_slot == 0
                           and change.wanted.ring.packed.avail_flags == VIRTQ_PACKED_DESC_F_AVAIL)
        else:
            self._fresh = self._begin == 0
        if iotlb is not None:
            if self._misses is None:
                self._misses = MissTable()
            iotlb._attach(self._misses)
            change.wanted.iotlb = &iotlb.iotlb
            change.wanted.misses = &self._misses.table
        self._change(&change)
        self._enabled = enabled
        self._memory = memory if iotlb is None else None     # the translations hold it as long as they use it
        self._iotlb = iotlb
        self._log = log
        self._inflight = tracking
        self._addresses = (desc, avail, used)
        if tracking is not None:
            # Whoever used buffers before us may have ended before the call.
            notify_peer(&self._peer.peer, change.wanted.call_fd)

    cdef InflightQueue _place_inflight(self, queue_change_t* change, InflightRegion region):
        """Place the ring by its in-flight region, if there is one for it."""
        cdef queue_t* wanted = &change.wanted
        cdef InflightQueue tracking
        if region is None or self.index >= region.num_queues:
            return None
        tracking = InflightQueue(region, self.index, wanted.ring.num, wanted.ring.is_packed)
        queue_place(wanted)
        inflight_resume(tracking, &wanted.ring, self.index)
        wanted.inflight = &tracking.inflight
        if wanted.ring.is_packed and wanted.log != NULL and wanted.log_ring:
            dirty_mark(wanted.log, wanted.ring.packed.desc_addr, 16 * <uint64_t>wanted.ring.num)
        return tracking

    cdef int _begin_split(self, queue_t* queue, int num, uint64_t base, uint64_t features, bint in_order) except -1:
        """Say how a split ring begins, as far as that can be said without reading it."""
        cdef split_t* ring = &queue.ring.split
        if num & (num - 1):
            raise ValueError(f"queue {self.index}: size {num} is not a power of two, as a split ring needs")
        ring.num = num
        ring.mask = num - 1
        ring.last_avail_idx = ring.shadow_avail_idx = <uint16_t>base
        ring.next_used = ring.shadow_used = ring.signalled_used = <uint16_t>base
        queue.unplaced = PLACE_USED | (PLACE_AVAIL if in_order else 0)
        ring.event_idx = has_feature(features, VIRTIO_F_EVENT_IDX)
        ring.in_order = has_feature(features, VIRTIO_F_IN_ORDER)
        return 0

    cdef int _begin_packed(self, queue_t* queue, int num, uint64_t base, uint64_t features, bint in_order) except -1:
        """Say how a packed ring begins, as far as that can be said without reading it."""
        cdef packed_t* ring = &queue.ring.packed
        cdef uint16_t slot = base & 0x7fff
        cdef bint wrap = base >> 15 & 1
        if not has_feature(features, VIRTIO_F_VERSION_1):
            raise ValueError(f"queue {self.index}: RING_PACKED was negotiated without VERSION_1")
        if slot >= num:
            raise ValueError(f"queue {self.index}: base {slot} is outside the ring of {num}")
        ring.num = num
        ring.mask = _elements(num) - 1
        ring.batch = self._batches and has_feature(features, VIRTIO_F_IN_ORDER)
        if in_order and not ring.batch:
            queue.unplaced = PLACE_AVAIL
        packed_go_to(ring, slot, wrap)
        ring.chain_slots = 1
        ring.event_idx = has_feature(features, VIRTIO_F_EVENT_IDX)
        return 0

    def stop(self, bint suspend=False):
        """Stop the ring and return the base to answer: the next available entry, 0 to 65535.

        Everything taken is published and released when this returns. The enabled flag stays.
        Stopping a stopped ring answers its last position. Packed: next available slot and wrap counter in the lower
        16 bits, those of the used side in the upper ones.

        Parameters
        ----------
        suspend : bool
            What waits to be begun is not done, and stays in flight in the region; only what is being done is finished.
            Without a region there would be no trace of it, and so it is done.
        """
        cdef packed_t* packed = &self.queue.ring.packed
        cdef queue_change_t change
        memset(&change, 0, sizeof(change))
        change.what = CHANGE_STOP
        if suspend and self.queue.inflight != NULL:
            change.what |= CHANGE_SUSPEND
        self._change(&change)
        if self._iotlb is not None:
            self._iotlb._detach(self._misses)
        self._memory = None
        self._iotlb = None
        self._log = None
        self._inflight = None
        self._addresses = None
        if not self.queue.ring.is_packed:
            return self.queue.ring.split.last_avail_idx
        avail = packed.avail_slot | (0x8000 if packed.avail_flags & VIRTQ_PACKED_DESC_F_AVAIL else 0)
        return avail | (packed.used_slot | (0x8000 if packed.used_flags else 0)) << 16

    def set_enabled(self, bint enabled):
        """Enable or disable the ring; remembered while it is stopped."""
        self._enabled = enabled
        self._set_in_use()

    def set_spare(self, bint spare):
        """Treat the ring as disabled whatever the front-end says of it; remembered while it is stopped."""
        self._spare = spare
        self._set_in_use()

    cdef int _set_in_use(self) except -1:
        cdef queue_change_t change
        memset(&change, 0, sizeof(change))
        change.what = CHANGE_ENABLED
        change.wanted.enabled = self._enabled and not self._spare
        self._change(&change)
        return 0

    def set_kick(self, fd):
        """Replace the kick descriptor (None: the driver does not kick)."""
        cdef queue_change_t change
        memset(&change, 0, sizeof(change))
        change.what = CHANGE_KICK
        change.wanted.kick_fd = _fd(fd)
        self._change(&change)

    def set_call(self, fd):
        """Replace the call descriptor and signal it once, so that no call is lost in between."""
        cdef queue_change_t change
        memset(&change, 0, sizeof(change))
        change.what = CHANGE_CALL
        change.wanted.call_fd = _signal_fd(fd)
        self._change(&change)
        if self.started:
            notify_peer(&self._peer.peer, change.wanted.call_fd)

    def signal(self, fd):
        """Signal a descriptor of the front-end once, unless that is muted."""
        notify_peer(&self._peer.peer, _signal_fd(fd))

    def unmute(self):
        """There is another front-end now, for this queue and those that share its peer."""
        memset(&self._peer.peer, 0, sizeof(peer_t))

    @property
    def muted(self):
        """bool: the front-end lets so many wait for its descriptors that signals hold us up; it gets no more."""
        return vq_load_u32(&self._peer.peer.muted) != 0

    def set_err(self, fd):
        """Replace the err descriptor."""
        cdef queue_change_t change
        memset(&change, 0, sizeof(change))
        change.what = CHANGE_ERR
        change.wanted.err_fd = _signal_fd(fd)
        self._change(&change)

    def set_memory(self, MemoryMap memory not None):
        """Move a started ring to a new memory map, keeping its indices.

        Raises ValueError, and changes nothing, if the ring does not lie in the new map.
        """
        cdef queue_change_t change
        if not self.queue.started:
            return
        memset(&change, 0, sizeof(change))
        self._resolve(&change, memory, None, self.queue.ring.num, self._addresses, self.queue.features)
        change.what = CHANGE_MEMORY
        self._change(&change)
        self._memory = memory

    def unmap(self):
        """Take the ring away from a queue behind an IOMMU, since it is not mapped any more; it keeps its indices."""
        cdef queue_change_t change
        if not self.queue.started or self._iotlb is None:
            return
        memset(&change, 0, sizeof(change))
        change.what = CHANGE_MEMORY
        change.wanted.unmapped = True
        change.wanted.memory = &self._iotlb.iotlb.nowhere
        change.wanted.hint = &self._iotlb.iotlb.nothing
        self._change(&change)

    def remap(self):
        """Give an unmapped queue its ring back; ValueError, and nothing changes, if not all of it is mapped."""
        cdef queue_change_t change
        if not self.queue.unmapped:
            return
        memset(&change, 0, sizeof(change))
        self._resolve(&change, None, self._iotlb, self.queue.ring.num, self._addresses, self.queue.features)
        change.what = CHANGE_MEMORY
        self._change(&change)

    @property
    def mapped(self):
        """bool: started, and its ring can be touched."""
        return bool(self.queue.started)

    def set_log(self, DirtyLog log, log_guest_addr=None):
        """Switch dirty logging: `log` None is off; `log_guest_addr` None leaves used ring stores out."""
        cdef queue_change_t change
        if not self.started:
            return
        memset(&change, 0, sizeof(change))
        change.what = CHANGE_LOG
        self._fill_log(<uintptr_t>&change, log, log_guest_addr)
        self._change(&change)
        self._log = log

    def _fill_log(self, uintptr_t address, DirtyLog log, log_guest_addr):
        cdef queue_change_t* change = <queue_change_t*>address
        change.wanted.log = NULL if log is None else &log.log
        change.wanted.log_ring = log is not None and log_guest_addr is not None
        change.wanted.log_guest_addr = 0 if log_guest_addr is None else log_guest_addr

    def poll_report(self):
        """What broke the queue, told once: (head, text, section), or None."""
        cdef uint32_t cause = vq_load_acquire_u32(&self.queue.broken)
        if cause == BROKEN_NOT or vq_exchange_u32(&self.queue.reported, 1):
            return None
        text, section = BROKEN_CAUSES[cause]
        return self.queue.broken_at, text, section

    @property
    def started(self):
        """bool"""
        return bool(self.queue.started or self.queue.unmapped)

    @property
    def enabled(self):
        """bool: by the front-end."""
        return bool(self._enabled)

    @property
    def live(self):
        """bool: started, enabled and not broken; packets move."""
        return bool(queue_takes(&self.queue))

    @property
    def broken(self):
        """str or None: why the queue is broken."""
        return BROKEN_CAUSES[self.queue.broken][0] if self.queue.broken else None

    @property
    def posted(self):
        """bool: the driver has made something available since the ring was started, as far as that is known."""
        cdef packed_t* packed
        cdef MemoryMap memory
        if not self.queue.started:
            return False
        memory = self._memory if self._iotlb is None else self._iotlb._memory
        if memory is None or memory.may_block:
            return True          # nothing can be said without a look at it
        if self.queue.ring.is_packed:
            packed = &self.queue.ring.packed
            return packed.next_used != 0 or packed.known != 0 or bool(packed_has_more(packed))
        return vq_load_u16(&self.queue.ring.split.avail.idx) != self._begin

    @property
    def heartbeat(self):
        """int or None: rounds that the queue's worker has done; None: it sleeps, or the queue has no worker."""
        if self.mailbox is None or vq_load_u32(&self.mailbox.box.asleep):
            return None
        return vq_load_u64(&self.mailbox.box.rounds)

    @property
    def num(self):
        """int: ring size in entries; 0 before the first start."""
        return self.queue.ring.num

    def snapshot(self):
        """dict: packets, bytes, dropped by cause, what they cost (busy_cycles, cycles_per_packet, empty_polls, bursts
        by size), calls, calls_suppressed, layout, size, state.
        """
        result = counters_snapshot(&self.queue.counters)
        result.update(counters_work(&self.queue.counters))
        result.update(layout="packed" if self.queue.ring.is_packed else "split",
                      calls=self.queue.calls, calls_suppressed=self.queue.calls_suppressed, size=self.queue.ring.num,
                      started=self.started, enabled=self.enabled, broken=self.broken)
        return result
