"""The steps of the chain cursor."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from vq_core.iotlb cimport IOTLB_READ
from vq_core.queue_state cimport queue_absent, queue_translate_part
from vq_core.ring cimport ring_counts_slots


cdef inline int _broken(chain_t* chain, uint32_t cause) noexcept nogil:
    chain.broken = cause
    chain.more = False
    return -1


cdef inline bint _read(chain_t* chain, queue_t* queue, virtq_desc_t* copy) noexcept nogil:
    """Copy the descriptor at chain.next; False if an indirect table is not in memory."""
    cdef uint8_t* host
    cdef uint8_t* to = <uint8_t*>copy
    cdef uint64_t part
    cdef uint64_t rest = sizeof(virtq_desc_t)
    cdef gpa_t addr, ignored
    if chain.table_count == 0:
        if chain.slots == 0:
            copy[0] = chain.first
        elif queue.ring.is_packed:
            packed_descriptor(&queue.ring.packed, <uint16_t>chain.next, copy)
        else:
            split_descriptor(&queue.ring.split, <uint16_t>chain.next, copy)
        chain.slots += 1
        if queue.ring.is_packed:
            chain.id = copy.next
        return True
    # table + 16 * table_count does not overflow: checked by _enter_table.
    addr = chain.table + chain.next * <uint64_t>sizeof(virtq_desc_t)
    host = queue_translate_part(queue, addr, sizeof(virtq_desc_t), IOTLB_READ, &part, &ignored)
    if host == NULL:
        return False
    if part == sizeof(virtq_desc_t):
        vq_snapshot16(copy, host)
        rest = 0
    while rest > 0:              # a descriptor that spans two regions: byte by byte, each once
        host = queue_translate_part(queue, addr, 1, IOTLB_READ, &part, &ignored)
        if host == NULL:
            return False
        to[0] = (<const volatile uint8_t*>host)[0]
        to += 1
        addr += 1
        rest -= 1
    if queue.ring.is_packed:
        packed_table_entry(copy)
    return True


cdef inline int _enter_table(chain_t* chain, queue_t* queue, virtq_desc_t* copy) noexcept nogil:
    """Turn to the indirect table that `copy` names (2.7.5.3)."""
    if chain.table_count != 0 or copy.flags & VIRTQ_DESC_F_NEXT or (queue.ring.is_packed and chain.slots > 1):
        return _broken(chain, BROKEN_INDIRECT)
    if copy.len == 0 or copy.len % sizeof(virtq_desc_t) or copy.len // sizeof(virtq_desc_t) > queue.indirect_limit:
        return _broken(chain, BROKEN_INDIRECT)
    if copy.addr + copy.len < copy.addr:
        return _broken(chain, BROKEN_ADDRESS)
    chain.table = copy.addr
    chain.table_count = copy.len // sizeof(virtq_desc_t)
    chain.next = 0
    chain.budget = chain.table_count
    return 0


cdef inline int _follow(chain_t* chain, queue_t* queue, virtq_desc_t* copy) noexcept nogil:
    """Where the descriptor after `copy` stands, and whether there is one."""
    cdef uint32_t count = chain.table_count if chain.table_count != 0 else queue.ring.num
    if queue.ring.is_packed:
        if chain.table_count != 0:
            chain.next += 1          # 2.8.7: all entries of a table, in order, whatever their NEXT says
            chain.more = chain.next < count
        else:
            chain.next = packed_following(&queue.ring.packed, <uint16_t>chain.next)
            chain.more = copy.flags & VIRTQ_DESC_F_NEXT != 0
    elif copy.flags & VIRTQ_DESC_F_NEXT:
        if copy.next >= count:
            return _broken(chain, BROKEN_NEXT)
        chain.next = copy.next
    else:
        chain.more = False
    return 0


cdef int chain_next(chain_t* chain, queue_t* queue, virtq_desc_t* copy) noexcept nogil:
    while chain.more:
        if chain.budget == 0:
            return _broken(chain, BROKEN_LOOP)
        chain.budget -= 1
        chain.steps += 1
        if not _read(chain, queue, copy):
            return _broken(chain, queue_absent(queue))
        if copy.flags & VIRTQ_DESC_F_INDIRECT:
            # Accepted without VIRTIO_F_INDIRECT_DESC too: Windows drivers have sent it so.
            if _enter_table(chain, queue, copy) < 0:
                return -1
            continue
        if _follow(chain, queue, copy) < 0:
            return -1
        if copy.flags & VIRTQ_DESC_F_WRITE:
            chain.writable = True
        elif chain.writable:
            return _broken(chain, BROKEN_ORDER)
        chain.total += copy.len
        if chain.total >> 32:
            return _broken(chain, BROKEN_LENGTH)
        if copy.len > 0:
            return 1
    return 0


cdef int chain_end(chain_t* chain, queue_t* queue) noexcept nogil:
    cdef virtq_desc_t ignored
    if not ring_counts_slots(&queue.ring):
        return 0
    while chain.more and chain.table_count == 0:
        if chain_next(chain, queue, &ignored) < 0:
            return -1
    return 0
