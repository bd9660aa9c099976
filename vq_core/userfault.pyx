"""Opening a userfaultfd, and its ioctls."""
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EPERM, errno as c_errno
from libc.stdint cimport uint64_t
from libc.string cimport memset

import errno
import os
import weakref

cdef extern from "<linux/userfaultfd.h>" nogil:
    cdef struct uffdio_api:
        uint64_t api
        uint64_t features
        uint64_t ioctls
    cdef struct uffdio_range:
        uint64_t start
        uint64_t len
    cdef struct uffdio_register:
        uffdio_range range
        uint64_t mode
        uint64_t ioctls
    unsigned long UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE
    uint64_t UFFD_API, UFFDIO_REGISTER_MODE_MISSING

cdef extern from "<sys/ioctl.h>" nogil:
    int c_ioctl "ioctl"(int fd, unsigned long request, ...) noexcept

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_userfaultfd

cdef extern from "<unistd.h>" nogil:
    long c_syscall "syscall"(long number, ...) noexcept

cdef enum:
    USERFAULTFD_IOC_NEW = 0xaa00     # headers have it from Linux 6.1 on

DEVICE = "/dev/userfaultfd"


cdef int userfault_register(int fd, void* start, uint64_t bytes) noexcept nogil:
    cdef uffdio_register what
    memset(&what, 0, sizeof(what))
    what.range.start = <uint64_t>start
    what.range.len = bytes
    what.mode = UFFDIO_REGISTER_MODE_MISSING
    return c_ioctl(fd, UFFDIO_REGISTER, &what)


cdef int userfault_unregister(int fd, void* start, uint64_t bytes) noexcept nogil:
    cdef uffdio_range what
    what.start = <uint64_t>start
    what.len = bytes
    return c_ioctl(fd, UFFDIO_UNREGISTER, &what)


cdef int userfault_wake(int fd, void* start, uint64_t bytes) noexcept nogil:
    cdef uffdio_range what
    what.start = <uint64_t>start
    what.len = bytes
    return c_ioctl(fd, UFFDIO_WAKE, &what)


cdef int _open() except -1:
    """A userfaultfd that also serves faults inside of system calls: those read and write guest memory too.

    An unprivileged one does not, and a system call that met a missing page would fail.
    """
    cdef long flags = os.O_CLOEXEC | os.O_NONBLOCK
    cdef int fd = <int>c_syscall(SYS_userfaultfd, flags)
    cdef int device
    if fd >= 0:
        return fd
    if c_errno != EPERM:
        PyErr_SetFromErrno(OSError)
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None
    try:
        fd = c_ioctl(device, USERFAULTFD_IOC_NEW, flags)
        if fd < 0:
            PyErr_SetFromErrno(OSError)
    finally:
        os.close(device)
    return fd


cdef class Userfault:
    """A userfaultfd and the memory maps that depend on it (see userfault.pxd).

    Raises
    ------
    OSError
        EPERM: it takes CAP_SYS_PTRACE, access to /dev/userfaultfd, or the sysctl vm.unprivileged_userfaultfd. ENOSYS:
        the kernel has none.

    Notes
    -----
    Spec: vhost-user, VHOST_USER_POSTCOPY_ADVISE.
    """

    def __cinit__(self):
        cdef uffdio_api api
        self.fd = -1
        self._maps = ()
        self.fd = _open()
        memset(&api, 0, sizeof(api))
        api.api = UFFD_API
        if c_ioctl(self.fd, UFFDIO_API, &api) != 0:
            PyErr_SetFromErrno(OSError)

    def __dealloc__(self):
        self.close()

    def fileno(self):
        """int: the descriptor; the front-end gets a copy of it."""
        return self.fd

    def close(self):
        """Close our descriptor; may be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    cdef int add(self, object memory) except -1:
        self._maps = tuple(known for known in self._maps if known() is not None) + (weakref.ref(memory),)
        return 0

    @property
    def waiting(self):
        """int: how many of our threads wait for a page, as the kernel counts them."""
        try:
            with open(f"/proc/self/fdinfo/{self.fd}") as info:
                return next((int(line.split()[1]) for line in info if line.startswith("total:")), 0)
        except OSError:
            return 0

    def settle(self):
        """All pages have come: from here on a page that is missing after all reads as zeroes."""
        for known in self._maps:
            memory = known()
            if memory is not None:
                memory.settle()

    def forsake(self):
        """Take all memory out of the front-end's hands: put zero pages in its place, and wake who waits."""
        for known in self._maps:
            memory = known()
            if memory is not None:
                memory.forsake()
