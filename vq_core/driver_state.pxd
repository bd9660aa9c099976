"""What both layouts of a driver-side virtqueue share: its state, its ids, and the checks of what a device says.

The device is not trusted (protocol 11.1, line 49): an id outside the ring or not outstanding, a length above what was
posted, a used index that runs ahead set `error`, which is sticky; nothing is indexed before it is checked. What the
driver wrote is remembered in private memory (`slots`, `free`, `heads`): the shared copy is never read for decisions.

A buffer is named by its id: below num, unique while the buffer is outstanding. Ids are handed out first in, first out:
a user whose buffers have one descriptor and come back in order sees the same id at the same place of the ring forever.

Buffers are counted by free-running positions modulo 2^16, in both layouts:
    next_avail_idx - last_used_idx <= num; published_avail_idx lies between.
Split: the positions are those of the ring, and free_tail - free_head is the number of free descriptors.
Packed: an id stands for a whole buffer; `free_slots` is the number of free descriptors, and used_slot + (num -
free_slots) is avail_slot modulo num.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_load_u64, vq_store_u64
from vq_core.virtio cimport (gpa_t, virtq_avail_t, virtq_desc_t, virtq_packed_desc_t, virtq_packed_event_t,
                             virtq_used_t)

# What the device did wrong. Texts: DRIVER_ERRORS in driver.pyx, in this order.
cdef enum:
    DRIVER_OK = 0
    DRIVER_USED_IDX = 1              # used index ahead of what was made available
    DRIVER_USED_ID = 2               # id outside the ring
    DRIVER_USED_NOT_OUTSTANDING = 3  # id that was not made available, or used twice
    DRIVER_USED_LENGTH = 4           # longer than the device-writable part
    DRIVER_USED_ORDER = 5            # IN_ORDER was negotiated, and the id is not next in order
    DRIVER_USED_AHEAD = 6            # packed: a descriptor is marked used that was not made available

cdef struct driver_part_t:           # one descriptor's worth of a buffer
    gpa_t addr
    uint32_t len

cdef struct driver_used_t:
    uint32_t id
    uint32_t len                     # bytes that the device wrote, at most the writable bytes that were posted

cdef struct driver_slot_t:           # private state of one id
    uint32_t writable_bytes          # of the buffer with this id
    uint16_t count                   # descriptors of that buffer; 0: no outstanding buffer has this id
    uint16_t position                # of the buffer in the order of adding
    uint16_t next                    # split: the descriptor that follows in the chain

cdef struct driver_t:
    virtq_desc_t* desc               # split: the three parts of the ring
    virtq_avail_t* avail
    virtq_used_t* used
    driver_slot_t* slots             # num
    uint16_t* free                   # mask + 1: first in, first out queue of free ids
    uint16_t* heads                  # mask + 1: ids by position
    uint16_t num
    uint16_t mask                    # of positions in `free` and `heads`: a power of two from num on, less one
    uint16_t next_avail_idx          # position of the next buffer to add
    uint16_t published_avail_idx     # of the first buffer that the device cannot see yet
    uint16_t kicked_avail_idx        # published_avail_idx at the last decision about a kick
    uint16_t last_used_idx           # buffers that came back; split: position of the next used element to take
    uint16_t shadow_used_idx         # split: used->idx as last read
    uint16_t free_head
    uint16_t free_tail
    uint16_t batch_left              # IN_ORDER: buffers before `batch` that the device skipped
    bint batch_valid
    driver_used_t batch              # IN_ORDER: the element that ends the batch
    bint kick_valid                  # False: no decision since the start; the first one always kicks
    bint event_idx
    bint in_order
    bint packed                      # the layout: constant
    int kick_fd
    int call_fd
    uint32_t error                   # DRIVER_*
    uint32_t error_value             # the index, id or length in question
    uint64_t kicks
    uint64_t kicks_suppressed

    virtq_packed_desc_t* ring        # packed: the three parts of the ring
    virtq_packed_event_t* driver_event
    virtq_packed_event_t* device_event
    uint64_t held_word               # last 8 bytes of the first descriptor that was added since the last publication
    uint64_t kick_slots              # descriptors published since the last decision about a kick
    uint32_t free_slots
    uint16_t held_slot               # where held_word belongs
    uint16_t avail_slot              # the next descriptor to write
    uint16_t avail_flags             # AVAIL and USED of what is made available in this lap
    uint16_t used_slot               # the next descriptor that the device uses
    uint16_t used_flags              # AVAIL and USED of what it uses in this lap
    uint16_t published_at            # the first slot that the device cannot see yet; wrap counter in bit 15
    uint16_t event_flags             # driver_event->flags as last written

cdef inline uint32_t driver_outstanding(driver_t* driver) noexcept nogil:
    """Number of buffers that were added and have not come back."""
    return <uint16_t>(driver.next_avail_idx - driver.last_used_idx)

cdef inline uint16_t driver_next_id(driver_t* driver) noexcept nogil:
    """The id that the next add gives; only with driver_free() > 0."""
    return driver.free[driver.free_head & driver.mask]

cdef inline void driver_store(virtq_desc_t* desc, gpa_t addr, uint64_t rest) noexcept nogil:
    """Write a descriptor, split or of an indirect table, unless it stands there: an unchanged line stays shared."""
    if (vq_load_u64(desc) ^ addr) | (vq_load_u64(&desc.len) ^ rest):
        vq_store_u64(desc, addr)
        vq_store_u64(&desc.len, rest)

cdef inline void driver_note(driver_t* driver, uint16_t id, uint16_t count, uint64_t writable_bytes) noexcept nogil:
    """Remember a buffer that is added: the buffer at position next_avail_idx."""
    cdef driver_slot_t* slot = &driver.slots[id]
    cdef uint16_t position = driver.next_avail_idx
    slot.writable_bytes = <uint32_t>writable_bytes if writable_bytes >> 32 == 0 else <uint32_t>0xffffffff
    slot.count = count
    slot.position = position
    driver.heads[position & driver.mask] = id
    driver.next_avail_idx = position + 1

cdef inline void driver_fail(driver_t* driver, uint32_t error, uint32_t value) noexcept nogil:
    """Stop believing the device: nothing is taken from it any more."""
    driver.error = error
    driver.error_value = value
    driver.shadow_used_idx = driver.last_used_idx

# Which check an element fails, DRIVER_OK if none.
cdef uint32_t driver_check_fully(driver_t* driver, driver_used_t* used) noexcept nogil

cdef inline uint32_t driver_check(driver_t* driver, driver_used_t* used) noexcept nogil:
    """Which check an element fails, DRIVER_OK if none: at one branch as a rule."""
    cdef driver_slot_t* slot
    if used.id >= driver.num:
        return DRIVER_USED_ID
    slot = &driver.slots[used.id]
    # Added but not published: its position lies at or behind published_avail_idx. That of a buffer which has been out
    # for long (completion order is free) may look so as well; driver_check_fully finds out.
    if (slot.count == 0) | (used.len > slot.writable_bytes) | \
            (<uint16_t>(slot.position - driver.published_avail_idx) <
             <uint16_t>(driver.next_avail_idx - driver.published_avail_idx)):
        return driver_check_fully(driver, used)
    return DRIVER_OK

# An element that stands for the `ahead` buffers before its own as well (2.7.9, 2.8.7): remember it as the batch.
cdef void driver_batch_begin(driver_t* driver, driver_used_t* used, uint16_t ahead) noexcept nogil

# The next buffer of the batch.
cdef void driver_batch_take(driver_t* driver, driver_used_t* used) noexcept nogil

cdef inline uint16_t driver_return(driver_t* driver, uint32_t id) noexcept nogil:
    """Take the buffer back and its id with it; the number of its descriptors."""
    cdef driver_slot_t* slot = &driver.slots[id]
    cdef uint16_t count = slot.count
    slot.count = 0
    driver.free[driver.free_tail & driver.mask] = <uint16_t>id
    driver.free_tail += 1
    driver.last_used_idx += 1
    return count

cdef inline void driver_refuse(driver_t* driver, uint32_t error, driver_used_t* used) noexcept nogil:
    """Fail because of this element."""
    driver_fail(driver, error, used.len if error == DRIVER_USED_LENGTH else used.id)
