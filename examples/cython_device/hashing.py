"""Serves the device of fnv.pyx, asks it as a driver would, and sends packets to the port and by the programs.

python hashing.py
"""

from __future__ import annotations

import threading
from tempfile import TemporaryDirectory

import fnv
from fnv import HashWorker, Sampled, SizesPort

import vq
from vq import virtio
from vq.testing import serving
from vq_core.queue import Queue

FEATURES = virtio.mask(
    virtio.VIRTIO_F_VERSION_1,
    virtio.VIRTIO_F_RING_PACKED,
    virtio.VIRTIO_F_INDIRECT_DESC,
    virtio.VHOST_USER_F_PROTOCOL_FEATURES,
)
PROTOCOL = virtio.mask(virtio.VHOST_USER_PROTOCOL_F_REPLY_ACK, virtio.VHOST_USER_PROTOCOL_F_MQ)


class Hashing(vq.HostedDevice):
    """Two queues, whose requests a worker of our own answers."""

    in_order = True

    def __init__(self) -> None:
        self.name = "hashing"
        self.queues = [Queue(0, "queue0"), Queue(1, "queue1")]
        self.offer = vq.Offer(FEATURES, PROTOCOL, queue_count=2, queue_num_answer=2)
        self.worker = HashWorker(self.queues, limit=1 << 16)
        self.report_fd = self.worker.report_fd  # who serves the device logs then why a queue broke
        self._thread = threading.Thread(target=self.worker.run, name="hashing")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self.worker.stop()
            self._thread.join()
        self.worker.close()


def main() -> None:
    for layout in ("split", "packed"):
        with (
            TemporaryDirectory() as folder,
            serving(Hashing(), f"{folder}/hash.sock"),
            vq.Frontend.connect(f"{folder}/hash.sock") as frontend,
        ):
            for queue in (0, 1):
                answer = frontend.driver(queue, layout=layout).ask(b"foo", b"bar", room=8)
                print(f"{layout} queue {queue}: {int.from_bytes(answer, 'little'):#x}")
    port = SizesPort("sizes")
    with vq.Pump(["gen:size=300,count=100000", port]) as pump:
        pump.run(duration=60)
    print(f"packets below each length: {port.histogram}")
    # Programs between ports: a function as it is, and a class with a state.
    plain = vq.NativeProgram(fnv.__pyx_capi__["drop_ipv4"], abi=1, name="drop_ipv4")
    sampled = Sampled(10)
    for program in (plain, sampled):
        with vq.Pump(["gen:size=64,count=1000", "null:"], program=program) as pump:
            pump.run(duration=60)
            print(f"{program.name}: {pump.snapshot()['ports']['null']['to_null']['packets']} of 1000 packets")


if __name__ == "__main__":
    main()
