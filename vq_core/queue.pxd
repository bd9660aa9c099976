"""A virtqueue as the control plane has it: what it must keep alive for its queue_t, and the ways to change that."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.dirty cimport DirtyLog
from vq_core.handover cimport Mailbox
from vq_core.inflight cimport InflightQueue, InflightRegion
from vq_core.iotlb cimport Iotlb
from vq_core.memory cimport MemoryMap
from vq_core.misses cimport MissTable
from vq_core.notify cimport peer_t
from vq_core.queue_state cimport queue_change_t, queue_t
from vq_core.virtio cimport gpa_t

cdef class Peer:
    """What the queues of one front-end have in common."""
    cdef peer_t peer

cdef class Queue:
    cdef queue_t queue
    cdef Peer _peer              # what `queue.peer` points to
    cdef public int index
    cdef readonly str name
    cdef Mailbox mailbox         # of the owning worker; None: nobody
    cdef bint _enabled           # by the front-end
    cdef bint _spare             # and yet not in use
    cdef bint _fresh             # started at its very beginning, as a new driver has it
    cdef MemoryMap _memory       # held while started, so that `queue.memory` lives
    cdef DirtyLog _log
    cdef InflightQueue _inflight  # what `queue.inflight` points to, while started
    cdef uint16_t _begin         # split: available index when the ring was started
    cdef bint _batches
    cdef uint64_t* _elements     # room for used elements (packed) or heads (split), while started
    cdef tuple _addresses        # (desc, avail, used), as the front-end said them, while started
    cdef bint _guest_addresses   # ... and these are guest addresses
    cdef Iotlb _iotlb            # held while started behind an IOMMU
    cdef MissTable _misses       # what `queue.misses` points to

    cdef int _change(self, queue_change_t* change) except -1
    cdef int _set_in_use(self) except -1
    cdef int _begin_split(self, queue_t* queue, int num, uint64_t base, uint64_t features, bint in_order) except -1
    cdef int _begin_packed(self, queue_t* queue, int num, uint64_t base, uint64_t features, bint in_order) except -1
    cdef InflightQueue _place_inflight(self, queue_change_t* change, InflightRegion region)
    cdef uint8_t* _find(self, MemoryMap memory, Iotlb iotlb, uint64_t address, uint64_t length, uint32_t perm,
                        gpa_t* guest_addr) except? NULL
    cdef int _resolve(self, queue_change_t* change, MemoryMap memory, Iotlb iotlb, int num, tuple addresses,
                      uint64_t features) except -1
