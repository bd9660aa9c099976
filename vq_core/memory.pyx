"""Memory maps from file descriptors (vhost-user: SET_MEM_TABLE, ADD_MEM_REG)."""
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from vq_core.virtio cimport gpa_t, uva_t

import os

cdef extern from "vq_guard.h" nogil:
    int vq_guard_install() noexcept
    void* vq_guard_add(void* start, uint64_t bytes, uint32_t* flag) noexcept
    void vq_guard_remove(void* slot) noexcept

cdef extern from "<sys/mman.h>" nogil:
    void* c_mmap "mmap"(void* addr, size_t length, int prot, int flags, int fd, long offset) noexcept
    int c_munmap "munmap"(void* addr, size_t length) noexcept
    int c_madvise "madvise"(void* addr, size_t length, int advice) noexcept
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_NORESERVE, MADV_DONTDUMP
    void* MAP_FAILED

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct c_statfs "statfs":
        long f_type
        long f_bsize
    int c_fstatfs "fstatfs"(int fd, c_statfs* buf) noexcept

cdef enum:
    HUGETLBFS_MAGIC = 0x958458f6

cdef uint64_t END = 0xffffffffffffffff


cdef region_t* memory_find(memory_t* memory, gpa_t addr) noexcept nogil:
    """The region that holds `addr`, or NULL. Binary search: up to 509 regions."""
    cdef uint32_t low = 0, high = memory.region_count, middle
    while low < high:
        middle = (low + high) >> 1
        if addr < memory.regions[middle].guest_addr:
            high = middle
        elif addr - memory.regions[middle].guest_addr >= memory.regions[middle].size:
            low = middle + 1
        else:
            return &memory.regions[middle]
    return NULL


cdef uint8_t* memory_user_translate(memory_t* memory, uva_t addr, uint64_t length, gpa_t* guest_addr) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t offset
    for i in range(memory.region_count):
        offset = addr - memory.regions[i].user_addr
        if offset < memory.regions[i].size and length <= memory.regions[i].size - offset:
            guest_addr[0] = memory.regions[i].guest_addr + offset
            return memory.regions[i].host + offset
    return NULL


cdef void* memory_guard(void* start, uint64_t bytes, uint32_t* flag) except? NULL:
    if vq_guard_install() != 0:
        PyErr_SetFromErrno(OSError)
    cdef void* guard = vq_guard_add(start, bytes, flag)
    if guard == NULL:
        raise MemoryError("memory guard")
    return guard


cdef void memory_unguard(void* guard) noexcept:
    vq_guard_remove(guard)


cdef class _Mapping:
    """One mmap of a region's file. Unmapped when the last map that uses it is gone.

    Consecutive tables share unchanged regions by making new mappings of them: a mapping
    belongs to one MemoryMap, whose `lost` flag its guard raises.
    """
    cdef uint8_t* start
    cdef size_t length
    cdef uint64_t skip            # from the start of the mapping (a page border) to the region
    cdef void* guard

    def __dealloc__(self):
        if self.guard != NULL:
            memory_unguard(self.guard)
        if self.start != NULL:
            c_munmap(self.start, self.length)


cdef uint64_t _page_size(int fd):
    """The page size of the file behind `fd`: the huge page size on hugetlbfs."""
    cdef c_statfs info
    if c_fstatfs(fd, &info) == 0 and (info.f_type & 0xffffffff) == HUGETLBFS_MAGIC:
        return <uint64_t>info.f_bsize
    return <uint64_t>os.sysconf("SC_PAGESIZE")


cdef class MemoryMap:
    """An immutable map of guest memory.

    Parameters
    ----------
    regions : sequence of (guest_addr, size, user_addr, mmap_offset, fd)
        Integers in bytes, as in a mem_region of vhost-user; `fd` is only used here and stays the
        caller's. At most 509 regions.

    Raises
    ------
    ValueError
        A region is empty, overflows, overlaps another, or is larger than its file.
    OSError
        mmap refused the file (for instance a read-only descriptor).

    Notes
    -----
    Threading: immutable, may be shared. The mappings live until the last reference is dropped.
    Spec: vhost-user "Memory region description"; SET_MEM_TABLE.
    """

    def __cinit__(self, regions):
        cdef uint32_t i
        cdef region_t* region
        cdef _Mapping mapping
        table = sorted(tuple(int(field) for field in region_fields) for region_fields in regions)
        if not 1 <= len(table) <= 509:
            raise ValueError(f"memory table has {len(table)} regions; 1 to 509 are possible")
        self._mappings = []
        self.memory.regions = <region_t*>calloc(len(table), sizeof(region_t))
        if self.memory.regions == NULL:
            raise MemoryError("memory table")
        _check_table(table)
        for i, (guest_addr, size, user_addr, mmap_offset, fd) in enumerate(table):
            mapping = _map(size, mmap_offset, fd)
            self._mappings.append(mapping)
            mapping.guard = memory_guard(mapping.start, mapping.length, &self.memory.lost)
            region = &self.memory.regions[i]
            region.guest_addr = guest_addr
            region.size = size
            region.user_addr = user_addr
            region.host = mapping.start + mapping.skip
            self.memory.region_count = i + 1

    def __dealloc__(self):
        # The mappings guard their ranges with a pointer to our flag: they go first.
        self._mappings = None
        free(self.memory.regions)

    @property
    def regions(self):
        """tuple of (guest_addr, size, user_addr): what is mapped, sorted by guest_addr."""
        return tuple((self.memory.regions[i].guest_addr, self.memory.regions[i].size, self.memory.regions[i].user_addr)
                     for i in range(self.memory.region_count))

    @property
    def lost(self):
        """bool: the owner truncated the memory (SIGBUS was caught); the map must not be used any more."""
        return memory_lost(&self.memory)

    @property
    def end(self):
        """int: the first guest physical address behind the last region; bounds a dirty log."""
        cdef region_t* last = &self.memory.regions[self.memory.region_count - 1]
        return last.guest_addr + last.size

    def translate(self, guest_addr, length):
        """Offset of [guest_addr, guest_addr + length) as (region index, offset in it), or None if it is not whole.

        For tests and diagnostics: what `memory_translate` of the data plane decides.
        """
        cdef region_t* hint = self.memory.regions
        cdef uint8_t* host = memory_translate(&self.memory, &hint, guest_addr, length)
        if host == NULL:
            return None
        return hint - self.memory.regions, host - hint.host


def _check_table(table):
    for guest_addr, size, user_addr, mmap_offset, fd in table:
        where = f"memory region at guest address {guest_addr:#x}"
        if size <= 0:
            raise ValueError(f"{where}: size {size} is not positive")
        for name, value in (("guest_addr", guest_addr), ("user_addr", user_addr), ("mmap_offset", mmap_offset)):
            if value < 0 or value + size > END:
                raise ValueError(f"{where}: {name} {value:#x} + size {size:#x} exceeds 64 bits")
    for key, name in ((0, "guest_addr"), (2, "user_addr")):
        ordered = sorted(table, key=lambda region: region[key])
        for before, after in zip(ordered, ordered[1:]):
            if before[key] + before[1] > after[key]:
                raise ValueError(f"memory regions overlap in {name}: {before[key]:#x} + {before[1]:#x} > {after[key]:#x}")


cdef _Mapping _map(uint64_t size, uint64_t mmap_offset, int fd):
    cdef uint64_t page = _page_size(fd)
    cdef uint64_t start = mmap_offset - mmap_offset % page
    # mmap_offset + size does not overflow (_check_table); the rounding is checked here.
    cdef uint64_t length = mmap_offset - start + size
    cdef _Mapping mapping = _Mapping.__new__(_Mapping)
    cdef void* got
    file_size = os.fstat(fd).st_size
    if mmap_offset + size > file_size:
        raise ValueError(f"memory region needs {mmap_offset + size} bytes of its file, which has {file_size}")
    if length > END - page or start > 0x7fffffffffffffff:
        raise ValueError(f"memory region of {size:#x} bytes at offset {mmap_offset:#x} is too large")
    length = (length + page - 1) // page * page
    got = c_mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <long>start)
    if got == MAP_FAILED:
        PyErr_SetFromErrno(OSError)
    mapping.start = <uint8_t*>got
    mapping.length = length
    mapping.skip = mmap_offset - start
    c_madvise(got, length, MADV_DONTDUMP)     # no guest data in our core dumps; harmless if refused
    return mapping
