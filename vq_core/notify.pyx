"""Signals to a peer that cannot hold us.

An asynchronous read of no interest (of /dev/null) is submitted with the peer's eventfd as the place to report its
end to. The kernel counts the end into the eventfd at once, and never waits: a full counter stays full. It costs about
two microseconds more than a write, which a queue pays only when its driver asked to be called.

Where the kernel or a sandbox has no asynchronous I/O a plain write is left, on a descriptor that was made O_NONBLOCK.

Linux's virtio_uml waits for its calls with SIGIO, which eventfds do not have, and gives us one end of a pair of Unix
stream sockets. There each message says for itself that it does not wait.
"""
from libc.errno cimport EAGAIN, EINVAL, ENOTSOCK, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from vq_core.arch cimport (vq_load_acquire_u32, vq_load_u32, vq_load_u64, vq_pause,
                           vq_store_release_u32, vq_store_u64)
from vq_core.clock cimport CLOCK_THREAD_CPUTIME_ID, clock_now

import os

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void* data, size_t bytes) noexcept
    long c_syscall "syscall"(long number, ...) noexcept

cdef extern from "<sys/socket.h>" nogil:
    ssize_t c_send "send"(int fd, const void* data, size_t bytes, int flags) noexcept
    int c_getsockopt "getsockopt"(int fd, int level, int name, void* value, uint32_t* bytes) noexcept
    int AF_UNIX, SOCK_STREAM, SOL_SOCKET, SO_DOMAIN, SO_TYPE, MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_io_setup, SYS_io_submit

cdef extern from "<linux/aio_abi.h>" nogil:
    ctypedef unsigned long aio_context_t
    int IOCB_CMD_PREAD, IOCB_FLAG_RESFD
    cdef struct iocb:
        uint16_t aio_lio_opcode
        uint32_t aio_fildes
        uint64_t aio_buf
        uint64_t aio_nbytes
        uint32_t aio_flags
        uint32_t aio_resfd

# The head of the ring of finished requests, which the kernel maps for us at the address of the context. Its layout is
# an interface: libaio reads it too.
cdef struct ring_t:
    uint32_t id
    uint32_t nr
    uint32_t head
    uint32_t tail
    uint32_t magic

cdef enum:
    AIO_RING_MAGIC = 0xa10a10a1
    REQUESTS = 64
    TRIES = 1000
    LONG_NS = 100000             # of the processor for one signal: no honest peer's waiters need as much
    QUICK_NS = 1000              # that a signal which takes less makes up for
    SPENT_MAX_NS = 100000000

cdef aio_context_t _context = 0
cdef ring_t* _ring = NULL
cdef int _null_fd = -1


cdef void _forget_finished() noexcept nogil:
    """Make room in the ring of finished requests.

    Any number of threads at once: nobody reads what the ring holds, so a head that goes back only asks for the next
    one to go forward again. A lock would let a thread that loses its processor inside make all others lose signals.
    """
    vq_store_release_u32(&_ring.head, vq_load_acquire_u32(&_ring.tail))


cdef void notify_signal(int fd) noexcept nogil:
    cdef iocb request
    cdef iocb* requests = &request
    cdef char ignored
    cdef int _try
    cdef uint64_t one = 1
    if fd < 0:
        return
    if _ring != NULL:
        memset(&request, 0, sizeof(request))
        request.aio_lio_opcode = IOCB_CMD_PREAD
        request.aio_fildes = _null_fd
        request.aio_buf = <uint64_t>&ignored
        request.aio_nbytes = 1
        request.aio_flags = IOCB_FLAG_RESFD
        request.aio_resfd = fd
        for _try in range(TRIES):
            if c_syscall(SYS_io_submit, _context, <long>1, &requests) == 1:
                _forget_finished()
                return
            if errno != EAGAIN:
                break
            _forget_finished()       # other threads filled the ring
            vq_pause()
        if errno != EINVAL:
            return                   # a closed descriptor
    # Not an eventfd: a socket, or a pipe, which the control plane has opened anew for us alone, without waiting.
    if c_send(fd, &one, 8, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 and errno == ENOTSOCK:
        c_write(fd, &one, 8)


cdef bint notify_usable(int fd) noexcept nogil:
    cdef int domain = 0, kind = 0
    cdef uint32_t size = sizeof(int)
    if fd < 0 or c_getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0:
        return True                  # no socket
    size = sizeof(int)
    return domain == AF_UNIX and c_getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) == 0 and kind == SOCK_STREAM


cdef bint notify_measured(peer_t* peer, int fd) noexcept nogil:
    cdef int64_t began
    cdef uint64_t took, spent
    if vq_load_u32(&peer.muted):
        return False
    began = clock_now(CLOCK_THREAD_CPUTIME_ID)
    notify_signal(fd)
    took = <uint64_t>(clock_now(CLOCK_THREAD_CPUTIME_ID) - began)
    # Two workers may come here at once, and then one sum is forgotten.
    spent = vq_load_u64(&peer.spent_ns)
    if took < LONG_NS:
        if spent:
            vq_store_u64(&peer.spent_ns, spent - min(spent, <uint64_t>QUICK_NS))
        return False
    spent += took
    vq_store_u64(&peer.spent_ns, spent)
    if spent < SPENT_MAX_NS:
        return False
    vq_store_release_u32(&peer.muted, 1)
    return True


def signal(int fd):
    """Signal an eventfd or pipe of a peer once, without ever waiting for it."""
    with nogil:
        notify_signal(fd)


def _open():
    global _context, _ring, _null_fd
    cdef ring_t* ring
    _null_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    if c_syscall(SYS_io_setup, <long>REQUESTS, &_context) == 0:
        ring = <ring_t*>_context
        if ring.magic == AIO_RING_MAGIC:
            _ring = ring


_open()
