"""The list of checks: a decorator puts a function there, with the clause that it is about and what it needs.

A check is a function of a `Target`. It returns, perhaps with a few words about what it saw, when the back-end is right;
it raises `Failed` when not, and `Skipped` when it finds out that it does not apply. Anything else that a front-end can
meet (a nack, a malformed reply, silence, an end of the connection) fails it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple

from vq import virtio as v
from vq.check.outcome import Group

if TYPE_CHECKING:
    from vq.check.target import Target

__all__ = ["Check", "check", "checks"]

Function = Callable[["Target"], str | None]

# In the order in which they run: what the others build upon comes first, what kills many back-ends last.
ROOMS: Final = {
    Group.CONFORMANCE: (
        "framing", "features", "acks", "queues", "memory", "slots", "postcopy", "rings", "states", "notify", "status",
        "reset", "config", "log", "iotlb", "inflight", "inband", "state", "sharing", "net", "control", "blk",
    ),
    Group.HOSTILE: (
        "framing", "fds", "values", "regions", "placement", "avail", "chains", "indirect", "packed", "net", "control",
        "blk", "iotlb", "life", "truncated",
    ),
}  # fmt: skip

# Whose feature names a check means; the bits that each type has for itself overlap.
_DEVICE_IDS: Final = {"net": v.DeviceId.NET, "blk": v.DeviceId.BLOCK}


class Check(NamedTuple):
    """One row of the list.

    Parameters
    ----------
    name
        Room and function, such as "rings.restart"; the rooms of hostile input begin with "hostile.".
    group
        Which half it belongs to.
    section
        Specification and clause.
    title
        First line of the function's docstring.
    device
        The type that it is for; empty: any.
    features, protocol_features
        What the back-end must offer, as sets of bits.
    run
        The function.
    """

    name: str
    group: Group
    section: str
    title: str
    device: str
    features: int
    protocol_features: int
    run: Function

    def lacking(self, device: str, features: int, protocol_features: int) -> str:
        """Say why the check does not apply to such a back-end; empty if it does."""
        if self.device and self.device != device:
            return f"for --type {self.device}"
        missing = v.feature_names(self.features & ~features, _DEVICE_IDS.get(self.device))
        missing += v.protocol_feature_names(self.protocol_features & ~protocol_features)
        return f"not offered: {', '.join(missing)}" if missing else ""


_checks: list[Check] = []


def check(
    section: str, *, device: str = "", features: tuple[int, ...] = (), protocol: tuple[int, ...] = ()
) -> Callable[[Function], Function]:
    """Put a function on the list.

    Parameters
    ----------
    section
        Specification and clause, such as "vhost-user, Ring states".
    device
        Type of device that it is for; empty: any.
    features, protocol
        Bit numbers that the back-end must offer; otherwise the check is skipped.
    """

    def enter(function: Function) -> Function:
        *_, half, room = function.__module__.split(".")
        group = Group(half)
        name = f"{_prefix(group)}{room}.{function.__name__.replace('_', '-')}"
        title = (function.__doc__ or "").split("\n")[0].rstrip(".")
        wanted = v.mask(*protocol)
        _checks.append(Check(name, group, section, title, device, v.mask(*features), wanted, function))
        return function

    return enter


def _prefix(group: Group) -> str:
    return "hostile." if group is Group.HOSTILE else ""


def checks() -> Iterator[Check]:
    """All checks in the order in which they run."""
    for group, rooms in ROOMS.items():
        for room in rooms:
            import_module(f"vq.check.{group}.{room}")
    order = [_prefix(group) + room for group, rooms in ROOMS.items() for room in rooms]
    yield from sorted(_checks, key=lambda known: order.index(known.name.rpartition(".")[0]))
