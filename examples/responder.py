"""A host made of arrays: answers ARP and pings of a guest, burst by burst, without a loop over packets.

python examples/responder.py SOCKET; in the guest: ip addr add 10.0.0.1/24 dev eth0, ip link set eth0 up, ping 10.0.0.2.
Any other address answers as well.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import vq

HEADER = bytes(10) + b"\1\0"  # of virtio-net: nothing is left to do, one buffer
MAC = np.frombuffer(b"\x02vq\0\0\1", np.uint8)
SIZE = 1514


def words(rows: Any, place: int) -> Any:
    """The two bytes at a place of each row, as numbers."""
    return rows[:, place].astype(int) << 8 | rows[:, place + 1]


class Responder(vq.Device):
    """A network device at whose other end there is this host, and nothing else."""

    device_id = vq.DeviceId.NET
    queues = ("receiveq", "transmitq")

    def handle(self, queue: vq.DeviceQueue) -> None:
        if queue.name == "transmitq":
            while burst := queue.pull(header=len(HEADER)):
                self.answer(burst)
                burst.complete()

    def answer(self, burst: vq.DeviceBurst) -> None:
        lengths = burst.lengths
        rows = burst.heads(SIZE)  # a copy: what is judged is what is sent back
        kinds = words(rows, 12)
        questions = (kinds == 0x0806) & (rows[:, 21] == 1) & (lengths >= 42)
        pings = (kinds == 0x0800) & (rows[:, 14] == 0x45) & (rows[:, 23] == 1) & (rows[:, 34] == 8) & (lengths >= 42)
        rows[:, :6], rows[:, 6:12] = rows[:, 6:12].copy(), MAC
        # ARP: a reply, from the address that was asked for.
        rows[questions, 21] = 2
        ends = rows[questions, 22:42]
        rows[questions, 32:42] = ends[:, :10]
        rows[questions, 22:28] = MAC
        rows[questions, 28:32] = ends[:, 16:20]
        # Echo: the addresses change places; the checksum grows by what the type loses.
        rows[pings, 26:34] = np.roll(rows[pings, 26:34], 4, axis=1)
        rows[pings, 34] = 0
        checksums = words(rows[pings], 36) + 0x0800
        checksums += checksums >> 16
        rows[pings, 36], rows[pings, 37] = checksums >> 8 & 0xFF, checksums & 0xFF
        wanted = (questions | pings) & (lengths <= SIZE)
        self.chains[0].push(rows[wanted], lengths[wanted], header=HEADER)


if __name__ == "__main__":
    vq.serve(Responder(), socket_path=sys.argv[1] if len(sys.argv) > 1 else "/tmp/responder.sock")
