"""A guest whose driver is played by hand: memory, one started queue, and the buffers that its ring holds."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from types import ModuleType

from vq_core.dirty import DirtyLog
from vq_core.memory import MemoryMap
from vq_core.ports.vhost import VhostPort

NUM = 256  # entries of a ring, stages.NUM
REGION = 1 << 14
AREAS = 64  # each as large as a region: the first for the ring, the others for buffers
GUEST_ADDR = 0x10_0000  # not zero, so that a mistaken kind of address is found out
USER_ADDR = 0x7E12_0000_0000
LINE = 64
HEADER_BYTES = 12
RINGS = (0, 4096, 5120)  # offsets of descriptors, driver area and device area
LOG_BYTES = 4096
NEXT, WRITE, INDIRECT = 1, 2, 4
_PATTERN = bytes((i * 3 + 1) % 251 for i in range(2048))
CSUM, MRG_RXBUF = 1 << 0, 1 << 15
INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED, IN_ORDER = 1 << 28, 1 << 29, 1 << 32, 1 << 34, 1 << 35


@dataclass(frozen=True)
class Shape:
    """What a guest's buffers and ring look like.

    Attributes
    ----------
    packed
        Layout of the ring.
    regions
        1, or 64: each buffer then lies in another region than the one before it.
    log
        Whether the dirty log is on.
    parts
        Descriptors of a buffer; with more than one the first holds the header alone.
    indirect
        They stand in a table of their own.
    share
        Buffers that a packet takes (mergeable receive buffers).
    size
        Bytes of a packet, 64 to 1518.
    event_idx
        Whether EVENT_IDX is negotiated; the driver wants no calls either way.
    in_order
        Whether IN_ORDER is negotiated.
    asks
        The driver's headers ask for a checksum.
    """

    packed: bool = False
    regions: int = 1
    log: bool = False
    parts: int = 1
    indirect: bool = False
    share: int = 1
    size: int = 64
    event_idx: bool = False
    in_order: bool = False
    asks: bool = False

    @property
    def features(self) -> int:
        """The virtio features that such a guest has negotiated."""
        features = VERSION_1 | CSUM | INDIRECT_DESC
        features |= RING_PACKED * self.packed | EVENT_IDX * self.event_idx | IN_ORDER * self.in_order
        return features | MRG_RXBUF * (self.share > 1)

    @property
    def slots(self) -> int:
        """Entries of the ring that a buffer takes."""
        return 1 if self.indirect else self.parts

    @property
    def chains(self) -> int:
        """Buffers that fill the ring."""
        return NUM // self.slots

    @property
    def lengths(self) -> list[int]:
        """Bytes of each descriptor of a buffer."""
        if self.parts == 1:
            return [-(-(HEADER_BYTES + self.size) // self.share)]
        each, rest = divmod(self.size, self.parts - 1)
        return [HEADER_BYTES, *[each] * (self.parts - 2), each + rest]


def lines(length: int) -> int:
    """The length in whole cache lines, bytes."""
    return -(-length // LINE) * LINE


class Guest:
    """Guest memory with one ring in it, served by a port of its own.

    Parameters
    ----------
    stages
        The compiled module.
    shape
        Ring and buffers.
    receives
        The ring is a receiveq, its buffers device-writable; else a transmitq full of packets.

    Attributes
    ----------
    lane
        What stages of the ring and the port are run with.
    places
        Guest address of each chain's parts: (address, length) in order.
    """

    def __init__(self, stages: ModuleType, shape: Shape, *, receives: bool) -> None:
        self.shape, self.receives = shape, receives
        self.fd = os.memfd_create("vq-stages", os.MFD_CLOEXEC)
        self.log_fd = os.memfd_create("vq-stages-log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, REGION * AREAS)
        os.ftruncate(self.log_fd, LOG_BYTES)
        self.bytes = mmap.mmap(self.fd, REGION * AREAS)
        size = REGION * AREAS // shape.regions
        self.map = MemoryMap(
            [(GUEST_ADDR + at, size, USER_ADDR + at, at, self.fd) for at in range(0, REGION * AREAS, size)]
        )
        self.port = VhostPort("stages", 1)
        self.port.configure(shape.features)
        self.places: list[list[tuple[int, int]]] = []
        descriptors = self._lay_out()
        log = DirtyLog(self.log_fd, LOG_BYTES, 0) if shape.log else None
        self.queue = self.port.queues[0 if receives else 1]
        self.queue.start(
            self.map,
            NUM,
            *[USER_ADDR + offset for offset in RINGS],
            0x8000 if shape.packed else 0,
            shape.features,
            enabled=True,
            log=log,
            log_guest_addr=GUEST_ADDR + RINGS[2] if shape.log else None,
        )
        self.lane = stages.Lane(self.port, 0 if receives else 1, descriptors, shape.chains)

    def close(self) -> None:
        """Stop the ring and close the descriptors."""
        self.queue.stop()
        os.close(self.fd)
        os.close(self.log_fd)

    def place(self, index: int, length: int) -> int:
        """Guest address of the memory of ring entry `index`: other entries of its lap lie in all other areas.

        Areas are skewed against each other and strides are odd numbers of lines, so that the sets of a cache are
        used evenly.
        """
        area, row = 1 + index * 29 % (AREAS - 1), index // (AREAS - 1)
        stride = (lines(length) // LINE | 1) * LINE
        offset = area * 7 % 64 * LINE + row * stride
        if offset + length > REGION:
            raise ValueError(f"{length} bytes for each of {NUM} ring entries do not fit into areas of {REGION} bytes")
        return GUEST_ADDR + area * REGION + offset

    def _lay_out(self) -> list[tuple[int, int, int, int]]:
        """Place all buffers and fill them; what the ring's descriptors say of them."""
        shape = self.shape
        way = WRITE if self.receives else 0
        room = lines(16 * shape.parts) + sum(map(lines, shape.lengths)) if shape.indirect else max(shape.lengths)
        descriptors: list[tuple[int, int, int, int]] = []
        for chain in range(shape.chains):
            head = chain * shape.slots
            flags = [way | NEXT] * (shape.parts - 1) + [way]
            if shape.indirect:
                table = self.place(head, room)
                starts = [table + lines(16 * shape.parts)]
                for length in shape.lengths[:-1]:
                    starts.append(starts[-1] + lines(length))
            else:
                starts = [self.place(head + part, room) for part in range(shape.parts)]
            parts = list(zip(starts, shape.lengths, strict=True))
            self.places.append(parts)
            if shape.indirect:
                self.poke(table, b"".join(self._entry(*part, flags, n) for n, part in enumerate(parts)))
                descriptors.append((table, 16 * shape.parts, INDIRECT, head if shape.packed else 0))
            else:
                for n, (part, flag) in enumerate(zip(parts, flags, strict=True)):
                    descriptors.append((*part, flag, head if shape.packed else (head + n + 1) % NUM))
            if not self.receives:
                self.write(chain, self.header + self.payload(chain))
        return descriptors

    def _entry(self, addr: int, length: int, flags: list[int], index: int) -> bytes:
        """One entry of an indirect table; a packed one ends in its flags, and NEXT has no meaning there (2.8.7)."""
        if self.shape.packed:
            return struct.pack("<QIHH", addr, length, 0, flags[index] & ~NEXT)
        return struct.pack("<QIHH", addr, length, flags[index], index + 1)

    @property
    def header(self) -> bytes:
        """What the driver writes before each packet."""
        return struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0) if self.shape.asks else bytes(HEADER_BYTES)

    def payload(self, chain: int) -> bytes:
        """The packet in the buffer `chain` of a transmitq."""
        return _PATTERN[chain * 7 % 251 :][: self.shape.size]

    def poke(self, addr: int, data: bytes) -> None:
        """Write to guest memory."""
        self.bytes[addr - GUEST_ADDR : addr - GUEST_ADDR + len(data)] = data

    def peek(self, addr: int, length: int) -> bytes:
        """Read guest memory."""
        return self.bytes[addr - GUEST_ADDR : addr - GUEST_ADDR + length]

    def write(self, chain: int, data: bytes) -> None:
        """Spread data over the parts of a buffer."""
        for addr, length in self.places[chain]:
            self.poke(addr, data[:length])
            data = data[length:]

    def read(self, chain: int) -> bytes:
        """All bytes of a buffer."""
        return b"".join(self.peek(addr, length) for addr, length in self.places[chain])

    def used(self) -> list[tuple[int, int]]:
        """What the driver is told of the last lap: (id, bytes written) of each buffer that came back."""
        if self.shape.packed:
            heads = range(0, self.shape.chains * self.shape.slots, self.shape.slots)  # a driver looks at no other slot
            ring = [struct.unpack("<QIHH", self.peek(GUEST_ADDR + 16 * slot, 16)) for slot in heads]
            return [(id_, length) for _, length, id_, flags in ring if flags & 0x8080 in (0, 0x8080)]
        _flags, count = struct.unpack("<HH", self.peek(GUEST_ADDR + RINGS[2], 4))
        elements = [struct.unpack("<II", self.peek(GUEST_ADDR + RINGS[2] + 4 + 8 * slot, 8)) for slot in range(NUM)]
        return [elements[(count - i) % NUM] for i in range(min(count, self.shape.chains), 0, -1)]

    def marked(self) -> set[int]:
        """Pages that the dirty log names, as numbers of guest pages."""
        bits = os.pread(self.log_fd, LOG_BYTES, 0)
        return {8 * i + bit for i, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}
