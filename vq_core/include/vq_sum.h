/* The sum under every checksum, in the widest vectors that the machine has: a choice of instruction set for one
 * function is what Cython cannot say. Included by vq_core/offload.pyx alone.
 */
#ifndef VQ_SUM_H
#define VQ_SUM_H

#include "vq_arch.h"

/* `total` wraps, `high` does not (that takes 2^32 words): total - (high << 32) is the exact sum of the low halves of
 * all words. Three operations a word, no carries, and compilers make vectors of them. */
#define VQ_SUM_LOOP(words, count)                      \
    uint64_t total = 0, high = 0;                      \
    for (uint32_t i = 0; i < (count); i++) {           \
        uint64_t word = (words)[i];                    \
        total += word;                                 \
        high += word >> 32;                            \
    }                                                  \
    return (total - (high << 32)) + high;

#if defined(__x86_64__) && defined(__GNUC__)
static int vq_sum_wide; /* set once, before the first worker starts */

typedef uint64_t vq_v4u64 __attribute__((vector_size(32)));
typedef uint64_t __attribute__((vector_size(32), may_alias, aligned(1))) vq_v4u64_any;

/* Two vectors a step, each read from memory once: packets lie across cache lines, where the two reads that compilers
 * make of VQ_SUM_LOOP cost more than the sums. The lanes are put together by the same arithmetic, each lane's high
 * halves before the lanes, which saves half of the shuffles. */
static __attribute__((noinline, target("avx2"))) uint64_t vq_sum_avx2(const vq_u64_any *words, uint32_t count) {
    vq_v4u64 total = {0}, high = {0};
    uint32_t i = 0;
    for (; i + 8 <= count; i += 8) {
        vq_v4u64 a = *(const vq_v4u64_any *)(words + i), b = *(const vq_v4u64_any *)(words + i + 4);
        __asm__("" : "+x"(a), "+x"(b)); /* so that neither is read again */
        total += a + b;
        high += (a >> 32) + (b >> 32);
    }
    total = total - (high << 32) + high;
    uint64_t sum = total[0] + total[1] + total[2] + total[3];
    for (; i < count; i++) sum += (words[i] & 0xffffffff) + (words[i] >> 32);
    return sum;
}
static void vq_sum_choose(void) { vq_sum_wide = __builtin_cpu_supports("avx2") != 0; }
#else
static void vq_sum_choose(void) {}
#endif

/* Sum of `count` 64-bit words at any address as 32-bit halves; count up to 2^28, so that it stays below 2^61. */
VQ_INLINE uint64_t vq_sum_words(const void *data, uint32_t count) {
    const vq_u64_any *words = (const vq_u64_any *)data;
#if defined(__x86_64__) && defined(__GNUC__)
    if (count >= 16 && vq_sum_wide) return vq_sum_avx2(words, count);
#endif
    VQ_SUM_LOOP(words, count)
}

#endif
