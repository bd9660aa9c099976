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

The second most frequent shape, a header and the data in a descriptor each, is recognised without the cursor
(`chain_twin`). What it does not take for such a chain it forgets: the cursor reads and checks all of it anew.

Why it ends: `budget` falls with each descriptor that is read, whether it is returned or not.

Thread: the worker that owns the queue.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.arch cimport vq_snapshot16
from vq_core.memory cimport memory_translate_near, region_t
from vq_core.packed cimport packed_descriptor, packed_following, packed_table_entry
from vq_core.queue_state cimport (BROKEN_ADDRESS, BROKEN_INDIRECT, BROKEN_LENGTH, BROKEN_LOOP, BROKEN_NEXT, BROKEN_NOT,
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

cdef struct twin_t:
    virtq_desc_t header          # copies: addr, len and flags
    virtq_desc_t data
    uint16_t slots               # descriptors of the ring itself
    uint16_t id                  # as chain_t.id

cdef inline bint chain_twin(queue_t* queue, region_t* near, bint packed, uint16_t head, virtq_desc_t* first,
                            twin_t* twin) noexcept nogil:
    """Whether the chain that begins with `first`, at `head`, has two descriptors of one direction; then fill `twin`.

    They stand in the ring, or in an indirect table inside one region. `packed` is a literal.
    """
    cdef uint8_t* table
    if first.flags & VIRTQ_DESC_F_INDIRECT:
        if (first.flags & VIRTQ_DESC_F_NEXT) | (first.len != 2 * sizeof(virtq_desc_t)):
            return False
        table = memory_translate_near(queue.memory, &queue.hint, near, first.addr, 2 * sizeof(virtq_desc_t))
        if table == NULL or queue.indirect_limit < 2:
            return False
        vq_snapshot16(&twin.header, table)
        vq_snapshot16(&twin.data, table + sizeof(virtq_desc_t))
        if packed:
            packed_table_entry(&twin.header)
            packed_table_entry(&twin.data)
            twin.header.flags |= VIRTQ_DESC_F_NEXT       # 2.8.7: all entries in their order, whatever they say
            twin.data.flags &= <uint16_t>~VIRTQ_DESC_F_NEXT
            twin.id = first.next
        elif twin.header.next != 1:
            return False
        else:
            twin.id = head
        twin.slots = 1
    elif first.flags & VIRTQ_DESC_F_NEXT:
        # Else the second descriptor would be the first one, which may have lost its NEXT by now: a buffer longer than
        # its ring, and a packed place outside of it.
        if queue.ring.num < 2:
            return False
        twin.header = first[0]
        twin.slots = 2
        if packed:
            packed_descriptor(&queue.ring.packed, packed_following(&queue.ring.packed, head), &twin.data)
            twin.id = twin.data.next
        elif first.next >= queue.ring.num:
            return False
        else:
            split_descriptor(&queue.ring.split, first.next, &twin.data)
            twin.id = head
    else:
        return False
    return (((twin.header.flags ^ twin.data.flags) == VIRTQ_DESC_F_NEXT)
            & ((twin.data.flags & (VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_INDIRECT)) == 0)
            & (twin.header.len <= ~twin.data.len))       # together below 2^32

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
