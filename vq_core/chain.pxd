"""From a head to its descriptors: a cursor over one descriptor chain, for everything but the straight line.

The hot paths of the ports handle a chain of one descriptor inside one region themselves; all other
chains come here: joined by NEXT, indirect, spanning regions, of length zero. A descriptor is copied
out of guest memory once (TOCTOU), checked, and only the copy is used.

Checks (protocol section 8.2, 8.3): next inside the table; at most `num` descriptors of a direct chain
and `indirect_limit` of an indirect table; INDIRECT only as the last descriptor of a chain (packed: as the only one),
not inside a table, its length a positive multiple of 16; readable before writable; total below 2^32 bytes.
Descriptors of length zero are counted and skipped.

Split and packed differ in what comes next: the descriptor that `next` names, or the one that follows. A packed chain
has its buffer id in its last descriptor, so it must be walked to its end (`chain_end`) before it is used.

Why it ends: `budget` falls with each descriptor that is read, whether it is returned or not.

Thread: the worker that owns the queue.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_snapshot16
from vq_core.memory cimport memory_translate, memory_translate_part
from vq_core.packed cimport packed_descriptor, packed_following
from vq_core.queue cimport (BROKEN_ADDRESS, BROKEN_INDIRECT, BROKEN_LENGTH, BROKEN_LOOP, BROKEN_NEXT, BROKEN_NOT,
                            BROKEN_ORDER, queue_t)
from vq_core.split cimport split_descriptor
from vq_core.virtio cimport VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, gpa_t, virtq_desc_t

cdef struct chain_t:
    virtq_desc_t first           # copy of the first descriptor
    uint32_t next                # index of the descriptor to read next
    uint32_t budget              # descriptors that may still be read
    uint32_t table_count         # entries of the indirect table; 0: the ring's own table
    gpa_t table                  # guest address of the indirect table
    bint more                    # there is a descriptor to read
    bint writable                # a device-writable descriptor was seen
    uint32_t broken              # BROKEN_* once a step returned -1
    uint32_t steps               # descriptors read, those of an indirect table included
    uint64_t total               # bytes of all descriptors so far
    uint16_t slots               # descriptors of the ring itself that were read
    uint16_t id                  # split: the head; packed: the buffer id, right at the chain's end

cdef inline void chain_begin(chain_t* chain, queue_t* queue, uint16_t head, virtq_desc_t* first) noexcept nogil:
    """Set the cursor before `head`, which the caller has checked to be below num and copied to `first`."""
    chain.first = first[0]
    chain.next = head
    chain.budget = queue.ring.num
    chain.table_count = 0
    chain.table = 0
    chain.more = True
    chain.writable = False
    chain.broken = BROKEN_NOT
    chain.steps = 0
    chain.total = 0
    chain.slots = 0
    chain.id = head

# Step to the next descriptor of length > 0: 1 and its copy (addr, len, flags), 0 at the end, -1 with chain.broken set.
cdef int chain_next(chain_t* chain, queue_t* queue, virtq_desc_t* copy) noexcept nogil

# Walk on to where slots and id are known: 0, or -1 with chain.broken set. Nothing to do where heads are read from the
# available ring.
cdef int chain_end(chain_t* chain, queue_t* queue) noexcept nogil
