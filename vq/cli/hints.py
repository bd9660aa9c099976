"""What to type at the other end of a port."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vq.cli.guest_options import Link, socket_path
from vq.cli.qemu import qemu_options
from vq.ports import PortSpec

__all__ = ["describe", "qemu_blk_options"]


def qemu_blk_options(path: str, queues: int) -> str:
    """The QEMU options that give a guest the disk behind a socket.

    Parameters
    ----------
    path
        The socket.
    queues
        Request queues that the back-end offers.
    """
    words = [
        "-object", "memory-backend-memfd,id=vqmem,size=1G,share=on", "-machine", "memory-backend=vqmem", "-m", "1G",
        "-chardev", f"socket,id=vqblk,path={path.replace(',', ',,')},reconnect-ms=1000",
        "-device", f"vhost-user-blk-pci,chardev=vqblk,num-queues={queues}",
    ]  # fmt: skip
    return shlex.join(words)


def describe(specs: Sequence[PortSpec]) -> list[str]:
    """Lines that say what a pump has opened, and how a guest gets to it."""
    lines = []
    for number, spec in enumerate(specs):
        if spec.kind != "vhost":
            lines.append(f"{spec.name}: open")
            continue
        path = socket_path(spec)
        what = "connects to" if spec.flag("client") else "listens on"
        pairs = spec.number("queues")
        most = f"up to {pairs} queue pair{'s' if pairs > 1 else ''}"
        lines.append(f"{spec.name}: {f'{what} {path}' if path else 'was passed'}, {most}")
        if path:
            lines.append(f"  QEMU: {shlex.join(qemu_options(Link.of(spec, path), number))}")
    return lines
