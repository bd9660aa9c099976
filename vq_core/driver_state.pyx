"""The rarer checks of a driver-side virtqueue."""
from libc.stdint cimport uint16_t, uint32_t


cdef uint32_t driver_check_fully(driver_t* driver, driver_used_t* used) noexcept nogil:
    cdef driver_slot_t* slot
    cdef uint16_t position
    if used.id >= driver.num:
        return DRIVER_USED_ID
    slot = &driver.slots[used.id]
    if slot.count == 0:
        return DRIVER_USED_NOT_OUTSTANDING
    position = driver.published_avail_idx
    while position != driver.next_avail_idx:           # at most num turns
        if driver.heads[position & driver.mask] == used.id:
            return DRIVER_USED_NOT_OUTSTANDING         # the device cannot know of it yet
        position += 1
    return DRIVER_USED_LENGTH if used.len > slot.writable_bytes else DRIVER_OK


cdef void driver_batch_begin(driver_t* driver, driver_used_t* used, uint16_t ahead) noexcept nogil:
    driver.batch = used[0]
    driver.batch_left = ahead
    driver.batch_valid = True


cdef void driver_batch_take(driver_t* driver, driver_used_t* used) noexcept nogil:
    cdef uint16_t head
    if driver.batch_left == 0:
        driver.batch_valid = False
        used[0] = driver.batch
        return
    driver.batch_left -= 1
    head = driver.heads[driver.last_used_idx & driver.mask]
    used.id = head
    used.len = driver.slots[head].writable_bytes       # skipped buffers were used completely
