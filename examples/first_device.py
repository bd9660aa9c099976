"""Your first device, an entropy source for a guest: python examples/first_device.py SOCKET."""

import os
import sys

import vq


class Rng(vq.Device):
    device_id = vq.DeviceId.RNG

    def handle(self, queue):
        for chain in queue:
            chain.write(os.urandom(chain.writable_bytes))
            chain.complete()


if __name__ == "__main__":
    vq.serve(Rng(), socket_path=sys.argv[1] if len(sys.argv) > 1 else "/tmp/rng.sock")
