"""Driver-side virtqueues: what a guest's driver does, for the demo, benchmarks, tests and users of the front-end role.

The third file, beside split.pxd and packed.pxd, that reads and writes ring memory (VIRTIO 1.3, 2.7.13 and 2.7.14).

The verbs hide the layout of the ring; whoever uses them sees ids, addresses and lengths only:

    driver_next_id, driver_add, driver_publish, driver_needs_kick, driver_kick     buffers to the device
    driver_pending, driver_poll_used                                               buffers back from it
    driver_arm, driver_disarm                                                      calls on and off

A buffer is named by its id: below num, unique while the buffer is outstanding. Ids are handed out first in, first out:
a user whose buffers have one descriptor and come back in order sees the same id at the same place of the ring forever,
so that neither descriptors nor ring entries change and their cache lines stay shared with the device.

The device is not trusted (protocol 11.1, line 49): an id outside the ring or not outstanding, a length above what was
posted, a used index that runs ahead set `error`, which is sticky; nothing is indexed before it is checked. What the
driver wrote is remembered in private memory (`slots`, `free`, `heads`): the shared copy is never read for decisions.

Invariants: next_avail_idx - last_used_idx <= num; published_avail_idx lies between; free_tail - free_head is the number
of free descriptors. Positions run freely modulo 2^16.

Thread: one at a time for everything here; nothing takes a lock.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport (vq_fence, vq_load_acquire_u16, vq_load_u16, vq_load_u64, vq_store_release_u16, vq_store_u16,
                           vq_store_u64)
from vq_core.notify cimport notify_crossed, notify_signal
from vq_core.virtio cimport (VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE,
                             VIRTQ_USED_F_NO_NOTIFY, gpa_t, uva_t, virtq_avail_t, virtq_desc_t, virtq_used_t)

# What the device did wrong. Texts: DRIVER_ERRORS in driver.pyx, in this order.
cdef enum:
    DRIVER_OK = 0
    DRIVER_USED_IDX = 1              # used index ahead of what was made available
    DRIVER_USED_ID = 2               # id outside the ring
    DRIVER_USED_NOT_OUTSTANDING = 3  # id that was not made available, or used twice
    DRIVER_USED_LENGTH = 4           # longer than the device-writable part
    DRIVER_USED_ORDER = 5            # IN_ORDER was negotiated, and the id is not next in order

cdef struct driver_part_t:           # one descriptor's worth of a buffer
    gpa_t addr
    uint32_t len

cdef struct driver_used_t:
    uint32_t id
    uint32_t len                     # bytes that the device wrote, at most the writable bytes that were posted

cdef struct driver_slot_t:           # private state of one descriptor
    uint32_t writable_bytes          # of the buffer whose head this is
    uint16_t count                   # descriptors of that buffer; 0: not a head of an outstanding buffer
    uint16_t position                # where the head stands in the available ring
    uint16_t next                    # the descriptor that follows in the chain

cdef struct driver_t:
    virtq_desc_t* desc
    virtq_avail_t* avail
    virtq_used_t* used
    driver_slot_t* slots             # num
    uint16_t* free                   # num: first in, first out queue of free descriptors
    uint16_t* heads                  # num: heads by position: what the available ring should say
    uint16_t num                     # power of two
    uint16_t mask                    # num - 1
    uint16_t next_avail_idx          # position of the next buffer to add
    uint16_t published_avail_idx     # avail->idx as last published
    uint16_t kicked_avail_idx        # published_avail_idx at the last decision about a kick
    uint16_t last_used_idx           # position of the next used element to take
    uint16_t shadow_used_idx         # used->idx as last read
    uint16_t free_head
    uint16_t free_tail
    uint16_t batch_left              # IN_ORDER: buffers before `batch` that the device skipped in the used ring
    bint batch_valid
    driver_used_t batch              # IN_ORDER: the element that ends the batch
    bint kick_valid                  # False: no decision since the start; the first one always kicks
    bint event_idx
    bint in_order
    int kick_fd
    int call_fd
    uint32_t error                   # DRIVER_*
    uint32_t error_value             # the index, id or length in question
    uint64_t kicks
    uint64_t kicks_suppressed

cdef inline uint32_t driver_free(driver_t* driver) noexcept nogil:
    """Number of free descriptors."""
    return <uint16_t>(driver.free_tail - driver.free_head)

cdef inline uint32_t driver_outstanding(driver_t* driver) noexcept nogil:
    """Number of buffers that were added and have not come back."""
    return <uint16_t>(driver.next_avail_idx - driver.last_used_idx)

cdef inline uint16_t driver_next_id(driver_t* driver) noexcept nogil:
    """The id that the next add gives; only with driver_free() > 0."""
    return driver.free[driver.free_head & driver.mask]

cdef inline void driver_put(virtq_desc_t* desc, gpa_t addr, uint32_t length, uint16_t flags,
                            uint16_t next) noexcept nogil:
    """Write a descriptor unless it stands there already: an unchanged line stays shared with the device."""
    cdef uint64_t rest = <uint64_t>length | <uint64_t>flags << 32 | <uint64_t>next << 48
    if (vq_load_u64(desc) ^ addr) | (vq_load_u64(&desc.len) ^ rest):
        vq_store_u64(desc, addr)
        vq_store_u64(&desc.len, rest)

cdef inline void driver_post(driver_t* driver, uint16_t head, uint16_t count, uint64_t writable_bytes) noexcept nogil:
    """Put the chain at `head` into the available ring; seen by the device after driver_publish."""
    cdef driver_slot_t* slot = &driver.slots[head]
    cdef uint16_t position = driver.next_avail_idx
    slot.writable_bytes = <uint32_t>writable_bytes if writable_bytes >> 32 == 0 else <uint32_t>0xffffffff
    slot.count = count
    slot.position = position
    driver.heads[position & driver.mask] = head
    if vq_load_u16(&driver.avail.ring[position & driver.mask]) != head:
        vq_store_u16(&driver.avail.ring[position & driver.mask], head)
    driver.next_avail_idx = position + 1

cdef inline int driver_add(driver_t* driver, driver_part_t* parts, uint32_t readable, uint32_t writable) noexcept nogil:
    """Add a buffer of `readable` device-readable parts, then `writable` device-writable ones (one at least).

    Returns its id, or -1 without enough free descriptors. Literal counts fold to straight-line code.
    """
    cdef uint32_t count = readable + writable
    cdef uint32_t i
    cdef uint64_t writable_bytes = 0
    cdef uint16_t head, index, next, flags
    if driver_free(driver) < count:
        return -1
    head = index = driver_next_id(driver)
    for i in range(count):
        flags = 0
        next = 0
        if i >= readable:
            flags = VIRTQ_DESC_F_WRITE
            writable_bytes += parts[i].len
        if i + 1 < count:
            flags |= VIRTQ_DESC_F_NEXT
            next = driver.free[<uint16_t>(driver.free_head + i + 1) & driver.mask]
            driver.slots[index].next = next
        driver_put(&driver.desc[index], parts[i].addr, parts[i].len, flags, next)
        index = next
    driver.free_head = <uint16_t>(driver.free_head + count)
    driver_post(driver, head, <uint16_t>count, writable_bytes)
    return head

cdef inline int driver_add_indirect(driver_t* driver, virtq_desc_t* table, gpa_t table_addr, driver_part_t* parts,
                                    uint32_t readable, uint32_t writable) noexcept nogil:
    """Add a buffer by one descriptor that points to `table`: readable + writable entries at guest address `table_addr`.

    The table belongs to the device until the buffer comes back. Returns the id, or -1 without a free descriptor.
    """
    cdef uint32_t count = readable + writable
    cdef uint32_t i
    cdef uint64_t writable_bytes = 0
    cdef uint16_t head, flags
    if driver_free(driver) == 0:
        return -1
    head = driver_next_id(driver)
    for i in range(count):
        flags = VIRTQ_DESC_F_NEXT if i + 1 < count else 0
        if i >= readable:
            flags |= VIRTQ_DESC_F_WRITE
            writable_bytes += parts[i].len
        driver_put(&table[i], parts[i].addr, parts[i].len, flags, <uint16_t>(i + 1) if i + 1 < count else 0)
    driver_put(&driver.desc[head], table_addr, count * 16, VIRTQ_DESC_F_INDIRECT, 0)
    driver.free_head = <uint16_t>(driver.free_head + 1)
    driver_post(driver, head, 1, writable_bytes)
    return head

cdef inline void driver_publish(driver_t* driver) noexcept nogil:
    """Expose all added buffers: one index store, none when there is nothing new."""
    if driver.published_avail_idx != driver.next_avail_idx:
        # Release: pairs with the device's acquire of avail->idx; descriptors and entries stand before it.
        vq_store_release_u16(&driver.avail.idx, driver.next_avail_idx)
        driver.published_avail_idx = driver.next_avail_idx

cdef inline bint driver_needs_kick(driver_t* driver) noexcept nogil:
    """Whether the device wants a kick for what was published since the last decision (2.7.10)."""
    cdef uint16_t old = driver.kicked_avail_idx
    if driver.published_avail_idx == old and driver.kick_valid:
        return False
    # Pairs with the device's fence between writing avail_event (or flags) and reading avail->idx.
    vq_fence()
    driver.kicked_avail_idx = driver.published_avail_idx
    if not driver.kick_valid:
        driver.kick_valid = True
        return True
    if driver.event_idx:
        return notify_crossed(vq_load_u16(&driver.used.ring[driver.num]), driver.published_avail_idx, old)
    return not (vq_load_u16(&driver.used.flags) & VIRTQ_USED_F_NO_NOTIFY)

cdef inline bint driver_kick(driver_t* driver) noexcept nogil:
    """Kick the device if it wants it; whether it did."""
    if driver.published_avail_idx == driver.kicked_avail_idx and driver.kick_valid:
        return False
    if not driver_needs_kick(driver):
        driver.kicks_suppressed += 1
        return False
    driver.kicks += 1
    notify_signal(driver.kick_fd)
    return True

cdef inline int driver_pending(driver_t* driver) noexcept nogil:
    """Number of used buffers to take, reading the device's index anew; -1 in the error state."""
    cdef uint16_t pending
    if driver.error != DRIVER_OK:
        return -1
    # Acquire: pairs with the device's release of used->idx; elements and written buffers stand before it.
    driver.shadow_used_idx = vq_load_acquire_u16(&driver.used.idx)
    pending = <uint16_t>(driver.shadow_used_idx - driver.last_used_idx)
    if pending > <uint16_t>(driver.published_avail_idx - driver.last_used_idx):
        driver_fail(driver, DRIVER_USED_IDX, driver.shadow_used_idx)
        return -1
    return pending

cdef inline void driver_fail(driver_t* driver, uint32_t error, uint32_t value) noexcept nogil:
    """Stop believing the device: nothing is taken from it any more."""
    driver.error = error
    driver.error_value = value
    driver.shadow_used_idx = driver.last_used_idx

# The next element when IN_ORDER was negotiated: 0, or DRIVER_* with nothing taken. It may stand for a batch (2.7.9).
cdef uint32_t driver_next_in_order(driver_t* driver, driver_used_t* used) noexcept nogil

# Which check an element fails, DRIVER_OK if none.
cdef uint32_t driver_check(driver_t* driver, driver_used_t* used) noexcept nogil

# Return the descriptors of a chain after its head to the free ones.
cdef void driver_give_back(driver_t* driver, uint16_t head, uint16_t count) noexcept nogil

cdef inline int driver_poll_used(driver_t* driver, driver_used_t* used, uint32_t max) noexcept nogil:
    """Take up to `max` used buffers: their number, or -1 in the error state. Their descriptors are free again.

    The device's index is read only when all that is known was taken. What stands before a bad element is
    delivered; the error shows at the next call.
    """
    cdef uint32_t n = 0, known, error
    cdef uint64_t element
    cdef driver_slot_t* slot
    cdef uint16_t count
    known = <uint16_t>(driver.shadow_used_idx - driver.last_used_idx)
    if known == 0:
        if driver_pending(driver) < 0:
            return -1
        known = <uint16_t>(driver.shadow_used_idx - driver.last_used_idx)
    if known > max:
        known = max
    while n < known:
        if driver.in_order:
            error = driver_next_in_order(driver, &used[n])
        else:
            # Read once: the copy is checked and used.
            element = vq_load_u64(&driver.used.ring[driver.last_used_idx & driver.mask])
            used[n].id = <uint32_t>element
            used[n].len = <uint32_t>(element >> 32)
            error = driver_check_inline(driver, &used[n])
        if error != DRIVER_OK:
            driver_fail(driver, error, used[n].len if error == DRIVER_USED_LENGTH else used[n].id)
            return <int>n if n > 0 else -1
        slot = &driver.slots[used[n].id]
        count = slot.count
        slot.count = 0
        driver.free[driver.free_tail & driver.mask] = <uint16_t>used[n].id
        driver.free_tail += 1
        if count > 1:
            driver_give_back(driver, <uint16_t>used[n].id, count)
        driver.last_used_idx += 1
        n += 1
    return <int>n

cdef inline uint32_t driver_check_inline(driver_t* driver, driver_used_t* used) noexcept nogil:
    cdef driver_slot_t* slot
    if used.id >= driver.num:
        return DRIVER_USED_ID
    slot = &driver.slots[used.id]
    # Added but not published: its position lies at or behind published_avail_idx. That of a buffer which has been out
    # for long (completion order is free) may look so as well; driver_check finds out.
    if (slot.count == 0) | (used.len > slot.writable_bytes) | \
            (<uint16_t>(slot.position - driver.published_avail_idx) <
             <uint16_t>(driver.next_avail_idx - driver.published_avail_idx)):
        return driver_check(driver, used)
    return DRIVER_OK

cdef inline bint driver_arm(driver_t* driver) noexcept nogil:
    """Ask for a call at the next used buffer; True if there is one already (or an error) and no call may come."""
    if driver.event_idx:
        vq_store_u16(&driver.avail.ring[driver.num], driver.last_used_idx)
    else:
        vq_store_u16(&driver.avail.flags, 0)
    # Pairs with the device's fence between publishing used->idx and reading used_event (or flags).
    vq_fence()
    return driver_pending(driver) != 0

cdef inline void driver_disarm(driver_t* driver) noexcept nogil:
    """Ask for no calls; a hint (2.7.7). With EVENT_IDX used_event stays behind, one call in 65536 buffers may come."""
    if not driver.event_idx:
        vq_store_u16(&driver.avail.flags, VIRTQ_AVAIL_F_NO_INTERRUPT)

cdef class Region:
    """One region of guest memory: a sealed memfd and our mapping of it."""
    cdef readonly object guest_addr      # int, bytes, like the following
    cdef readonly object user_addr
    cdef readonly object size
    cdef readonly object mmap_offset
    cdef readonly int fd                 # -1 once closed
    cdef uint8_t* start                  # of the mapping
    cdef size_t length
    cdef uint8_t* data                   # start + mmap_offset
    cdef uint64_t used                   # bytes that the allocator gave out
    cdef dict blocks                     # free blocks by size

cdef class Block:
    """Bytes of guest memory that nobody else uses; given back when the last reference (or view) is dropped."""
    cdef readonly object guest_addr
    cdef readonly object size
    cdef Region region
    cdef uint64_t offset
    cdef uint64_t room                   # bytes that it occupies
    cdef uint8_t* data

cdef class GuestMemory:
    cdef list _regions

cdef class DriverQueue:
    cdef driver_t driver
    cdef readonly GuestMemory memory
    cdef readonly object features        # int
    cdef readonly bint busy              # a traffic engine owns the queue
    cdef Block _desc
    cdef Block _avail
    cdef Block _used
    cdef dict _posted                    # id -> Buffer

    cdef int claim(self) except -1
    cdef void unclaim(self) noexcept
