"""The split layout, driver side (VIRTIO 1.3, 2.7): the verbs of driver.pxd for it.

A buffer has the id of its first descriptor. Unchanged descriptors and ring entries are not written again, so that
their cache lines stay shared with the device.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.arch cimport (vq_fence, vq_load_acquire_u16, vq_load_u16, vq_load_u64, vq_store_release_u16, vq_store_u16)
from vq_core.driver_state cimport (DRIVER_OK, DRIVER_USED_IDX, driver_check, driver_fail, driver_next_id, driver_note,
                                   driver_part_t, driver_refuse, driver_return, driver_store, driver_t,
                                   driver_used_t)
from vq_core.notify cimport notify_crossed
from vq_core.virtio cimport (VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE,
                             VIRTQ_USED_F_NO_NOTIFY, gpa_t, virtq_desc_t)

cdef inline uint64_t driver_split_word(uint32_t length, uint16_t flags, uint16_t next) noexcept nogil:
    """The last 8 bytes of a descriptor."""
    return <uint64_t>length | <uint64_t>flags << 32 | <uint64_t>next << 48

cdef inline uint32_t driver_split_free(driver_t* driver) noexcept nogil:
    return <uint16_t>(driver.free_tail - driver.free_head)

cdef inline void driver_split_post(driver_t* driver, uint16_t head, uint16_t count,
                                   uint64_t writable_bytes) noexcept nogil:
    """Put the chain at `head` into the available ring; seen by the device after driver_split_publish."""
    cdef uint16_t* entry = &driver.avail.ring[driver.next_avail_idx & driver.mask]
    driver_note(driver, head, count, writable_bytes)
    if vq_load_u16(entry) != head:
        vq_store_u16(entry, head)

cdef inline int driver_split_add(driver_t* driver, driver_part_t* parts, uint32_t readable,
                                 uint32_t writable) noexcept nogil:
    cdef uint32_t count = readable + writable
    cdef uint32_t i
    cdef uint64_t writable_bytes = 0
    cdef uint16_t head, index, next, flags
    if driver_split_free(driver) < count:
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
        driver_store(&driver.desc[index], parts[i].addr, driver_split_word(parts[i].len, flags, next))
        index = next
    driver.free_head = <uint16_t>(driver.free_head + count)
    driver_split_post(driver, head, <uint16_t>count, writable_bytes)
    return head

cdef inline int driver_split_add_indirect(driver_t* driver, virtq_desc_t* table, gpa_t table_addr,
                                          driver_part_t* parts, uint32_t readable, uint32_t writable) noexcept nogil:
    cdef uint32_t count = readable + writable
    cdef uint32_t i
    cdef uint64_t writable_bytes = 0
    cdef uint16_t head, flags, next
    if driver_split_free(driver) == 0:
        return -1
    head = driver_next_id(driver)
    for i in range(count):
        flags = VIRTQ_DESC_F_NEXT if i + 1 < count else 0
        next = <uint16_t>(i + 1) if i + 1 < count else 0
        if i >= readable:
            flags |= VIRTQ_DESC_F_WRITE
            writable_bytes += parts[i].len
        driver_store(&table[i], parts[i].addr, driver_split_word(parts[i].len, flags, next))
    driver_store(&driver.desc[head], table_addr, driver_split_word(count * 16, VIRTQ_DESC_F_INDIRECT, 0))
    driver.free_head = <uint16_t>(driver.free_head + 1)
    driver_split_post(driver, head, 1, writable_bytes)
    return head

cdef inline void driver_split_publish(driver_t* driver) noexcept nogil:
    if driver.published_avail_idx != driver.next_avail_idx:
        # Release: pairs with the device's acquire of avail->idx; descriptors and entries stand before it.
        vq_store_release_u16(&driver.avail.idx, driver.next_avail_idx)
        driver.published_avail_idx = driver.next_avail_idx

cdef inline bint driver_split_wants_kick(driver_t* driver, uint16_t old) noexcept nogil:
    """Whether the device asked for a kick by what was published since position `old`; after a fence (2.7.10)."""
    if driver.event_idx:
        return notify_crossed(vq_load_u16(&driver.used.ring[driver.num]), driver.published_avail_idx, old)
    return not (vq_load_u16(&driver.used.flags) & VIRTQ_USED_F_NO_NOTIFY)

cdef inline int driver_split_pending(driver_t* driver) noexcept nogil:
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

# The next element when IN_ORDER was negotiated: 0, or DRIVER_* with nothing taken. It may stand for a batch (2.7.9).
cdef uint32_t driver_split_next_in_order(driver_t* driver, driver_used_t* used) noexcept nogil

# Return the descriptors of a chain after its head to the free ones.
cdef void driver_split_give_back(driver_t* driver, uint16_t head, uint16_t count) noexcept nogil

cdef inline uint32_t driver_split_element(driver_t* driver, driver_used_t* used) noexcept nogil:
    """Copy the next used element, once; which check the copy fails, DRIVER_OK if none."""
    cdef uint64_t element = vq_load_u64(&driver.used.ring[driver.last_used_idx & driver.mask])
    used.id = <uint32_t>element
    used.len = <uint32_t>(element >> 32)
    return driver_check(driver, used)

cdef inline int driver_split_poll_used(driver_t* driver, driver_used_t* used, uint32_t max) noexcept nogil:
    """The device's index is read only when all that is known was taken."""
    cdef uint32_t n = 0, known, error
    cdef uint16_t count
    known = <uint16_t>(driver.shadow_used_idx - driver.last_used_idx)
    if known == 0:
        if driver_split_pending(driver) < 0:
            return -1
        known = <uint16_t>(driver.shadow_used_idx - driver.last_used_idx)
    if known > max:
        known = max
    while n < known:
        if driver.in_order:
            error = driver_split_next_in_order(driver, &used[n])
        else:
            error = driver_split_element(driver, &used[n])
        if error != DRIVER_OK:
            driver_refuse(driver, error, &used[n])
            return <int>n if n > 0 else -1
        count = driver_return(driver, used[n].id)
        if count > 1:
            driver_split_give_back(driver, <uint16_t>used[n].id, count)
        n += 1
    return <int>n

cdef inline void driver_split_ask_call(driver_t* driver) noexcept nogil:
    """Ask for a call at the next used buffer; a fence follows."""
    if driver.event_idx:
        vq_store_u16(&driver.avail.ring[driver.num], driver.last_used_idx)
    else:
        vq_store_u16(&driver.avail.flags, 0)

cdef inline void driver_split_disarm(driver_t* driver) noexcept nogil:
    """With EVENT_IDX used_event stays behind (2.7.7): one call in 65536 buffers may come."""
    if not driver.event_idx:
        vq_store_u16(&driver.avail.flags, VIRTQ_AVAIL_F_NO_INTERRUPT)

# Empty the rings at position `base`: where both indices begin.
cdef void driver_split_reset(driver_t* driver, uint16_t base) noexcept nogil
