"""Translations of an IOMMU: what the control thread does to them."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from vq_core.arch cimport vq_exchange_u32, vq_store_release_pointer, vq_store_release_u32
from vq_core.clock cimport CLOCK_MONOTONIC, SECOND_NS, clock_now
from vq_core.memory cimport MemoryMap, memory_translate, memory_user_translate, region_t
from vq_core.misses cimport (MISS_ASKED, MISSES_MAX, MissTable, miss_t, misses_age, misses_answer, misses_asked,
                             misses_clear, misses_expire, misses_free, misses_next, misses_note, misses_oldest)
from vq_core.virtio cimport gpa_t, iova_t

import os

cdef uint64_t END = 0xffffffffffffffff


cdef iotlb_entry_t* iotlb_find(iotlb_view_t* view, iova_t iova) noexcept nogil:
    """The entry that holds `iova`, or NULL. Binary search."""
    cdef uint32_t low = 0, high = view.count, middle
    while low < high:
        middle = (low + high) >> 1
        if iova < view.entries[middle].iova:
            high = middle
        elif iova > view.entries[middle].last:
            low = middle + 1
        else:
            return &view.entries[middle]
    return NULL


# ---- making views ----

cdef iotlb_view_t* _draft(uint32_t room) except NULL:
    """An empty view with room for so many entries."""
    cdef iotlb_view_t* view = <iotlb_view_t*>malloc(sizeof(iotlb_view_t) + room * sizeof(iotlb_entry_t))
    if view == NULL:
        raise MemoryError("IOTLB view")
    view.generation = 0
    view.count = 0
    view.older = NULL
    view.entries = <iotlb_entry_t*>(view + 1)
    return view


cdef void _append(iotlb_view_t* view, iotlb_entry_t* entry) noexcept nogil:
    """Add an entry behind all others, joining it with the last one if they are contiguous in all address spaces."""
    cdef iotlb_entry_t* before
    cdef uint64_t size
    if view.count > 0:
        before = &view.entries[view.count - 1]
        size = before.last - before.iova + 1         # below 2^64, since something lies behind it
        if before.last + 1 == entry.iova and before.perm == entry.perm and before.host + size == entry.host \
                and before.guest_addr + size == entry.guest_addr:
            before.last = entry.last
            return
    view.entries[view.count] = entry[0]
    view.count += 1


cdef void _append_part(iotlb_view_t* view, iotlb_entry_t* entry, iova_t iova, iova_t last) noexcept nogil:
    """Add the part of an entry from `iova` to `last`, both of which lie inside it."""
    cdef iotlb_entry_t part
    part.iova = iova
    part.last = last
    part.host = entry.host + (iova - entry.iova)
    part.guest_addr = entry.guest_addr + (iova - entry.iova)
    part.perm = entry.perm
    _append(view, &part)


cdef void _replace(iotlb_view_t* view, iotlb_view_t* old, iova_t iova, iova_t last,
                   iotlb_entry_t* entry) noexcept nogil:
    """Fill `view` with the entries of `old`, but for [iova, last], where `entry` comes, or nothing if it is NULL."""
    cdef iotlb_entry_t* other
    cdef uint32_t i
    for i in range(old.count):
        other = &old.entries[i]
        if other.iova < iova:
            _append_part(view, other, other.iova, min(other.last, iova - 1))
    if entry != NULL:
        _append(view, entry)
    for i in range(old.count):
        other = &old.entries[i]
        if other.last > last:
            _append_part(view, other, max(other.iova, last + 1), other.last)


cdef bint _loses(iotlb_view_t* old, iova_t iova, iova_t last, iotlb_entry_t* entry) noexcept nogil:
    """Whether something that [iova, last] translates to, or permits, is void when `entry` (NULL: nothing) comes there.
    """
    cdef iotlb_entry_t* other
    cdef uint32_t i
    for i in range(old.count):
        other = &old.entries[i]
        if other.last < iova or other.iova > last:
            continue
        # Both are contiguous: they say the same everywhere if they do so at one place. Pointers may wrap on the way.
        if entry == NULL or other.perm & ~entry.perm or other.guest_addr - other.iova != entry.guest_addr - iova \
                or other.host - entry.host != <ssize_t>(other.iova - iova):
            return True
    return False


cdef void _drive_out(iotlb_view_t* view, iova_t newest, uint64_t* dice) noexcept nogil:
    """Take out entries, any but the one at `newest`, until the others fit: no choice is better than a random one."""
    cdef uint32_t victim, i
    while view.count > IOTLB_ENTRIES_MAX:
        dice[0] ^= dice[0] << 13
        dice[0] ^= dice[0] >> 7
        dice[0] ^= dice[0] << 17
        victim = <uint32_t>(dice[0] % view.count)
        if view.entries[victim].iova <= newest <= view.entries[victim].last:
            continue
        view.count -= 1
        for i in range(victim, view.count):
            view.entries[i] = view.entries[i + 1]


cdef class Iotlb:
    """The translations of one connection, for all queues of its device.

    Raises
    ------
    OSError
        There is no room for another descriptor.

    Attributes
    ----------
    partial : bool
        Entries were driven out to make room: something may be in use that no view tells of.

    Notes
    -----
    Threading: for the control thread. What a change took away is in use until `vq_core.queue.settle` has returned.
    Spec: vhost-user, "IOMMU support".
    """

    def __cinit__(self):
        self.iotlb.misses.event_fd = -1
        self.iotlb.view = _draft(0)
        self.iotlb.nowhere.regions = &self.iotlb.nothing
        self.iotlb.nowhere.lost = &self.iotlb.never
        self._dice = 0x9e3779b97f4a7c15
        self._former = []
        self._own = MissTable()
        self._tables = [self._own]
        self.iotlb.misses.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __dealloc__(self):
        self._reclaim()
        free(self.iotlb.view)
        self.close()

    def close(self):
        """Close the descriptor, when no queue uses the translations any more; may be called twice."""
        if self.iotlb.misses.event_fd >= 0:
            os.close(self.iotlb.misses.event_fd)
            self.iotlb.misses.event_fd = -1

    # -- views --

    cdef int _publish(self, iotlb_view_t* view) except -1:
        """Put a new view in place of the present one, which is kept for those who still read it."""
        cdef iotlb_view_t* old = self.iotlb.view
        view.generation = old.generation + 1
        # Release: pairs with the acquire in iotlb_view.
        vq_store_release_pointer(&self.iotlb.view, view)
        old.older = self._retired
        self._retired = old
        self._retired_count += 1
        return 0

    cdef void _reclaim(self) noexcept:
        """Free the retired views; nobody reads them any more."""
        cdef iotlb_view_t* view
        while self._retired != NULL:
            view = self._retired
            self._retired = view.older
            free(view)
        self._retired_count = 0
        self._former = []

    cdef int _attach(self, MissTable table) except -1:
        self._tables.append(table)
        return 0

    cdef int _detach(self, MissTable table) except -1:
        """Forget what a queue missed, which does not use its table any more."""
        misses_clear(&table.table)
        self._tables = [one for one in self._tables if one is not table]
        return 0

    def set_memory(self, MemoryMap memory):
        """Take over another map (None: nothing); entries whose memory it still has, at the same place, stay.

        Returns
        -------
        bool
            Whether entries are gone.
        """
        cdef iotlb_view_t* old = self.iotlb.view
        cdef iotlb_view_t* view = _draft(old.count)
        cdef region_t* hint
        cdef iotlb_entry_t* entry
        cdef uint64_t kept = 0
        cdef uint32_t i
        for i in range(old.count):
            entry = &old.entries[i]
            if memory is None or entry.last - entry.iova == END:
                continue
            hint = memory.memory.regions
            if memory_translate(&memory.memory, &hint, entry.guest_addr, entry.last - entry.iova + 1) == entry.host:
                _append(view, entry)
                kept += 1
        self._former.append(self._memory)
        self._memory = memory
        self.iotlb.nowhere.lost = &self.iotlb.never if memory is None else memory.memory.lost
        self._publish(view)
        return kept != old.count

    def update(self, iova_t iova, uint64_t size, uint64_t address, uint32_t perm, *, guest_addresses=False):
        """Take over a translation (IOTLB_MSG UPDATE).

        Parameters
        ----------
        iova, size : int
            Range in bytes, size > 0, which must not pass 2^64.
        address : int
            Where it lies: front-end user address, or guest physical address with `guest_addresses`.
        perm : int
            1 read, 2 write, 3 both.

        Returns
        -------
        bool
            Whether the range meant something else before.

        Raises
        ------
        ValueError
            A value is out of range, or the memory does not lie in one region.
        """
        cdef iotlb_entry_t entry
        cdef iotlb_view_t* view
        cdef region_t* hint
        cdef bint lost
        where = f"IOTLB update of {size:#x} bytes at {iova:#x}"
        if size == 0 or iova > END - (size - 1):
            raise ValueError(f"{where}: it is empty or passes 2^64")
        if not 1 <= perm <= 3:
            raise ValueError(f"{where}: perm {perm}; 1 is read, 2 write, 3 both")
        if self._memory is None:
            raise ValueError(f"{where}: no memory table has been set")
        if guest_addresses:
            hint = self._memory.memory.regions
            entry.guest_addr = address
            entry.host = memory_translate(&self._memory.memory, &hint, address, size)
        else:
            entry.host = memory_user_translate(&self._memory.memory, address, size, &entry.guest_addr)
        if entry.host == NULL:
            raise ValueError(f"{where}: {address:#x} does not lie in one memory region as a whole")
        entry.iova = iova
        entry.last = iova + (size - 1)
        entry.perm = perm
        lost = _loses(self.iotlb.view, iova, entry.last, &entry)
        view = _draft(self.iotlb.view.count + 2)
        _replace(view, self.iotlb.view, iova, entry.last, &entry)
        if view.count > IOTLB_ENTRIES_MAX:
            self.partial = True
            _drive_out(view, iova, &self._dice)
        self._publish(view)
        for table in self._tables:
            misses_answer(&(<MissTable>table).table, iova, entry.last, perm)
        return bool(lost)

    def invalidate(self, iova_t iova, iova_t last):
        """Forget [iova, last] (IOTLB_MSG INVALIDATE); whether a worker may be using something of it."""
        cdef iotlb_view_t* view
        if not _loses(self.iotlb.view, iova, last, NULL):
            return self._retired != NULL             # it may be in one of these
        view = _draft(self.iotlb.view.count + 1)
        _replace(view, self.iotlb.view, iova, last, NULL)
        if view.count > IOTLB_ENTRIES_MAX:           # one was cut in two
            self.partial = True
            _drive_out(view, iova, &self._dice)
        self._publish(view)
        return True

    def again(self):
        """A new view that says the same, so that parked queues try once more."""
        cdef iotlb_view_t* old = self.iotlb.view
        cdef iotlb_view_t* view = _draft(old.count)
        memcpy(view.entries, old.entries, old.count * sizeof(iotlb_entry_t))
        view.count = old.count
        self._publish(view)

    # -- looking --

    cdef uint8_t* _locate(self, iova_t iova, uint64_t length, uint32_t perm, gpa_t* guest_addr) noexcept:
        """The pointer for [iova, iova + length) if all of it is there and contiguous, in our memory and for the guest.
        """
        cdef uint64_t part
        cdef gpa_t next_guest_addr
        cdef uint8_t* host
        cdef uint8_t* start = iotlb_translate_part(self.iotlb.view, iova, length, perm, &part, guest_addr)
        cdef uint64_t done = part
        if start == NULL or iova + (length - 1) < iova:
            return NULL
        while done < length:             # neighbours that differ in their permissions
            host = iotlb_translate_part(self.iotlb.view, iova + done, length - done, perm, &part, &next_guest_addr)
            if host != start + done or next_guest_addr != guest_addr[0] + done:
                return NULL
            done += part
        return start

    def lacking(self, iova_t iova, uint64_t length, uint32_t perm, int most=MISSES_MAX):
        """list of int: where something of [iova, iova + length) is missing, an address for each page, `most` of them.
        """
        cdef uint64_t part, done = 0
        cdef gpa_t guest_addr
        found = []
        while done < length and iova + done >= iova and len(found) < most:
            if iotlb_translate_part(self.iotlb.view, iova + done, length - done, perm, &part, &guest_addr) == NULL:
                found.append(iova + done)
                part = IOTLB_PAGE - (iova + done) % IOTLB_PAGE
            done += part
        return found

    def guest_address(self, iova_t iova, uint64_t length, uint32_t perm):
        """int or None: where [iova, iova + length) lies for the guest, if all of it is there and contiguous."""
        cdef gpa_t guest_addr
        return None if self._locate(iova, length, perm, &guest_addr) == NULL else guest_addr

    def translate(self, iova_t iova, uint64_t length, uint32_t perm):
        """(guest_addr, bytes) of the first part of a range, or None: what workers see; for tests and diagnostics."""
        cdef uint64_t part
        cdef gpa_t guest_addr
        if iotlb_translate_part(self.iotlb.view, iova, length, perm, &part, &guest_addr) == NULL:
            return None
        return guest_addr, part

    @property
    def crowded(self):
        """bool: so many former views wait that it is time to `settle`."""
        return self._retired_count > IOTLB_RETIRED_MAX

    @property
    def entries(self):
        """list of (iova, last, guest_addr, perm)."""
        return [(self.iotlb.view.entries[i].iova, self.iotlb.view.entries[i].last,
                 self.iotlb.view.entries[i].guest_addr, self.iotlb.view.entries[i].perm)
                for i in range(self.iotlb.view.count)]

    # -- what is missing --

    def fileno(self):
        """int: a descriptor that is readable when `ask` has something to say."""
        return self.iotlb.misses.event_fd

    def miss(self, iova_t iova, uint32_t perm):
        """Note that the control thread misses a translation."""
        misses_note(&self._own.table, &self.iotlb.misses, iova, perm)

    def ask(self, int most):
        """Take what is missing and has not been asked for.

        Parameters
        ----------
        most : int
            How many questions may be open, those from before included.

        Returns
        -------
        list of (iova, perm)
        """
        cdef miss_t* slot
        cdef MissTable table
        cdef uint64_t part
        cdef gpa_t guest_addr
        cdef int at
        cdef int64_t now = clock_now(CLOCK_MONOTONIC)
        try:
            os.eventfd_read(self.iotlb.misses.event_fd)
        except BlockingIOError:
            pass
        vq_exchange_u32(&self.iotlb.misses.told, 0)   # a full fence: what is noted from here on is signalled
        room = most - self.open
        found = []
        # Another queue comes first each time, so that one alone cannot have all the room.
        self._turn = (self._turn + 1) % len(self._tables)
        for table in self._tables[self._turn:] + self._tables[:self._turn]:
            at = misses_next(&table.table, 0)
            while at < MISSES_MAX and len(found) < room:
                slot = &table.table.slots[at]
                # Noted by somebody who looked into an older view. The driver may take the page away as soon as it was
                # used, so that the question would be one for a page that is not there, which IOMMUs report as a fault.
                if iotlb_translate_part(self.iotlb.view, slot.iova, 1, slot.perm, &part, &guest_addr) != NULL:
                    misses_free(slot)
                else:
                    found.append((slot.iova, slot.perm))
                    slot.asked_ns = now
                    vq_store_release_u32(&slot.state, MISS_ASKED)
                at = misses_next(&table.table, at + 1)
        return found

    def expire(self, double seconds):
        """Forget questions that have been open for so long; how many. Who still misses it asks `again`."""
        cdef int64_t before = clock_now(CLOCK_MONOTONIC) - <int64_t>(seconds * SECOND_NS)
        return sum(misses_expire(&(<MissTable>table).table, before) for table in self._tables)

    def doubt(self, iova_t iova, iova_t last, double seconds):
        """Let questions of [iova, last] be so old at least; whether there are any."""
        cdef int64_t asked = clock_now(CLOCK_MONOTONIC) - <int64_t>(seconds * SECOND_NS)
        return sum(misses_age(&(<MissTable>table).table, iova, last, asked) for table in self._tables) > 0

    @property
    def age(self):
        """float: seconds since the oldest open question was asked; 0 if none is open."""
        cdef int64_t now = clock_now(CLOCK_MONOTONIC), oldest = now
        for table in self._tables:
            oldest = misses_oldest(&(<MissTable>table).table, oldest)
        return (now - oldest) / <double>SECOND_NS

    @property
    def open(self):
        """int: questions that have not been answered."""
        return sum(misses_asked(&(<MissTable>table).table) for table in self._tables)
