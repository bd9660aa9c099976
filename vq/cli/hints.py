"""What to type at the other end of a port."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vq.ports import PortSpec

__all__ = ["describe", "qemu_options"]


def qemu_options(spec: PortSpec, number: int = 0) -> str:
    """The QEMU options that connect a guest to a ``vhost:`` port.

    Parameters
    ----------
    spec
        The port.
    number
        Distinguishes the ids of several ports.
    """
    # A comma would end the value in QEMU's option syntax; there it is doubled.
    path = spec.target.replace(",", ",,")
    chardev = f"socket,id=vq{number},path={path}"
    # Whoever connects, does so again after the other end went away.
    chardev += ",server=on,wait=off" if spec.flag("client") else ",reconnect-ms=1000"
    # QEMU gives a device one queue pair, and to each queue an interrupt, only if it is told.
    pairs = spec.number("queues") if "queues" in spec.options else 1
    netdev, device = (f",queues={pairs}", f",mq=on,vectors={2 * pairs + 2}") if pairs > 1 else ("", "")
    words = [
        "-object", "memory-backend-memfd,id=vqmem,size=1G,share=on", "-machine", "memory-backend=vqmem", "-m", "1G",
        "-chardev", chardev,
        "-netdev", f"vhost-user,id=vqnet{number},chardev=vq{number}{netdev}",
        "-device", f"virtio-net-pci,netdev=vqnet{number}{device}",
    ]  # fmt: skip
    return shlex.join(words)


def describe(specs: Sequence[PortSpec]) -> list[str]:
    """Lines that say what a pump has opened, and how a guest gets to it."""
    lines = []
    for number, spec in enumerate(specs):
        if spec.kind != "vhost":
            lines.append(f"{spec.name}: open")
            continue
        what = "connects to" if spec.flag("client") else "listens on"
        pairs = spec.number("queues")
        lines.append(f"{spec.name}: {what} {spec.target}, up to {pairs} queue pair{'s' if pairs > 1 else ''}")
        lines.append(f"  QEMU: {qemu_options(spec, number)}")
    return lines
