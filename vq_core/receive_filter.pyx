"""Receive filters: how they are made."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

PASSES = {"listed": PASS_LISTED, "all": PASS_ALL, "none": PASS_NONE}


cdef void filter_gather(packet_t* packet, uint8_t* to) noexcept nogil:
    cdef uint32_t done = min(packet.head_bytes, <uint32_t>HEAD_BYTES), i, part
    memset(to, 0, HEAD_BYTES)    # a frame that is shorter is of no VLAN
    memcpy(to, packet.data, done)
    for i in range(packet.more_count):
        if done == HEAD_BYTES:
            break
        part = min(packet.more[i].length, <uint32_t>HEAD_BYTES - done)
        memcpy(to + done, packet.more[i].data, part)
        done += part


cdef class ReceiveFilter:
    """Which packets a driver wants to receive.

    Parameters
    ----------
    unicast, multicast, broadcast : {"listed", "all", "none"}
        What is let through of each class.
    macs : iterable of bytes
        Addresses of 6 bytes that are listed, unicast and multicast; at most `MACS_MAX` different ones.
    vlans : iterable of int, optional
        Tagged packets must be of one of these VLANs, 0 to 4095; None: of any.

    Raises
    ------
    ValueError
        An address, a VLAN or the number of addresses is impossible.
    """

    MACS_MAX = FILTER_MACS_MAX

    def __cinit__(self, *, unicast="listed", multicast="listed", broadcast="all", macs=(), vlans=None):
        cdef uint32_t vlan
        self.filter.unicast = PASSES[unicast]
        self.filter.multicast = PASSES[multicast]
        self.filter.broadcast = PASSES[broadcast]
        different = set(macs)
        if len(different) > FILTER_MACS_MAX:
            raise ValueError(f"{len(different)} addresses; a filter takes {FILTER_MACS_MAX}")
        for mac in different:
            if len(mac) != 6:
                raise ValueError(f"MAC address of {len(mac)} bytes; it has 6")
            self._list(int.from_bytes(mac, "little"))
        self.filter.by_vlan = vlans is not None
        for number in vlans or ():
            if not 0 <= number <= 4095:
                raise ValueError(f"VLAN {number}; 0 to 4095 are possible")
            vlan = number
            self.filter.vlans[vlan >> 5] |= <uint32_t>1 << (vlan & 31)

    def _list(self, uint64_t mac):
        cdef uint32_t slot = filter_slot(mac)
        while self.filter.macs[slot] != 0:
            slot = (slot + 1) & (FILTER_SLOTS - 1)
        self.filter.macs[slot] = mac | FILTER_IN_USE
