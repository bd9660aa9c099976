"""A device that is served in Python: an entropy source (virtio-rng) for a guest: python examples/entropy.py SOCKET.

QEMU, started after it: -chardev socket,id=c0,path=SOCKET -device vhost-user-rng-pci,chardev=c0
and memory that is shared, as for vq pump.
"""

from __future__ import annotations

import os
import signal
import sys

import vq
from vq import virtio
from vq_core.chain_queue import ChainQueue
from vq_core.queue import Queue

FEATURES = virtio.mask(virtio.VIRTIO_F_VERSION_1, virtio.VIRTIO_F_RING_PACKED, virtio.VHOST_USER_F_PROTOCOL_FEATURES)
PROTOCOL = virtio.mask(virtio.VHOST_USER_PROTOCOL_F_REPLY_ACK, virtio.VHOST_USER_PROTOCOL_F_MQ)
AT_ONCE = 64  # requests, then the front-end has its turn
ANSWER_MAX = 1 << 16  # bytes, however long the buffer of a driver may be


class Entropy(vq.Device):
    """One queue, whose requests are empty buffers to be filled with random bytes (VIRTIO 1.3, 5.4)."""

    def __init__(self) -> None:
        self.name = "entropy"
        self.report_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.requests = ChainQueue(Queue(0, "requestq", self.report_fd))
        self.queues = [self.requests.queue]
        self.requests_fd = self.requests.fileno()
        self.offer = vq.Offer(FEATURES, PROTOCOL, queue_count=1, queue_num_answer=1)

    def close(self) -> None:
        if self.report_fd is not None:
            self.requests.close()
            os.close(self.report_fd)
            self.report_fd = None

    def serve_requests(self) -> None:
        self.requests.begin()
        for _ in range(AT_ONCE):
            request = self.requests.pop()
            if request is None:
                break
            request.complete(os.urandom(min(request.writable_bytes, ANSWER_MAX)))
        self.requests.publish()
        self.requests.arm()


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/entropy.py SOCKET")
    try:
        with vq.Server(Entropy(), path=sys.argv[1]) as server:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: server.request_stop())
            server.run()
    except (vq.VqError, OSError) as error:
        raise SystemExit(f"entropy.py: {error}") from None


if __name__ == "__main__":
    main()
