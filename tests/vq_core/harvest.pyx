"""What a front-end does with a dirty log during a migration, as fast as a processor can.

    Harvester(bits, memory)     bits: the log, writable; memory: (guest address, view, copy) of each region
        .once()                 take all bits, then copy the pages that they name; the number of pages
        .run()                  do this without the GIL until .stop() is called, by another thread; the number of rounds

A bit is taken before its page is read, as QEMU does it: what is written to the page afterwards must set it again.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from vq_core.arch cimport vq_exchange_u32, vq_load_acquire_u32, vq_load_u32, vq_store_release_u32

cdef enum:
    PAGE = 4096

cdef struct area_t:
    uint64_t first               # page
    uint64_t pages
    uint8_t* memory
    uint8_t* copy


cdef class Harvester:
    cdef uint32_t* words
    cdef size_t count
    cdef area_t* areas
    cdef int area_count
    cdef uint32_t stopping
    cdef readonly uint64_t strays        # bits of pages that are no memory
    cdef readonly uint64_t taken
    cdef list held

    def __cinit__(self, bits, memory):
        cdef uint8_t[::1] view = bits
        cdef uint8_t[::1] there
        cdef uint8_t[::1] copy
        assert view.shape[0] % 4 == 0
        self.words = <uint32_t*>&view[0]
        self.count = view.shape[0] // 4
        self.areas = <area_t*>calloc(len(memory) + 1, sizeof(area_t))
        self.held = [view]
        for i, (guest_addr, region, mirror) in enumerate(memory):
            there, copy = region, mirror
            assert guest_addr % PAGE == 0 and there.shape[0] % PAGE == 0 and there.shape[0] == copy.shape[0]
            self.areas[i].first = guest_addr // PAGE
            self.areas[i].pages = there.shape[0] // PAGE
            self.areas[i].memory = &there[0]
            self.areas[i].copy = &copy[0]
            self.held += [there, copy]
        self.area_count = len(memory)

    def __dealloc__(self):
        free(self.areas)

    cdef void _copy(self, uint64_t page) noexcept nogil:
        cdef area_t* area
        cdef uint64_t at
        cdef int i
        for i in range(self.area_count):
            area = &self.areas[i]
            if area.first <= page < area.first + area.pages:
                at = (page - area.first) * PAGE
                memcpy(area.copy + at, area.memory + at, PAGE)
                self.taken += 1
                return
        self.strays += 1

    cdef int _once(self) noexcept nogil:
        cdef uint32_t bits
        cdef size_t i
        cdef int bit, pages = 0
        for i in range(self.count):
            if vq_load_u32(&self.words[i]) == 0:
                continue
            bits = vq_exchange_u32(&self.words[i], 0)    # a full fence: the pages are read afterwards
            for bit in range(32):
                if bits >> bit & 1:
                    self._copy(32 * i + bit)
                    pages += 1
        return pages

    def once(self):
        return self._once()

    def run(self):
        cdef uint64_t rounds = 0
        with nogil:
            while not vq_load_acquire_u32(&self.stopping):
                self._once()
                rounds += 1
        return rounds

    def stop(self):
        vq_store_release_u32(&self.stopping, 1)
