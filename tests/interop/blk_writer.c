/* Random writes and reads of a disk by several threads, each block verified: runs in the guest.
 *
 *     blk_writer DEVICE FIRST_BLOCK BLOCKS THREADS OPERATIONS
 *
 * A block of 4096 bytes is its number and generation, then words made of both. Thread t has the blocks that leave t when
 * they are divided by THREADS. Each is written once, then operations are chosen at random; at the end all are compared.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8 };

static const char *device;
static long first, blocks, threads, operations;

static uint64_t word(uint64_t block, uint64_t generation, uint64_t place) {
    return (block * 0x9e3779b97f4a7c15u ^ generation * 0xc2b2ae3d27d4eb4fu) + place * 0x165667b19e3779f9u;
}

static void fill(uint64_t *data, uint64_t block, uint64_t generation) {
    data[0] = block;
    data[1] = generation;
    for (int i = 2; i < WORDS; i++) data[i] = word(block, generation, i);
}

static void fail(const char *what, long block) {
    printf("%s block %ld\n", what, block);
    exit(1);
}

static void *run(void *argument) {
    long own = (long)(intptr_t)argument, count = (blocks - own + threads - 1) / threads;
    uint64_t *data, *wanted = malloc(BLOCK), *generations = calloc(count, 8), random = own * 2 + 1;
    int fd = open(device, O_RDWR | O_DIRECT);
    if (fd < 0 || posix_memalign((void **)&data, BLOCK, BLOCK)) fail("no memory or no device for", own);
    for (long n = 0; n < operations + 2 * count; n++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        long at = n < count ? n : n >= operations + count ? n - operations - count : (long)(random >> 20) % count;
        long block = own + at * threads;
        int writes = n < count || (n < operations + count && random & 1);
        off_t place = (off_t)(first + block) * BLOCK;
        if (writes) {
            fill(data, block, ++generations[at]);
            if (pwrite(fd, data, BLOCK, place) != BLOCK) fail("cannot write", block);
        } else {
            fill(wanted, block, generations[at]);
            if (pread(fd, data, BLOCK, place) != BLOCK) fail("cannot read", block);
            if (memcmp(data, wanted, BLOCK)) fail("wrong content of", block);
        }
    }
    if (fsync(fd)) fail("cannot flush", own);
    return NULL;
}

int main(int count, char **words) {
    if (count != 6) return 2;
    device = words[1];
    first = atol(words[2]), blocks = atol(words[3]), threads = atol(words[4]), operations = atol(words[5]);
    pthread_t started[threads];
    for (long i = 0; i < threads; i++) pthread_create(&started[i], NULL, run, (void *)(intptr_t)i);
    for (long i = 0; i < threads; i++) pthread_join(started[i], NULL);
    printf("right\n");
    return 0;
}
