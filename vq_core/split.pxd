"""The split virtqueue, device side: the only reader and writer of that layout (VIRTIO 1.3, 2.7).

Every shared field has one getter or setter here. What the device wrote (used ring, avail_event)
is never read back: the shadows below are the truth. What the driver writes (descriptors,
available ring) is read once, into private copies.

Owner: the worker that owns the queue; nobody else touches a split_t while its ring is started.

Positions run freely modulo 2^16; a slot is position & mask. Invariants:
    next_used_idx - last_avail_idx  is at most 0 (we never use more than we took), and
    shadow_avail_idx - last_avail_idx <= num.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport (vq_fence, vq_load_acquire_u16, vq_load_u16, vq_snapshot16, vq_store_release_u16,
                           vq_store_u16, vq_store_u64)
from vq_core.virtio cimport (VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_USED_F_NO_NOTIFY, virtq_avail_t, virtq_desc_t,
                             virtq_used_t)
from vq_core.notify cimport notify_crossed

cdef struct split_t:
    virtq_desc_t* desc            # num entries, 16-byte aligned
    virtq_avail_t* avail          # 2-byte aligned
    virtq_used_t* used            # 4-byte aligned
    uint16_t num                  # power of two; 0: not configured
    uint16_t mask                 # num - 1
    uint16_t last_avail_idx       # position of the next available entry to take
    uint16_t shadow_avail_idx     # avail->idx as last read
    uint16_t next_used_idx        # position of the next used element to write
    uint16_t shadow_used_idx      # used->idx as last published
    uint16_t signalled_used_idx   # shadow_used_idx at the last decision about a call
    bint signalled_valid          # False: no decision since the ring started
    bint event_idx                # VIRTIO_F_EVENT_IDX was negotiated
    bint suppressing              # the driver is asked not to kick

cdef inline int split_available(split_t* ring) noexcept nogil:
    """Number of entries to take, reading the driver's index anew; -1 if it runs ahead of the ring."""
    # Acquire: pairs with the driver's release of idx; descriptors and ring entries stand before it.
    ring.shadow_avail_idx = vq_load_acquire_u16(&ring.avail.idx)
    cdef uint16_t count = <uint16_t>(ring.shadow_avail_idx - ring.last_avail_idx)
    if count > ring.num:
        ring.shadow_avail_idx = ring.last_avail_idx
        return -1
    return count

cdef inline int split_ready(split_t* ring) noexcept nogil:
    """Number of entries to take that are known already, without touching the driver's line."""
    return <uint16_t>(ring.shadow_avail_idx - ring.last_avail_idx)

cdef inline uint16_t split_head(split_t* ring, uint16_t ahead) noexcept nogil:
    """The head of the entry `ahead` of the next one; any 16-bit value: the caller checks it once."""
    return vq_load_u16(&ring.avail.ring[<uint16_t>(ring.last_avail_idx + ahead) & ring.mask])

cdef inline void split_take(split_t* ring, uint16_t count) noexcept nogil:
    ring.last_avail_idx = <uint16_t>(ring.last_avail_idx + count)

cdef inline void split_untake(split_t* ring, uint16_t count) noexcept nogil:
    """Give entries back that were taken last and whose used elements were not published."""
    ring.last_avail_idx = <uint16_t>(ring.last_avail_idx - count)

cdef inline void split_descriptor(split_t* ring, uint16_t index, virtq_desc_t* copy) noexcept nogil:
    """Copy descriptor `index` (< num, checked by the caller) out of the table, once."""
    vq_snapshot16(copy, &ring.desc[index])

cdef inline void split_put_used(split_t* ring, uint16_t ahead, uint32_t head, uint32_t length) noexcept nogil:
    """Write the used element `ahead` of the next one; the driver sees it with `split_publish`."""
    vq_store_u64(&ring.used.ring[<uint16_t>(ring.next_used_idx + ahead) & ring.mask],
                 <uint64_t>head | <uint64_t>length << 32)

cdef inline void split_advance_used(split_t* ring, uint16_t count) noexcept nogil:
    ring.next_used_idx = <uint16_t>(ring.next_used_idx + count)

cdef inline void split_publish(split_t* ring, uint16_t position) noexcept nogil:
    """Expose all used elements before `position`: one index store."""
    # Release: pairs with the driver's acquire of used->idx; elements, buffers and log bits stand before it.
    vq_store_release_u16(&ring.used.idx, position)
    ring.shadow_used_idx = position

cdef inline bint split_needs_call(split_t* ring) noexcept nogil:
    """Whether the driver wants a call for what was published since the last decision (2.7.7.2)."""
    cdef uint16_t old
    cdef bint first
    if ring.shadow_used_idx == ring.signalled_used_idx and ring.signalled_valid:
        return False
    # Pairs with the driver's fence between writing used_event (or flags) and reading used->idx:
    # one of the two sides sees the other's store.
    vq_fence()
    if not ring.event_idx:
        ring.signalled_used_idx = ring.shadow_used_idx
        ring.signalled_valid = True
        return not (vq_load_u16(&ring.avail.flags) & VIRTQ_AVAIL_F_NO_INTERRUPT)
    old = ring.signalled_used_idx
    first = not ring.signalled_valid
    ring.signalled_used_idx = ring.shadow_used_idx
    ring.signalled_valid = True
    return first or notify_crossed(vq_load_u16(&ring.avail.ring[ring.num]), ring.shadow_used_idx, old)

cdef inline void split_suppress_kicks(split_t* ring) noexcept nogil:
    """Ask the driver not to kick (2.7.10): with EVENT_IDX by leaving avail_event behind."""
    if not ring.suppressing:
        ring.suppressing = True
        if not ring.event_idx:
            vq_store_u16(&ring.used.flags, VIRTQ_USED_F_NO_NOTIFY)

cdef inline void split_request_kick(split_t* ring) noexcept nogil:
    """Ask for a kick at the next available entry; look at the ring once more afterwards."""
    ring.suppressing = False
    if ring.event_idx:
        # avail_event lies behind the last used element; mid-burst it names what comes after what we know.
        vq_store_u16(&ring.used.ring[ring.num], ring.shadow_avail_idx)
    else:
        vq_store_u16(&ring.used.flags, 0)
    # Pairs with the driver's fence between publishing avail->idx and reading avail_event (or flags).
    vq_fence()
