"""A driver-side virtqueue in Python's hands."""
from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from vq_core.driver_packed cimport DRIVER_WRAP_COUNTER, driver_packed_reset, driver_packed_used_position
from vq_core.driver_split cimport driver_split_reset
from vq_core.virtio cimport (VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTQ_SIZE_MAX, has_feature,
                             virtq_avail_t, virtq_packed_desc_t, virtq_packed_event_t, virtq_used_t)
from vq_core.wait cimport wait_drain

import os
import select
import time

ERROR_S = 0.5                    # a device that signals an error may show a moment later what it had used before it

DRIVER_ERRORS = (
    None,
    "used index {value} is ahead of what was made available",
    "used id {value} is outside the ring of {num}",
    "used id {value} is not outstanding",
    "used length {value} is above the writable bytes of its buffer",
    "used id {value} is not next in order, though IN_ORDER was negotiated",
    "descriptor {value} is marked used, but none is outstanding",
)


class BrokenRingError(RuntimeError):
    """The device broke the ring; the queue takes nothing from it any more, until `DriverQueue.reset`.

    Attributes
    ----------
    cause : int
        1 used index, 2 id outside the ring, 3 id not outstanding, 4 length, 5 order, 6 a descriptor used for nothing.
    value : int
        The index, id, length or slot in question.
    """

    def __init__(self, cause, value, num):
        super().__init__(f"the device broke the ring: {DRIVER_ERRORS[cause].format(value=value, num=num)}; "
                         "reset the queue (VIRTIO 1.3, 2.7.8, 2.8.8)")
        self.cause = cause
        self.value = value


class Buffer:
    """A buffer that was added to a DriverQueue: its token.

    Attributes
    ----------
    id : int
        Its name on the ring while it is outstanding.
    readable, writable : tuple of memoryview
        The parts of the device-readable and of the device-writable half; raw parts, which were given as
        addresses, are left out.
    """

    __slots__ = ("id", "readable", "writable", "_table")

    def __init__(self, readable, writable, table):
        self.id = -1
        self.readable = tuple(readable)
        self.writable = tuple(writable)
        self._table = table                # the indirect table lives as long as the buffer

    def written(self, length):
        """The first `length` bytes of the device-writable half: what a used length says was written."""
        return b"".join(self.writable)[:length]


cdef class DriverQueue:
    """One virtqueue, driver side, with its rings in guest memory and its kick and call eventfds.

    Parameters
    ----------
    memory : GuestMemory
        Where the rings and the buffers lie.
    size : int
        Ring size in entries, 1 to 32768; a power of two unless RING_PACKED is among the features.
    features : int
        Negotiated virtio features, by default VERSION_1 alone. RING_PACKED chooses the layout; EVENT_IDX and
        IN_ORDER change what the driver does.
    base : int, optional
        Where both sides begin, in the form of `avail_idx`; by default a fresh ring: 0, packed 0x8000.

    Raises
    ------
    ValueError
        The size or the base is not legal for the layout.
    BrokenRingError
        From `poll`, `arm` and `wait`: the device broke the rules; sticky until `reset`.

    Notes
    -----
    Threading: one thread at a time; RuntimeError while a traffic engine owns the queue.
    Spec: VIRTIO 1.3, 2.7 and 2.8.
    """

    def __cinit__(self):
        memset(&self.driver, 0, sizeof(driver_t))
        self.driver.kick_fd = self.driver.call_fd = -1

    def __init__(self, GuestMemory memory not None, int size, *, features=0x1_0000_0000, base=None):
        cdef uint32_t places = 1
        cdef bint packed = has_feature(features, VIRTIO_F_RING_PACKED)
        if not 1 <= size <= VIRTQ_SIZE_MAX:
            raise ValueError(f"queue size {size} is not from 1 to {VIRTQ_SIZE_MAX}")
        if not packed and size & (size - 1):
            raise ValueError(f"queue size {size} is not a power of two; only a packed ring (RING_PACKED, bit 34) may "
                             "have any size")
        self.memory = memory
        self.features = features
        self._desc = memory.alloc(16 * size)
        self._avail = memory.alloc(4 if packed else 4 + 2 * size + 2)
        self._used = memory.alloc(4 if packed else 4 + 8 * size + 2)
        if packed:
            self.driver.ring = <virtq_packed_desc_t*>self._desc.data
            self.driver.driver_event = <virtq_packed_event_t*>self._avail.data
            self.driver.device_event = <virtq_packed_event_t*>self._used.data
        else:
            self.driver.desc = <virtq_desc_t*>self._desc.data
            self.driver.avail = <virtq_avail_t*>self._avail.data
            self.driver.used = <virtq_used_t*>self._used.data
        self.driver.packed = packed
        self.driver.num = size
        while places < self.driver.num:
            places *= 2
        self.driver.mask = <uint16_t>(places - 1)
        self.driver.slots = <driver_slot_t*>calloc(size, sizeof(driver_slot_t))
        self.driver.free = <uint16_t*>calloc(places, sizeof(uint16_t))
        self.driver.heads = <uint16_t*>calloc(places, sizeof(uint16_t))
        if self.driver.slots == NULL or self.driver.free == NULL or self.driver.heads == NULL:
            raise MemoryError("driver queue")
        self.driver.event_idx = has_feature(features, VIRTIO_F_EVENT_IDX)
        self.driver.in_order = has_feature(features, VIRTIO_F_IN_ORDER)
        self.driver.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.driver.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.reset(base)

    def __dealloc__(self):
        self.close()
        free(self.driver.slots)
        free(self.driver.free)
        free(self.driver.heads)

    cdef int claim(self) except -1:
        """Take the queue for a traffic engine."""
        self._check_free()
        self.busy = True
        return 0

    cdef void unclaim(self) noexcept:
        self.busy = False

    def _check_free(self):
        if self.busy:
            raise RuntimeError("a running traffic engine owns this queue; stop it first")
        if self.driver.num == 0:
            raise RuntimeError("the queue was not initialised")

    def close(self):
        """Close the kick and call descriptors; the rings stay until the queue is dropped."""
        if self.driver.kick_fd >= 0:
            os.close(self.driver.kick_fd)
        if self.driver.call_fd >= 0:
            os.close(self.driver.call_fd)
        self.driver.kick_fd = self.driver.call_fd = -1

    def reset(self, base=None):
        """Start over with empty rings at position `base`, all buffers ours again. The device must be stopped."""
        cdef driver_t* driver = &self.driver
        cdef uint32_t id
        self._check_free()
        if base is None:
            base = DRIVER_WRAP_COUNTER if driver.packed else 0
        if not 0 <= base <= 0xffff:
            raise ValueError(f"base {base} is not a ring position from 0 to 65535")
        if driver.packed and base & 0x7fff >= driver.num:
            raise ValueError(f"base {base:#x} names slot {base & 0x7fff} of a packed ring of {driver.num}; the slot "
                             "stands in bits 0 to 14, the wrap counter in bit 15")
        memset(driver.slots, 0, driver.num * sizeof(driver_slot_t))
        for id in range(driver.num):
            driver.free[id] = <uint16_t>id
        driver.free_head = 0
        driver.free_tail = driver.num
        driver.batch_left = 0
        driver.batch_valid = False
        driver.kick_valid = False
        driver.error = DRIVER_OK
        if driver.packed:
            driver_packed_reset(driver, base)
        else:
            driver_split_reset(driver, base)
        self._posted = {}

    def add(self, readable=(), writable=(), *, indirect=False):
        """Add a buffer; the device sees it after `publish` or `kick`.

        Parameters
        ----------
        readable : sequence of (bytes-like or Block or (guest_addr, length))
            Device-readable parts, one descriptor each. Bytes are copied into guest memory; pairs go to the
            ring as they are, so that tests can say what they like.
        writable : sequence of (int or Block or (guest_addr, length))
            Device-writable parts; an int allocates so many bytes.
        indirect : bool
            Use an indirect table.

        Returns
        -------
        Buffer
            The token that `poll` gives back.

        Raises
        ------
        ValueError
            There is no part at all.
        BufferError
            The ring has not enough free descriptors.
        """
        cdef driver_part_t* parts
        cdef Block table = None
        cdef int head
        cdef uint32_t i, readable_count, writable_count
        self._check_free()
        readable_parts = [self._part(part) for part in readable]
        writable_parts = [self._part(part) for part in writable]
        every = readable_parts + writable_parts
        if not every:
            raise ValueError("a buffer needs at least one part: bytes for the device to read, or room for it to write")
        readable_count, writable_count = len(readable_parts), len(writable_parts)
        needed = 1 if indirect else len(every)
        if needed > driver_free(&self.driver):
            raise BufferError(f"a buffer of {needed} descriptors does not fit; {driver_free(&self.driver)} of "
                              f"{self.driver.num} are free: poll for used buffers first")
        if indirect:
            table = self.memory.alloc(16 * len(every))
        parts = <driver_part_t*>malloc(len(every) * sizeof(driver_part_t))
        if parts == NULL:
            raise MemoryError("parts")
        try:
            for i in range(readable_count + writable_count):
                parts[i].addr, parts[i].len = every[i][0], every[i][1]
            if indirect:
                head = driver_add_indirect(&self.driver, <virtq_desc_t*>table.data, table.guest_addr, parts,
                                           readable_count, writable_count)
            else:
                head = driver_add(&self.driver, parts, readable_count, writable_count)
        finally:
            free(parts)
        token = Buffer((part[2] for part in readable_parts if part[2] is not None),
                       (part[2] for part in writable_parts if part[2] is not None), table)
        token.id = head
        self._posted[head] = token
        return token

    def _part(self, part):
        """(guest_addr, length, view or None) of one part of `add`."""
        cdef Block block
        if isinstance(part, tuple):
            return part[0], part[1], None
        if isinstance(part, Block):
            block = part
        elif isinstance(part, int):
            block = self.memory.alloc(part)
        else:
            block = self.memory.alloc(max(1, len(part)))
            memoryview(block)[:len(part)] = part
            return block.guest_addr, len(part), memoryview(block)[:len(part)]
        return block.guest_addr, block.size, memoryview(block)

    def publish(self):
        """Show the device everything that was added."""
        self._check_free()
        driver_publish(&self.driver)

    def kick(self):
        """Publish, and signal the kick descriptor if the device wants it; whether it did."""
        self.publish()
        return bool(driver_kick(&self.driver))

    def poll(self, max=VIRTQ_SIZE_MAX):
        """Take used buffers back: a list of (Buffer, length), `length` in bytes as the device said, checked."""
        cdef driver_used_t used[64]
        cdef int count = 64, i
        self._check_free()
        result = []
        while count == 64 and len(result) < max:
            count = driver_poll_used(&self.driver, used, min(64, max - len(result)))
            for i in range(count):
                result.append((self._posted.pop(used[i].id), used[i].len))
        if count < 0 and not result:
            self._raise()
        return result

    def _raise(self):
        raise BrokenRingError(self.driver.error, self.driver.error_value, self.driver.num)

    def arm(self):
        """Ask for a call at the next used buffer; True if one is there already, so that no call may come."""
        self._check_free()
        ready = driver_arm(&self.driver)
        if self.driver.error != DRIVER_OK:
            self._raise()
        return bool(ready)

    def disarm(self):
        """Ask for no calls."""
        self._check_free()
        driver_disarm(&self.driver)

    def wait(self, timeout, error_fd=-1):
        """Sleep until a used buffer is there or the time is over, whatever calls come for nothing meanwhile.

        Parameters
        ----------
        timeout : float
            Seconds.
        error_fd : int
            The descriptor of SET_VRING_ERR, or -1. When it is readable only what was used before is waited for, half a
            second at most.

        Returns
        -------
        bool
            Whether there is a used buffer.
        """
        end = time.monotonic() + timeout
        poller = select.poll()
        poller.register(self.driver.call_fd, select.POLLIN)
        if error_fd >= 0:
            poller.register(error_fd, select.POLLIN)
        while not self.arm():
            left = end - time.monotonic()
            if left <= 0:
                return False
            ready = [fd for fd, _ in poller.poll(left * 1000)]
            if error_fd in ready:
                poller.unregister(error_fd)
                end = min(end, time.monotonic() + ERROR_S)
            elif ready:
                wait_drain(self.driver.call_fd)
        return True

    @property
    def layout(self):
        """str: "split" or "packed"."""
        return "packed" if self.driver.packed else "split"

    @property
    def size(self):
        """int: entries."""
        return self.driver.num

    @property
    def free(self):
        """int: free descriptors."""
        return driver_free(&self.driver)

    @property
    def outstanding(self):
        """int: buffers that have not come back."""
        return driver_outstanding(&self.driver)

    @property
    def error(self):
        """str or None: what the device did wrong."""
        if self.driver.error == DRIVER_OK:
            return None
        return DRIVER_ERRORS[self.driver.error].format(value=self.driver.error_value, num=self.driver.num)

    @property
    def addresses(self):
        """tuple of int: user addresses of descriptor table, available ring, used ring, for SET_VRING_ADDR.

        Packed: of descriptor ring, driver event structure, device event structure, in the same places of the message.
        """
        return self._desc.user_addr, self._avail.user_addr, self._used.user_addr

    @property
    def guest_addresses(self):
        """tuple of int: guest addresses of the same three."""
        return self._desc.guest_addr, self._avail.guest_addr, self._used.guest_addr

    @property
    def kick_fd(self):
        """int: eventfd that the driver signals; stays the queue's."""
        return self.driver.kick_fd

    @property
    def call_fd(self):
        """int: eventfd that the device signals; stays the queue's."""
        return self.driver.call_fd

    @property
    def avail_idx(self):
        """int: where the device continues after what was published: the available half of SET_VRING_BASE.

        Split: a free-running index. Packed: the slot in bits 0 to 14, the wrap counter in bit 15.
        """
        return self.driver.published_at if self.driver.packed else self.driver.published_avail_idx

    @property
    def used_idx(self):
        """int: where the next used buffer is looked for, in the form of `avail_idx`: the base after a crash.

        Packed: the used half of SET_VRING_BASE, whose bits are 16 to 31 there.
        """
        return driver_packed_used_position(&self.driver) if self.driver.packed else self.driver.last_used_idx

    @property
    def kicks(self):
        """tuple of int: kicks sent, kicks that the device did not want."""
        return self.driver.kicks, self.driver.kicks_suppressed

    # Raw access, for tests that build malformed rings and for reference devices. The driver's state does not follow.

    def _raw(self, Block block, layout, dtype, count, offset=0):
        import numpy
        if layout is not None and layout != self.layout:
            raise AttributeError(f"a {self.layout} ring has no such part; it belongs to the {layout} layout")
        return numpy.frombuffer(block, dtype, count, offset)

    @property
    def desc(self):
        """ndarray, shape (size,): the descriptors themselves, (addr u8, len u4, flags u2, next u2).

        Packed: (addr u8, len u4, id u2, flags u2).
        """
        last = ("id", "flags") if self.driver.packed else ("flags", "next")
        fields = [("addr", "<u8"), ("len", "<u4"), *((name, "<u2") for name in last)]
        return self._raw(self._desc, None, fields, self.driver.num)

    @property
    def avail(self):
        """ndarray of uint16, shape (size + 3,): flags, idx, ring[size], used_event. Split only."""
        return self._raw(self._avail, "split", "<u2", self.driver.num + 3)

    @property
    def used(self):
        """ndarray of (id u4, len u4), shape (size,): the used elements. Split only."""
        return self._raw(self._used, "split", [("id", "<u4"), ("len", "<u4")], self.driver.num, 4)

    @property
    def used_head(self):
        """ndarray of uint16, shape (2,): flags and idx of the used ring. Split only."""
        return self._raw(self._used, "split", "<u2", 2)

    @property
    def avail_event(self):
        """ndarray of uint16, shape (1,): the device's event field behind the used elements. Split only."""
        return self._raw(self._used, "split", "<u2", 1, 4 + 8 * self.driver.num)

    @property
    def driver_event(self):
        """ndarray of uint16, shape (2,): off_wrap and flags of the driver's event structure. Packed only."""
        return self._raw(self._avail, "packed", "<u2", 2)

    @property
    def device_event(self):
        """ndarray of uint16, shape (2,): off_wrap and flags of the device's event structure. Packed only."""
        return self._raw(self._used, "packed", "<u2", 2)
