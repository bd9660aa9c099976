"""The memory of a pretended guest, as its owner sees it: regions, and an allocator in them."""
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

import fcntl
import os

cdef extern from "<sys/mman.h>" nogil:
    void* c_mmap "mmap"(void* addr, size_t length, int prot, int flags, int fd, long offset) noexcept
    int c_munmap "munmap"(void* addr, size_t length) noexcept
    int PROT_READ, PROT_WRITE, MAP_SHARED
    void* MAP_FAILED

cdef enum:
    LINE = 64                        # smallest block, and the alignment of all: a cache line
    PAGE = 4096

# Gap between regions that choose their own addresses: wide, so that a wrong offset hits nothing.
cdef uint64_t GAP = 1 << 30


cdef class Region:
    """One region of guest memory: a memfd sealed against change of size, and our mapping of it."""

    def __cinit__(self):
        self.fd = -1

    def __init__(self, size, guest_addr, user_addr, *, mmap_offset=0, hugepages=False):
        cdef void* got
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if hugepages else 0)
        self.fd = os.memfd_create("vq-guest-memory", flags)
        page = os.fstat(self.fd).st_blksize if hugepages else PAGE
        if size <= 0 or size % PAGE or mmap_offset < 0 or mmap_offset % page:
            raise ValueError(f"guest memory of {size} bytes at offset {mmap_offset}: the size must be a positive "
                             f"multiple of {PAGE}, the offset a multiple of the page size {page}")
        whole = -(-(size + mmap_offset) // page) * page
        os.ftruncate(self.fd, whole)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        got = c_mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if got == MAP_FAILED:
            if hugepages:
                raise MemoryError(f"no {page} byte pages for {whole} bytes of guest memory; raise vm.nr_hugepages "
                                  "or leave hugepages out")
            PyErr_SetFromErrno(OSError)
        self.start = <uint8_t*>got
        self.length = whole
        self.data = self.start + <size_t>mmap_offset
        self.guest_addr, self.user_addr, self.size, self.mmap_offset = guest_addr, user_addr, size, mmap_offset
        self.blocks = {}

    def __dealloc__(self):
        if self.start != NULL:
            c_munmap(self.start, self.length)
        if self.fd >= 0:
            os.close(self.fd)

    def close(self):
        """Close the descriptor; the mapping lives until the last view is dropped."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, <Py_ssize_t>self.size, 0, flags)

    def __repr__(self):
        return f"Region(guest_addr={self.guest_addr:#x}, user_addr={self.user_addr:#x}, size={self.size:#x})"


cdef class Block:
    """A piece of guest memory; supports the buffer protocol: ``memoryview(block)``.

    Attributes
    ----------
    guest_addr : int
    user_addr : int
    size : int
        Bytes.

    Notes
    -----
    The bytes go back to the allocator when the last reference and the last view are dropped.
    """

    def __init__(self):
        raise TypeError("blocks are made by their memory alone: call GuestMemory.alloc()")

    def __dealloc__(self):
        if self.region is not None and self.region.blocks is not None:      # the collector may have cleared it first
            self.region.blocks.setdefault(self.room, []).append(self.offset)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, <Py_ssize_t>self.size, 0, flags)

    @property
    def user_addr(self):
        return self.region.user_addr + self.offset

    def __repr__(self):
        return f"Block(guest_addr={self.guest_addr:#x}, size={self.size})"


cdef uint64_t _room(uint64_t size):
    """What a block of `size` bytes occupies: a power of two up to a page, then pages; a block fits any of its room."""
    cdef uint64_t room = LINE
    if size > PAGE:
        return (size + PAGE - 1) // PAGE * PAGE
    while room < size:
        room *= 2
    return room


cdef class GuestMemory:
    """The memory of a pretended guest: regions backed by memfds, and an allocator for rings and buffers.

    Parameters
    ----------
    size : int
        Bytes of the first region, a multiple of 4096.
    guest_addr, user_addr : int
        Where the driver and the front-end see it. By default they differ from each other and from our own
        mapping, so that a back-end that mixes them up is found out.
    mmap_offset : int
        Where the region begins in its file, bytes.
    hugepages : bool
        Back it by huge pages.

    Raises
    ------
    ValueError
        The size is not a multiple of the page size, or a region overlaps another.
    MemoryError
        There are not enough huge pages.

    Notes
    -----
    Threading: methods under the GIL; the bytes belong to whoever uses the rings.
    Spec: protocol section 6.5 (front-end duties): sealed against shrinking.
    """

    def __init__(self, size, *, guest_addr=0x4000_0000, user_addr=0x7e12_0000_0000, mmap_offset=0, hugepages=False):
        self._regions = []
        self.add_region(size, guest_addr=guest_addr, user_addr=user_addr, mmap_offset=mmap_offset, hugepages=hugepages)

    def add_region(self, size, *, guest_addr=None, user_addr=None, mmap_offset=0, hugepages=False):
        """Add a region; without addresses it lies 1 GiB behind the last one. Returns the Region."""
        if guest_addr is None:
            guest_addr = max(region.guest_addr + region.size for region in self._regions) + GAP
        if user_addr is None:
            user_addr = max(region.user_addr + region.size for region in self._regions) + GAP
        for region in self._regions:
            for name, address, start in (("guest_addr", guest_addr, region.guest_addr),
                                         ("user_addr", user_addr, region.user_addr)):
                if address < start + region.size and start < address + size:
                    raise ValueError(f"region at {name} {address:#x} ({size} bytes) overlaps {region!r}")
        region = Region(size, guest_addr, user_addr, mmap_offset=mmap_offset, hugepages=hugepages)
        self._regions.append(region)
        return region

    @property
    def regions(self):
        """list of (guest_addr, size, user_addr, mmap_offset, fd): the rows of SET_MEM_TABLE; fds stay ours."""
        return [(region.guest_addr, region.size, region.user_addr, region.mmap_offset, region.fd)
                for region in self._regions]

    def alloc(self, size, align=LINE):
        """Take a zeroed Block of `size` bytes at a multiple of `align`, a power of two; MemoryError if all is full."""
        cdef Region region
        cdef Block block
        cdef uint64_t room, offset = 0, misaligned
        if size <= 0 or align <= 0 or align & (align - 1):
            raise ValueError(f"a block of {size} bytes aligned to {align}: size must be positive, align a power of two")
        room = _room(size)
        for region in self._regions:
            stock = region.blocks.get(room, ())
            for index, free_offset in enumerate(stock):
                if (<uint64_t>region.guest_addr + <uint64_t>free_offset) % <uint64_t>align == 0:
                    offset = stock.pop(index)
                    break
            else:
                misaligned = (<uint64_t>region.guest_addr + region.used) % <uint64_t>align
                offset = region.used + (<uint64_t>align - misaligned if misaligned else 0)
                if offset + room > <uint64_t>region.size:
                    continue
                region.used = offset + room
            block = Block.__new__(Block)
            block.region = region
            block.offset = offset
            block.room = room
            block.data = region.data + offset
            block.guest_addr = region.guest_addr + offset
            block.size = size
            memset(block.data, 0, size)
            return block
        raise MemoryError(f"no region of the guest memory has {size} bytes left; make it larger (memory_bytes)")

    def view(self, guest_addr, length):
        """A writable memoryview of [guest_addr, guest_addr + length); ValueError unless that lies in one region."""
        cdef Region region
        for region in self._regions:
            if region.guest_addr <= guest_addr and guest_addr + length <= region.guest_addr + region.size:
                offset = guest_addr - region.guest_addr
                return memoryview(region)[offset:offset + length]
        raise ValueError(f"[{guest_addr:#x}, {guest_addr + length:#x}) does not lie in one region of {self._regions}")

    def close(self):
        """Close the descriptors of all regions; views, blocks and queues keep working."""
        for region in self._regions:
            region.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
