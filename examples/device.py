"""A device with a state that moves from one back-end to another: python examples/device.py."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vq
from vq import virtio
from vq_core.queue import Queue

FEATURES = virtio.mask(virtio.VIRTIO_F_VERSION_1, virtio.VHOST_USER_F_PROTOCOL_FEATURES)
PROTOCOL = virtio.mask(virtio.VHOST_USER_PROTOCOL_F_REPLY_ACK, virtio.VHOST_USER_PROTOCOL_F_DEVICE_STATE)


class Notebook(vq.HostedDevice):
    """One queue that nobody serves, and a text that survives a migration."""

    def __init__(self, text: str) -> None:
        self.name = "notebook"
        self.text = text
        self.queues = [Queue(0, "queue0")]
        self.offer = vq.Offer(FEATURES, PROTOCOL, queue_count=1, queue_num_answer=1)

    def save_state(self) -> bytes:
        return self.text.encode()

    def load_state(self, state: bytes) -> None:
        try:
            self.text = state.decode()
        except UnicodeDecodeError as error:
            raise vq.FrontendError("device state", "text", "not UTF-8", str(error)) from error


@contextmanager
def served(device: vq.HostedDevice, path: str) -> Iterator[vq.Frontend]:
    """Host a device in a thread, and be its front-end."""
    with vq.Server(device, path=path) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            with vq.Frontend.connect(path) as frontend:
                frontend.set_features(frontend.negotiate(FEATURES, PROTOCOL))
                yield frontend
        finally:
            server.request_stop()
            thread.join()


def main() -> None:
    source, target = Notebook("remember the milk"), Notebook("")
    with tempfile.TemporaryDirectory() as folder:
        with served(source, str(Path(folder, "source.sock"))) as frontend:
            state = frontend.save_state()
        with served(target, str(Path(folder, "target.sock"))) as frontend:
            frontend.load_state(state)
    print(f"the target knows: {target.text}")


if __name__ == "__main__":
    main()
