"""The in-flight region: mapping the file, and recording what is taken and given back."""
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from vq_core.arch cimport (vq_load_u16, vq_load_u32, vq_load_u64, vq_store_release_u8, vq_store_release_u16,
                           vq_store_release_u64)
from vq_core.memory cimport memory_guard, memory_unguard
from vq_core.packed cimport packed_following, packed_t
from vq_core.virtio cimport VIRTQ_DESC_F_NEXT, virtq_packed_desc_t

import os

cdef extern from "<sys/mman.h>" nogil:
    void* c_mmap "mmap"(void* addr, size_t length, int prot, int flags, int fd, long offset) noexcept
    int c_munmap "munmap"(void* addr, size_t length) noexcept
    int PROT_READ, PROT_WRITE, MAP_SHARED
    void* MAP_FAILED

if (sizeof(inflight_split_t), sizeof(inflight_split_entry_t), sizeof(inflight_packed_t),
        sizeof(inflight_packed_entry_t)) != (16, 16, 32, 32):
    raise ImportError("this compiler lays the structures of the specification out differently")


# ---- taking ----

cdef void _record_packed(inflight_t* inflight, packed_t* ring, uint16_t slot, uint16_t slots,
                         uint16_t id) noexcept nogil:
    """Copy the descriptors from `slot` on into free entries.

    They are read a second time here. A guest that changes them in between harms the request that is done once more
    after a crash, and that one is checked like any other.

    In force with the last store, old_free_head: before it, all entries that were written are free ones.
    """
    cdef inflight_packed_entry_t* entry
    cdef inflight_packed_entry_t* first = &inflight.packed_entries[inflight.free_head]
    cdef virtq_packed_desc_t* desc
    cdef uint16_t head = inflight.free_head, index = head, last = head, i
    for i in range(slots):
        desc = &ring.desc[slot]
        entry = &inflight.packed_entries[index]
        entry.addr = vq_load_u64(&desc.addr)
        entry.len = vq_load_u32(&desc.len)
        entry.id = id
        entry.flags = vq_load_u16(&desc.flags) & <uint16_t>~VIRTQ_DESC_F_NEXT | \
            (VIRTQ_DESC_F_NEXT if i + 1 < slots else 0)
        slot = packed_following(ring, slot)
        last = index
        index = inflight.next[index]
    first.last = last
    first.num = slots
    first.counter = inflight.counter
    vq_store_release_u8(&first.inflight, 1)
    vq_store_release_u16(&inflight.packed.free_head, index)
    vq_store_release_u16(&inflight.packed.old_free_head, index)
    inflight.free_head = index
    inflight.last[head] = last
    inflight.slots[head] = slots
    inflight.taken_slots += slots
    inflight.entry[id] = head + 1


cdef bint inflight_record(inflight_t* inflight, ring_t* ring, uint16_t head, uint16_t slots,
                          uint16_t id) noexcept nogil:
    if inflight.entry[id]:
        return False
    if inflight.is_packed:
        if slots > inflight.num - inflight.taken_slots:
            return False         # more descriptors than the ring has, so some of them were taken before
        _record_packed(inflight, &ring.packed, head, slots, id)
    else:
        # The counter first: it counts only with the mark.
        vq_store_release_u64(&inflight.split_entries[id].counter, inflight.counter)
        vq_store_release_u8(&inflight.split_entries[id].inflight, 1)
        inflight.entry[id] = id + 1
    inflight.counter += 1
    return True


# ---- giving back ----

cdef void _list_split(inflight_t* inflight) noexcept nogil:
    cdef uint16_t i, head
    for i in range(inflight.batch_count):
        head = inflight.batch[i]
        vq_store_release_u16(&inflight.split_entries[head].next, inflight.last_batch_head)
        vq_store_release_u16(&inflight.split.last_batch_head, head)
        inflight.last_batch_head = head


cdef void inflight_list_batch(inflight_t* inflight, packed_t* ring) noexcept nogil:
    """Link the batch where a restart finds it, if used->idx (packed: the ring) tells that it was exposed.

    Packed: the entries become free, and used_idx moves on; old_free_head and old_used_idx still tell of before.
    """
    cdef uint32_t slot = ring.used_slot
    cdef uint16_t i, head
    cdef bint wrap = ring.used_flags != 0
    if not inflight.is_packed:
        _list_split(inflight)
        return
    for i in range(inflight.batch_count):
        head = inflight.entry[inflight.batch[i]] - 1
        inflight.next[inflight.last[head]] = inflight.free_head
        vq_store_release_u16(&inflight.packed_entries[inflight.last[head]].next, inflight.free_head)
        vq_store_release_u16(&inflight.packed.free_head, head)
        inflight.free_head = head
        slot += inflight.slots[head]
        if slot >= ring.num:
            slot -= ring.num
            wrap = not wrap
    vq_store_release_u16(&inflight.packed.used_idx, <uint16_t>slot)
    vq_store_release_u8(&inflight.packed.used_wrap_counter, wrap)


cdef void inflight_clear_batch(inflight_t* inflight, ring_t* ring) noexcept nogil:
    """The batch is exposed: it is in flight no more, and what a restart would have to look at is settled.

    Release: none of these stores comes before the one that exposes the batch.
    """
    cdef uint16_t i, id, head
    for i in range(inflight.batch_count):
        id = inflight.batch[i]
        head = inflight.entry[id] - 1
        if inflight.is_packed:
            vq_store_release_u8(&inflight.packed_entries[head].inflight, 0)
            inflight.taken_slots -= inflight.slots[head]
        else:
            vq_store_release_u8(&inflight.split_entries[head].inflight, 0)
        inflight.entry[id] = 0
    inflight.batch_count = 0
    if inflight.is_packed:
        # The wrap counter after its index: between the two the ring is asked at the new place, which is not available
        # under the old counter.
        vq_store_release_u16(&inflight.packed.old_free_head, inflight.free_head)
        vq_store_release_u16(&inflight.packed.old_used_idx, ring.packed.used_slot)
        vq_store_release_u8(&inflight.packed.old_used_wrap_counter, ring.packed.used_flags != 0)
    else:
        vq_store_release_u16(&inflight.split.used_idx, ring.split.shadow_used)


# ---- the file ----

def inflight_bytes(int num_queues, int queue_size, bint packed):
    """int: bytes of a region for so many queues of so many entries."""
    each = (sizeof(inflight_packed_t) + sizeof(inflight_packed_entry_t) * queue_size if packed
            else sizeof(inflight_split_t) + sizeof(inflight_split_entry_t) * queue_size)
    return num_queues * ((each + INFLIGHT_ALIGN - 1) // INFLIGHT_ALIGN * INFLIGHT_ALIGN)


cdef class InflightRegion:
    """A mapped in-flight region.

    Parameters
    ----------
    fd : int
        Descriptor of the shared file; only used here, stays the caller's.
    size : int
        Bytes of the region, as the front-end says; what its queues do not need is not mapped.
    offset : int
        Where the region starts in the file, in bytes.
    num_queues, queue_size : int
        Its shape, 1 or more each.
    packed : bool
        Layout of the rings; without it the size is checked for split ones, and for others when they start.

    Raises
    ------
    ValueError
        A number is out of range, or region or file are too small.
    OSError
        mmap refused the file.

    Notes
    -----
    Spec: vhost-user, SET_INFLIGHT_FD.
    """

    def __cinit__(self, fd, size, offset, num_queues, queue_size, bint packed=False):
        cdef uint64_t page = os.sysconf("SC_PAGESIZE")
        cdef uint64_t start, skip
        shape = f"in-flight region of {num_queues} queues with {queue_size} entries"
        if not (1 <= num_queues <= 0xffff and 1 <= queue_size <= 0x8000):
            raise ValueError(f"{shape}: there must be one queue at least, and 1 to 32768 entries")
        if size <= 0 or offset < 0 or offset % 8 or size + offset > 1 << 62:
            raise ValueError(f"{shape}: {size} bytes at offset {offset}; size must be positive, offset a multiple of "
                             "8, and the sum below 2^62")
        needed = inflight_bytes(num_queues, queue_size, packed)
        if size < needed:
            raise ValueError(f"{shape}: {size} bytes; {needed} are needed")
        status = os.fstat(fd)
        if size + offset > status.st_size:
            raise ValueError(f"{shape}: {size + offset} bytes of its file, which has {status.st_size}")
        if status.st_blksize % page == 0:
            page = max(page, <uint64_t>status.st_blksize)    # huge pages are mapped and unmapped whole
        size = min(size, inflight_bytes(num_queues, queue_size, True))
        skip = offset % page
        start = offset - skip
        self._length = (size + offset - start + page - 1) // page * page
        cdef void* got = c_mmap(NULL, self._length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, <long>start)
        if got == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self._start = got
        self._guard = memory_guard(got, self._length, &self._lost)
        self._bytes = <uint8_t*>got + skip
        self.size, self.num_queues, self.queue_size = size, num_queues, queue_size

    def __dealloc__(self):
        if self._guard != NULL:
            memory_unguard(self._guard)
        if self._start != NULL:
            c_munmap(self._start, self._length)

    @property
    def lost(self):
        """bool: the owner truncated the file (SIGBUS was caught); what was recorded is gone."""
        return vq_load_u32(&self._lost) != 0

    cdef uint8_t* part(self, int index, bint packed) except NULL:
        """The part of queue `index` (< num_queues)."""
        needed = inflight_bytes(self.num_queues, self.queue_size, packed)
        if self.size < needed:
            raise ValueError(f"in-flight region of {self.size} bytes; packed rings need {needed}")
        return self._bytes + <uint64_t>inflight_bytes(index, self.queue_size, packed)


cdef class InflightQueue:
    """What one ring has in flight, from its start to its stop: its part of the region and private memory."""

    def __cinit__(self, InflightRegion region not None, int index, int num, bint packed):
        cdef inflight_t* inflight = &self.inflight
        cdef uint8_t* start = region.part(index, packed)
        cdef size_t size = region.queue_size
        cdef uint16_t* words
        memset(inflight, 0, sizeof(inflight_t))
        if num > region.queue_size:
            raise ValueError(f"queue {index}: the in-flight region has {region.queue_size} entries, the ring {num}")
        inflight.is_packed = packed
        inflight.num, inflight.size = num, size
        inflight.lost = &region._lost
        if packed:
            inflight.packed = <inflight_packed_t*>start
            inflight.packed_entries = <inflight_packed_entry_t*>(start + sizeof(inflight_packed_t))
        else:
            inflight.split = <inflight_split_t*>start
            inflight.split_entries = <inflight_split_entry_t*>(start + sizeof(inflight_split_t))
        # One allocation, the largest alignment first.
        self._private = calloc(size, sizeof(inflight_again_t) + sizeof(virtq_packed_desc_t) + 5 * sizeof(uint16_t))
        if self._private == NULL:
            raise MemoryError(f"queue {index}")
        inflight.again = <inflight_again_t*>self._private
        inflight.copies = <virtq_packed_desc_t*>(inflight.again + size)
        words = <uint16_t*>(inflight.copies + size)
        inflight.entry, inflight.next, inflight.last = words, words + size, words + 2 * size
        inflight.slots, inflight.batch = words + 3 * size, words + 4 * size
        self._region = region

    def __dealloc__(self):
        free(self._private)
