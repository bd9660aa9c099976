"""Several pumps in one: which ports are joined with which."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeAlias, overload

from vq.errors import UsageError
from vq.ports import PortSpec, parse_ports

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from vq_core.port import Port

__all__ = ["JOINT", "PortArgument", "parse_groups"]

JOINT: Final = "+"  # the word between two groups

PortText = PortSpec | str
PortArgument: TypeAlias = "PortText | Port"


@overload
def parse_groups(ports: Sequence[PortText | Sequence[PortText]]) -> list[list[PortSpec]]: ...
@overload
def parse_groups(ports: Sequence[PortArgument | Sequence[PortArgument]]) -> list[list[PortSpec | Port]]: ...
def parse_groups(
    ports: Sequence[PortArgument | Sequence[PortArgument]],
) -> list[list[PortSpec]] | list[list[PortSpec | Port]]:
    """Read the PORT arguments of a pump, group by group; the names are unique among all.

    Parameters
    ----------
    ports
        PORT arguments, or ports that are open, with the word ``+`` between two groups, or a sequence of them for each
        group.

    Returns
    -------
    list of list of PortSpec or Port
        By group; `echo:` is left out, since a port alone is reflected anyway.

    Raises
    ------
    UsageError
        As `parse_ports`; or an open port has the name of another; or a group is empty, or an `echo:` does not stand
        beside exactly one port.
    """
    groups = _split(ports)
    words = [port for group in groups for port in group if not _is_open(port)]
    specs = iter(parse_ports(words) if words or not any(groups) else [])
    named = [[port if _is_open(port) else next(specs) for port in group] for group in groups]
    _check_names([port for group in named for port in group])
    for number, group in enumerate(named, start=1):
        if not group:
            raise UsageError(f"group {number} of {len(named)} has no PORT; leave out the {JOINT} before or after it")
    return [_without_echo(group) for group in named]


def _is_open(port: object) -> TypeIs[Port]:
    """Whether it is a port that is open; the engine, which is slow to load, is not needed to say no."""
    engine = sys.modules.get("vq_core.port")
    return engine is not None and isinstance(port, engine.Port)


def _check_names(ports: Sequence[PortSpec | Port]) -> None:
    """Those of PORT arguments are told apart already; one that its owner gave has to be a name of its own."""
    names = set()
    for port in ports:
        if not isinstance(port.name, str) or not port.name:
            raise UsageError(f"a port has the name {port.name!r}; its constructor has to give it one")
        if port.name in names:
            raise UsageError(f"two ports are called {port.name!r}; counters and log lines need a name for each")
        names.add(port.name)


def _split(ports: Sequence[PortArgument | Sequence[PortArgument]]) -> list[list[PortArgument]]:
    words = [item for item in ports if isinstance(item, PortSpec | str) or _is_open(item)]
    rows = [list(item) for item in ports if not (isinstance(item, PortSpec | str) or _is_open(item))]
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


def _without_echo(group: list[PortSpec | Port]) -> list[PortSpec | Port]:
    echoes = [port for port in group if isinstance(port, PortSpec) and port.kind == "echo"]
    if echoes and (len(group) != 2 or len(echoes) != 1):
        others = len(group) - len(echoes)
        raise UsageError(f"echo: reflects one other port, and this pump has {others}; give exactly one")
    return [port for port in group if port not in echoes]
