"""The rarer steps of the split layout, driver side."""
from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memset
from vq_core.arch cimport vq_store_release_u16, vq_store_u16
from vq_core.driver_state cimport DRIVER_OK, DRIVER_USED_ORDER, driver_batch_begin, driver_batch_take


cdef uint32_t driver_split_next_in_order(driver_t* driver, driver_used_t* used) noexcept nogil:
    cdef uint32_t error
    cdef uint16_t ahead
    if not driver.batch_valid:
        error = driver_split_element(driver, used)
        if error != DRIVER_OK:
            return error
        ahead = <uint16_t>(driver.slots[used.id].position - driver.last_used_idx)
        if ahead == 0:
            return DRIVER_OK
        # The element stands for everything up to its own buffer, which the device must have counted in its index.
        if ahead >= <uint16_t>(driver.shadow_used_idx - driver.last_used_idx):
            return DRIVER_USED_ORDER
        driver_batch_begin(driver, used, ahead)
    driver_batch_take(driver, used)
    return DRIVER_OK


cdef void driver_split_give_back(driver_t* driver, uint16_t head, uint16_t count) noexcept nogil:
    cdef uint16_t index = head
    for _ in range(count - 1):
        index = driver.slots[index].next               # private: written by driver_split_add, below num
        driver.free[driver.free_tail & driver.mask] = index
        driver.free_tail += 1


cdef void driver_split_reset(driver_t* driver, uint16_t base) noexcept nogil:
    memset(driver.desc, 0, 16 * driver.num)
    memset(driver.avail, 0, 4 + 2 * driver.num + 2)
    memset(driver.used, 0, 4 + 8 * driver.num + 2)
    driver.next_avail_idx = driver.published_avail_idx = driver.kicked_avail_idx = base
    driver.last_used_idx = driver.shadow_used_idx = base
    vq_store_u16(&driver.used.idx, base)
    vq_store_release_u16(&driver.avail.idx, base)
