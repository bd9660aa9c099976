"""A network namespace of a test's own: real interfaces and sockets that nobody else sees."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(),
    reason="needs root and /dev/net/tun for interfaces of its own; run: sudo make test",
)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def own_network() -> Iterator[None]:
    """Move the calling thread into a fresh network namespace, and back at the end; without IPv6 chatter."""
    with open("/proc/thread-self/ns/net", "rb") as home:
        _check(_libc.unshare(CLONE_NEWNET))
        try:
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
            yield
        finally:
            _check(_libc.setns(home.fileno(), CLONE_NEWNET))


def ip(command: str) -> str:
    """Run ``ip COMMAND`` in the thread's namespace."""
    return subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True, timeout=60).stdout


def mac_of(interface: str) -> str:
    """Hardware address of an interface."""
    return ip(f"-o link show dev {interface}").split("link/ether ")[1].split()[0]


def receive_all(sock: socket.socket, count: int, timeout: float = 60) -> list[bytes]:
    """Receive `count` datagrams; fewer if they do not come in time."""
    got: list[bytes] = []
    end = time.monotonic() + timeout
    while len(got) < count and (left := end - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            got.append(sock.recv(65536))
        except TimeoutError:
            break
    return got
