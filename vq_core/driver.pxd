"""Driver-side virtqueues: what a guest's driver does, for the demo, benchmarks, tests and users of the front-end role.

The verbs hide the layout of the ring; whoever uses them sees ids, addresses and lengths only:

    driver_free, driver_outstanding, driver_next_id                                what there is room for
    driver_add, driver_add_indirect, driver_publish                                buffers to the device
    driver_needs_kick, driver_kick                                                 and word of them
    driver_pending, driver_poll_used                                               buffers back from it
    driver_arm, driver_disarm                                                      calls on and off

Each has a twin with `_as` behind its name that is told the layout first: with a literal there (True: packed), a hot
loop looks at `driver.packed` once and is compiled for each layout by itself.

driver_split.pxd and driver_packed.pxd are, beside split.pxd and packed.pxd of the device's side, the files that read
and write ring memory. What they share, and how a device is kept honest: driver_state.pxd.

Thread: one at a time for everything here; nothing takes a lock.
"""
from libc.stdint cimport uint16_t, uint32_t
from vq_core.arch cimport vq_fence
from vq_core.driver_packed cimport (driver_packed_add, driver_packed_add_indirect, driver_packed_ask_call,
                                    driver_packed_disarm, driver_packed_free, driver_packed_pending,
                                    driver_packed_poll_used, driver_packed_publish, driver_packed_wants_kick)
from vq_core.driver_split cimport (driver_split_add, driver_split_add_indirect, driver_split_ask_call,
                                   driver_split_disarm, driver_split_free, driver_split_pending,
                                   driver_split_poll_used, driver_split_publish, driver_split_wants_kick)
from vq_core.driver_state cimport (DRIVER_OK, DRIVER_USED_AHEAD, DRIVER_USED_ID, DRIVER_USED_IDX, DRIVER_USED_LENGTH,
                                   DRIVER_USED_NOT_OUTSTANDING, DRIVER_USED_ORDER, driver_next_id, driver_outstanding,
                                   driver_part_t, driver_slot_t, driver_t, driver_used_t)
from vq_core.guest_memory cimport Block, GuestMemory
from vq_core.notify cimport notify_signal
from vq_core.virtio cimport gpa_t, virtq_desc_t

# ---- for either layout ----

cdef inline uint32_t driver_free(driver_t* driver) noexcept nogil:
    """Number of free descriptors."""
    return driver_free_as(driver.packed, driver)

cdef inline int driver_add(driver_t* driver, driver_part_t* parts, uint32_t readable, uint32_t writable) noexcept nogil:
    """Add a buffer of `readable` device-readable parts, then `writable` device-writable ones (one at least).

    Returns its id, or -1 without enough free descriptors. Literal counts fold to straight-line code.
    """
    return driver_add_as(driver.packed, driver, parts, readable, writable)

cdef inline int driver_add_indirect(driver_t* driver, virtq_desc_t* table, gpa_t table_addr, driver_part_t* parts,
                                    uint32_t readable, uint32_t writable) noexcept nogil:
    """Add a buffer by one descriptor that points to `table`: readable + writable entries at guest address `table_addr`.

    The table belongs to the device until the buffer comes back; its entries have the layout's own form, 16 bytes each.
    Returns the id, or -1 without a free descriptor.
    """
    return driver_add_indirect_as(driver.packed, driver, table, table_addr, parts, readable, writable)

cdef inline void driver_publish(driver_t* driver) noexcept nogil:
    """Expose all added buffers at once: one store, none when there is nothing new."""
    driver_publish_as(driver.packed, driver)

cdef inline bint driver_needs_kick(driver_t* driver) noexcept nogil:
    """Whether the device wants a kick for what was published since the last decision (2.7.10, 2.8.10)."""
    return driver_needs_kick_as(driver.packed, driver)

cdef inline bint driver_kick(driver_t* driver) noexcept nogil:
    """Kick the device if it wants it; whether it did."""
    return driver_kick_as(driver.packed, driver)

cdef inline int driver_pending(driver_t* driver) noexcept nogil:
    """Number of used buffers that are seen at one look (packed: 1 if there are any), -1 in the error state."""
    return driver_pending_as(driver.packed, driver)

cdef inline int driver_poll_used(driver_t* driver, driver_used_t* used, uint32_t max) noexcept nogil:
    """Take up to `max` used buffers: their number, or -1 in the error state. Their descriptors are free again.

    What stands before a bad element is delivered; the error shows at the next call.
    """
    return driver_poll_used_as(driver.packed, driver, used, max)

cdef inline bint driver_arm(driver_t* driver) noexcept nogil:
    """Ask for a call at the next used buffer; True if there is one already (or an error) and no call may come."""
    return driver_arm_as(driver.packed, driver)

cdef inline void driver_disarm(driver_t* driver) noexcept nogil:
    """Ask for no calls; a hint (2.7.7, 2.8.10): some may come all the same."""
    driver_disarm_as(driver.packed, driver)

# ---- for a layout that the caller knows ----

cdef inline uint32_t driver_free_as(bint packed, driver_t* driver) noexcept nogil:
    return driver_packed_free(driver) if packed else driver_split_free(driver)

cdef inline int driver_add_as(bint packed, driver_t* driver, driver_part_t* parts, uint32_t readable,
                              uint32_t writable) noexcept nogil:
    if packed:
        return driver_packed_add(driver, parts, readable, writable)
    return driver_split_add(driver, parts, readable, writable)

cdef inline int driver_add_indirect_as(bint packed, driver_t* driver, virtq_desc_t* table, gpa_t table_addr,
                                       driver_part_t* parts, uint32_t readable, uint32_t writable) noexcept nogil:
    if packed:
        return driver_packed_add_indirect(driver, table, table_addr, parts, readable, writable)
    return driver_split_add_indirect(driver, table, table_addr, parts, readable, writable)

cdef inline void driver_publish_as(bint packed, driver_t* driver) noexcept nogil:
    if packed:
        driver_packed_publish(driver)
    else:
        driver_split_publish(driver)

cdef inline bint driver_needs_kick_as(bint packed, driver_t* driver) noexcept nogil:
    cdef uint16_t old = driver.kicked_avail_idx
    cdef bint first = not driver.kick_valid
    if driver.published_avail_idx == old and not first:
        return False
    # Pairs with the device's fence between writing its event field (or flags) and looking at the ring.
    vq_fence()
    driver.kicked_avail_idx = driver.published_avail_idx
    driver.kick_valid = True
    if packed:
        return driver_packed_wants_kick(driver) or first
    return driver_split_wants_kick(driver, old) or first

cdef inline bint driver_kick_as(bint packed, driver_t* driver) noexcept nogil:
    if driver.published_avail_idx == driver.kicked_avail_idx and driver.kick_valid:
        return False
    if not driver_needs_kick_as(packed, driver):
        driver.kicks_suppressed += 1
        return False
    driver.kicks += 1
    notify_signal(driver.kick_fd)
    return True

cdef inline int driver_pending_as(bint packed, driver_t* driver) noexcept nogil:
    return driver_packed_pending(driver) if packed else driver_split_pending(driver)

cdef inline int driver_poll_used_as(bint packed, driver_t* driver, driver_used_t* used, uint32_t max) noexcept nogil:
    return driver_packed_poll_used(driver, used, max) if packed else driver_split_poll_used(driver, used, max)

cdef inline bint driver_arm_as(bint packed, driver_t* driver) noexcept nogil:
    if packed:
        driver_packed_ask_call(driver)
    else:
        driver_split_ask_call(driver)
    # Pairs with the device's fence between publishing a used buffer and reading our event field (or flags).
    vq_fence()
    return driver_pending_as(packed, driver) != 0

cdef inline void driver_disarm_as(bint packed, driver_t* driver) noexcept nogil:
    if packed:
        driver_packed_disarm(driver)
    else:
        driver_split_disarm(driver)

# ---- the queue as Python sees it ----

cdef class DriverQueue:
    cdef driver_t driver
    cdef readonly GuestMemory memory
    cdef readonly object features        # int
    cdef readonly bint busy              # a traffic engine owns the queue
    cdef Block _desc                     # descriptor table; packed: the ring
    cdef Block _avail                    # available ring; packed: the driver's event structure
    cdef Block _used                     # used ring; packed: the device's event structure
    cdef dict _posted                    # id -> Buffer

    cdef int claim(self) except -1
    cdef void unclaim(self) noexcept
