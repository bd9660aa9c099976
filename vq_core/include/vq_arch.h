/* The only C of vq: what Cython cannot say.
 *
 * Ordering (VIRTIO 1.3, 2.7.13; the pairs are named where they are used), reads of
 * shared memory that happen exactly once, prefetch, pause, cycle counter, short copies.
 * (vq_guard.h holds the guard against guest memory that its owner truncates.)
 */
#ifndef VQ_ARCH_H
#define VQ_ARCH_H

#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define VQ_INLINE static inline __attribute__((always_inline, unused))

/* A guest may place anything anywhere: such types may alias and may be unaligned. */
typedef uint64_t __attribute__((may_alias, aligned(1))) vq_u64_any;
typedef uint32_t __attribute__((may_alias, aligned(1))) vq_u32_any;
typedef uint16_t __attribute__((may_alias, aligned(1))) vq_u16_any;

VQ_INLINE uint16_t vq_load_acquire_u16(const volatile void *p) {
    return __atomic_load_n((const volatile uint16_t *)p, __ATOMIC_ACQUIRE);
}
VQ_INLINE uint16_t vq_load_u16(const volatile void *p) {
    return __atomic_load_n((const volatile uint16_t *)p, __ATOMIC_RELAXED);
}
VQ_INLINE void vq_store_release_u16(volatile void *p, uint16_t v) {
    __atomic_store_n((volatile uint16_t *)p, v, __ATOMIC_RELEASE);
}
VQ_INLINE void vq_store_u16(volatile void *p, uint16_t v) {
    __atomic_store_n((volatile uint16_t *)p, v, __ATOMIC_RELAXED);
}
VQ_INLINE void vq_store_u64(volatile void *p, uint64_t v) {
    __atomic_store_n((volatile uint64_t *)p, v, __ATOMIC_RELAXED);
}
VQ_INLINE uint64_t vq_load_u64(const volatile void *p) {
    return __atomic_load_n((const volatile uint64_t *)p, __ATOMIC_RELAXED);
}
VQ_INLINE uint64_t vq_load_acquire_u64(const volatile void *p) {
    return __atomic_load_n((const volatile uint64_t *)p, __ATOMIC_ACQUIRE);
}
VQ_INLINE void vq_store_release_u64(volatile void *p, uint64_t v) {
    __atomic_store_n((volatile uint64_t *)p, v, __ATOMIC_RELEASE);
}
VQ_INLINE uint32_t vq_load_acquire_u32(const volatile void *p) {
    return __atomic_load_n((const volatile uint32_t *)p, __ATOMIC_ACQUIRE);
}
VQ_INLINE uint32_t vq_load_u32(const volatile void *p) {
    return __atomic_load_n((const volatile uint32_t *)p, __ATOMIC_RELAXED);
}
VQ_INLINE void vq_store_release_u32(volatile void *p, uint32_t v) {
    __atomic_store_n((volatile uint32_t *)p, v, __ATOMIC_RELEASE);
}
VQ_INLINE void *vq_load_acquire_pointer(const volatile void *p) {
    return __atomic_load_n((void *const volatile *)p, __ATOMIC_ACQUIRE);
}
VQ_INLINE void vq_store_release_pointer(volatile void *p, void *v) {
    __atomic_store_n((void *volatile *)p, v, __ATOMIC_RELEASE);
}
VQ_INLINE uint32_t vq_exchange_u32(volatile void *p, uint32_t v) {
    return __atomic_exchange_n((volatile uint32_t *)p, v, __ATOMIC_SEQ_CST);
}
VQ_INLINE uint8_t vq_load_u8(const volatile void *p) {
    return __atomic_load_n((const volatile uint8_t *)p, __ATOMIC_RELAXED);
}
VQ_INLINE void vq_store_release_u8(volatile void *p, uint8_t v) {
    __atomic_store_n((volatile uint8_t *)p, v, __ATOMIC_RELEASE);
}
VQ_INLINE void vq_or_u8(volatile void *p, uint8_t v) {
    __atomic_fetch_or((volatile uint8_t *)p, v, __ATOMIC_RELAXED);
}
VQ_INLINE void vq_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
VQ_INLINE void vq_fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }

VQ_INLINE void vq_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
/* One to four billion a second, whatever is counted: what waits by it has its bounds in such cycles. Arm's counter may
 * be as slow as a megahertz; where there is none to read these are nanoseconds. */
VQ_INLINE uint64_t vq_cycles(void) {
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t v, hz;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(v));
    __asm__("mrs %0, cntfrq_el0" : "=r"(hz));
    return v << (__builtin_clzll(hz | 1) > 33 ? __builtin_clzll(hz | 1) - 33 : 0);
#else
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
#endif
}
/* Position of the highest bit that is set; v > 0. */
VQ_INLINE uint32_t vq_log2(uint32_t v) { return 31u - (uint32_t)__builtin_clz(v); }
VQ_INLINE void vq_prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
/* For a line that is about to be written: it comes at once as ours alone, instead of shared first and ours by a second
 * round trip. The builtin says so only when the compiler is told of a newer processor, but every 64-bit one has it or
 * takes it for nothing. */
VQ_INLINE void vq_prefetch_write(const void *p) {
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)p));
#else
    __builtin_prefetch(p, 1, 3);
#endif
}

/* Snapshots: every byte is read once, and the copy cannot be replaced by a second read
 * (the empty asm makes the compiler forget where the value came from). */
VQ_INLINE void vq_snapshot16(void *to, const void *from) {
#if defined(__SSE2__)
    __m128i v = _mm_loadu_si128((const __m128i *)from);
    __asm__ volatile("" : "+x"(v));
    _mm_storeu_si128((__m128i *)to, v);
#else
    uint64_t a = ((const volatile vq_u64_any *)from)[0], b = ((const volatile vq_u64_any *)from)[1];
    ((vq_u64_any *)to)[0] = a;
    ((vq_u64_any *)to)[1] = b;
#endif
}
VQ_INLINE uint64_t vq_snapshot_u64(const void *from) { return *(const volatile vq_u64_any *)from; }
VQ_INLINE uint32_t vq_snapshot_u32(const void *from) { return *(const volatile vq_u32_any *)from; }
VQ_INLINE uint16_t vq_snapshot_u16(const void *from) { return *(const volatile vq_u16_any *)from; }
VQ_INLINE void vq_put_u64(void *to, uint64_t v) { *(vq_u64_any *)to = v; }
VQ_INLINE void vq_put_u32(void *to, uint32_t v) { *(vq_u32_any *)to = v; }
VQ_INLINE void vq_put_u16(void *to, uint16_t v) { *(vq_u16_any *)to = v; }

/* Copy n bytes; short ones by overlapping moves, without a call. Payload is never decided
 * upon, so reading some of its bytes twice is harmless. */
VQ_INLINE void vq_copy(void *to, const void *from, uint32_t n) {
#if defined(__SSE2__)
    char *d = (char *)to;
    const char *s = (const char *)from;
#define VQ_MOVE(o) _mm_storeu_si128((__m128i *)(d + (o)), _mm_loadu_si128((const __m128i *)(s + (o))))
    if (__builtin_expect(n >= 48 && n <= 128, 1)) {
        __m128i z0 = _mm_loadu_si128((const __m128i *)(s + n - 16));
        VQ_MOVE(0); VQ_MOVE(16); VQ_MOVE(32);
        if (n > 64) {
            VQ_MOVE(48);
            if (n > 80) { VQ_MOVE(64); }
            if (n > 96) { VQ_MOVE(80); }
            if (n > 112) { VQ_MOVE(96); }
        }
        _mm_storeu_si128((__m128i *)(d + n - 16), z0);
        return;
    }
#undef VQ_MOVE
#endif
    memcpy(to, from, n);
}

#endif
