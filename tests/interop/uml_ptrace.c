/* Loaded before User-mode Linux: lets it run on processors that have more registers than it knows.
 *
 * Its kernel keeps the extended state of a process in a buffer that ends before the tiles of AMX. The host takes such a
 * state only whole, and the guest would panic as it starts. Here the tiles, which no program of ours uses, are added.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

enum {
    STATE_MAX = 1 << 16,
    XFEATURES = 512 /* where the state says which parts of it are in use */
};
#define TILES (UINT64_C(3) << 17)

typedef long ptrace_call(int request, ...);

static long set_whole(ptrace_call *next, long pid, void *kind, const struct iovec *part) {
    static _Alignas(64) unsigned char state[STATE_MAX];
    struct iovec whole = {state, sizeof state};
    uint64_t used;
    if (next(PTRACE_GETREGSET, pid, kind, &whole) < 0)
        return -1;
    if (part->iov_len < XFEATURES + sizeof used || part->iov_len >= whole.iov_len)
        return next(PTRACE_SETREGSET, pid, kind, part);
    memcpy(state, part->iov_base, part->iov_len);
    memcpy(&used, state + XFEATURES, sizeof used);
    used &= ~TILES;
    memcpy(state + XFEATURES, &used, sizeof used);
    return next(PTRACE_SETREGSET, pid, kind, &whole);
}

long ptrace(enum __ptrace_request request, ...) {
    static ptrace_call *next;
    va_list words;
    va_start(words, request);
    long pid = va_arg(words, long);
    void *addr = va_arg(words, void *);
    void *data = va_arg(words, void *);
    va_end(words);
    if (next == NULL)
        next = (ptrace_call *)dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && addr == (void *)(size_t)NT_X86_XSTATE)
        return set_whole(next, pid, addr, data);
    return next(request, pid, addr, data);
}
