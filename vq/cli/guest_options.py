"""What ``vq qemu`` and ``vq libvirt`` have in common: ports that are guests, and how a guest is to be made."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from cyclopts import Parameter

from vq.errors import UsageError
from vq.groups import parse_groups
from vq.inherited import find_fd, listening_path
from vq.ports import PortSpec

__all__ = ["GuestPorts", "Link", "Memory", "RingSize", "guest_links", "parse_memory", "socket_path"]

MEMORY: Final = re.compile(r"([1-9][0-9]{0,8})([MG])", re.I)

GuestPorts = Annotated[str, Parameter(name="PORT", help="As for vq pump; those that are no vhost: are left out.")]
Memory = Annotated[str, Parameter(help="Memory of a guest, such as 512M or 4G.")]
RingSize = Annotated[
    Literal[256, 512, 1024], Parameter(help="Entries of each ring. Left to itself QEMU makes rings of 256.")
]


@dataclass(frozen=True, slots=True)
class Link:
    """How one guest is joined to one port.

    Parameters
    ----------
    name
        Of the port.
    path
        Of the socket, absolute: QEMU may run elsewhere.
    listens
        QEMU listens; else it connects.
    pairs
        Queue pairs that the guest is given.
    packed
        The device may be driven with packed rings.
    mtu
        The port's, or None.
    """

    name: str
    path: str
    listens: bool
    pairs: int
    packed: bool
    mtu: int | None

    @classmethod
    def of(cls, spec: PortSpec, path: str) -> Link:
        """The link of a ``vhost:`` port; a guest gets several queue pairs only where the port asks for them."""
        return cls(
            spec.name,
            os.path.abspath(path),
            spec.flag("client"),
            spec.number("queues") if "queues" in spec.options else 1,
            spec.get("layout") == "packed",
            spec.maybe_number("mtu"),
        )


def socket_path(spec: PortSpec) -> str:
    """The path of a ``vhost:`` port's socket; empty for an inherited socket that does not listen on one."""
    return listening_path(find_fd(spec.inherited)) if spec.inherited else spec.target


def guest_links(ports: Sequence[str]) -> list[Link]:
    """The links of those PORT arguments that are guests.

    Raises
    ------
    UsageError
        As `parse_groups`; or no guest is among them, or one is an inherited socket without a path.
    """
    links = []
    for group in parse_groups(ports):
        for spec in group:
            if spec.kind != "vhost":
                continue
            path = socket_path(spec)
            if not path:
                raise UsageError(f"{spec.name}: this socket listens on no path, so nobody can connect to it by name")
            links.append(Link.of(spec, path))
    if not links:
        raise UsageError("no PORT is a guest; write one such as vhost:/run/vq/a.sock")
    return links


def parse_memory(text: str) -> int:
    """Read the memory of a guest; gives MiB."""
    match = MEMORY.fullmatch(text)
    if match is None:
        raise UsageError(f"--memory is {text!r}; write mebibytes or gibibytes, such as 512M or 4G")
    return int(match[1]) * (1024 if match[2].upper() == "G" else 1)
