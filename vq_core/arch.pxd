"""What Cython cannot say: ordered and once-only access, prefetch, pause, short copies.

Only the files named in tests/quality/test_casts.py may use the snapshot and put functions on
guest memory. Each use of an ordered access names the access that it pairs with.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "vq_arch.h" nogil:
    uint16_t vq_load_acquire_u16(const void* p) noexcept
    uint16_t vq_load_u16(const void* p) noexcept
    void vq_store_release_u16(void* p, uint16_t v) noexcept
    void vq_store_u16(void* p, uint16_t v) noexcept
    uint64_t vq_load_u64(const void* p) noexcept
    void vq_store_u64(void* p, uint64_t v) noexcept
    uint64_t vq_load_acquire_u64(const void* p) noexcept
    void vq_store_release_u64(void* p, uint64_t v) noexcept
    uint32_t vq_load_acquire_u32(const void* p) noexcept
    uint32_t vq_load_u32(const void* p) noexcept
    void vq_store_release_u32(void* p, uint32_t v) noexcept
    void* vq_load_acquire_pointer(const void* p) noexcept
    void vq_store_release_pointer(void* p, void* v) noexcept
    uint32_t vq_exchange_u32(void* p, uint32_t v) noexcept
    uint8_t vq_load_u8(const void* p) noexcept
    void vq_store_release_u8(void* p, uint8_t v) noexcept
    void vq_or_u8(void* p, uint8_t v) noexcept
    void vq_fence() noexcept
    void vq_fence_release() noexcept
    void vq_pause() noexcept
    uint64_t vq_cycles() noexcept
    uint32_t vq_log2(uint32_t v) noexcept
    void vq_prefetch(const void* p) noexcept
    void vq_prefetch_write(const void* p) noexcept
    void vq_snapshot16(void* to, const void* source) noexcept
    uint64_t vq_snapshot_u64(const void* source) noexcept
    uint32_t vq_snapshot_u32(const void* source) noexcept
    uint16_t vq_snapshot_u16(const void* source) noexcept
    void vq_put_u64(void* to, uint64_t v) noexcept
    void vq_put_u32(void* to, uint32_t v) noexcept
    void vq_put_u16(void* to, uint16_t v) noexcept
    void vq_copy(void* to, const void* source, uint32_t n) noexcept
