"""A device whose requests a `ChainWorker` serves."""

from __future__ import annotations

import threading

import vq
from vq import virtio as v
from vq_core.chain_worker import ChainWorker
from vq_core.queue import Queue

FEATURES = v.mask(
    v.VIRTIO_F_VERSION_1,
    v.VIRTIO_F_RING_PACKED,
    v.VIRTIO_F_INDIRECT_DESC,
    v.VIRTIO_F_EVENT_IDX,
    v.VHOST_USER_F_PROTOCOL_FEATURES,
)
PROTOCOL = v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_MQ)


class Swallow(vq.HostedDevice):
    """Two queues, whose requests come back empty."""

    in_order = True

    def __init__(self, kind: type[ChainWorker] = ChainWorker) -> None:
        self.name = "swallow"
        self.queues = [Queue(0, "queue0"), Queue(1, "queue1")]
        self.offer = vq.Offer(FEATURES, PROTOCOL, queue_count=2, queue_num_answer=2)
        self.worker = kind(self.queues)
        self.report_fd = self.worker.report_fd
        self._thread = threading.Thread(target=self.worker.run)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.worker.stop()
        self._thread.join()
        self.worker.close()
