"""Accounts of packets that do not come one after the other."""
from libc.stdint cimport uint64_t


cdef void order_gap(order_t* order, totals_t* totals, uint64_t until) noexcept nogil:
    cdef uint64_t number = order.next
    if until - number > SPAN:
        number = until - SPAN                # what lies further back is forgotten: lost for good
    while number < until:
        order.missing[(number & (SPAN - 1)) >> 6] |= <uint64_t>1 << (number & 63)
        number += 1
    order.gone += until - order.next
    totals.gaps += until - order.next
    order.next = until


cdef void order_odd(order_t* order, totals_t* totals, uint64_t number) noexcept nogil:
    cdef uint64_t bit = <uint64_t>1 << (number & 63)
    cdef uint64_t* place = &order.missing[(number & (SPAN - 1)) >> 6]
    if number >= order.next:
        if order.next != number:
            order_gap(order, totals, number)
        place[0] &= ~bit                     # whatever stood there SPAN numbers ago is forgotten
        order.next = number + 1
        order.come += 1
        totals.verified += 1
    elif order.next - number <= SPAN and place[0] & bit:
        place[0] &= ~bit
        order.gone -= 1
        order.come += 1
        totals.gaps -= 1
        totals.reordered += 1
        totals.verified += 1
    else:
        totals.duplicated += 1
