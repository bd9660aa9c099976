"""The userfaultfd of a postcopy migration: some pages of guest memory are still on their way.

Whoever touches such a page waits in the kernel until the front-end, which holds the same userfaultfd, has put the page
in place (vhost-user, "Migration", postcopy). Memory maps register their mappings here (memory.pyx); what they are asked
for afterwards is said by `Userfault`:

- settle: all pages are there, nothing waits any more;
- forsake: the front-end lets us wait for ever, so all memory is taken out of its hands. Its place is taken by zero
  pages, and the `lost` flag of each map is raised, as when the owner truncates its memory.

The kernel knows no userfaultfd for a part of a process: who holds one can have any memory of the process waited for or
moved. That is the protocol's, so that postcopy is offered only where front-ends are trusted.

Threading: control thread; `waiting` and `forsake` also from the thread that watches (vq/fault_watch.py).
"""
from libc.stdint cimport uint64_t

# All may fail with -1 and errno.
cdef int userfault_register(int fd, void* start, uint64_t bytes) noexcept nogil
cdef int userfault_unregister(int fd, void* start, uint64_t bytes) noexcept nogil
cdef int userfault_wake(int fd, void* start, uint64_t bytes) noexcept nogil

cdef class Userfault:
    cdef int fd
    cdef tuple _maps             # weak references; replaced, never changed

    cdef int add(self, object memory) except -1
