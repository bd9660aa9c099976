"""Translations of an IOMMU: with VIRTIO_F_ACCESS_PLATFORM all addresses of a driver are I/O virtual (IOVA).

The front-end says which range of IOVA lies where (IOTLB_MSG UPDATE) and what is void from now on (INVALIDATE). All
queues of a device look into one iotlb_t, whose `view` is immutable: the control thread makes a new one for each message
and publishes it by one store.

    UPDATE      new view, and that is all: whoever looks next finds the entry
    INVALIDATE  new view, then all workers pass a burst boundary (`settle`, queue.pyx), then the ack:
                nobody has a pointer that came from an older view

Views that are out of use wait in a list (`retired`) until the next `settle`, since a worker may still be reading one.

Invariants of a view: entries are sorted by iova and do not overlap; an entry lies inside one memory region, so it is
contiguous in our memory and in guest addresses; neighbours that could be one entry are one; count <= IOTLB_ENTRIES_MAX.
The memory behind the entries is mapped: `Iotlb` holds the map that they were looked up in.

A queue behind an IOMMU has `nowhere` for its memory, a map without regions: all straight lines of the ports miss there
and fall back to their slow paths, which ask `queue_translate_part`. Without an IOMMU nothing here is touched.

Threads: views are read by any worker; all else belongs to the control thread, but for `misses` (misses.pxd).
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vq_core.arch cimport vq_load_acquire_pointer
from vq_core.memory cimport MemoryMap, memory_t, region_t
from vq_core.misses cimport MissTable, misses_t
from vq_core.virtio cimport gpa_t, iova_t

cdef enum:
    IOTLB_ENTRIES_MAX = 2048     # after neighbours were joined; one more drives another out
    IOTLB_RETIRED_MAX = 64       # views that wait before the workers are asked to let go of them
    IOTLB_PAGE = 4096            # the least that an IOMMU translates: what is missing is asked for in such pieces

cdef enum:                       # vhost-user, "IOTLB message": perm
    IOTLB_READ = 1
    IOTLB_WRITE = 2

cdef struct iotlb_entry_t:
    iova_t iova
    uint64_t last                # last address, so that a range may end at 2^64
    uint8_t* host
    gpa_t guest_addr
    uint32_t perm                # IOTLB_READ, IOTLB_WRITE or both

cdef struct iotlb_view_t:
    uint64_t generation          # each view has its own
    uint32_t count
    iotlb_view_t* older          # in the list of retired ones
    iotlb_entry_t* entries       # behind this struct, in the same allocation

cdef struct iotlb_t:
    iotlb_view_t* view           # never NULL while queues use it
    memory_t nowhere
    region_t nothing             # of no size: the hint into `nowhere`
    uint32_t never               # what nowhere.lost points to without memory: zero
    misses_t misses              # where workers say what is missing

cdef iotlb_entry_t* iotlb_find(iotlb_view_t* view, iova_t iova) noexcept nogil

cdef inline iotlb_view_t* iotlb_view(iotlb_t* iotlb) noexcept nogil:
    # Acquire: pairs with the release in Iotlb._publish; the entries stand before it.
    return <iotlb_view_t*>vq_load_acquire_pointer(&iotlb.view)

cdef inline uint8_t* iotlb_translate_part(iotlb_view_t* view, iova_t iova, uint64_t length, uint32_t perm,
                                          uint64_t* part, gpa_t* guest_addr) noexcept nogil:
    """The pointer for `iova`, and how many of `length` bytes (> 0) lie in its entry; NULL if none does, or may be used.

    Parameters
    ----------
    perm
        What the entry must allow.
    part, guest_addr
        Where the number of bytes and their first guest physical address go.
    """
    cdef iotlb_entry_t* entry = iotlb_find(view, iova)
    cdef uint64_t rest
    if entry == NULL or perm & ~entry.perm:
        return NULL
    rest = entry.last - iova             # and one more: the sum could be 2^64
    part[0] = length if length - 1 <= rest else rest + 1
    guest_addr[0] = entry.guest_addr + (iova - entry.iova)
    return entry.host + (iova - entry.iova)

cdef class Iotlb:
    cdef iotlb_t iotlb
    cdef iotlb_view_t* _retired
    cdef int _retired_count
    cdef readonly bint partial
    cdef uint64_t _dice          # state of the numbers that choose whom to drive out
    cdef MemoryMap _memory       # what the entries point into; None: nothing
    cdef list _former            # maps that retired views point into
    cdef MissTable _own          # what the control thread misses
    cdef list _tables            # that, and those of all started queues
    cdef int _turn               # the table that is asked from first

    cdef int _publish(self, iotlb_view_t* view) except -1
    cdef void _reclaim(self) noexcept
    cdef int _attach(self, MissTable table) except -1
    cdef int _detach(self, MissTable table) except -1
    cdef uint8_t* _locate(self, iova_t iova, uint64_t length, uint32_t perm, gpa_t* guest_addr) noexcept
