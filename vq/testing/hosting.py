"""A device behind a socket, served by a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vq.errors import ResourceError
from vq.hosted_device import HostedDevice
from vq.server import Server

__all__ = ["serving"]

END_S = 30.0


@contextmanager
def serving(device: HostedDevice, path: str | Path) -> Iterator[Server]:
    """Serve a device until the end of the block, and close it then.

    Parameters
    ----------
    device
        What is to be tested.
    path
        Of the socket; front-ends can connect when the block begins.

    Raises
    ------
    ResourceError
        The loop of the server does not end within 30 s: a hook of the device waits for something.
    BaseException
        What the loop itself has raised.
    """
    problems: list[BaseException] = []
    server = Server(device, path=str(path))

    def loop() -> None:
        try:
            server.run()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=loop, name="vq-testing", daemon=True)
    thread.start()
    try:
        yield server
    except Exception as seen:  # perhaps nothing but what a server that has ended looks like from outside
        _end(server, thread, path)
        if problems:
            raise problems[0] from seen
        raise
    except BaseException:
        _end(server, thread, path)
        raise
    _end(server, thread, path)
    if problems:
        raise problems[0]


def _end(server: Server, thread: threading.Thread, path: str | Path) -> None:
    server.request_stop()
    thread.join(END_S)
    if thread.is_alive():
        remedy = "look for a hook of the device that waits"
        raise ResourceError(f"the server of {path} does not end", path=str(path), remedy=remedy)
    server.close()
