"""A device that hashes what a driver sends, a port that measures packets, and programs that choose among them.

All of them run in a worker, without the GIL.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from vq_core cimport (CHAIN_ABI, OFFLOAD_ALL, PORT_ABI, PROGRAM_ABI, VERDICT_DROP, ChainWorker, Port, Program,
                      endpoint_t, exchange_t, packet_t)

if CHAIN_ABI != 1 or PORT_ABI != 1 or PROGRAM_ABI != 1:
    found = f"{CHAIN_ABI}, {PORT_ABI} and {PROGRAM_ABI}"
    raise ImportError(f"fnv.pyx was written for version 1 of vq's contracts, not {found}")


cdef uint64_t fnv1a(const uint8_t* data, uint32_t length) noexcept nogil:
    cdef uint64_t value = 0xcbf29ce484222325
    cdef uint32_t i
    for i in range(length):
        value = (value ^ data[i]) * <uint64_t>0x100000001b3
    return value


cdef class HashWorker(ChainWorker):
    """Answers each request with the FNV-1a hash of its bytes, 8 bytes, little-endian."""

    cdef int64_t answer(self, exchange_t* exchange) noexcept nogil:
        cdef uint64_t value
        if exchange.readable_bytes > exchange.data_bytes or exchange.reply_bytes < sizeof(value):
            return -1            # no request of ours: the queue breaks
        value = fnv1a(exchange.data, exchange.data_bytes)
        memcpy(exchange.reply, &value, sizeof(value))
        return sizeof(value)


cdef enum:
    CLASSES = 17

cdef struct sizes_t:
    uint64_t packets[CLASSES]    # by the number of bits of their length


cdef int push(endpoint_t* endpoint, packet_t* packets, int count) noexcept nogil:
    cdef sizes_t* sizes = <sizes_t*>endpoint.port
    cdef uint32_t length
    cdef int i, bits
    for i in range(count):
        length = packets[i].length
        bits = 0
        while length and bits < CLASSES - 1:
            length >>= 1
            bits += 1
        sizes.packets[bits] += 1
        endpoint.pushed.bytes += packets[i].length
    endpoint.pushed.packets += count
    return count


cdef class SizesPort(Port):
    """A sink that counts packets by their length, in powers of two."""
    cdef sizes_t* sizes

    directions = ("to_sizes", "from_sizes")

    def __cinit__(self, str name):
        self.name = name
        self.sizes = <sizes_t*>calloc(1, sizeof(sizes_t))
        if self.sizes == NULL:
            raise MemoryError("sizes")
        self.allocate(1)
        self.endpoints[0].port = self.sizes
        self.endpoints[0].accepts = OFFLOAD_ALL
        self.endpoints[0].push = push

    def __dealloc__(self):
        free(self.sizes)

    @property
    def sources(self):
        """list of int: none; nothing comes from a sink."""
        return []

    @property
    def histogram(self):
        """dict: packets by the least power of two that is more than their length."""
        return {1 << bits: self.sizes.packets[bits] for bits in range(CLASSES) if self.sizes.packets[bits]}


# `api` makes a capsule of it, in fnv.__pyx_capi__, for vq.NativeProgram.
cdef api uint32_t drop_ipv4(void* state, const packet_t* packets, uint16_t* verdicts, uint32_t count) noexcept nogil:
    cdef uint32_t i, found = 0
    for i in range(count):
        if packets[i].head_bytes >= 14 and packets[i].data[12] == 8 and packets[i].data[13] == 0:
            verdicts[i] = VERDICT_DROP
            found += 1
    return found


cdef struct sampled_t:
    uint32_t one_of
    uint32_t seen


cdef uint32_t sample(void* state, const packet_t* packets, uint16_t* verdicts, uint32_t count) noexcept nogil:
    cdef sampled_t* sampled = <sampled_t*>state
    cdef uint32_t i
    for i in range(count):
        if sampled.seen % sampled.one_of:
            verdicts[i] = VERDICT_DROP
        sampled.seen += 1
    return count


cdef class Sampled(Program):
    """Lets one of so many packets pass; with a count of its own for each worker."""
    cdef sampled_t sampled

    def __cinit__(self, uint32_t one_of):
        self.name = f"one of {one_of}"
        self.sampled.one_of = max(one_of, <uint32_t>1)
        self.program.run = sample
        self.program.state = &self.sampled

    cpdef Program bound(self):
        return Sampled(self.sampled.one_of)
