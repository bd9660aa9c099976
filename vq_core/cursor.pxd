"""Where a burst stands in a ring: a private copy that split.pxd and packed.pxd move, and that a burst writes back once.

While it is only passed to inlined verbs a compiler keeps it in registers; a slow path gets a copy of it.
"""
from libc.stdint cimport uint16_t

cdef struct cursor_t:
    uint16_t taken               # buffers taken since the burst began
    uint16_t head                # split: head of the buffer last looked at; packed: its first slot
    uint16_t flags               # packed: AVAIL and USED bits of an available descriptor
    uint16_t known               # split: buffers that may be taken, as far as is known
