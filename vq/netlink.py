"""What the pump asks of network interfaces: MTU, up and down, what is there (rtnetlink, by pyroute2).

pyroute2 is imported when it is needed for the first time, so that ``import vq`` stays fast. All functions act in the
network namespace of the calling thread.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vq.errors import ResourceError, UsageError

MTU_MIN = 68  # IPv4's own (RFC 791)
MTU_MAX = 65521  # of a TAP: the largest IP packet without the Ethernet header
IFF_UP = 1
IFF_LOWER_UP = 1 << 16
TUN_TYPE_TAP = 2

REMEDIES = {
    errno.ENODEV: "'ip link' lists the interfaces that exist",
    errno.EINVAL: "the interface does not take this value; 'ip -d link show' prints its limits (minmtu, maxmtu)",
}


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface as it was when asked.

    Parameters
    ----------
    name, index
        As ``ip link`` shows them.
    mtu
        In bytes, without the Ethernet header.
    up
        The administrator wants it up.
    carrier
        The cable is plugged; for a TAP: a program holds it and says so. An interface that is down has no carrier.
    kind
        "tap", "tun", "bridge", "veth", ...; empty for hardware.
    persistent, multi_queue
        Of a TAP: it outlives its programs; it was made for several queues. False for all else.
    queues
        Of a TAP: how many queues programs hold now.
    address
        MAC address, lower case with colons; empty if it has none.
    """

    name: str
    index: int
    mtu: int
    up: bool
    carrier: bool
    kind: str
    persistent: bool
    multi_queue: bool
    queues: int
    address: str


def get_link(name: str) -> Link | None:
    """Look up an interface.

    Parameters
    ----------
    name
        Of the interface.

    Returns
    -------
    Link or None
        None if there is no such interface.

    Raises
    ------
    ResourceError
        The kernel did not answer.
    """
    with _netlink(name, "look-up of the interface") as route:
        message = _find(route, name)
    return None if message is None else _link(message)


def exists(name: str) -> bool:
    """Whether there is an interface of that name."""
    return get_link(name) is not None


def configure(name: str, *, mtu: int | None = None, up: bool | None = None) -> Link:
    """Set MTU and state of an interface, as far as they differ from what it has.

    What it has already needs no privilege: a TAP that was made and set up for an unprivileged user just works.

    Parameters
    ----------
    name
        Of the interface.
    mtu
        Bytes, 68 to 65521; None leaves it.
    up
        True: up, False: down; None leaves it.

    Returns
    -------
    Link
        As it is now.

    Raises
    ------
    UsageError
        `mtu` is out of range.
    ResourceError
        No such interface, no permission, or the interface cannot have this MTU.
    """
    if mtu is not None and not MTU_MIN <= mtu <= MTU_MAX:
        raise UsageError(f"{name}: MTU {mtu}; {MTU_MIN} to {MTU_MAX} bytes are possible")
    link = get_link(name)
    if link is None:
        raise ResourceError("look-up failed", errno=errno.ENODEV, path=name, remedy=REMEDIES[errno.ENODEV])
    changes: dict[str, Any] = {}
    if mtu is not None and mtu != link.mtu:
        changes["mtu"] = mtu
    if up is not None and up != link.up:
        changes["state"] = "up" if up else "down"
    if not changes:
        return link
    command = " ".join(str(value) if key == "state" else f"{key} {value}" for key, value in changes.items())
    privilege = f"run with CAP_NET_ADMIN, or have the administrator run: ip link set {name} {command}"
    with _netlink(name, f"setting {command}", privilege) as route:
        route.link("set", index=link.index, **changes)
        message = _find(route, name)
    if message is None:
        raise ResourceError("the interface has just gone", errno=errno.ENODEV, path=name)
    return _link(message)


def set_mtu(name: str, mtu: int) -> Link:
    """Set the MTU in bytes; see `configure`."""
    return configure(name, mtu=mtu)


def set_up(name: str, up: bool = True) -> Link:
    """Take the interface up or down; see `configure`."""
    return configure(name, up=up)


def _pyroute2() -> Any:
    """Import pyroute2 late: it takes a third of a second."""
    import pyroute2  # type: ignore[import-untyped]

    return pyroute2


@contextmanager
def _netlink(name: str, what: str, privilege: str = "run with CAP_NET_ADMIN") -> Iterator[Any]:
    """Open a netlink socket; what fails on it is a ResourceError about the interface `name`."""
    pyroute2 = _pyroute2()
    try:
        with pyroute2.IPRoute() as route:
            yield route
    except pyroute2.NetlinkError as error:
        remedy = privilege if error.code in (errno.EPERM, errno.EACCES) else REMEDIES.get(error.code, "")
        raise ResourceError(f"{what} failed", errno=error.code, path=name, remedy=remedy) from error
    except OSError as error:
        raise ResourceError(f"{what} failed", errno=error.errno or 0, path=name) from error


def _find(route: Any, name: str) -> Any | None:
    try:
        found = list(route.link("get", ifname=name))
    except _pyroute2().NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    return found[0] if found else None


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info else None) or ""
    persistent = multi_queue = False
    queues = 0
    if kind == "tun":  # the kernel's name for both
        tun = info.get_attr("IFLA_INFO_DATA")
        kind = "tap" if tun.get_attr("IFLA_TUN_TYPE") == TUN_TYPE_TAP else "tun"
        persistent = bool(tun.get_attr("IFLA_TUN_PERSIST"))
        multi_queue = bool(tun.get_attr("IFLA_TUN_MULTI_QUEUE"))
        queues = tun.get_attr("IFLA_TUN_NUM_QUEUES") or 0
    return Link(
        name=message.get_attr("IFLA_IFNAME"),
        index=message["index"],
        mtu=message.get_attr("IFLA_MTU"),
        up=bool(message["flags"] & IFF_UP),
        carrier=bool(message["flags"] & IFF_LOWER_UP),
        kind=kind,
        persistent=persistent,
        multi_queue=multi_queue,
        queues=queues,
        address=message.get_attr("IFLA_ADDRESS") or "",
    )
