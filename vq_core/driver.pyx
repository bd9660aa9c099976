"""Guest memory as its owner sees it, and the cold side of driver-side virtqueues."""
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from vq_core.virtio cimport VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTQ_SIZE_MAX, has_feature

import fcntl
import os
import select

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

DRIVER_ERRORS = (
    None,
    "used index {value} is ahead of what was made available",
    "used id {value} is outside the ring of {num}",
    "used id {value} is not outstanding",
    "used length {value} is above the writable bytes of its buffer",
    "used id {value} is not next in order, though IN_ORDER was negotiated",
)


class BrokenRingError(RuntimeError):
    """The device broke the ring; the queue takes nothing from it any more, until `DriverQueue.reset`.

    Attributes
    ----------
    cause : int
        1 used index, 2 id outside the ring, 3 id not outstanding, 4 length, 5 order.
    value : int
        The index, id or length in question.
    """

    def __init__(self, cause, value, num):
        super().__init__(f"the device broke the ring: {DRIVER_ERRORS[cause].format(value=value, num=num)}; "
                         "reset the queue (VIRTIO 1.3, 2.7.8)")
        self.cause = cause
        self.value = value


cdef uint32_t driver_next_in_order(driver_t* driver, driver_used_t* used) noexcept nogil:
    cdef uint64_t element
    cdef uint32_t error
    cdef uint16_t head, ahead
    if not driver.batch_valid:
        element = vq_load_u64(&driver.used.ring[driver.last_used_idx & driver.mask])
        used.id = <uint32_t>element
        used.len = <uint32_t>(element >> 32)
        error = driver_check_inline(driver, used)
        if error != DRIVER_OK:
            return error
        ahead = <uint16_t>(driver.slots[used.id].position - driver.last_used_idx)
        if ahead == 0:
            return DRIVER_OK
        # The element stands for everything up to its own buffer, which the device must have counted in its index.
        if ahead >= <uint16_t>(driver.shadow_used_idx - driver.last_used_idx):
            return DRIVER_USED_ORDER
        driver.batch = used[0]
        driver.batch_left = ahead
        driver.batch_valid = True
    if driver.batch_left == 0:
        driver.batch_valid = False
        used[0] = driver.batch
        return DRIVER_OK
    driver.batch_left -= 1
    head = driver.heads[driver.last_used_idx & driver.mask]
    used.id = head
    used.len = driver.slots[head].writable_bytes       # 2.7.9: skipped buffers were used completely
    return DRIVER_OK


cdef uint32_t driver_check(driver_t* driver, driver_used_t* used) noexcept nogil:
    cdef driver_slot_t* slot
    cdef uint16_t position
    if used.id >= driver.num:
        return DRIVER_USED_ID
    slot = &driver.slots[used.id]
    if slot.count == 0:
        return DRIVER_USED_NOT_OUTSTANDING
    position = driver.published_avail_idx
    while position != driver.next_avail_idx:           # at most num turns
        if driver.heads[position & driver.mask] == used.id:
            return DRIVER_USED_NOT_OUTSTANDING         # the device cannot know of it yet
        position += 1
    return DRIVER_USED_LENGTH if used.len > slot.writable_bytes else DRIVER_OK


cdef void driver_give_back(driver_t* driver, uint16_t head, uint16_t count) noexcept nogil:
    cdef uint16_t index = head
    for _ in range(count - 1):
        index = driver.slots[index].next               # private: written by driver_add, below num
        driver.free[driver.free_tail & driver.mask] = index
        driver.free_tail += 1


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
        raise MemoryError(f"no region of the guest memory has {size} bytes left; make it larger")

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


class Buffer:
    """A buffer that was added to a DriverQueue: its token.

    Attributes
    ----------
    id : int
        Its name on the ring while it is outstanding.
    readable, writable : tuple of memoryview
        The parts of the device-readable and of the device-writable half; raw parts, which were given as
        addresses, are left out.
    """

    __slots__ = ("id", "readable", "writable", "_table")

    def __init__(self, readable, writable, table):
        self.id = -1
        self.readable = tuple(readable)
        self.writable = tuple(writable)
        self._table = table                # the indirect table lives as long as the buffer

    def written(self, length):
        """The first `length` bytes of the device-writable half: what a used length says was written."""
        return b"".join(self.writable)[:length]


cdef class DriverQueue:
    """One virtqueue, driver side, with its rings in guest memory and its kick and call eventfds.

    Parameters
    ----------
    memory : GuestMemory
        Where the rings and the buffers lie.
    size : int
        Ring size in entries, a power of two, 1 to 32768.
    features : int
        Negotiated virtio features, by default VERSION_1 alone; EVENT_IDX and IN_ORDER change what the driver does.
    base : int
        Position that both indices start at, 0 to 65535, for SET_VRING_BASE.

    Raises
    ------
    ValueError
        The size is not legal, or the features ask for a packed ring.
    BrokenRingError
        From `poll`, `arm` and `wait`: the device broke the rules; sticky until `reset`.

    Notes
    -----
    Threading: one thread at a time; RuntimeError while a traffic engine owns the queue.
    Spec: VIRTIO 1.3, 2.7.
    """

    def __cinit__(self):
        memset(&self.driver, 0, sizeof(driver_t))
        self.driver.kick_fd = self.driver.call_fd = -1

    def __init__(self, GuestMemory memory not None, int size, *, features=0x1_0000_0000, base=0):
        if not 1 <= size <= VIRTQ_SIZE_MAX or size & (size - 1):
            raise ValueError(f"queue size {size} is not a power of two from 1 to {VIRTQ_SIZE_MAX}")
        if has_feature(features, VIRTIO_F_RING_PACKED):
            raise ValueError("the features ask for a packed ring (bit 34), this queue has the split layout; "
                             "leave the bit out")
        self.memory = memory
        self.features = features
        self._desc = memory.alloc(16 * size)
        self._avail = memory.alloc(4 + 2 * size + 2)
        self._used = memory.alloc(4 + 8 * size + 2)
        self.driver.desc = <virtq_desc_t*>self._desc.data
        self.driver.avail = <virtq_avail_t*>self._avail.data
        self.driver.used = <virtq_used_t*>self._used.data
        self.driver.num = size
        self.driver.mask = size - 1
        self.driver.slots = <driver_slot_t*>calloc(size, sizeof(driver_slot_t))
        self.driver.free = <uint16_t*>malloc(size * sizeof(uint16_t))
        self.driver.heads = <uint16_t*>calloc(size, sizeof(uint16_t))
        if self.driver.slots == NULL or self.driver.free == NULL or self.driver.heads == NULL:
            raise MemoryError("driver queue")
        self.driver.event_idx = has_feature(features, VIRTIO_F_EVENT_IDX)
        self.driver.in_order = has_feature(features, VIRTIO_F_IN_ORDER)
        self.driver.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.driver.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.reset(base)

    def __dealloc__(self):
        self.close()
        free(self.driver.slots)
        free(self.driver.free)
        free(self.driver.heads)

    cdef int claim(self) except -1:
        """Take the queue for a traffic engine."""
        self._check_free()
        self.busy = True
        return 0

    cdef void unclaim(self) noexcept:
        self.busy = False

    def _check_free(self):
        if self.busy:
            raise RuntimeError("a running traffic engine owns this queue; stop it first")
        if self.driver.num == 0:
            raise RuntimeError("the queue was not initialised")

    def close(self):
        """Close the kick and call descriptors; the rings stay until the queue is dropped."""
        if self.driver.kick_fd >= 0:
            os.close(self.driver.kick_fd)
        if self.driver.call_fd >= 0:
            os.close(self.driver.call_fd)
        self.driver.kick_fd = self.driver.call_fd = -1

    def reset(self, base=0):
        """Start over with empty rings at position `base`, all buffers ours again. The device must be stopped."""
        cdef driver_t* driver = &self.driver
        cdef uint16_t position, index
        self._check_free()
        if not 0 <= base <= 0xffff:
            raise ValueError(f"base {base} is not a ring position from 0 to 65535")
        position = base
        memset(driver.desc, 0, 16 * driver.num)
        memset(driver.avail, 0, 4 + 2 * driver.num + 2)
        memset(driver.used, 0, 4 + 8 * driver.num + 2)
        memset(driver.slots, 0, driver.num * sizeof(driver_slot_t))
        for index in range(driver.num):
            driver.free[index] = index
        driver.free_head = 0
        driver.free_tail = driver.num
        driver.next_avail_idx = driver.published_avail_idx = driver.kicked_avail_idx = position
        driver.last_used_idx = driver.shadow_used_idx = position
        driver.batch_left = 0
        driver.batch_valid = False
        driver.kick_valid = False
        driver.error = DRIVER_OK
        vq_store_u16(&driver.used.idx, position)
        vq_store_release_u16(&driver.avail.idx, position)
        self._posted = {}

    def add(self, readable=(), writable=(), *, indirect=False):
        """Add a buffer; the device sees it after `publish` or `kick`.

        Parameters
        ----------
        readable : sequence of (bytes-like or Block or (guest_addr, length))
            Device-readable parts, one descriptor each. Bytes are copied into guest memory; pairs go to the
            ring as they are, so that tests can say what they like.
        writable : sequence of (int or Block or (guest_addr, length))
            Device-writable parts; an int allocates so many bytes.
        indirect : bool
            Use an indirect table.

        Returns
        -------
        Buffer
            The token that `poll` gives back.

        Raises
        ------
        ValueError
            There is no part at all.
        BufferError
            The ring has not enough free descriptors.
        """
        cdef driver_part_t* parts
        cdef Block table = None
        cdef int head
        cdef uint32_t i, readable_count, writable_count
        self._check_free()
        readable_parts = [self._part(part) for part in readable]
        writable_parts = [self._part(part) for part in writable]
        every = readable_parts + writable_parts
        if not every:
            raise ValueError("a buffer needs at least one part")
        readable_count, writable_count = len(readable_parts), len(writable_parts)
        needed = 1 if indirect else len(every)
        if needed > driver_free(&self.driver):
            raise BufferError(f"a buffer of {needed} descriptors does not fit; {driver_free(&self.driver)} of "
                              f"{self.driver.num} are free: poll for used buffers first")
        if indirect:
            table = self.memory.alloc(16 * len(every))
        parts = <driver_part_t*>malloc(len(every) * sizeof(driver_part_t))
        if parts == NULL:
            raise MemoryError("parts")
        try:
            for i in range(readable_count + writable_count):
                parts[i].addr, parts[i].len = every[i][0], every[i][1]
            if indirect:
                head = driver_add_indirect(&self.driver, <virtq_desc_t*>table.data, table.guest_addr, parts,
                                           readable_count, writable_count)
            else:
                head = driver_add(&self.driver, parts, readable_count, writable_count)
        finally:
            free(parts)
        token = Buffer((part[2] for part in readable_parts if part[2] is not None),
                       (part[2] for part in writable_parts if part[2] is not None), table)
        token.id = head
        self._posted[head] = token
        return token

    def _part(self, part):
        """(guest_addr, length, view or None) of one part of `add`."""
        cdef Block block
        if isinstance(part, tuple):
            return part[0], part[1], None
        if isinstance(part, Block):
            block = part
        elif isinstance(part, int):
            block = self.memory.alloc(part)
        else:
            block = self.memory.alloc(max(1, len(part)))
            memoryview(block)[:len(part)] = part
            return block.guest_addr, len(part), memoryview(block)[:len(part)]
        return block.guest_addr, block.size, memoryview(block)

    def publish(self):
        """Show the device everything that was added."""
        self._check_free()
        driver_publish(&self.driver)

    def kick(self):
        """Publish, and signal the kick descriptor if the device wants it; whether it did."""
        self.publish()
        return bool(driver_kick(&self.driver))

    def poll(self, max=VIRTQ_SIZE_MAX):
        """Take used buffers back: a list of (Buffer, length), `length` in bytes as the device said, checked."""
        cdef driver_used_t used[64]
        cdef int count = 64, i
        self._check_free()
        result = []
        while count == 64 and len(result) < max:
            count = driver_poll_used(&self.driver, used, min(64, max - len(result)))
            for i in range(count):
                result.append((self._posted.pop(used[i].id), used[i].len))
        if count < 0 and not result:
            self._raise()
        return result

    def _raise(self):
        raise BrokenRingError(self.driver.error, self.driver.error_value, self.driver.num)

    def arm(self):
        """Ask for a call at the next used buffer; True if one is there already, so that no call may come."""
        self._check_free()
        ready = driver_arm(&self.driver)
        if self.driver.error != DRIVER_OK:
            self._raise()
        return bool(ready)

    def disarm(self):
        """Ask for no calls."""
        self._check_free()
        driver_disarm(&self.driver)

    def wait(self, timeout):
        """Sleep until a used buffer is there: by arm, the call descriptor, and a look at the ring.

        Parameters
        ----------
        timeout : float
            Seconds.

        Returns
        -------
        bool
            Whether there is a used buffer.
        """
        if self.arm():
            return True
        poller = select.poll()
        poller.register(self.driver.call_fd, select.POLLIN)
        if poller.poll(timeout * 1000):
            os.eventfd_read(self.driver.call_fd)
        pending = driver_pending(&self.driver)
        if pending < 0:
            self._raise()
        return pending > 0

    @property
    def size(self):
        """int: entries."""
        return self.driver.num

    @property
    def free(self):
        """int: free descriptors."""
        return driver_free(&self.driver)

    @property
    def outstanding(self):
        """int: buffers that have not come back."""
        return driver_outstanding(&self.driver)

    @property
    def error(self):
        """str or None: what the device did wrong."""
        if self.driver.error == DRIVER_OK:
            return None
        return DRIVER_ERRORS[self.driver.error].format(value=self.driver.error_value, num=self.driver.num)

    @property
    def addresses(self):
        """tuple of int: user addresses of descriptor table, available ring, used ring, for SET_VRING_ADDR."""
        return self._desc.user_addr, self._avail.user_addr, self._used.user_addr

    @property
    def guest_addresses(self):
        """tuple of int: guest addresses of the same three."""
        return self._desc.guest_addr, self._avail.guest_addr, self._used.guest_addr

    @property
    def kick_fd(self):
        """int: eventfd that the driver signals; stays the queue's."""
        return self.driver.kick_fd

    @property
    def call_fd(self):
        """int: eventfd that the device signals; stays the queue's."""
        return self.driver.call_fd

    @property
    def avail_idx(self):
        """int: position that was published last."""
        return self.driver.published_avail_idx

    @property
    def used_idx(self):
        """int: position of the next used element to take: the base after a crash of the back-end."""
        return self.driver.last_used_idx

    @property
    def kicks(self):
        """tuple of int: kicks sent, kicks that the device did not want."""
        return self.driver.kicks, self.driver.kicks_suppressed

    # Raw access, for tests that build malformed rings and for reference devices. The driver's state does not follow.

    @property
    def desc(self):
        """ndarray of (addr u8, len u4, flags u2, next u2), shape (size,): the descriptor table itself."""
        import numpy
        return numpy.frombuffer(self._desc, [("addr", "<u8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")],
                                self.driver.num)

    @property
    def avail(self):
        """ndarray of uint16, shape (size + 3,): flags, idx, ring[size], used_event."""
        import numpy
        return numpy.frombuffer(self._avail, "<u2", self.driver.num + 3)

    @property
    def used(self):
        """ndarray of (id u4, len u4), shape (size,): the used elements."""
        import numpy
        return numpy.frombuffer(self._used, [("id", "<u4"), ("len", "<u4")], self.driver.num, 4)

    @property
    def used_head(self):
        """ndarray of uint16, shape (2,): flags and idx of the used ring."""
        import numpy
        return numpy.frombuffer(self._used, "<u2", 2)

    @property
    def avail_event(self):
        """ndarray of uint16, shape (1,): the device's event field behind the used elements."""
        import numpy
        return numpy.frombuffer(self._used, "<u2", 1, 4 + 8 * self.driver.num)
