"""``vq libvirt``: the parts of a libvirt domain that connect its guest to a port."""

from __future__ import annotations

from typing import Annotated, Final
from xml.etree import ElementTree

from cyclopts import Parameter

from vq.cli.guest_options import GuestPorts, Link, Memory, RingSize, guest_links, parse_memory
from vq.cli.output import check_output, write_json
from vq.stats import encode

__all__ = ["HELP", "domain_parts", "libvirt"]

# One line a paragraph: the terminal wraps them.
HELP: Final = """\
Print the parts of a libvirt domain that fit the vhost: ports of a pump, for each guest; to be merged into your own by \
virsh edit.

The mode of a source is QEMU's role: it is client where the pump listens, and server where the port is written with \
client. QEMU runs as a user of its own under libvirt; give the socket to it, with mode=0666 or by its directory.
"""
RECONNECT_S: Final = 1


def domain_parts(link: Link, *, memory_mib: int = 1024, ring_size: int = 1024) -> str:
    """The elements of a domain that connect its guest to a port, as XML.

    Parameters
    ----------
    link
        The port.
    memory_mib
        Of the guest.
    ring_size
        Entries of each ring: 256, 512 or 1024.
    """
    make = ElementTree.SubElement
    domain = ElementTree.Element("domain", type="kvm")
    make(domain, "memory", unit="MiB").text = str(memory_mib)
    backing = make(domain, "memoryBacking")
    make(backing, "source", type="memfd")
    make(backing, "access", mode="shared")
    interface = make(make(domain, "devices"), "interface", type="vhostuser")
    source = make(interface, "source", type="unix", path=link.path, mode="server" if link.listens else "client")
    if not link.listens:
        make(source, "reconnect", enabled="yes", timeout=str(RECONNECT_S))
    make(interface, "model", type="virtio")
    # libvirt says mq=on and counts the interrupts by itself.
    queues = {"queues": str(link.pairs)} if link.pairs > 1 else {}
    sizes = {"rx_queue_size": str(ring_size), "tx_queue_size": str(ring_size)}
    make(interface, "driver", queues | sizes | ({"packed": "on"} if link.packed else {}))
    if link.mtu is not None:
        make(interface, "mtu", size=str(link.mtu))
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")


def libvirt(
    *ports: GuestPorts,
    memory: Memory = "1G",
    ring_size: RingSize = 1024,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="One object a line.")] = False,
) -> int:
    """Print the parts of a libvirt domain that fit the ports of a pump; see `HELP`."""
    links = guest_links(ports)
    mib = parse_memory(memory)
    for link in links:
        text = domain_parts(link, memory_mib=mib, ring_size=ring_size)
        if json:
            write_json(encode({"port": link.name, "xml": text}))
            continue
        with check_output():
            if len(links) > 1:
                print(f"<!-- {link.name.replace('--', '- -')} -->")
            print(text)
    return 0
