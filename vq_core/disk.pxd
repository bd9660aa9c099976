"""What a block device keeps its data in: a file, a block device of the host, or nothing.

A disk_t is shared by all threads of its device. The fds, `read_only` and the kind never change; `capacity` and `stable`
are single words that the control thread stores and everybody else loads.

The functions wait for the kernel unless RWF_NOWAIT is among the flags. They return 0 or an errno.

With `direct_fd` the page cache is passed by where offset, length and memory of a request fit the medium. What does not
fit goes through the page cache, which the kernel keeps in agreement with the medium.
"""
from libc.stdint cimport uint32_t, uint64_t
from posix.uio cimport iovec

cdef enum:
    SECTOR_BYTES = 512           # VIRTIO 1.3, 5.2.4: unit of all sector numbers, whatever the block size is
    DISK_ID_BYTES = 20

cdef struct disk_t:
    int fd                       # -1: the null disk, which reads as zeroes and forgets what is written
    int direct_fd                # the same without the page cache; -1: not wanted
    uint32_t direct_bytes        # what its offsets, lengths and addresses are multiples of
    uint32_t device_bytes        # logical block of a block device, a power of two; 0: a regular file
    bint read_only
    bint ready                   # reads and writes never wait for a device: memory, or nothing at all
    uint64_t capacity            # sectors
    uint32_t stable              # a write must have reached the medium before it is acknowledged
    uint32_t no_nowait_read      # the file system has refused RWF_NOWAIT
    uint32_t no_nowait_write
    char id[DISK_ID_BYTES]       # padded with NUL

cdef int disk_read(disk_t* disk, iovec* parts, int count, uint64_t offset, uint64_t length, int flags) noexcept nogil
cdef int disk_write(disk_t* disk, iovec* parts, int count, uint64_t offset, uint64_t length, int flags) noexcept nogil
cdef int disk_flush(disk_t* disk) noexcept nogil
# A hint: what the medium or its file system cannot do is not done.
cdef int disk_discard(disk_t* disk, uint64_t offset, uint64_t length) noexcept nogil
# Afterwards the range reads as zeroes; `unmap`: it need not keep its room.
cdef int disk_write_zeroes(disk_t* disk, uint64_t offset, uint64_t length, bint unmap) noexcept nogil

cdef class Disk:
    cdef disk_t disk
    cdef readonly str path
    cdef readonly int block_bytes
    cdef readonly int physical_block_bytes
