"""A guest whose network driver has a control queue (VIRTIO 1.3, 5.1.6.5)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from vq import virtio as v
from vq.check.devices import poll_ring
from vq.check.guest import BASIC_PROTOCOL, Guest
from vq.check.outcome import Failed
from vq.check.waiting import until
from vq_core.driver import Buffer, DriverQueue

if TYPE_CHECKING:
    from vq.check.target import Target

__all__ = ["COMMANDS", "CONTROL", "ERR", "OK", "UNTOUCHED", "ControlGuest"]

CONTROL: Final = (v.VIRTIO_NET_F_CTRL_VQ,)
# Features whose commands a driver may send.
COMMANDS: Final = v.mask(
    *CONTROL, v.VIRTIO_NET_F_CTRL_RX, v.VIRTIO_NET_F_CTRL_RX_EXTRA, v.VIRTIO_NET_F_CTRL_VLAN,
    v.VIRTIO_NET_F_CTRL_MAC_ADDR, v.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, v.VIRTIO_NET_F_GUEST_ANNOUNCE,
    v.VIRTIO_NET_F_GUEST_CSUM,
)  # fmt: skip
MAX_PAIRS_AT: Final = 8  # in the configuration space: max_virtqueue_pairs (VIRTIO 1.3, 5.1.4)
MOST_PAIRS: Final = 127  # for which there are ring indices in the messages that bring fds
OK: Final = 0
ERR: Final = 1
UNTOUCHED: Final = 0x5A  # stands where the ack is to come


class ControlGuest(Guest):
    """A connection whose first queue pair and control queue run.

    Parameters
    ----------
    target, layout, num
        As for `Guest`.
    multiqueue
        Acknowledge MQ, so that the control queue stands behind all pairs; otherwise behind the first (VIRTIO 1.3,
        5.1.2).

    Attributes
    ----------
    pairs : int
        Queue pairs that the driver knows of.
    """

    def __init__(self, target: Target, *, layout: str = "split", num: int = 64, multiqueue: bool = False) -> None:
        wanted = COMMANDS | (v.mask(v.VIRTIO_NET_F_MQ) if multiqueue else 0)
        protocol = BASIC_PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_CONFIG)
        super().__init__(target, features=wanted, protocol=protocol, layout=layout, num=num, running=False)
        try:
            self.pairs = self._max_pairs() if multiqueue else 1
            while len(self.queues) < 2 * self.pairs + 1:
                self.queues.append(DriverQueue(self.memory, num, features=self.frontend.features))
            self.share()
            for index in (0, 1, self.victim):
                self.start(index)
        except BaseException:
            self.close()
            raise

    def _max_pairs(self) -> int:
        (pairs,) = struct.unpack("<H", self.frontend.get_config(MAX_PAIRS_AT, 2))
        if not 1 <= pairs <= MOST_PAIRS:
            raise Failed(f"max_virtqueue_pairs is {pairs}; there are 1 to {MOST_PAIRS}")
        return int(pairs)

    @property
    def victim(self) -> int:
        return 2 * self.pairs

    def send(self, *parts: bytes) -> int:
        """Have a command executed that lies in so many descriptors.

        Returns
        -------
        int
            Its ack, which is `OK` or `ERR`.

        Raises
        ------
        Failed
            It is not answered, or not by one byte that is one of these.
        """
        return self.flood([parts])[0]

    def flood(self, commands: Sequence[Sequence[bytes]]) -> list[int]:
        """Make several commands available at once; gives their acks, as `send` does."""
        queue = self.queues[self.victim]
        buffers: list[Buffer] = []
        for parts in commands:
            buffer = queue.add(parts, [1])
            buffer.writable[0][0] = UNTOUCHED
            buffers.append(buffer)
        queue.publish()
        self.kick(self.victim)
        done: list[tuple[Buffer, int]] = []

        def finished() -> bool:
            done.extend(poll_ring(self, self.victim))
            return len(done) >= len(buffers)

        if not until(finished, self.target.timeout):
            raise Failed(f"{len(done)} of {len(buffers)} commands are answered within {self.target.timeout:g} s")
        for buffer, length in done:
            ack = buffer.writable[0][0]
            if length != 1:
                raise Failed(f"the used length is {length}; the ack is 1 byte")
            if ack not in (OK, ERR):
                raise Failed(f"the ack is {ack:#x}; it is 0 or 1")
        return [buffer.writable[0][0] for buffer in buffers]

    def expect(self, ack: int, *parts: bytes) -> str:
        """Send a command, and insist on its ack; tells it."""
        names = {OK: "OK", ERR: "ERR"}
        found = self.send(*parts)
        if found != ack:
            raise Failed(f"answered {names[found]}, not {names[ack]}")
        return names[found]
