"""``vq qemu``: the options that connect a guest of QEMU to a port."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from typing import Annotated, Final, NamedTuple

from cyclopts import Parameter

from vq.cli.guest_options import GuestPorts, Link, Memory, RingSize, guest_links, parse_memory
from vq.cli.output import check_output, write_json
from vq.errors import UsageError
from vq.stats import encode

__all__ = ["HELP", "Version", "qemu", "qemu_options"]

# One line a paragraph: the terminal wraps them.
HELP: Final = """\
Print the QEMU options that fit the vhost: ports of a pump, a line for each guest; to be pasted behind your own.

Memory is shared with the back-end, whoever connects comes again after an interruption, a port with queues=N gives its \
guest N queue pairs and the interrupts that they need. A guest without a driver for packed rings uses split ones.
"""


class Version(NamedTuple):
    """A version of QEMU."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


MEMORY_BACKEND: Final = Version(5, 0)  # -machine takes memory-backend= from here on
USEFUL: Final = Version(8, 0)  # 7.2 may crash without KVM as soon as a guest uses MSI-X on a vhost-user device
MILLISECONDS: Final = Version(9, 2)  # reconnect-ms= replaces reconnect= from here on


def qemu_options(
    link: Link, number: int = 0, *, version: Version = MILLISECONDS, memory_mib: int = 1024, ring_size: int = 1024
) -> list[str]:
    """The QEMU options that connect a guest to a port, word by word.

    Parameters
    ----------
    link
        The port.
    number
        Distinguishes the ids of several ports.
    version
        Of QEMU.
    memory_mib
        Of the guest.
    ring_size
        Entries of each ring: 256, 512 or 1024.
    """
    # A comma would end the value in QEMU's option syntax; there it is doubled.
    chardev = f"socket,id=vq{number},path={link.path.replace(',', ',,')}"
    # Whoever connects, does so again after the other end went away.
    if link.listens:
        chardev += ",server=on,wait=off"
    else:
        chardev += ",reconnect-ms=1000" if version >= MILLISECONDS else ",reconnect=1"
    netdev, device = f"vhost-user,id=vqnet{number},chardev=vq{number}", f"virtio-net-pci,netdev=vqnet{number}"
    # QEMU gives a device one queue pair, and to each queue an interrupt, only if it is told.
    if link.pairs > 1:
        netdev += f",queues={link.pairs}"
        device += f",mq=on,vectors={2 * link.pairs + 2}"
    device += f",rx_queue_size={ring_size},tx_queue_size={ring_size}"
    device += ",packed=on" if link.packed else ""
    device += f",host_mtu={link.mtu}" if link.mtu is not None else ""
    size = f"{memory_mib}M" if memory_mib % 1024 else f"{memory_mib // 1024}G"
    return [
        "-object", f"memory-backend-memfd,id=vqmem,size={size},share=on",
        "-machine", "memory-backend=vqmem", "-m", size,
        "-chardev", chardev, "-netdev", netdev, "-device", device,
    ]  # fmt: skip


def _programs() -> tuple[str, ...]:
    return (f"qemu-system-{platform.machine()}", "qemu-kvm", "/usr/libexec/qemu-kvm", "kvm")


def installed_version() -> Version | None:
    """The version of the QEMU of this machine; None if there is none, or it does not say."""
    for name in _programs():
        program = shutil.which(name)
        if program is not None:
            with suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
                match = re.search(r"version (\d+)\.(\d+)", done.stdout)
                if match is not None:
                    return Version(int(match[1]), int(match[2]))
    return None


def parse_version(text: str) -> Version:
    """Read a version such as ``8.2`` or ``8.2.1``."""
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})(\.\d{1,3})?", text, re.ASCII)
    if match is None:
        raise UsageError(f"--qemu-version is {text!r}; write such as 8.2")
    version = Version(int(match[1]), int(match[2]))
    if version < MEMORY_BACKEND:
        raise UsageError(f"--qemu-version is {text}; these options need QEMU {MEMORY_BACKEND}, and {USEFUL} works well")
    return version


def qemu(
    *ports: GuestPorts,
    memory: Memory = "1G",
    ring_size: RingSize = 1024,
    qemu_version: Annotated[
        str | None, Parameter(help="Version of QEMU. Default: of the one installed here; without one, the newest.")
    ] = None,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="One object a line.")] = False,
) -> int:
    """Print the QEMU options that fit the ports of a pump; see `HELP`."""
    links = guest_links(ports)
    mib = parse_memory(memory)
    version = parse_version(qemu_version) if qemu_version is not None else installed_version() or MILLISECONDS
    if version < USEFUL:
        print(f"vq: note: use QEMU {USEFUL} or newer; {version} may crash with vhost-user and no KVM", file=sys.stderr)
    for number, link in enumerate(links):
        words = qemu_options(link, number, version=version, memory_mib=mib, ring_size=ring_size)
        if json:
            write_json(encode({"port": link.name, "options": words, "qemu": str(version)}))
            continue
        with check_output():
            if len(links) > 1:
                print(f"# {link.name}")
            print(shlex.join(words))
    return 0
