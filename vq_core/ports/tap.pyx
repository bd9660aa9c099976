"""The way of a packet through a TAP, and opening one."""
from libc.errno cimport EAGAIN, EBADF, EBADFD, EFAULT, EINTR, ENODEV, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.uio cimport readv, writev
from vq_core.arch cimport vq_load_u32, vq_load_u64, vq_store_release_u32, vq_store_u64
from vq_core.counters cimport DROP_IO_ERROR, DROP_TOO_LONG, DROP_TOO_SHORT
from vq_core.epoll cimport EPOLLIN, EPOLLOUT, epoll_move
from vq_core.net cimport net_header_check
from vq_core.poll cimport POLLERR, POLLHUP, POLLIN, POLLNVAL, POLLOUT, c_poll, pollfd
from vq_core.port cimport (ARM_PULL, ARM_PUSH, BURST_MAX, OFFLOAD_ALL, OFFLOAD_CSUM, OFFLOAD_ECN, OFFLOAD_TSO4,
                           OFFLOAD_TSO6, OFFLOAD_UFO, OFFLOAD_USO4, OFFLOAD_USO6, PACKET_MAX, burst_t, endpoint_t,
                           packet_t)

import errno as errors
import fcntl
import os
import struct

cdef extern from "<net/if.h>":
    int IFNAMSIZ

cdef extern from "<sys/ioctl.h>":
    pass                         # the request numbers below are made with its macros

cdef extern from "<linux/if_tun.h>":
    unsigned int TUNSETIFF, TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ
    int IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE, IFF_PERSIST

cdef enum:
    ETHERNET_BYTES = 14
    BACKOFF_MAX = 7              # empty pulls between two reads of an idle TAP: well below a microsecond
    # The request numbers of one family differ in their last byte alone; older headers lack these two.
    NUMBER_SETIFF = 202
    NUMBER_SETVNETLE = 220
    NUMBER_SETCARRIER = 226

DEVICE = "/dev/net/tun"

# TUN_F_* have the values of our OFFLOAD_* bits. A kernel refuses all of what it does not know in part, so the sets
# are tried from the fullest: USO came with Linux 6.2, UFO went with 4.14 and came back, as a promise, for old users.
OFFLOAD_SETS = (
    OFFLOAD_ALL,
    OFFLOAD_ALL & ~OFFLOAD_UFO,
    OFFLOAD_ALL & ~(OFFLOAD_USO4 | OFFLOAD_USO6),
    OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_ECN,
)


# ---- from the kernel: pull ----

cdef inline void _gone(tap_queue_t* queue, int error) noexcept nogil:
    """The device is no more: nothing is asked of the kernel from here on."""
    vq_store_release_u32(&queue.error, error)


cdef void _after_empty_read(tap_queue_t* queue, int error) noexcept nogil:
    if error == EAGAIN or error == EINTR:
        queue.backoff = min(2 * queue.backoff + 1, <uint32_t>BACKOFF_MAX)
        queue.skip = queue.backoff
    elif error == EBADFD or error == EBADF or error == EFAULT or error == ENODEV:
        _gone(queue, error)


cdef int _pull(endpoint_t* endpoint, burst_t* burst, int limit) noexcept nogil:
    cdef tap_queue_t* queue = <tap_queue_t*>endpoint.port
    cdef packet_t* packet
    cdef uint64_t total = 0
    cdef ssize_t got
    cdef int count = 0, cause, reads = 0
    burst.count = burst.wants = burst.segment_count = 0
    if queue.error:
        return 0
    if queue.skip > 0:           # another port of this worker is busy; an idle TAP costs it no system call each round
        queue.skip -= 1
        return 0
    if queue.released_mark == queue.pulled_mark:
        queue.used = 0
    limit = min(limit, BURST_MAX)
    # `reads` bounds a burst of packets that are all dropped.
    while count < limit and reads < 2 * BURST_MAX and TAP_BUFFER_BYTES - queue.used >= TAP_SLOT_BYTES:
        packet = &burst.packets[count]
        queue.vectors[0].iov_base = &packet.header
        queue.vectors[0].iov_len = TAP_HEADER_BYTES
        queue.vectors[1].iov_base = queue.buffer + queue.used
        queue.vectors[1].iov_len = TAP_SLOT_BYTES
        reads += 1
        got = readv(queue.fd, queue.vectors, 2)
        if got < 0:
            _after_empty_read(queue, errno)
            break
        queue.backoff = 0
        if got < TAP_HEADER_BYTES + ETHERNET_BYTES or got >= TAP_HEADER_BYTES + TAP_SLOT_BYTES:
            endpoint.pulled.dropped[DROP_TOO_SHORT if got < TAP_HEADER_BYTES + ETHERNET_BYTES else DROP_TOO_LONG] += 1
            continue
        packet.data = queue.buffer + queue.used
        packet.more = NULL
        packet.more_count = 0
        packet.head_bytes = packet.length = <uint32_t>got - TAP_HEADER_BYTES
        cause = net_header_check(packet, OFFLOAD_ALL)
        if cause >= 0:
            endpoint.pulled.dropped[cause] += 1
            continue
        queue.pulled_mark += 1
        packet.mark = queue.pulled_mark
        burst.wants |= packet.wants
        total += packet.length
        queue.used += (packet.length + 63) & ~<uint32_t>63
        count += 1
    vq_store_u64(&queue.reads, queue.reads + reads)
    burst.count = count
    endpoint.pulled.packets += count
    endpoint.pulled.bytes += total
    return count


cdef void _release(endpoint_t* endpoint, burst_t* burst, int count) noexcept nogil:
    cdef tap_queue_t* queue = <tap_queue_t*>endpoint.port
    if count == <int>burst.count:
        queue.released_mark = queue.pulled_mark
    elif count > 0:
        queue.released_mark = burst.packets[count - 1].mark


# ---- to the kernel: push ----

cdef int _gather(tap_queue_t* queue, packet_t* packet) noexcept nogil:
    """Point the vectors at header and segments; returns how many they are."""
    cdef uint32_t i, piece, joined = 0, plain = packet.more_count
    queue.vectors[0].iov_base = &packet.header
    queue.vectors[0].iov_len = TAP_HEADER_BYTES
    queue.vectors[1].iov_base = packet.data
    queue.vectors[1].iov_len = packet.head_bytes
    if plain > TAP_VECTORS - 2:
        plain = TAP_VECTORS - 3
    for i in range(plain):
        queue.vectors[2 + i].iov_base = packet.more[i].data
        queue.vectors[2 + i].iov_len = packet.more[i].length
    if plain == packet.more_count:
        return <int>(2 + plain)
    # The kernel takes at most 1024 vectors, and a copy of a small segment costs less than a vector.
    for i in range(plain, packet.more_count):
        piece = min(packet.more[i].length, <uint32_t>PACKET_MAX - joined)
        memcpy(queue.joined + joined, packet.more[i].data, piece)
        joined += piece
    queue.vectors[TAP_VECTORS - 1].iov_base = queue.joined
    queue.vectors[TAP_VECTORS - 1].iov_len = joined
    return TAP_VECTORS


cdef int _push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    cdef tap_queue_t* queue = <tap_queue_t*>endpoint.port
    cdef packet_t* packet
    cdef uint64_t total = 0
    cdef ssize_t put
    cdef int done = 0, sent = 0, writes = 0, error
    queue.blocked = False
    while done < count and not queue.error:
        packet = &packets[done]
        if packet.length < ETHERNET_BYTES or packet.length > PACKET_MAX:
            endpoint.pushed.dropped[DROP_TOO_SHORT if packet.length < ETHERNET_BYTES else DROP_TOO_LONG] += 1
            done += 1
            continue
        writes += 1
        put = writev(queue.fd, queue.vectors, _gather(queue, packet))
        if put >= 0:
            sent += 1
            total += packet.length
            done += 1
            continue
        error = errno
        if error == EINTR:
            continue
        if error == EAGAIN:
            queue.blocked = True
            break
        # EIO: the interface is down; EINVAL: a header that this kernel does not like; ENOMEM.
        endpoint.pushed.dropped[DROP_IO_ERROR] += 1
        done += 1
        if error == EBADFD or error == EBADF or error == ENODEV:
            _gone(queue, error)
    if queue.error and done < count:
        endpoint.pushed.dropped[DROP_IO_ERROR] += count - done
        done = count
    vq_store_u64(&queue.writes, queue.writes + writes)
    endpoint.pushed.packets += sent
    endpoint.pushed.bytes += total
    return done


# ---- both ----

cdef void _flush(endpoint_t* endpoint) noexcept nogil:
    pass                         # a write is already with the host's stack


cdef int _room(endpoint_t* endpoint) noexcept nogil:
    return BURST_MAX             # the kernel does not say; a full socket buffer is seen by the next push


cdef int _arm(endpoint_t* endpoint, int what) noexcept nogil:
    cdef tap_queue_t* queue = <tap_queue_t*>endpoint.port
    cdef pollfd question
    if queue.error:
        return 0
    queue.skip = 0
    question.fd = queue.fd
    question.events = question.revents = 0
    if what & ARM_PULL:
        question.events |= POLLIN
    if what & ARM_PUSH and queue.blocked:
        question.events |= POLLOUT       # asking also makes the kernel tell us when there is room
    if question.events == 0:
        return 0
    # The epoll watches edges: what came before this look is seen here, what comes after it makes an edge.
    if c_poll(&question, 1, 0) <= 0:
        return 0
    if question.revents & (POLLERR | POLLHUP | POLLNVAL):
        _gone(queue, EBADFD)
        return 0
    return 1 if question.revents & question.events else 0


cdef void _attach(endpoint_t* endpoint, int epoll_fd) noexcept nogil:
    cdef tap_queue_t* queue = <tap_queue_t*>endpoint.port
    if queue.fd >= 0:
        epoll_move(queue.epoll_fd, epoll_fd, queue.fd, EPOLLIN | EPOLLOUT)
        queue.epoll_fd = epoll_fd


# ---- control side ----

cdef void _wire(endpoint_t* endpoint, tap_queue_t* queue) noexcept:
    endpoint.port = queue
    endpoint.holds = 1
    endpoint.pull = _pull
    endpoint.push = _push
    endpoint.release = _release
    endpoint.flush = _flush
    endpoint.room = _room
    endpoint.arm = _arm
    endpoint.attach = _attach


def _failed(error, what, path):
    """The OSError of a failed step, with the step in its text and the file or interface as its file name."""
    return OSError(error.errno, f"{what}: {error.strerror}", path)


cdef object _request(object name, int flags):
    """A `struct ifreq` with a name and flags."""
    return struct.pack("16sH22x", name, flags)


def _open_queue(name, int queues):
    """Open one queue of the TAP `name` (bytes): its descriptor, the interface's name and its flags."""
    cdef int flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(error, "open", DEVICE) from None
    try:
        try:
            got = fcntl.ioctl(fd, TUNSETIFF, _request(name, flags | (IFF_MULTI_QUEUE if queues > 1 else 0)))
        except OSError as error:
            if error.errno != errors.EINVAL or queues > 1:
                raise
            # A device that was made with multi_queue is joined with that flag alone, even for one queue.
            got = fcntl.ioctl(fd, TUNSETIFF, _request(name, flags | IFF_MULTI_QUEUE))
        made = struct.unpack("16sH22x", fcntl.ioctl(fd, TUNGETIFF, _request(name, 0)))[1]
        if made & flags != flags:
            # Somebody else's queue settled the framing of all queues before us.
            raise OSError(errors.EBUSY, "other queues are in use without a vnet header")
        for number, value, needed in ((TUNSETVNETHDRSZ, TAP_HEADER_BYTES, True),
                                      (TUNSETIFF + NUMBER_SETVNETLE - NUMBER_SETIFF, 1, False)):
            try:
                fcntl.ioctl(fd, number, struct.pack("i", value))
            except OSError:
                if needed:       # without VNETLE fields have the host's byte order, which is the same here
                    raise
    except OSError as error:
        os.close(fd)
        raise _failed(error, "TUNSETIFF", os.fsdecode(name)) from None
    except BaseException:
        os.close(fd)
        raise
    return fd, struct.unpack("16sH22x", got)[0].rstrip(b"\0"), made


def _check_ifname(name, ifname):
    raw = os.fsencode(ifname)
    if not 1 <= len(raw) < IFNAMSIZ or raw in (b".", b"..") or any(c <= 32 or c in b"/:" for c in raw):
        raise ValueError(f"{name}: interface name {ifname!r}; "
                         f"it has 1 to {IFNAMSIZ - 1} bytes without space, '/' and ':'")
    return raw


cdef class TapPort(Port):
    """A TAP device of the host as a port of a pump.

    Parameters
    ----------
    name : str
        Of the port, for people.
    ifname : str
        Of the interface; it is made if it does not exist, and then vanishes with the port. ``%d`` in it is replaced
        by the kernel with the first free number.
    queues : int
        1 to 256. An existing device must have been made with ``multi_queue`` for more than one.
    offloads : int, optional
        OFFLOAD_* bits that the host's stack may ask of us; all that the kernel knows by default.

    Attributes
    ----------
    ifname : str
        The interface's real name.
    accepts : int
        OFFLOAD_* bits that the kernel completes in packets from us.
    offloads : int
        OFFLOAD_* bits that the kernel may ask of us.

    Raises
    ------
    ValueError
        A name or number out of range.
    OSError
        `filename` is ``/dev/net/tun`` (open) or the interface (all else), and `errno` says:

        ======  ==================================================================================================
        ENOENT  no /dev/net/tun: the module ``tun`` is not loaded (``modprobe tun``), or a container has no device
        EACCES  no permission to open /dev/net/tun
        ENODEV  /dev/net/tun is there, its module is not
        EPERM   making an interface needs CAP_NET_ADMIN; or ``ip tuntap add`` made it for another user
        EBUSY   another process uses it (a TAP without multi_queue has room for one), or uses it without a vnet header
        EINVAL  it exists and is no TAP; or `queues` > 1 and it was made without ``multi_queue``
        E2BIG   more than 256 queues in all
        EMFILE  too many open files
        ======  ==================================================================================================

    Notes
    -----
    Threading: made and closed by the control thread while no worker uses its endpoints; `set_carrier` and
    `set_offloads` at any time.
    """

    directions = ("to_tap", "from_tap")

    def __cinit__(self, name, ifname, int queues=1, offloads=None):
        cdef int i
        cdef tap_queue_t* queue
        if not 1 <= queues <= TAP_QUEUES_MAX:
            raise ValueError(f"{name}: {queues} queues; 1 to {TAP_QUEUES_MAX} are possible")
        self.name = name
        raw = _check_ifname(name, ifname)
        self.allocate(queues)
        self.queues = <tap_queue_t*>calloc(queues, sizeof(tap_queue_t))
        if self.queues == NULL:
            raise MemoryError("TAP queues")
        for i in range(queues):
            self.queues[i].fd = self.queues[i].epoll_fd = -1
        for i in range(queues):
            queue = &self.queues[i]
            queue.buffer = <uint8_t*>malloc(TAP_BUFFER_BYTES)
            queue.joined = <uint8_t*>malloc(PACKET_MAX)
            if queue.buffer == NULL or queue.joined == NULL:
                raise MemoryError("TAP buffers")
            queue.fd, raw, _ = _open_queue(raw, queues)      # a pattern has become a name for the further queues
            _wire(self.endpoints[i], queue)
        self.ifname = os.fsdecode(raw)
        self.accepts = self._probe()
        for i in range(queues):
            self.endpoints[i].accepts = self.accepts
        self.set_offloads(self.accepts if offloads is None else offloads & self.accepts)

    def __dealloc__(self):
        cdef int i
        if self.queues != NULL:
            for i in range(self.endpoint_count):
                if self.queues[i].fd >= 0:
                    os.close(self.queues[i].fd)
                free(self.queues[i].buffer)
                free(self.queues[i].joined)
            free(self.queues)

    def _probe(self):
        """The largest set of offloads that this kernel knows: what it may ask is also what it completes for us."""
        for offloads in OFFLOAD_SETS:
            try:
                self._control(TUNSETOFFLOAD, offloads, "TUNSETOFFLOAD")
            except OSError as error:
                if error.errno != errors.EINVAL:
                    raise
            else:
                return offloads
        return 0

    def _control(self, number, value, what):
        if self.queues[0].fd < 0:
            raise ValueError(f"{self.name}: the port is closed")
        try:
            return fcntl.ioctl(self.queues[0].fd, number, value)
        except OSError as error:
            raise _failed(error, what, self.ifname) from None

    def set_offloads(self, offloads):
        """Say what the host's stack may ask of us in the packets that it sends.

        Parameters
        ----------
        offloads : int
            OFFLOAD_* bits, a part of `accepts`. Without CSUM there are no others; USO4 and USO6 go together.

        Raises
        ------
        OSError
            EINVAL: the kernel does not know this combination. EBADFD: the interface was deleted.
        """
        self._control(TUNSETOFFLOAD, int(offloads), "TUNSETOFFLOAD")
        self.offloads = offloads

    def set_carrier(self, up):
        """Plug or unplug the cable, as the host sees it: `ip link` shows NO-CARRIER.

        Parameters
        ----------
        up : bool
            Whether the guest's link is up.

        Raises
        ------
        OSError
            EINVAL: Linux before 5.0 cannot. EBADFD: the interface was deleted.
        """
        self._control(TUNSETIFF + NUMBER_SETCARRIER - NUMBER_SETIFF, struct.pack("i", bool(up)), "TUNSETCARRIER")

    def _flags(self):
        return struct.unpack("16sH22x", self._control(TUNGETIFF, _request(b"", 0), "TUNGETIFF"))[1]

    @property
    def persistent(self):
        """bool: the interface outlives the port (``ip tuntap add`` made it)."""
        return bool(self._flags() & IFF_PERSIST)

    @property
    def multi_queue(self):
        """bool: the interface was made for several queues, whether we use them or not."""
        return bool(self._flags() & IFF_MULTI_QUEUE)

    @property
    def error(self):
        """str or None: why the port has ended by itself: its interface was deleted."""
        cdef int i
        for i in range(self.endpoint_count):
            if vq_load_u32(&self.queues[i].error) and self.queues[i].fd >= 0:
                return f"{self.name}: queue {i}: the interface {self.ifname} was deleted; make it again and restart"
        return None

    @property
    def syscalls(self):
        """dict: system calls that moved packets since start: ``{"pull": reads, "push": writes}``."""
        cdef int i
        cdef uint64_t reads = 0, writes = 0
        for i in range(self.endpoint_count):
            reads += vq_load_u64(&self.queues[i].reads)
            writes += vq_load_u64(&self.queues[i].writes)
        return {"pull": reads, "push": writes}

    def close(self):
        """Let go of the device; an interface that we made vanishes. For the control thread, when no worker is left."""
        cdef int i
        for i in range(self.endpoint_count):
            if self.queues[i].fd >= 0:
                os.close(self.queues[i].fd)      # a closed descriptor leaves every epoll by itself
                self.queues[i].fd = self.queues[i].epoll_fd = -1
                _gone(&self.queues[i], EBADF)
