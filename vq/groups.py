"""Several pumps in one: which ports are joined with which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vq.errors import UsageError
from vq.ports import PortSpec, parse_ports

__all__ = ["JOINT", "PortArgument", "parse_groups"]

JOINT: Final = "+"  # the word between two groups

PortArgument = PortSpec | str


def parse_groups(ports: Sequence[PortArgument | Sequence[PortArgument]]) -> list[list[PortSpec]]:
    """Read the PORT arguments of a pump, group by group; the names are unique among all.

    Parameters
    ----------
    ports
        PORT arguments with the word ``+`` between two groups, or a sequence of them for each group.

    Returns
    -------
    list of list of PortSpec
        By group; `echo:` is left out, since a port alone is reflected anyway.

    Raises
    ------
    UsageError
        As `parse_ports`; or a group is empty, or an `echo:` does not stand beside exactly one port.
    """
    groups = _split(ports)
    specs = iter(parse_ports([port for group in groups for port in group]))
    named = [[next(specs) for _ in group] for group in groups]
    for number, group in enumerate(named, start=1):
        if not group:
            raise UsageError(f"group {number} of {len(named)} has no PORT; leave out the {JOINT} before or after it")
    return [_without_echo(group) for group in named]


def _split(ports: Sequence[PortArgument | Sequence[PortArgument]]) -> list[list[PortArgument]]:
    words = [item for item in ports if isinstance(item, PortSpec | str)]
    rows = [list(item) for item in ports if not isinstance(item, PortSpec | str)]
    if rows and words:
        raise UsageError("ports holds PORT arguments beside sequences of them; write a sequence for each group")
    if rows:
        return rows
    groups: list[list[PortArgument]] = [[]]
    for word in words:
        if word == JOINT:
            groups.append([])
        else:
            groups[-1].append(word)
    return groups


def _without_echo(group: list[PortSpec]) -> list[PortSpec]:
    echoes = [spec for spec in group if spec.kind == "echo"]
    if echoes and (len(group) != 2 or len(echoes) != 1):
        others = len(group) - len(echoes)
        raise UsageError(f"echo: reflects one other port, and this pump has {others}; give exactly one")
    return [spec for spec in group if spec.kind != "echo"]
