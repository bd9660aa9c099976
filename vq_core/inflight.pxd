"""The in-flight region: which requests a device has taken and not given back yet, told to the device that comes next.

The front-end keeps the file, and never looks inside; a back-end that starts after a crash finds there what its
predecessor had under way, does it once more, and so loses nothing. The layout is the one of the vhost-user
specification, common to libvhost-user, DPDK and SPDK. NULL means that there is no region: one predicted branch.

    take:     entry filled in, inflight = 1             (packed: in force with old_free_head)
    publish:  inflight_publishing: lists and used_idx; then the ring; then inflight_published: inflight = 0, old_*

Why each store has its place: the process may end between any two of them, and what then stands in ring and region must
say how far it had come. So all stores here are in program order (release); the order is written at each function.

While a ring runs its region is written only: whoever else can write to it, the front-end, changes nothing here. All
that we need to know stands in private memory. Once, at the start (`inflight_restart.pyx`), the region is read: each
word once, into private memory, and checked there.

Owner: the worker that owns the queue; at the start the control thread.
Spec: vhost-user, "Inflight I/O tracking".
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_load_u32, vq_store_release_u8, vq_store_release_u16
from vq_core.packed cimport packed_t
from vq_core.ring cimport ring_t
from vq_core.virtio cimport virtq_packed_desc_t

cdef enum:
    INFLIGHT_ALIGN = 64          # each queue's part of the file has a multiple of this
    INFLIGHT_VERSION = 1         # 0: fresh, nobody has started a ring with it

cdef struct inflight_split_t:    # header of a queue's part, split layout; 16 bytes, entries by head follow
    uint64_t features
    uint16_t version
    uint16_t desc_num
    uint16_t last_batch_head     # of the heads that were used, the last; `next` leads to those before
    uint16_t used_idx            # used->idx up to which all `inflight` are right

cdef struct inflight_split_entry_t:
    uint8_t inflight
    uint8_t padding[5]
    uint16_t next
    uint64_t counter

cdef struct inflight_packed_t:   # header, packed layout; 32 bytes, entries follow
    uint64_t features
    uint16_t version
    uint16_t desc_num
    uint16_t free_head
    uint16_t old_free_head
    uint16_t used_idx
    uint16_t old_used_idx
    uint8_t used_wrap_counter
    uint8_t old_used_wrap_counter
    uint8_t padding[10]

cdef struct inflight_packed_entry_t:     # one descriptor of a chain; inflight, last, num and counter in its head alone
    uint8_t inflight
    uint8_t padding
    uint16_t next
    uint16_t last
    uint16_t num
    uint64_t counter
    uint16_t id
    uint16_t flags
    uint32_t len
    uint64_t addr

cdef struct inflight_again_t:    # a request to do once more
    uint64_t counter
    uint16_t id                  # split: its head
    uint16_t head                # packed: its first entry
    uint16_t slots               # descriptors of the ring
    uint16_t copy                # packed: where its copied descriptors begin in `copies`

cdef struct inflight_t:
    bint is_packed
    uint16_t num                 # entries of the ring
    uint16_t size                # entries of the region, num or more
    uint32_t* lost               # the file was truncated (SIGBUS guard)
    inflight_split_t* split      # the region, write-only while the ring runs
    inflight_split_entry_t* split_entries
    inflight_packed_t* packed
    inflight_packed_entry_t* packed_entries
    uint64_t counter             # of the request that is taken next
    uint16_t* entry              # by head or buffer id: 0, or 1 + its first entry as long as it is in flight
    uint16_t* next               # packed: by entry, as in the region
    uint16_t* last               # packed: by first entry
    uint16_t* slots              # packed: by first entry
    uint16_t free_head           # packed; size: none
    uint16_t last_batch_head     # split
    uint32_t taken_slots         # packed: descriptors in flight
    uint16_t* batch              # heads or ids that were given back and are not published
    uint16_t batch_count
    inflight_again_t* again      # what is to be done once more, oldest first
    uint16_t again_count
    uint16_t again_next          # those before have been begun
    virtq_packed_desc_t* copies  # packed: descriptors of what is to be done once more

# Note that a request was taken, `slots` descriptors at `head`, before anything is done about it; False: it is in flight
# already, so the driver has broken its ring.
cdef bint inflight_record(inflight_t* inflight, ring_t* ring, uint16_t head, uint16_t slots, uint16_t id) noexcept nogil

cdef void inflight_list_batch(inflight_t* inflight, packed_t* ring) noexcept nogil
cdef void inflight_clear_batch(inflight_t* inflight, ring_t* ring) noexcept nogil

cdef inline bint inflight_take(inflight_t* inflight, ring_t* ring, uint16_t head, uint16_t slots,
                               uint16_t id) noexcept nogil:
    """As `inflight_record`, if there is a region."""
    return inflight == NULL or inflight_record(inflight, ring, head, slots, id)

cdef inline void inflight_give_back(inflight_t* inflight, uint16_t id) noexcept nogil:
    """A request that was taken is done, and will be published."""
    if inflight != NULL:
        inflight.batch[inflight.batch_count] = id        # of as many as can be in flight
        inflight.batch_count += 1

cdef inline void inflight_publishing(inflight_t* inflight, ring_t* ring) noexcept nogil:
    """What was given back is about to be exposed: say what that will change."""
    if inflight != NULL:
        inflight_list_batch(inflight, &ring.packed)

cdef inline void inflight_published(inflight_t* inflight, ring_t* ring) noexcept nogil:
    """What was given back is exposed."""
    if inflight != NULL:
        inflight_clear_batch(inflight, ring)

cdef inline bint inflight_is_again(inflight_t* inflight) noexcept nogil:
    """Whether something of before is still to be begun once more."""
    return inflight != NULL and inflight.again_next < inflight.again_count

cdef inline bint inflight_lost(inflight_t* inflight) noexcept nogil:
    """Whether the owner truncated the file under us."""
    return inflight != NULL and vq_load_u32(inflight.lost) != 0

cdef class InflightRegion:
    cdef uint8_t* _bytes
    cdef void* _start
    cdef size_t _length
    cdef void* _guard
    cdef uint32_t _lost
    cdef readonly uint64_t size
    cdef readonly int num_queues
    cdef readonly int queue_size

    cdef uint8_t* part(self, int index, bint packed) except NULL

cdef class InflightQueue:
    cdef inflight_t inflight
    cdef InflightRegion _region  # held, so that the mapping lives
    cdef void* _private
