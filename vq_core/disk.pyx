"""Reading and writing what a block device is made of."""
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset
from posix.uio cimport RWF_DSYNC, RWF_NOWAIT, iovec, preadv2, pwritev2
from vq_core.arch cimport vq_load_u32, vq_load_u64, vq_store_release_u32, vq_store_u64

import errno as errors
import fcntl
import os
import stat
import struct

cdef extern from "<unistd.h>" nogil:
    int c_fdatasync "fdatasync"(int fd) noexcept

cdef extern from "<fcntl.h>" nogil:
    int c_fallocate "fallocate"(int fd, int mode, long offset, long length) noexcept

cdef extern from "<linux/falloc.h>" nogil:
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

cdef extern from "<sys/ioctl.h>" nogil:
    int c_ioctl "ioctl"(int fd, unsigned long request, uint64_t* span) noexcept

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct c_statfs "statfs":
        long f_type
    int c_fstatfs "fstatfs"(int fd, c_statfs* buf) noexcept

cdef enum:
    ZEROES_BYTES = 65536
    TMPFS_MAGIC = 0x01021994
    BLKSSZGET = 0x1268
    BLKDISCARD = 0x1277
    BLKPBSZGET = 0x127b

cdef uint8_t _zeroes[ZEROES_BYTES]


cdef inline int _fd(disk_t* disk, iovec* parts, int count, uint64_t offset, uint64_t length) noexcept nogil:
    """The descriptor for a transfer: without the page cache where it fits the medium."""
    cdef uint64_t all_bits = offset | length
    cdef int i
    if disk.direct_fd < 0:
        return disk.fd
    for i in range(count):
        all_bits |= <uint64_t>parts[i].iov_base | parts[i].iov_len
    return disk.fd if all_bits & (disk.direct_bytes - 1) else disk.direct_fd


cdef int _transfer(disk_t* disk, bint write, iovec* parts, int count, uint64_t offset, uint64_t length,
                   int flags) noexcept nogil:
    """Move `length` bytes, which `parts` have room for; with RWF_NOWAIT all at once, or EAGAIN."""
    cdef uint64_t done = 0, skip = 0
    cdef int fd = _fd(disk, parts, count, offset, length)
    cdef ssize_t moved
    cdef iovec rest
    cdef iovec* at
    cdef int left
    while done < length:
        at, left = parts, count
        if skip:                 # in the middle of a part: the rest of it by itself
            rest.iov_base = <char*>parts.iov_base + skip
            rest.iov_len = parts.iov_len - skip
            at, left = &rest, 1
        if write:
            moved = pwritev2(fd, at, left, <long>(offset + done), flags)
        else:
            moved = preadv2(fd, at, left, <long>(offset + done), flags)
        if moved < 0:
            if errno == EINTR:
                continue
            if errno == EINVAL and fd != disk.fd:
                fd = disk.fd     # the medium wants more than it has said, or a file ends inside its last block
                continue
            return errno
        if <uint64_t>moved < length - done:
            if flags & RWF_NOWAIT:
                return EAGAIN
            if moved == 0:
                return EIO       # the file ends before its disk: somebody has truncated it
        done += <uint64_t>moved
        skip += <uint64_t>moved
        while count > 0 and skip >= parts.iov_len:
            skip -= parts.iov_len
            parts += 1
            count -= 1
    return 0


cdef int disk_read(disk_t* disk, iovec* parts, int count, uint64_t offset, uint64_t length, int flags) noexcept nogil:
    cdef int i
    if disk.fd < 0:
        for i in range(count):
            memset(parts[i].iov_base, 0, parts[i].iov_len)
        return 0
    return _transfer(disk, False, parts, count, offset, length, flags)


cdef int disk_write(disk_t* disk, iovec* parts, int count, uint64_t offset, uint64_t length, int flags) noexcept nogil:
    if disk.fd < 0:
        return 0
    if vq_load_u32(&disk.stable) and not disk.ready:
        flags |= RWF_DSYNC
    return _transfer(disk, True, parts, count, offset, length, flags)


cdef int disk_flush(disk_t* disk) noexcept nogil:
    if disk.fd < 0 or disk.read_only or c_fdatasync(disk.fd) == 0:
        return 0
    return errno


cdef inline void _whole_blocks(disk_t* disk, uint64_t* offset, uint64_t* end) noexcept nogil:
    """Shrink a range to the whole blocks of a block device; empty (end <= offset) if there is none."""
    cdef uint64_t rest = disk.device_bytes - 1
    if disk.device_bytes:
        offset[0] = (offset[0] + rest) & ~rest       # below 2^63, as the disk's end is: cannot wrap
        end[0] &= ~rest


cdef int disk_discard(disk_t* disk, uint64_t offset, uint64_t length) noexcept nogil:
    cdef uint64_t span[2]
    cdef uint64_t end = offset + length
    cdef int failed
    if disk.fd < 0:
        return 0
    if disk.device_bytes:
        _whole_blocks(disk, &offset, &end)
        if end <= offset:
            return 0
        span[0], span[1] = offset, end - offset
        failed = c_ioctl(disk.fd, BLKDISCARD, span)
    else:
        failed = c_fallocate(disk.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long>offset, <long>length)
    return 0 if failed == 0 or errno == EOPNOTSUPP else errno


cdef int _fill(disk_t* disk, uint64_t offset, uint64_t length) noexcept nogil:
    """Write zeroes where nothing shorter is known."""
    cdef iovec part
    cdef int error
    while length > 0:
        part.iov_base = _zeroes
        part.iov_len = min(length, <uint64_t>ZEROES_BYTES)
        error = _transfer(disk, True, &part, 1, offset, part.iov_len, 0)
        if error:
            return error
        offset += part.iov_len
        length -= part.iov_len
    return 0


cdef int _zero(disk_t* disk, uint64_t offset, uint64_t length, bint unmap) noexcept nogil:
    """Zero a range of whole blocks."""
    cdef int keep = FALLOC_FL_KEEP_SIZE
    if unmap and c_fallocate(disk.fd, FALLOC_FL_PUNCH_HOLE | keep, <long>offset, <long>length) == 0:
        return 0
    if c_fallocate(disk.fd, FALLOC_FL_ZERO_RANGE | keep, <long>offset, <long>length) == 0:
        return 0
    return _fill(disk, offset, length) if errno == EOPNOTSUPP else errno


cdef int disk_write_zeroes(disk_t* disk, uint64_t offset, uint64_t length, bint unmap) noexcept nogil:
    cdef uint64_t first = offset, last = offset + length
    cdef int error
    if disk.fd < 0:
        return 0
    _whole_blocks(disk, &first, &last)
    if last <= first:
        error = _fill(disk, offset, length)
    else:
        error = _zero(disk, first, last - first, unmap)
        if error == 0:
            error = _fill(disk, offset, first - offset)
        if error == 0:
            error = _fill(disk, last, offset + length - last)
    if error == 0 and vq_load_u32(&disk.stable):
        error = disk_flush(disk)
    return error


cdef class Disk:
    """A file or block device that guests see as a disk.

    Parameters
    ----------
    path : str or None
        A regular file or a block device; None is the null disk, which reads as zeroes and forgets what is written.
    read_only : bool
        Nothing is ever written.
    size : int, optional
        Bytes of a null disk.
    direct : bool
        Pass by the page cache of the host (O_DIRECT), where requests fit the medium.

    Attributes
    ----------
    path : str
    block_bytes, physical_block_bytes : int
        What the medium reads and writes at once: as it says, and as it does.

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        It is neither a regular file nor a block device; or its file system has no direct input and output.

    Notes
    -----
    Threading: the data plane uses a disk from any thread; everything here is for the control thread.
    """

    def __cinit__(self, path, bint read_only=False, size=0, *, bint direct=False):
        cdef c_statfs info
        self.disk.fd = self.disk.direct_fd = -1
        self.disk.read_only = read_only
        self.disk.ready = path is None
        self.block_bytes = self.physical_block_bytes = SECTOR_BYTES
        self.path = "null" if path is None else os.fspath(path)
        self.disk.capacity = size // SECTOR_BYTES
        self.set_id(os.path.basename(self.path))
        if path is None:
            return
        flags = os.O_RDONLY if read_only else os.O_RDWR
        # O_NONBLOCK, so that a FIFO of that name does not hold us up; files and block devices do not care.
        self.disk.fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        kind = os.fstat(self.disk.fd)
        if stat.S_ISBLK(kind.st_mode):
            (self.block_bytes,) = struct.unpack("I", fcntl.ioctl(self.disk.fd, BLKSSZGET, bytes(4)))
            (self.physical_block_bytes,) = struct.unpack("I", fcntl.ioctl(self.disk.fd, BLKPBSZGET, bytes(4)))
            self.disk.device_bytes = self.block_bytes
        elif stat.S_ISREG(kind.st_mode):
            self.physical_block_bytes = max(SECTOR_BYTES, min(kind.st_blksize, 65536))
            # Not of a block device: the file system of its node, which is a tmpfs as well, says nothing about it.
            self.disk.ready = c_fstatfs(self.disk.fd, &info) == 0 and info.f_type == TMPFS_MAGIC
        else:
            raise ValueError(f"{self.path}: neither a regular file nor a block device")
        if direct:
            self._open_direct(flags)
        self.measure()

    def _open_direct(self, flags):
        """Open the file once more, without the page cache."""
        try:
            # By the descriptor: the path may name another file by now.
            self.disk.direct_fd = os.open(f"/proc/self/fd/{self.disk.fd}", flags | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errors.EINVAL:
                raise
            raise ValueError(f"{self.path}: its file system has no direct input and output") from error
        self.disk.direct_bytes = self.block_bytes
        # What goes past the page cache always waits for the medium, so the worker does not try.
        self.disk.no_nowait_read = self.disk.no_nowait_write = 1
        self.disk.ready = False

    def __dealloc__(self):
        if self.disk.fd or self.disk.direct_fd:      # both 0: the arguments were refused, and nothing was opened
            self.close()

    def close(self):
        """Close the file, when no request is under way any more; may be called twice."""
        if self.disk.direct_fd >= 0:
            os.close(self.disk.direct_fd)
            self.disk.direct_fd = -1
        if self.disk.fd >= 0:
            os.close(self.disk.fd)
            self.disk.fd = -1
            self.disk.capacity = 0

    def fileno(self):
        """The descriptor; -1 of a null disk or a closed one."""
        return self.disk.fd

    def flush(self):
        """Bring what was acknowledged to the medium; without the GIL.

        Raises
        ------
        OSError
            The medium failed.
        """
        cdef int error
        with nogil:
            error = disk_flush(&self.disk)
        if error:
            raise OSError(error, os.strerror(error), self.path)

    @property
    def capacity(self):
        """int: sectors of 512 bytes."""
        return vq_load_u64(&self.disk.capacity)

    @property
    def read_only(self):
        """bool"""
        return bool(self.disk.read_only)

    @property
    def direct(self):
        """bool: the page cache is passed by."""
        return self.disk.direct_fd >= 0

    @property
    def ready(self):
        """bool: reads and writes never wait for a device: the disk is in memory, or nowhere."""
        return bool(self.disk.ready)

    def measure(self):
        """Look how long the file is now; whether that has changed the capacity.

        Requests beyond the new end fail from here on.
        """
        if self.disk.fd < 0:
            return False
        capacity = os.lseek(self.disk.fd, 0, os.SEEK_END) // SECTOR_BYTES
        changed = capacity != self.capacity
        vq_store_u64(&self.disk.capacity, capacity)
        return changed

    def set_id(self, text):
        """Set what GET_ID answers: up to 20 bytes."""
        cdef int i
        data = os.fsencode(text)[:DISK_ID_BYTES]
        for i in range(DISK_ID_BYTES):
            self.disk.id[i] = data[i] if i < len(data) else 0

    def set_stable(self, bint stable):
        """Whether each write must have reached the medium before it is acknowledged (no write cache).

        What was acknowledged before is brought there now.
        """
        if stable and not self.disk.stable:
            vq_store_release_u32(&self.disk.stable, 1)
            with nogil:
                disk_flush(&self.disk)
        elif not stable:
            vq_store_release_u32(&self.disk.stable, 0)
