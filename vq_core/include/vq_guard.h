/* The memory guard: guest memory that its owner truncates raises SIGBUS where a worker
 * touches it. The handler puts zero pages in place of the lost range and raises the flag of
 * its memory map; the worker looks at the flag once a burst and breaks that port's queues.
 * Included by vq_core/memory.pyx alone, so that there is one list in the process.
 *
 * Async-signal safety: the handler only walks a list whose nodes are never freed (they are
 * recycled), calls mmap (a bare system call), and stores the flag.
 */
#ifndef VQ_GUARD_H
#define VQ_GUARD_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include "vq_arch.h"

typedef struct vq_guard_node {
    struct vq_guard_node *next;
    struct vq_guard_node *next_free; /* under the lock; the handler does not look at it */
    uintptr_t start; /* 0: free for reuse */
    uintptr_t end;
    uint32_t *flag;
} vq_guard_node;

static vq_guard_node *vq_guard_list;
static vq_guard_node *vq_guard_free;
static long vq_guard_count; /* ranges that are guarded; written under the lock */
static pthread_mutex_t vq_guard_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction vq_guard_previous;
static int vq_guard_installed;

static void vq_guard_handler(int number, siginfo_t *info, void *context) {
    uintptr_t address = (uintptr_t)info->si_addr;
    for (vq_guard_node *node = __atomic_load_n(&vq_guard_list, __ATOMIC_ACQUIRE); node; node = node->next) {
        uintptr_t start = __atomic_load_n(&node->start, __ATOMIC_ACQUIRE);
        uintptr_t end = __atomic_load_n(&node->end, __ATOMIC_ACQUIRE);
        /* The second look at start: a node that was recycled between the two loads has another one. */
        if (start && address >= start && address < end && start == __atomic_load_n(&node->start, __ATOMIC_ACQUIRE)) {
            void *got = mmap((void *)start, end - start, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
            if (got == MAP_FAILED) break;
            __atomic_store_n(node->flag, 1u, __ATOMIC_RELEASE);
            return;
        }
    }
    /* Not ours: hand it to whoever was there before; without one, die as the kernel would. */
    if (vq_guard_previous.sa_flags & SA_SIGINFO) {
        vq_guard_previous.sa_sigaction(number, info, context);
    } else if (vq_guard_previous.sa_handler != SIG_DFL && vq_guard_previous.sa_handler != SIG_IGN) {
        vq_guard_previous.sa_handler(number);
    } else {
        signal(SIGBUS, SIG_DFL);
    }
}

/* Returns 0, or -1 with errno. Installs the handler at the first call; later calls are free. */
static int vq_guard_install(void) {
    int result = 0;
    pthread_mutex_lock(&vq_guard_lock);
    if (!vq_guard_installed) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = vq_guard_handler;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigemptyset(&action.sa_mask);
        result = sigaction(SIGBUS, &action, &vq_guard_previous);
        vq_guard_installed = result == 0;
    }
    pthread_mutex_unlock(&vq_guard_lock);
    return result;
}

/* How many ranges are guarded now. */
static long vq_guard_used(void) { return __atomic_load_n(&vq_guard_count, __ATOMIC_RELAXED); }

/* Guards [start, start + bytes); returns a handle for vq_guard_remove, or NULL with errno: ENOMEM, or ENOSPC when
 * `most` ranges are guarded already. */
static void *vq_guard_add(void *start, uint64_t bytes, uint32_t *flag, long most) {
    pthread_mutex_lock(&vq_guard_lock);
    if (vq_guard_count >= most) {
        pthread_mutex_unlock(&vq_guard_lock);
        errno = ENOSPC;
        return NULL;
    }
    vq_guard_node *node = vq_guard_free;
    int fresh = node == NULL;
    if (fresh) {
        node = (vq_guard_node *)calloc(1, sizeof *node);
    } else {
        vq_guard_free = node->next_free;
    }
    if (node) {
        node->flag = flag;
        __atomic_store_n(&node->end, (uintptr_t)start + bytes, __ATOMIC_RELEASE);
        __atomic_store_n(&node->start, (uintptr_t)start, __ATOMIC_RELEASE);
        if (fresh) {
            node->next = vq_guard_list;
            __atomic_store_n(&vq_guard_list, node, __ATOMIC_RELEASE);
        }
        __atomic_store_n(&vq_guard_count, vq_guard_count + 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&vq_guard_lock);
    return node; /* calloc has set errno */
}

/* Ends the guard; comes before munmap, after every worker has left the map. */
static void vq_guard_remove(void *slot) {
    vq_guard_node *node = (vq_guard_node *)slot;
    pthread_mutex_lock(&vq_guard_lock);
    __atomic_store_n(&node->start, (uintptr_t)0, __ATOMIC_RELEASE);
    node->next_free = vq_guard_free;
    vq_guard_free = node;
    __atomic_store_n(&vq_guard_count, vq_guard_count - 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&vq_guard_lock);
}

#endif
