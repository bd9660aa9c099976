"""Requests to a block device, as many under way as it is given: what a guest's driver does, to measure and to verify.

One thread drives request queues. A request has a slot: 64 bytes with header and status, as Linux lays them out, and
the data at a page of its own. Blocks are chosen at random. To verify, each block's checksum is remembered when it is
read for the first time or written, and compared whenever it is read again; no block is in two requests at once then.

Thread: one runs it; any thread may call `stop` and read the counters.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from vq_core.arch cimport vq_load_u8, vq_load_u32, vq_load_u64, vq_pause, vq_store_release_u32, vq_store_u64
from vq_core.blk_request cimport VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, blk_header_t
from vq_core.clock cimport CLOCK_MONOTONIC, SECOND_NS, clock_now
from vq_core.disk cimport SECTOR_BYTES
from vq_core.driver cimport (DRIVER_OK, Block, DriverQueue, driver_add, driver_add_indirect, driver_arm, driver_disarm,
                             driver_free, driver_kick, driver_outstanding, driver_part_t, driver_poll_used,
                             driver_publish, driver_t, driver_used_t)
from vq_core.driver import BrokenRingError
from vq_core.poll cimport pollfd
from vq_core.virtio cimport VIRTIO_F_INDIRECT_DESC, has_feature, virtq_desc_t
from vq_core.wait cimport wait_add, wait_any

import os

cdef enum:
    HEAD_BYTES = 64                  # of a slot: the header, and the status behind it
    STATUS_AT = 16
    TABLE_BYTES = 64                 # three descriptors
    PAGE = 4096
    BURST = 32
    TRIES = 8                        # to find a block that no other request has
    WAIT_MS = 20                     # longest sleep: the clock and the stop flag are looked at then
    QUEUES_MAX = 64
    DEPTH_MAX = 1024
    UNSAID = 0xff                    # a status that no device gives

# Ways a run ends.
cdef enum:
    LOAD_DONE = 0
    LOAD_LOST = 1
    LOAD_BROKEN = 2

cdef struct load_slot_t:             # a request under way
    uint64_t block
    uint64_t sum                     # of what it writes
    bint write

cdef struct load_queue_t:
    driver_t* driver
    uint8_t* heads
    uint8_t* data
    virtq_desc_t* tables             # NULL: three descriptors in the ring
    uint64_t heads_addr
    uint64_t data_addr
    uint64_t tables_addr
    load_slot_t* slots               # depth
    uint32_t* free                   # slots that no request has
    uint32_t free_count
    uint16_t* slot_of                # by the id of the buffer

cdef struct load_t:
    load_queue_t* queues
    uint32_t queue_count
    uint32_t depth
    uint32_t size                    # bytes of a block
    uint64_t stride                  # of the data of two slots
    uint64_t blocks
    uint32_t writes                  # of 65536 requests
    bint verify
    bint sleep
    uint64_t random
    uint64_t* sums                   # verify: by block; 0: not known
    uint8_t* taken                   # verify: by block
    uint64_t patience_ns
    uint64_t reads                   # counters: one writer
    uint64_t written
    uint64_t failed
    uint64_t changed
    uint64_t lost
    uint64_t active_ns
    uint32_t stop


cdef inline uint64_t load_random(load_t* load) noexcept nogil:
    """Xorshift with a multiplication: its upper half is good enough for places on a disk."""
    cdef uint64_t x = load.random
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    load.random = x
    return x * 0x2545F4914F6CDD1DULL


cdef inline uint64_t load_mix(uint64_t sum, uint64_t word) noexcept nogil:
    return (sum ^ word) * 0x9E3779B97F4A7C15ULL ^ sum >> 29


cdef uint64_t load_sum(const uint8_t* data, uint32_t size) noexcept nogil:
    """The checksum of a block, never 0."""
    cdef uint64_t sum = size, word
    cdef uint32_t at = 0
    while at < size:
        memcpy(&word, data + at, 8)
        sum = load_mix(sum, word)
        at += 8
    return sum | 1


cdef uint64_t load_fill(uint8_t* data, uint32_t size, uint64_t seed) noexcept nogil:
    """Fill a block with words that differ from all others; its checksum."""
    cdef uint64_t sum = size, word = seed
    cdef uint32_t at = 0
    while at < size:
        word = word * 6364136223846793005ULL + 1442695040888963407ULL
        memcpy(data + at, &word, 8)
        sum = load_mix(sum, word)
        at += 8
    return sum | 1


cdef inline bint load_choose(load_t* load, uint64_t random, uint64_t* block) noexcept nogil:
    """Choose a block; False if all that were tried are in a request already."""
    cdef int _try
    block[0] = ((random >> 32) * load.blocks) >> 32
    if load.verify:
        for _try in range(TRIES):
            if not load.taken[block[0]]:
                load.taken[block[0]] = 1
                return True
            block[0] = ((load_random(load) >> 32) * load.blocks) >> 32
        return False
    return True


cdef inline bint load_begin(load_t* load, load_queue_t* queue) noexcept nogil:
    """Add one request; False without a block for it."""
    cdef driver_part_t parts[3]
    cdef blk_header_t header
    cdef uint64_t random = load_random(load), block
    cdef uint32_t at
    cdef load_slot_t* slot
    cdef uint8_t* head
    cdef uint8_t* data
    cdef int id
    if not load_choose(load, random, &block):
        return False
    queue.free_count -= 1
    at = queue.free[queue.free_count]
    slot = &queue.slots[at]
    slot.block = block
    slot.write = (random & 0xffff) < load.writes
    head = queue.heads + at * HEAD_BYTES
    data = queue.data + at * load.stride
    header.type = VIRTIO_BLK_T_OUT if slot.write else VIRTIO_BLK_T_IN
    header.reserved = 0
    header.sector = block * (load.size // SECTOR_BYTES)
    memcpy(head, &header, sizeof(header))
    head[STATUS_AT] = UNSAID
    if slot.write:
        if load.verify:
            slot.sum = load_fill(data, load.size, random)
        else:
            memcpy(data, &random, 8)
    parts[0].addr, parts[0].len = queue.heads_addr + at * HEAD_BYTES, sizeof(header)
    parts[1].addr, parts[1].len = queue.data_addr + at * load.stride, load.size
    parts[2].addr, parts[2].len = queue.heads_addr + at * HEAD_BYTES + STATUS_AT, 1
    if queue.tables != NULL:
        id = driver_add_indirect(queue.driver, queue.tables + at * (TABLE_BYTES // 16),
                                 queue.tables_addr + at * TABLE_BYTES, parts, 2 if slot.write else 1,
                                 1 if slot.write else 2)
    elif slot.write:
        id = driver_add(queue.driver, parts, 2, 1)
    else:
        id = driver_add(queue.driver, parts, 1, 2)
    queue.slot_of[id] = <uint16_t>at
    return True


cdef inline void load_end(load_t* load, load_queue_t* queue, driver_used_t* used) noexcept nogil:
    """Take a request back: count it, and compare what it has read."""
    cdef uint32_t at = queue.slot_of[used.id]
    cdef load_slot_t* slot = &queue.slots[at]
    cdef bint done = vq_load_u8(queue.heads + at * HEAD_BYTES + STATUS_AT) == VIRTIO_BLK_S_OK
    cdef uint64_t sum
    # The length of the used element counts what was written from the start: a read's data and its status (5.2.6).
    if not done:
        load.failed += 1
    elif used.len != (1 if slot.write else load.size + 1):
        done = False
        load.changed += 1
    elif slot.write:
        load.written += 1
    else:
        load.reads += 1
    if load.verify:
        if done and not slot.write:
            sum = load_sum(queue.data + at * load.stride, load.size)
            if load.sums[slot.block] != 0 and load.sums[slot.block] != sum:
                load.changed += 1
            load.sums[slot.block] = sum
        elif slot.write:
            load.sums[slot.block] = slot.sum if done else 0      # one that failed may have been written in part
        load.taken[slot.block] = 0
    queue.free[queue.free_count] = at
    queue.free_count += 1


cdef inline int load_round(load_t* load, load_queue_t* queue, bint more) noexcept nogil:
    """Take back what is done and begin as many; number taken back, -1 if the ring is broken."""
    cdef driver_used_t used[BURST]
    cdef int got = driver_poll_used(queue.driver, used, BURST), i
    cdef uint32_t needed = 1 if queue.tables != NULL else 3
    if got < 0:
        return -1
    for i in range(got):
        load_end(load, queue, &used[i])
    if more:
        while queue.free_count > 0 and driver_free(queue.driver) >= needed:
            if not load_begin(load, queue):
                break
        driver_publish(queue.driver)
        driver_kick(queue.driver)
    return got


cdef uint32_t load_under_way(load_t* load) noexcept nogil:
    cdef uint32_t i, count = 0
    for i in range(load.queue_count):
        count += driver_outstanding(load.queues[i].driver)
    return count


cdef void load_doze(load_t* load) noexcept nogil:
    """Wait for a call of any queue."""
    cdef pollfd fds[QUEUES_MAX]
    cdef uint32_t i
    cdef bint ready = False
    for i in range(load.queue_count):
        wait_add(&fds[i], load.queues[i].driver.call_fd)
        ready |= driver_arm(load.queues[i].driver)
    if not ready:
        wait_any(fds, load.queue_count, WAIT_MS)
    for i in range(load.queue_count):
        driver_disarm(load.queues[i].driver)


cdef int load_run(load_t* load, uint64_t duration_ns) noexcept nogil:
    """Keep requests under way until the time is over, then wait for them: how it ended."""
    cdef int64_t begin = clock_now(CLOCK_MONOTONIC), now = begin, moved = begin
    cdef uint32_t i, looks = 0
    cdef bint more = True, progress
    cdef int got
    for i in range(load.queue_count):
        driver_disarm(load.queues[i].driver)
    while True:
        progress = False
        for i in range(load.queue_count):
            got = load_round(load, &load.queues[i], more)
            if got < 0:
                return LOAD_BROKEN
            progress |= got > 0
        looks += 1
        if not progress:
            if load.sleep:
                load_doze(load)
            else:
                vq_pause()
        if progress and looks & 15 or not progress and not load.sleep and looks & 255:
            continue
        now = clock_now(CLOCK_MONOTONIC)
        if progress:
            moved = now
        if more and (<uint64_t>(now - begin) >= duration_ns or vq_load_u32(&load.stop)):
            more = False
            vq_store_u64(&load.active_ns, load.active_ns + <uint64_t>(now - begin))
        if not more and load_under_way(load) == 0:
            return LOAD_DONE
        if <uint64_t>(now - moved) > load.patience_ns:
            if more:
                vq_store_u64(&load.active_ns, load.active_ns + <uint64_t>(now - begin))
            load.lost += load_under_way(load)
            return LOAD_LOST


def blk_load_memory_bytes(ring, depth, size, *, queues=1):
    """Guest memory that a BlkLoad needs, rings included; a multiple of 4096.

    Parameters
    ----------
    ring, depth, size, queues : int
        Entries of a ring; requests under way in a queue; bytes of a request; queues.
    """
    pages = -(-ring * 32 // PAGE) + 8 + -(-depth * (HEAD_BYTES + TABLE_BYTES) // PAGE) + 2
    return queues * (pages * PAGE + depth * _stride(size)) + PAGE


def _stride(size):
    """Bytes from data to data: whole pages, as the buffers of a guest's page cache are."""
    return -(-size // PAGE) * PAGE


cdef class BlkLoad:
    """Reads and writes blocks of a disk at random, by request queues.

    Parameters
    ----------
    queues : sequence of DriverQueue
        Fresh ones, of one device.
    blocks : int
        The first so many of the disk are used, 1 to 2^32 - 1.
    size : int
        Bytes of a block and of each request, a multiple of 512 up to 1 MiB.
    depth : int
        Requests under way in each queue, 1 to 1024.
    writes : int
        Per cent of the requests that write.
    indirect : bool
        A request is one descriptor that points to a table of three; False: three descriptors.
    verify : bool
        Compare what is read with what was written or read before.
    poll : {"busy", "sleep"}
        Look at the rings all the time, or sleep until a call comes.
    cpu : int, optional
        Processor that `run` pins its thread to.
    patience : float
        Seconds without any progress after which what is under way counts as lost, which ends the run.
    seed : int
        Another one gives another order of blocks, and other content.

    Raises
    ------
    ValueError
        An argument is out of range.
    MemoryError
        The guest memory is too small; `blk_load_memory_bytes` says how much is enough.

    Notes
    -----
    Threading: `run` gives up the GIL; `stop` may come from any thread.
    """

    cdef load_t load
    cdef list _queues
    cdef list _blocks
    cdef object cpu

    def __init__(self, queues, blocks, size=4096, *, depth=32, writes=0, indirect=False, verify=False, poll="busy",
                 cpu=None, patience=5.0, seed=1):
        cdef DriverQueue queue
        self._queues, self._blocks, self.cpu = list(queues), [], cpu
        if not 1 <= len(self._queues) <= QUEUES_MAX:
            raise ValueError(f"{len(self._queues)} queues; 1 to {QUEUES_MAX} are possible")
        if not 1 <= blocks < 1 << 32 or size % SECTOR_BYTES or not SECTOR_BYTES <= size <= 1 << 20:
            raise ValueError(f"{blocks} blocks of {size} bytes: 1 to 2^32 - 1 are possible, of 512 bytes to 1 MiB each")
        if not 1 <= depth <= DEPTH_MAX or not 0 <= writes <= 100 or not patience > 0:
            raise ValueError(f"depth {depth}, writes {writes}, patience {patience}: 1 to {DEPTH_MAX} requests; 0 to "
                             "100 per cent; above 0 s")
        if verify and blocks < 2 * depth * len(self._queues):
            raise ValueError(f"{blocks} blocks are too few to verify with {depth * len(self._queues)} requests under "
                             "way; twice as many are needed")
        if poll not in ("busy", "sleep"):
            raise ValueError(f"poll {poll!r} is neither 'busy' nor 'sleep'")
        self.load.depth, self.load.size, self.load.blocks = depth, size, blocks
        self.load.stride = _stride(size)
        self.load.writes = writes * 65536 // 100
        self.load.verify, self.load.sleep = verify, poll == "sleep"
        self.load.patience_ns = <uint64_t>(patience * SECOND_NS)
        self.load.random = <uint64_t>(seed & 0xffffffff) * 2 + 1
        if verify:
            self.load.sums = <uint64_t*>calloc(blocks, 8)
            self.load.taken = <uint8_t*>calloc(blocks, 1)
            if self.load.sums == NULL or self.load.taken == NULL:
                raise MemoryError("checksums")
        self.load.queues = <load_queue_t*>calloc(len(self._queues), sizeof(load_queue_t))
        if self.load.queues == NULL:
            raise MemoryError("queues")
        for queue in self._queues:
            self._set_queue(queue, indirect)

    def _set_queue(self, DriverQueue queue, indirect):
        """Give one queue its slots."""
        cdef load_queue_t* side = &self.load.queues[self.load.queue_count]
        cdef Block heads, data, tables
        cdef uint32_t i
        if queue.outstanding:
            raise ValueError(f"the queue has {queue.outstanding} buffers outstanding; give a fresh one, or reset it")
        if indirect and not has_feature(queue.features, VIRTIO_F_INDIRECT_DESC):
            raise ValueError("indirect descriptors were asked for, but INDIRECT_DESC (bit 28) is not among the queue's "
                             "features")
        if not indirect and queue.size < 3:
            raise ValueError(f"a request has three descriptors; a ring of {queue.size} has no room for it")
        heads = queue.memory.alloc(HEAD_BYTES * self.load.depth)
        data = queue.memory.alloc(self.load.stride * self.load.depth, align=PAGE)
        self._blocks += [heads, data]
        side.driver = &queue.driver
        side.heads, side.heads_addr = heads.data, heads.guest_addr
        side.data, side.data_addr = data.data, data.guest_addr
        if indirect:
            tables = queue.memory.alloc(TABLE_BYTES * self.load.depth)
            self._blocks.append(tables)
            side.tables, side.tables_addr = <virtq_desc_t*>tables.data, tables.guest_addr
        side.slots = <load_slot_t*>calloc(self.load.depth, sizeof(load_slot_t))
        side.free = <uint32_t*>calloc(self.load.depth, sizeof(uint32_t))
        side.slot_of = <uint16_t*>calloc(queue.size, sizeof(uint16_t))
        self.load.queue_count += 1
        if side.slots == NULL or side.free == NULL or side.slot_of == NULL:
            raise MemoryError("slots")
        for i in range(self.load.depth):
            side.free[i] = i
            load_fill(side.data + i * self.load.stride, self.load.size, i)
        side.free_count = self.load.depth

    def __dealloc__(self):
        cdef uint32_t i
        if self.load.queues != NULL:
            for i in range(self.load.queue_count):
                free(self.load.queues[i].slots)
                free(self.load.queues[i].free)
                free(self.load.queues[i].slot_of)
        free(self.load.queues)
        free(self.load.sums)
        free(self.load.taken)

    def run(self, duration=1.0):
        """Keep requests under way for `duration` seconds, or until `stop`; then wait for those that still are.

        Raises
        ------
        BrokenRingError
            The device broke a ring.
        RuntimeError
            A queue is in use already.
        """
        cdef DriverQueue queue
        cdef uint64_t duration_ns = <uint64_t>(duration * SECOND_NS)
        cdef int ended
        claimed = []
        affinity = None
        try:
            for queue in self._queues:
                queue.claim()
                claimed.append(queue)
            if self.cpu is not None:
                affinity = os.sched_getaffinity(0)
                os.sched_setaffinity(0, {self.cpu})
            with nogil:
                ended = load_run(&self.load, duration_ns)
        finally:
            for queue in claimed:
                queue.unclaim()
            if affinity is not None:
                os.sched_setaffinity(0, affinity)
        if ended == LOAD_BROKEN:
            for queue in self._queues:
                if queue.driver.error != DRIVER_OK:
                    raise BrokenRingError(queue.driver.error, queue.driver.error_value, queue.driver.num)

    def stop(self):
        """Let `run` end soon, from any thread."""
        vq_store_release_u32(&self.load.stop, 1)

    @property
    def counters(self):
        """dict of int: reads and writes that were done, failed, changed, lost.

        `changed`: what was read is not what had been written or read there, or the used length is wrong.
        """
        cdef load_t* load = &self.load
        return {"reads": vq_load_u64(&load.reads), "writes": vq_load_u64(&load.written),
                "failed": vq_load_u64(&load.failed), "changed": vq_load_u64(&load.changed),
                "lost": vq_load_u64(&load.lost)}

    @property
    def seconds(self):
        """float: how long requests have been kept under way, without the wait at the end."""
        return vq_load_u64(&self.load.active_ns) / 1e9
