"""Opening capture files (draft-ietf-opsawg-pcap: classic pcap, link type Ethernet) and telling how they fare."""
from cpython.exc cimport PyErr_SetFromErrno, PyErr_SetFromErrnoWithFilename
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from vq_core.arch cimport vq_load_acquire_u32, vq_load_u64
from vq_core.clock cimport clock_timer
from vq_core.memory cimport memory_guard, memory_unguard
from vq_core.ports.pcap_replay cimport FAULT_NONE, PCAP_HEADER_BYTES, pcap_replay_wire
from vq_core.ports.pcap_writer cimport PCAP_BUFFER_BYTES, PCAP_SNAPLEN_MAX, pcap_writer_end, pcap_writer_wire

import errno
import os
import stat
import struct

cdef extern from "<sys/mman.h>" nogil:
    void* c_mmap "mmap"(void* addr, size_t length, int prot, int flags, int fd, long offset) noexcept
    int c_munmap "munmap"(void* addr, size_t length) noexcept
    int c_madvise "madvise"(void* addr, size_t length, int advice) noexcept
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_NORESERVE, MADV_WILLNEED
    void* MAP_FAILED

cdef enum:
    ETHERNET_BYTES = 14
    LINKTYPE_ETHERNET = 1

MAGIC_MICRO = 0xa1b2c3d4         # not in the enum: above the range of a C int
MAGIC_NANO = 0xa1b23c4d

FAULTS = (
    "",
    "the file ends inside the record's header",
    "the file ends inside the record, which has {value} bytes; the capture was cut off",
    f"captured length {{value}} is impossible (above the packet's length or {PCAP_SNAPLEN_MAX}); the file is damaged",
    "the file was truncated while it was replayed",
    "no packet in it can be replayed",
)


def _read_header(path, head, size):
    """Check the header of a file: (swapped, nanoseconds a unit of the fraction); ValueError for what is no pcap."""
    convert = f"convert it: tcpdump -r {path} -w NEW.pcap"
    magic = head[:4]
    for known, what in ((b"\x0a\x0d\x0d\x0a", f"a pcapng file; {convert}"),
                        (b"\x1f\x8b", "compressed by gzip; unpack it first: gunzip -k"),
                        (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first: unzstd"),
                        (b"\x34\xcd\xb2\xa1", f"a pcap file in the modified form of old Linux tools; {convert}"),
                        (b"\xa1\xb2\xcd\x34", f"a pcap file in the modified form of old Linux tools; {convert}")):
        if magic.startswith(known):
            raise ValueError(f"{path}: {what}")
    if len(head) < PCAP_HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes; a pcap file has a header of {PCAP_HEADER_BYTES}")
    for order in "<>":
        value = struct.unpack_from(order + "I", head)[0]
        if value in (MAGIC_MICRO, MAGIC_NANO):
            break
    else:
        raise ValueError(f"{path}: not a pcap file: it begins with {magic.hex(' ')}")
    major, minor, _, _, _, network = struct.unpack_from(order + "HHiIII", head, 4)
    if major != 2:
        raise ValueError(f"{path}: pcap version {major}.{minor}; only 2 is known")
    if network & 0xffff != LINKTYPE_ETHERNET:
        raise ValueError(f"{path}: link type {network & 0xffff}; a pump moves Ethernet frames (link type 1) only")
    if network >> 16:
        raise ValueError(f"{path}: its frames carry check sequences (link type {network:#x}), which no guest takes")
    return order == ">", 1 if value == MAGIC_NANO else 1000


def _timer():
    cdef int fd = clock_timer()
    if fd < 0:
        PyErr_SetFromErrno(OSError)
    return fd


cdef class PcapPort(Port):
    """A capture file as a port of a pump: written, or replayed. It has one endpoint.

    Parameters
    ----------
    name : str
        Of the port, for people.
    path : str or path-like
        The file. For writing it is made or emptied; a FIFO with a reader (``wireshark -k -i FIFO``) will do as well.
    write : bool
        Write what is pushed; else replay.
    snaplen : int, optional
        Writing: bytes kept of each packet, 14 to 262144 (default: all).
    speed : float
        Replay: 0 is as fast as the target takes it; 1 the pace of the capture, 2 twice as fast.
    loop : int
        Replay: passes through the file; 0 is for ever.

    Attributes
    ----------
    path : str
    write : bool

    Raises
    ------
    ValueError
        An argument out of range, or a file that is no classic pcap file of Ethernet frames; the text says what to do.
    OSError
        The file cannot be opened or mapped; ENXIO: a FIFO without a reader.

    Notes
    -----
    Writing: packets are counted when they are in the file, at most 100 ms after the push; all are after `close`, or
    when the worker has let go of the endpoint. What the disk does not take is dropped as ``io_error``.

    Replay: the file is replayed up to its first damaged record; `error` says which. Packets that are no Ethernet frame
    of 14 to 65553 bytes are dropped as ``too_short`` or ``too_long``. What is pushed to a replayed file is dropped as
    ``no_target``.

    Threading: made and closed by the control thread while no worker uses the endpoint; the properties at any time.
    """

    directions = ("to_pcap", "from_pcap")

    def __cinit__(self, name, path, *, write=False, snaplen=None, double speed=0.0, loop=1):
        self.writer.fd = self.writer.timer_fd = self.writer.epoll_fd = -1
        self.replay.timer_fd = self.replay.epoll_fd = -1
        self.name = name
        self.path = os.fsdecode(path)
        self.write = write
        self.allocate(1)
        if write:
            if speed or loop != 1:
                raise ValueError(f"{name}: speed and loop are for a replay, not with write")
            self._begin_write(PCAP_SNAPLEN_MAX if snaplen is None else snaplen)
        else:
            if snaplen is not None:
                raise ValueError(f"{name}: snaplen goes with write")
            if not 0 <= speed < 1e9:
                raise ValueError(f"{name}: speed {speed}; 0 (as fast as possible) up to 1e9 times the capture's pace")
            if not 0 <= loop < 1 << 32:
                raise ValueError(f"{name}: loop {loop}; 1 or more passes, or 0 for ever")
            self._begin_replay(speed, loop)

    def _begin_write(self, snaplen):
        if not ETHERNET_BYTES <= snaplen <= PCAP_SNAPLEN_MAX:
            raise ValueError(f"{self.name}: snaplen {snaplen}; {ETHERNET_BYTES} to {PCAP_SNAPLEN_MAX} bytes")
        self.writer.snaplen = snaplen
        self.writer.buffer = <uint8_t*>malloc(PCAP_BUFFER_BYTES)
        if self.writer.buffer == NULL:
            raise MemoryError("capture buffer")
        # O_NONBLOCK: a pipe that nobody reads must not hold a worker.
        self.writer.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        self.writer.regular = stat.S_ISREG(os.fstat(self.writer.fd).st_mode)
        header = struct.pack("<IHHiIII", MAGIC_NANO, 2, 4, 0, 0, snaplen, LINKTYPE_ETHERNET)
        try:
            written = os.write(self.writer.fd, header)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None
        if written != len(header):
            raise OSError(errno.ENOSPC, "no room for the header", self.path)
        self.writer.committed = PCAP_HEADER_BYTES
        self.writer.timer_fd = _timer()
        self.endpoints[0].port = &self.writer
        pcap_writer_wire(self.endpoints[0])

    def _begin_replay(self, double speed, loop):
        cdef int fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        cdef uint64_t page = os.sysconf("SC_PAGESIZE")
        cdef void* got
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{self.path}: not a regular file; a replay maps it into memory")
            head = os.pread(fd, PCAP_HEADER_BYTES, 0)
            self.replay.swapped, self.replay.unit_ns = _read_header(self.path, head, status.st_size)
            self.replay.size = status.st_size
            # Ours to write: a program may change the bytes of a packet, and the file must not see it.
            got = c_mmap(NULL, self.replay.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0)
            if got == MAP_FAILED:
                PyErr_SetFromErrnoWithFilename(OSError, os.fsencode(self.path))
        finally:
            os.close(fd)
        self.replay.map = <uint8_t*>got
        c_madvise(got, self.replay.size, MADV_WILLNEED)
        self.guard = memory_guard(got, (self.replay.size + page - 1) // page * page, &self.replay.lost)
        self.replay.offset = PCAP_HEADER_BYTES
        self.replay.speed = speed
        self.replay.loops = loop
        self.replay.timer_fd = _timer()
        self.endpoints[0].port = &self.replay
        pcap_replay_wire(self.endpoints[0])

    def __dealloc__(self):
        if self.endpoints == NULL:   # the arguments were refused, and nothing was opened
            return
        self.let_go()
        if self.writer.fd >= 0:
            os.close(self.writer.fd)
        free(self.writer.buffer)

    cdef void let_go(self) noexcept:
        """Write out the rest and give back all but the written file; what was given back stays so."""
        if self.writer.fd >= 0 and self.writer.fill > 0:
            pcap_writer_end(self.endpoints[0])
        if self.guard != NULL:
            memory_unguard(self.guard)
            self.guard = NULL
        if self.replay.map != NULL:
            c_munmap(self.replay.map, self.replay.size)
            self.replay.map = NULL
        for fd in (self.writer.timer_fd, self.replay.timer_fd):
            if fd >= 0:
                os.close(fd)
        self.writer.timer_fd = self.replay.timer_fd = -1

    def close(self):
        """Write out the rest, then give back the file. For the control thread, when no worker is left; repeatable.

        Raises
        ------
        OSError
            The file system said only now that it could not keep what was written.
        """
        self.let_go()
        self.replay.done = True
        self.writer.broken = True
        self.writer.epoll_fd = self.replay.epoll_fd = -1      # closed descriptors leave an epoll by themselves
        fd, self.writer.fd = self.writer.fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.path) from None

    @property
    def sources(self):
        """list of int: the endpoint of a replay; nothing comes from a written file."""
        return [] if self.write else [0]

    @property
    def targets(self):
        """list of int: the endpoint of a written file; a replayed one takes nothing."""
        return [0] if self.write else []

    @property
    def finished(self):
        """bool: the replay is through and all its packets have been dealt with; of a written file: always."""
        return self.write or vq_load_acquire_u32(&self.replay.through) != 0

    @property
    def error(self):
        """str or None: what was wrong with the file: its first damaged record, or the last refused write."""
        cdef uint32_t fault = vq_load_acquire_u32(&self.replay.fault)
        cdef uint32_t code = vq_load_acquire_u32(&self.writer.error)
        if fault != FAULT_NONE:
            text = FAULTS[fault].format(value=self.replay.fault_value)
            return f"{self.path}: record {self.replay.fault_record} at byte {self.replay.fault_offset}: {text}"
        if code:
            full = code in (errno.ENOSPC, errno.EDQUOT)
            rest = "make room; packets are dropped meanwhile" if full else "packets are lost"
            return f"{self.path}: write refused: {os.strerror(code)}; {rest}"
        return None

    @property
    def cut_packets(self):
        """int: packets of a replay that the capture holds in part only (a snaplen); they are replayed as they are."""
        return vq_load_u64(&self.replay.cut_count)
