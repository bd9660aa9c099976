"""The packed layout, driver side (VIRTIO 1.3, 2.8): the verbs of driver.pxd for it.

One ring serves both ways. AVAIL and USED tell whose a descriptor is: they differ when the driver makes it available
(AVAIL is the wrap counter) and are equal when the device has used it (both are its wrap counter).

Publication: the descriptors of all buffers that were added stand in the ring, but the last 8 bytes of the very first
are held back. Storing them exposes the whole batch at once. Flags change in every lap, so these 8 bytes (length, id,
flags) are written each time; the address only when it differs.

A used descriptor is taken by one load of these same 8 bytes: flags, id and length of one moment.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from vq_core.arch cimport (vq_load_acquire_u64, vq_load_u32, vq_load_u64, vq_store_release_u32, vq_store_release_u64,
                           vq_store_u64)
from vq_core.driver_state cimport (DRIVER_OK, DRIVER_USED_AHEAD, driver_check, driver_fail, driver_next_id, driver_note,
                                   driver_part_t, driver_refuse, driver_return, driver_store, driver_t, driver_used_t)
from vq_core.virtio cimport (VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_PACKED_DESC_F_AVAIL,
                             VIRTQ_PACKED_DESC_F_USED, VIRTQ_PACKED_EVENT_FLAG_DESC, VIRTQ_PACKED_EVENT_FLAG_DISABLE,
                             VIRTQ_PACKED_EVENT_FLAG_ENABLE, gpa_t, virtq_desc_t, virtq_packed_desc_t)

cdef enum:
    DRIVER_WRAP_BITS = VIRTQ_PACKED_DESC_F_AVAIL | VIRTQ_PACKED_DESC_F_USED
    DRIVER_WRAP_COUNTER = 0x8000         # of a position in its 16 bits: event structures and vhost bases

cdef inline uint64_t driver_packed_word(uint32_t length, uint16_t id, uint16_t flags) noexcept nogil:
    """The last 8 bytes of a descriptor."""
    return <uint64_t>length | <uint64_t>id << 32 | <uint64_t>flags << 48

cdef inline uint16_t driver_packed_avail_position(driver_t* driver) noexcept nogil:
    """The next slot to write, with its wrap counter."""
    return driver.avail_slot | <uint16_t>((driver.avail_flags & VIRTQ_PACKED_DESC_F_AVAIL) << 8)

cdef inline uint16_t driver_packed_used_position(driver_t* driver) noexcept nogil:
    """The next slot that the device uses, with its wrap counter."""
    return driver.used_slot | (driver.used_flags & DRIVER_WRAP_COUNTER)

cdef inline uint32_t driver_packed_free(driver_t* driver) noexcept nogil:
    return driver.free_slots

cdef inline void driver_packed_put(driver_t* driver, bint head, gpa_t addr, uint64_t word) noexcept nogil:
    """Write the next descriptor; `head` is a literal. Without its last 8 bytes if the device is to see it last."""
    cdef virtq_packed_desc_t* desc = &driver.ring[driver.avail_slot]
    cdef uint32_t slot = <uint32_t>driver.avail_slot + 1
    if vq_load_u64(desc) != addr:
        vq_store_u64(desc, addr)
    if head and driver.next_avail_idx == driver.published_avail_idx:
        driver.held_word = word
        driver.held_slot = driver.avail_slot
    else:
        vq_store_u64(&desc.len, word)
    if slot == driver.num:
        slot = 0
        driver.avail_flags ^= DRIVER_WRAP_BITS
    driver.avail_slot = <uint16_t>slot

cdef inline void driver_packed_post(driver_t* driver, uint16_t id, uint16_t count,
                                    uint64_t writable_bytes) noexcept nogil:
    driver.free_head = <uint16_t>(driver.free_head + 1)
    driver.free_slots -= count
    driver_note(driver, id, count, writable_bytes)

cdef inline int driver_packed_add(driver_t* driver, driver_part_t* parts, uint32_t readable,
                                  uint32_t writable) noexcept nogil:
    cdef uint32_t count = readable + writable
    cdef uint32_t i
    cdef uint64_t writable_bytes = 0
    cdef uint16_t id, flags
    if driver.free_slots < count:
        return -1
    id = driver_next_id(driver)
    for i in range(count):
        flags = driver.avail_flags
        if i >= readable:
            flags |= VIRTQ_DESC_F_WRITE
            writable_bytes += parts[i].len
        if i + 1 < count:
            flags |= VIRTQ_DESC_F_NEXT
        driver_packed_put(driver, i == 0, parts[i].addr, driver_packed_word(parts[i].len, id, flags))
    driver_packed_post(driver, id, <uint16_t>count, writable_bytes)
    return id

cdef inline int driver_packed_add_indirect(driver_t* driver, virtq_desc_t* table, gpa_t table_addr,
                                           driver_part_t* parts, uint32_t readable, uint32_t writable) noexcept nogil:
    """2.8.8: the entries of a table are used in their order; of their flags WRITE alone counts."""
    cdef uint32_t count = readable + writable
    cdef uint32_t i
    cdef uint64_t writable_bytes = 0
    cdef uint16_t id, flags
    if driver.free_slots == 0:
        return -1
    id = driver_next_id(driver)
    for i in range(count):
        flags = 0
        if i >= readable:
            flags = VIRTQ_DESC_F_WRITE
            writable_bytes += parts[i].len
        driver_store(&table[i], parts[i].addr, driver_packed_word(parts[i].len, 0, flags))
    driver_packed_put(driver, True, table_addr,
                      driver_packed_word(count * 16, id, driver.avail_flags | VIRTQ_DESC_F_INDIRECT))
    driver_packed_post(driver, id, 1, writable_bytes)
    return id

cdef inline void driver_packed_publish(driver_t* driver) noexcept nogil:
    cdef int fresh
    if driver.published_avail_idx != driver.next_avail_idx:
        # Release: pairs with the device's acquire of these flags; all other descriptors stand before them.
        vq_store_release_u64(&driver.ring[driver.held_slot].len, driver.held_word)
        driver.published_avail_idx = driver.next_avail_idx
        driver.published_at = driver_packed_avail_position(driver)
        fresh = <int>driver.avail_slot - driver.held_slot
        driver.kick_slots += <uint64_t>(fresh if fresh > 0 else fresh + driver.num)

cdef inline bint driver_packed_wants_kick(driver_t* driver) noexcept nogil:
    """Whether the device asked for a kick by what was published since the last call; after a fence (2.8.10)."""
    # Both halves in one load: they belong together.
    cdef uint32_t event = vq_load_u32(driver.device_event)
    cdef uint32_t how = event >> 16 & 3
    cdef uint64_t passed = driver.kick_slots
    cdef int distance
    driver.kick_slots = 0
    if how != VIRTQ_PACKED_EVENT_FLAG_DESC or not driver.event_idx:
        return how != VIRTQ_PACKED_EVENT_FLAG_DISABLE
    # How far the slot that it waits for lies behind the last published one: in this lap, or in the one before.
    distance = <int>(driver.published_at & 0x7fff) - <int>(event & 0x7fff) - 1
    if (event ^ driver.published_at) & DRIVER_WRAP_COUNTER:
        distance += driver.num
    return distance >= 0 and <uint64_t>distance < passed

cdef inline int driver_packed_pending(driver_t* driver) noexcept nogil:
    """1 if a buffer was used: only walking the ring tells how many."""
    cdef uint64_t word
    if driver.error != DRIVER_OK:
        return -1
    if driver.batch_valid:
        return driver.batch_left + 1
    word = vq_load_acquire_u64(&driver.ring[driver.used_slot].len)
    if (word >> 48 & DRIVER_WRAP_BITS) != driver.used_flags:
        return 0
    if driver.published_avail_idx == driver.last_used_idx:
        driver_fail(driver, DRIVER_USED_AHEAD, driver.used_slot)
        return -1
    return 1

# IN_ORDER: an element that may stand for a batch (2.8.7); `used` becomes the first of it.
cdef void driver_packed_in_order(driver_t* driver, driver_used_t* used) noexcept nogil

cdef inline int driver_packed_poll_used(driver_t* driver, driver_used_t* used, uint32_t max) noexcept nogil:
    cdef uint32_t n = 0, freed = 0, count, error = DRIVER_OK
    cdef uint32_t slot = driver.used_slot
    cdef uint16_t flags = driver.used_flags
    cdef uint64_t word
    if driver.error != DRIVER_OK:
        return -1
    while n < max:
        if driver.batch_valid:
            driver_packed_in_order(driver, &used[n])
        else:
            # Acquire: pairs with the device's release of these flags; written buffers stand before it.
            word = vq_load_acquire_u64(&driver.ring[slot].len)
            if (word >> 48 & DRIVER_WRAP_BITS) != flags:
                break
            used[n].id = <uint16_t>(word >> 32)
            # Without WRITE the length says nothing (2.8.5).
            used[n].len = <uint32_t>word if word >> 48 & VIRTQ_DESC_F_WRITE else <uint32_t>0
            error = driver_check(driver, &used[n])
            if error != DRIVER_OK:
                break
            if driver.in_order:
                driver_packed_in_order(driver, &used[n])
        count = driver_return(driver, used[n].id)
        freed += count
        slot += count
        if slot >= driver.num:
            slot -= driver.num
            flags ^= DRIVER_WRAP_BITS
        n += 1
    driver.free_slots += freed
    driver.used_slot = <uint16_t>slot
    driver.used_flags = flags
    if error != DRIVER_OK:
        if driver.published_avail_idx == driver.last_used_idx:
            driver_fail(driver, DRIVER_USED_AHEAD, slot)
        else:
            driver_refuse(driver, error, &used[n])
        if n == 0:
            return -1
    return <int>n

cdef inline void driver_packed_event(driver_t* driver, uint16_t off_wrap, uint16_t flags) noexcept nogil:
    """Write the driver's event structure, both halves in one store."""
    driver.event_flags = flags
    vq_store_release_u32(driver.driver_event, <uint32_t>off_wrap | <uint32_t>flags << 16)

cdef inline void driver_packed_ask_call(driver_t* driver) noexcept nogil:
    """Ask for a call at the next used buffer; a fence follows."""
    if driver.event_idx:
        driver_packed_event(driver, driver_packed_used_position(driver), VIRTQ_PACKED_EVENT_FLAG_DESC)
    else:
        driver_packed_event(driver, 0, VIRTQ_PACKED_EVENT_FLAG_ENABLE)

cdef inline void driver_packed_disarm(driver_t* driver) noexcept nogil:
    if driver.event_flags != VIRTQ_PACKED_EVENT_FLAG_DISABLE:
        driver_packed_event(driver, 0, VIRTQ_PACKED_EVENT_FLAG_DISABLE)

# Empty the ring at position `base`: the slot where both sides begin, the wrap counter of both in bit 15.
cdef void driver_packed_reset(driver_t* driver, uint16_t base) noexcept nogil
