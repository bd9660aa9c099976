"""The rarer steps of the packed layout, driver side."""
from libc.stdint cimport uint16_t
from libc.string cimport memset
from vq_core.driver_state cimport driver_batch_begin, driver_batch_take


cdef void driver_packed_in_order(driver_t* driver, driver_used_t* used) noexcept nogil:
    cdef uint16_t ahead
    if not driver.batch_valid:
        # Below the number of published buffers: in order, what is outstanding has consecutive positions.
        ahead = <uint16_t>(driver.slots[used.id].position - driver.last_used_idx)
        if ahead == 0:
            return
        driver_batch_begin(driver, used, ahead)
    driver_batch_take(driver, used)


cdef void driver_packed_reset(driver_t* driver, uint16_t base) noexcept nogil:
    cdef uint16_t start = base & 0x7fff, slot
    cdef uint16_t lap = DRIVER_WRAP_BITS if base & DRIVER_WRAP_COUNTER else 0
    memset(driver.ring, 0, 16 * driver.num)
    memset(driver.device_event, 0, 4)
    # As a device leaves a ring of which it has used everything: before `start` in this lap, from there on in the last.
    for slot in range(driver.num):
        driver.ring[slot].flags = lap if slot < start else lap ^ DRIVER_WRAP_BITS
    driver.avail_slot = driver.used_slot = start
    driver.avail_flags = VIRTQ_PACKED_DESC_F_AVAIL if lap else VIRTQ_PACKED_DESC_F_USED
    driver.used_flags = lap
    driver.published_at = base
    driver.free_slots = driver.num
    driver.kick_slots = 0
    driver.next_avail_idx = driver.published_avail_idx = driver.kicked_avail_idx = 0
    driver.last_used_idx = driver.shadow_used_idx = 0
    driver_packed_event(driver, 0, VIRTQ_PACKED_EVENT_FLAG_ENABLE)
