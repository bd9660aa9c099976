"""How each type of device is driven: its rings, what its driver wants, one unit of its work, and a valid request."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from vq import virtio as v
from vq.check.outcome import Failed
from vq.check.raw_ring import WRITE, Row
from vq.check.waiting import until
from vq.errors import UsageError
from vq_core.driver import BrokenRingError, Buffer

if TYPE_CHECKING:
    from vq.check.guest import Guest
    from vq.check.target import Target

__all__ = ["TYPES", "Driving", "NetDevice", "driving", "frame", "header_bytes", "net", "poll_ring", "read_sector"]

ECHO_S: Final = 0.5  # for a first packet to come back, from a back-end that may not send it back at all
ETHERNET: Final = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x01" + b"\x88\xb5"  # broadcast, local experiment
SECTOR: Final = 512
VIRTIO_BLK_T_IN: Final = 0
RECEIVE_BYTES: Final = 2048


class Driving(ABC):
    """A type of device.

    Attributes
    ----------
    rings
        How many it needs.
    victim
        The ring from which it reads by itself.
    features
        What its driver always wants.
    """

    rings = 1
    victim = 0
    features = v.mask(v.VIRTIO_F_VERSION_1)

    @abstractmethod
    def exchange(self, guest: Guest) -> None:
        """Have one unit of work done, and insist that it is right."""

    @abstractmethod
    def request(self, guest: Guest) -> list[Row]:
        """Put a valid request into guest memory; gives its descriptors."""


class AnyDevice(Driving):
    """A device of unknown type: rings can be started and stopped, nothing is known about what to put into them."""

    def exchange(self, guest: Guest) -> None:
        guest.stop_all()

    def request(self, guest: Guest) -> list[Row]:
        block = guest.block(bytes(64))
        return [(block.guest_addr, 64, 0)]


class NetDevice(Driving):
    """A network device (VIRTIO 1.3, 5.1): a packet goes out, and comes back where the back-end echoes."""

    rings = 2
    victim = 1
    header = b""  # of the packet that came back last

    def exchange(self, guest: Guest) -> None:
        self.send(guest, frame(0))

    def send(self, guest: Guest, packet: bytes, *, parts: int = 1, indirect: bool = False) -> None:
        """Send a packet in so many descriptors, and insist that all is right with it."""
        head = bytes(header_bytes(guest))
        step = -(-len(packet) // parts)
        pieces = [packet[start : start + step] for start in range(0, len(packet), step)]
        self.send_parts(guest, [head, *pieces] if parts > 1 else [head + packet], packet, indirect=indirect)

    def send_parts(
        self,
        guest: Guest,
        readable: Sequence[bytes | tuple[int, int]],
        packet: bytes,
        *,
        indirect: bool = False,
    ) -> None:
        """Send a packet that lies in guest memory already, or is put there.

        Insists that its buffer comes back, and the packet itself where the back-end echoes.
        """
        target = guest.target
        self.post(guest)
        guest.queues[1].add(readable, indirect=indirect)
        guest.queues[1].publish()
        guest.kick(1)
        if not until(lambda: poll_ring(guest, 1), target.timeout):
            raise Failed(f"a packet of {len(packet)} bytes is not taken from the transmitq within {target.timeout:g} s")
        if target.echoes is False:
            return
        patience = ECHO_S if target.echoes is None else target.timeout
        came = until(lambda: self._came(guest, packet), patience)
        if target.echoes and not came:
            raise Failed(f"a packet of {len(packet)} bytes does not come back within {target.timeout:g} s")
        target.echoes = came

    def post(self, guest: Guest) -> None:
        """Give the device receive buffers, if it has few."""
        receiveq = guest.queues[0]
        if receiveq.outstanding < min(8, receiveq.size):
            for _ in range(min(16, receiveq.free)):
                receiveq.add(writable=[RECEIVE_BYTES])
            receiveq.publish()
            guest.kick(0)

    def _came(self, guest: Guest, packet: bytes) -> bool:
        """Look at what was received; other packets than ours are passed over."""
        header = header_bytes(guest)
        for buffer, length in poll_ring(guest, 0):
            data = buffer.written(length)
            if data[header:] == packet:
                self.header = data[:header]
                return True
        return False

    def request(self, guest: Guest) -> list[Row]:
        data = bytes(header_bytes(guest)) + frame(1)
        return [(guest.block(data).guest_addr, len(data), 0)]


class BlkDevice(Driving):
    """A block device (VIRTIO 1.3, 5.2): its first sector is read; nothing is ever written."""

    def exchange(self, guest: Guest) -> None:
        status, _ = read_sector(guest, 0)
        if status != 0:
            raise Failed(f"reading sector 0 ends with status {status}")

    def request(self, guest: Guest) -> list[Row]:
        head = guest.block(struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 0))
        data, status = guest.memory.alloc(SECTOR), guest.memory.alloc(1)
        return [(head.guest_addr, 16, 0), (data.guest_addr, SECTOR, WRITE), (status.guest_addr, 1, WRITE)]


_DRIVINGS: Final[dict[str, Callable[[], Driving]]] = {"any": AnyDevice, "net": NetDevice, "blk": BlkDevice}
TYPES: Final = tuple(_DRIVINGS)


def net(target: Target) -> NetDevice:
    """The driver's half of a network device, for checks that are for this type only."""
    assert isinstance(target.driving, NetDevice)
    return target.driving


def driving(device: str) -> Driving:
    """Give the driver's half of a type of device."""
    if device not in _DRIVINGS:
        raise UsageError(f"type {device!r} is not known; use {', '.join(TYPES)}")
    return _DRIVINGS[device]()


def header_bytes(guest: Guest) -> int:
    """Size of the virtio-net header as negotiated (VIRTIO 1.3, 5.1.6.1)."""
    features = guest.frontend.features
    return 12 if v.has(features, v.VIRTIO_F_VERSION_1) or v.has(features, v.VIRTIO_NET_F_MRG_RXBUF) else 10


def frame(number: int, size: int = 96) -> bytes:
    """An Ethernet frame that only this number has."""
    return (ETHERNET + struct.pack(">Q", number) + bytes((7 * at + number) & 255 for at in range(size)))[:size]


def poll_ring(guest: Guest, index: int) -> list[tuple[Buffer, int]]:
    """Take what a ring's device has used; it keeps the rules of the ring or the check fails."""
    guest.attend()
    try:
        return guest.queues[index].poll()
    except BrokenRingError as problem:
        raise Failed(f"ring {index}: {problem}") from problem


def read_sector(guest: Guest, sector: int, kind: int = VIRTIO_BLK_T_IN, size: int = SECTOR) -> tuple[int, bytes]:
    """Have a block device do a request that returns data; gives its status and the data it claims to have written."""
    queue = guest.queues[0]
    queue.add([struct.pack("<IIQ", kind, 0, sector)], [size, 1] if size else [1])
    queue.publish()
    guest.kick(0)
    came: list[tuple[Buffer, int]] = []

    def take() -> bool:
        came.extend(poll_ring(guest, 0))
        return bool(came)

    if not until(take, guest.target.timeout):
        raise Failed(f"request {kind} of sector {sector} does not complete within {guest.target.timeout:g} s")
    ((buffer, length),) = came
    return buffer.writable[-1][0], b"".join(buffer.writable)[: max(length - 1, 0)]
