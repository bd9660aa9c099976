"""A virtqueue as Python sees it: chains one by one, or packets by the burst.

    in the ring -> taken (taken.pxd) -> DeviceChain or DeviceBurst -> completed -> published

Owner: the control thread; `complete` of what was taken may come from any thread.
"""
from libc.stdint cimport uint32_t, uint64_t
from vq_core.device_chain cimport DeviceChain
from vq_core.taken cimport TakingQueue

cdef class DeviceQueue(TakingQueue):
    cdef uint32_t _budget            # chains that an iteration may still take in this turn
    cdef uint32_t _bursts            # ... and that `pull` may
    cdef uint64_t _bytes             # ... and bytes
    cdef uint64_t _dropped

    cdef DeviceChain _take(self)
