"""A device in an event loop of yours; answers come when coroutines end: python examples/asyncio_device.py SOCKET."""

from __future__ import annotations

import asyncio
import signal
import sys

import vq


class Slow(vq.Device):
    """Gives each request back in capital letters, after as many milliseconds as it has bytes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.tasks: set[asyncio.Task[None]] = set()

    def handle(self, queue: vq.DeviceQueue) -> None:
        for chain in queue:
            task = self.loop.create_task(self.answer(chain))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def answer(self, chain: vq.DeviceChain) -> None:
        text = chain.read()
        await asyncio.sleep(len(text) / 1000)
        if chain.alive:
            chain.write(text.upper()[: chain.writable_bytes])
            chain.complete()


async def main(path: str) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    device = Slow(loop)
    try:
        with vq.Backend(device, path=path) as backend:
            loop.add_reader(backend.fileno(), backend.dispatch)
            await ended.wait()
            loop.remove_reader(backend.fileno())
    finally:
        device.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/asyncio_device.py SOCKET")
    try:
        asyncio.run(main(sys.argv[1]))
    except (vq.VqError, OSError) as error:
        raise SystemExit(f"asyncio_device.py: {error}") from None
