"""Memory maps from file descriptors (vhost-user: SET_MEM_TABLE, ADD_MEM_REG)."""
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport ENOSPC, errno as c_errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from vq_core.arch cimport vq_store_release_u32
from vq_core.userfault cimport Userfault, userfault_register, userfault_unregister, userfault_wake
from vq_core.virtio cimport gpa_t, uva_t

import errno
import os
import stat

cdef extern from "vq_guard.h" nogil:
    int vq_guard_install() noexcept
    long vq_guard_used() noexcept
    void* vq_guard_add(void* start, uint64_t bytes, uint32_t* flag, long most) noexcept
    void vq_guard_remove(void* slot) noexcept

cdef extern from "<sys/mman.h>" nogil:
    void* c_mmap "mmap"(void* addr, size_t length, int prot, int flags, int fd, long offset) noexcept
    int c_munmap "munmap"(void* addr, size_t length) noexcept
    int c_madvise "madvise"(void* addr, size_t length, int advice) noexcept
    int c_mprotect "mprotect"(void* addr, size_t length, int prot) noexcept
    int PROT_NONE, PROT_READ, PROT_WRITE, MADV_DONTDUMP, MADV_NOHUGEPAGE
    int MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE
    void* MAP_FAILED

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct c_statfs "statfs":
        long f_type
        long f_bsize
    int c_fstatfs "fstatfs"(int fd, c_statfs* buf) noexcept

cdef enum:
    TABLE_USUAL = 32             # regions: as many as one SET_MEM_TABLE can bring

cdef uint64_t END = 0xffffffffffffffff


def _mappings_max():
    """How many mappings of peers this process takes: a quarter of what the kernel allows stays for everything else.

    At the kernel's own limit (vm.max_map_count) nothing works any more: no thread starts, large allocations fail, and
    the guard below cannot put anything in place of memory that was truncated.
    """
    try:
        with open("/proc/sys/vm/max_map_count") as limit:
            return int(limit.read()) // 4 * 3
    except (OSError, ValueError):
        return 49152


cdef long _mappings_limit = _mappings_max()


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


cdef int _check_room(long regions) except -1:
    """Keep the last half of the room for tables of the usual size, so that nobody needs to go without memory."""
    if regions > TABLE_USUAL and vq_guard_used() >= _mappings_limit // 2:
        raise OSError(errno.ENOMEM, f"no memory table of {regions} regions: too many mappings in this process")
    return 0


cdef void* memory_guard(void* start, uint64_t bytes, uint32_t* flag) except? NULL:
    if vq_guard_install() != 0:
        PyErr_SetFromErrno(OSError)
    cdef void* guard = vq_guard_add(start, bytes, flag, _mappings_limit)
    if guard == NULL:
        if c_errno == ENOSPC:
            raise OSError(errno.ENOMEM, f"too many mappings in this process: {_mappings_limit}")
        raise MemoryError("memory guard")
    return guard


cdef void memory_unguard(void* guard) noexcept:
    vq_guard_remove(guard)


cdef class _Flag:
    """What the guard of each mapping raises."""
    cdef uint32_t lost


cdef class _Mapping:
    """One mapped region; unmapped when the last map that holds it is gone."""
    cdef readonly tuple key       # (guest_addr, size, user_addr)
    cdef uint8_t* start           # page-aligned
    cdef size_t length
    cdef uint64_t skip            # bytes from there to the region
    cdef void* guard
    cdef _Flag flag               # outlives the guard

    def __dealloc__(self):
        if self.guard != NULL:
            memory_unguard(self.guard)
        if self.start != NULL:
            c_munmap(self.start, self.length)


cdef uint64_t _page_size(int fd):
    """The page size of the file behind `fd`: the huge page size on hugetlbfs."""
    cdef c_statfs info
    # As numbers of C: among Python's, an enumerator above 2^31 would be negative and equal to no type at all.
    if c_fstatfs(fd, &info) == 0 and <uint32_t>info.f_type == <uint32_t>0x958458f6:      # HUGETLBFS_MAGIC
        return <uint64_t>info.f_bsize
    return <uint64_t>os.sysconf("SC_PAGESIZE")


cdef class MemoryMap:
    """An immutable map of guest memory.

    Parameters
    ----------
    regions : sequence of (guest_addr, size, user_addr, mmap_offset, fd)
        Integers in bytes, as in a mem_region of vhost-user; `fd` is only used here and stays the
        caller's. 1 to 509 regions.
    userfault : Userfault, optional
        Postcopy: the pages are still on their way. Nothing can be touched until `open`, and then `may_block` holds
        until `settle`.

    Raises
    ------
    ValueError
        A region is empty, overflows, overlaps another, or is larger than its file.
    OSError
        mmap refused the file (for instance a read-only descriptor), or the peers of this process have too many
        mappings already (ENOMEM).

    Notes
    -----
    Threading: immutable, may be shared. The mappings live until the last reference is dropped.
    Spec: vhost-user "Memory region description"; SET_MEM_TABLE.
    """

    def __init__(self, regions, Userfault userfault=None):
        self._flag = _Flag()
        regions = [tuple(int(field) for field in region) for region in regions]
        if not regions or self._mappings is not None:
            raise ValueError("a memory table has at least one region, and a map is never changed")
        _check_table([region[:3] for region in regions])
        _check_room(len(regions))
        self._fill([_map(region, self._flag) for region in regions])
        if userfault is not None:
            self._userfault = userfault
            self.may_block = True
            for mapping in self._mappings:
                _await_pages(mapping, userfault.fd)
            userfault.add(self)

    cdef int _fill(self, list mappings) except -1:
        """Lay out the table of `mappings`, which passed _check_table."""
        cdef _Mapping mapping
        cdef region_t* region
        self._mappings = sorted(mappings, key=lambda mapping: mapping.key)
        self.memory.lost = &(<_Flag>self._flag).lost
        self.memory.regions = <region_t*>calloc(len(mappings), sizeof(region_t))
        if self.memory.regions == NULL:
            raise MemoryError("memory table")
        for mapping in self._mappings:
            region = &self.memory.regions[self.memory.region_count]
            region.guest_addr, region.size, region.user_addr = mapping.key
            region.host = mapping.start + mapping.skip
            self.memory.region_count += 1
        return 0

    def __dealloc__(self):
        free(self.memory.regions)

    def plus(self, region):
        """A new map with one region more, (guest_addr, size, user_addr, mmap_offset, fd); mappings are shared.

        Raises as the constructor does.
        """
        cdef MemoryMap result
        region = tuple(int(field) for field in region)
        _check_table([(<_Mapping>mapping).key for mapping in self._mappings] + [region[:3]])
        _check_room(len(self._mappings) + 1)
        result = MemoryMap.__new__(MemoryMap)
        result._flag = self._flag
        result._fill(self._mappings + [_map(region, self._flag)])
        return result

    def minus(self, guest_addr, size, user_addr):
        """A new map without the region of exactly these values; None if nothing is left; KeyError if there is none."""
        cdef MemoryMap result
        key = (guest_addr, size, user_addr)
        rest = [mapping for mapping in self._mappings if (<_Mapping>mapping).key != key]
        if len(rest) == len(self._mappings):
            raise KeyError(f"no memory region with guest_addr {guest_addr:#x}, size {size:#x}, "
                           f"user_addr {user_addr:#x}")
        if not rest:
            return None
        result = MemoryMap.__new__(MemoryMap)
        result._flag = self._flag
        result._fill(rest)
        return result

    @property
    def host_addrs(self):
        """dict of int by int: where each region lies in this process, by its guest_addr. For the front-end alone, which
        tells our faults apart by it (vhost-user, SET_MEM_TABLE in a postcopy migration).
        """
        return {self.memory.regions[i].guest_addr: <uintptr_t>self.memory.regions[i].host
                for i in range(self.memory.region_count)}

    def open(self):
        """Postcopy: the front-end serves our faults from here on, so that the memory can be used."""
        cdef _Mapping mapping
        for mapping in self._mappings:
            if c_mprotect(mapping.start, mapping.length, PROT_READ | PROT_WRITE) != 0:
                PyErr_SetFromErrno(OSError)

    def settle(self):
        """Postcopy is over: all pages have come. Who waits for one nevertheless gets zeroes."""
        cdef _Mapping mapping
        for mapping in self._mappings:
            if userfault_unregister(self._userfault.fd, mapping.start, mapping.length) != 0 and not self.lost:
                PyErr_SetFromErrno(OSError)
        self.may_block = False

    def forsake(self):
        """Put zero pages in place of all memory, raise `lost` and wake who waits; nothing of it reaches the front-end.

        Any thread may call it while the map is in use.
        """
        cdef _Mapping mapping
        for mapping in self._mappings:
            if c_mmap(mapping.start, mapping.length, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED:
                PyErr_SetFromErrno(OSError)
            vq_store_release_u32(&mapping.flag.lost, 1)
            userfault_wake(self._userfault.fd, mapping.start, mapping.length)

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
        if self.memory.region_count == 0:
            return 0
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


cdef int _await_pages(_Mapping mapping, int userfault_fd) except -1:
    """Let the front-end put the pages of a mapping in place; until it says so nobody can touch one."""
    if mapping.skip:
        raise ValueError(f"memory region at guest address {mapping.key[0]:#x}: with postcopy it must begin on a page")
    c_madvise(mapping.start, mapping.length, MADV_NOHUGEPAGE)     # pages come one by one
    if c_mprotect(mapping.start, mapping.length, PROT_NONE) != 0:
        PyErr_SetFromErrno(OSError)
    if userfault_register(userfault_fd, mapping.start, mapping.length) != 0:
        raise OSError(c_errno, f"memory region at guest address {mapping.key[0]:#x} cannot be moved by postcopy: share "
                      "memory from a memfd, tmpfs or hugetlbfs")
    return 0


def _check_table(table):
    if len(table) > 509:
        raise ValueError(f"memory table has {len(table)} regions; 509 are possible")
    for guest_addr, size, user_addr in table:
        where = f"memory region at guest address {guest_addr:#x}"
        if size <= 0:
            raise ValueError(f"{where}: size {size} is not positive")
        for name, value in (("guest_addr", guest_addr), ("user_addr", user_addr)):
            if value < 0 or value + size > END:
                raise ValueError(f"{where}: {name} {value:#x} + size {size:#x} exceeds 64 bits")
    for key, name in ((0, "guest_addr"), (2, "user_addr")):
        ordered = sorted(table, key=lambda region: region[key])
        for before, after in zip(ordered, ordered[1:]):
            if before[key] + before[1] > after[key]:
                raise ValueError(f"memory regions overlap in {name}: "
                                 f"{before[key]:#x} + {before[1]:#x} > {after[key]:#x}")


cdef _Mapping _map(tuple region, _Flag flag):
    cdef uint64_t page, start, length, size, mmap_offset
    cdef int fd = region[4]
    cdef _Mapping mapping = _Mapping.__new__(_Mapping)
    cdef void* got
    if not 0 <= region[3] <= (1 << 62) or region[1] > (1 << 62):
        raise ValueError(f"memory region of {region[1]:#x} bytes at offset {region[3]:#x} is too large")
    size, mmap_offset = region[1], region[3]
    status = os.fstat(fd)
    # Of a device (/dev/dax) the kernel knows the size, we do not.
    if stat.S_ISREG(status.st_mode) and mmap_offset + size > status.st_size:
        raise ValueError(f"memory region needs {mmap_offset + size} bytes of its file, which has {status.st_size}")
    page = _page_size(fd)
    start = mmap_offset - mmap_offset % page
    # All three are below 2^63: no sum here can wrap.
    length = (mmap_offset - start + size + page - 1) // page * page
    got = c_mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <long>start)
    if got == MAP_FAILED:
        PyErr_SetFromErrno(OSError)
    mapping.key = region[:3]
    mapping.start = <uint8_t*>got
    mapping.length = length
    mapping.skip = mmap_offset - start
    mapping.flag = flag
    mapping.guard = memory_guard(mapping.start, mapping.length, &flag.lost)
    c_madvise(got, length, MADV_DONTDUMP)     # no guest data in our core dumps; harmless if refused
    return mapping
