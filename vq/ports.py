"""The PORT argument: ``KIND:TARGET[,key=value...]`` to `PortSpec`, by the table in port_kinds.py."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from vq.errors import UsageError
from vq.inherited import NAME_MAX, find_fd
from vq.port_kinds import KINDS, Kind, Value

__all__ = ["PortSpec", "parse_port", "parse_ports"]

SOCKET_PATH_BYTES: Final = 107  # sun_path of Linux, without its final zero
INTERFACE_BYTES: Final = 15  # IFNAMSIZ of Linux, without its final zero
INHERITED: Final = "fd="  # begins the target of a vhost port that is an inherited socket

# Keys of `pcap` that only make sense in one direction: key -> must `write` stand beside it?
PCAP_DIRECTION: Final[Mapping[str, bool]] = MappingProxyType({"speed": False, "loop": False, "snaplen": True})


@dataclass(frozen=True, slots=True)
class PortSpec:
    """A PORT that has been read and checked; nothing has been opened yet.

    Parameters
    ----------
    kind
        Key of `KINDS`.
    target
        Path, interface or file; empty for kinds without one.
    options
        What was written, as numbers, strings and True; use `get` and the typed look-ups for defaults too.
    name
        How counters and log lines call it; unique in a pump that `parse_ports` made.
    """

    kind: str
    target: str = ""
    options: Mapping[str, Value] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        if not self.name:
            object.__setattr__(self, "name", f"{self.kind}:{self.target}" if self.target else self.kind)

    def get(self, key: str) -> Value | None:
        """The value of a key, written or by default; None if neither; KeyError if the kind has no such key."""
        option = KINDS[self.kind].option(key)
        if option is None:
            raise KeyError(f"{self.kind}: has no option {key}")
        return self.options.get(key, False if option.form == "flag" else option.default)

    @property
    def inherited(self) -> str:
        """Number or name of the inherited socket that a ``vhost:fd=...`` means; empty for all others."""
        return self.target.removeprefix(INHERITED) if _is_inherited(self.kind, self.target) else ""

    def flag(self, key: str) -> bool:
        """Whether a flag was written."""
        return bool(self.get(key))

    def number(self, key: str) -> int:
        """An integer that has a default."""
        value = self.get(key)
        if not isinstance(value, int):
            raise KeyError(f"{self.kind}: {key} is not set")
        return value

    def maybe_number(self, key: str) -> int | None:
        """An integer, or None if it was not written and has no default."""
        return None if self.get(key) is None else self.number(key)

    def real(self, key: str) -> float:
        """A number that has a default."""
        value = self.get(key)
        if not isinstance(value, int | float):
            raise KeyError(f"{self.kind}: {key} is not set")
        return float(value)

    def __str__(self) -> str:
        words = [key if value is True else f"{key}={self._written(key, value)}" for key, value in self.options.items()]
        head = f"{self.kind}:"
        return head + ",".join(([self.target] if self.target else []) + words)

    def _written(self, key: str, value: Value) -> str:
        option = KINDS[self.kind].option(key)
        return f"{value:o}" if option is not None and option.form == "octal" else str(value)


def _is_inherited(kind: str, target: str) -> bool:
    return kind == "vhost" and target.startswith(INHERITED)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _meant(kind: Kind, word: str, key: str) -> str:
    """What someone who wrote an unknown option may have meant: a bare number, a comma in a path, a slip."""
    if word.isascii() and word.isdigit() and len(word) < 20:
        number = next((o for o in kind.options if o.form == "integer" and o.low <= int(word) <= o.high), None)
        return f"; did you mean {number.key}={word}?" if number else ""
    if kind.target in ("PATH", "FILE") and ("/" in key or "." in key):
        return f"; a {kind.target} cannot hold a comma"
    return _nearest(key, [option.key for option in kind.options])


def _place(spec: PortSpec) -> tuple[object, ...]:
    """What two ports cannot share: an interface, or a file, which may have several names."""
    if spec.kind == "tap":
        return ("interface", spec.target)
    if spec.inherited:
        try:
            status = os.fstat(find_fd(spec.inherited))
        except UsageError as error:
            raise UsageError(f"PORT {str(spec)!r}: {error}") from error
        return ("socket", status.st_dev, status.st_ino)
    try:
        status = os.stat(spec.target)
    except OSError:  # not there yet, or opening it will say what is wrong
        return ("file", os.path.realpath(spec.target))
    return ("file", status.st_dev, status.st_ino)


def _kind(text: str, name: str, colon: str) -> Kind:
    if not colon and name in KINDS:
        raise UsageError(f"PORT {text!r}: the colon is missing; write {KINDS[name].usage}")
    if name not in KINDS:
        known = ", ".join(kind.usage for kind in KINDS.values())
        what = f"unknown kind {name!r}" if colon else "no KIND:TARGET"
        # A bare path most likely wants to be a socket.
        near = f"; did you mean vhost:{name}?" if not colon and "/" in name else _nearest(name, tuple(KINDS))
        raise UsageError(f"PORT {text!r}: {what}; kinds are {known}{near}")
    return KINDS[name]


def _check_target(kind: Kind, target: str, where: str) -> None:
    if not target:
        raise UsageError(f"{where}: {kind.target} is missing; write {kind.usage}")
    if "\0" in target:
        raise UsageError(f"{where}: {kind.target} holds a zero byte; no file or interface can be called so")
    if _is_inherited(kind.name, target):
        _check_inherited(target.removeprefix(INHERITED), where)
    elif kind.name == "vhost" and len(os.fsencode(target)) > SOCKET_PATH_BYTES:
        size = len(os.fsencode(target))
        raise UsageError(
            f"{where}: the path has {size} bytes, a Unix socket takes {SOCKET_PATH_BYTES}; use a shorter one"
        )
    if kind.name == "tap":
        size = len(os.fsencode(target))
        if size > INTERFACE_BYTES:
            raise UsageError(
                f"{where}: the name has {size} bytes, an interface takes {INTERFACE_BYTES}; use a shorter one"
            )
        if target in (".", "..") or any(c in "/:%" or c.isspace() for c in target):
            raise UsageError(f"{where}: {target!r} cannot name an interface; leave out blanks and the signs / : %")


def _check_inherited(word: str, where: str) -> None:
    if not 1 <= len(word) <= NAME_MAX or not word.isascii() or not word.isprintable() or ":" in word:
        example = "write fd=3, or fd=NAME as in FileDescriptorName="
        raise UsageError(f"{where}: {word!r} is neither the number nor the name of an inherited socket; {example}")


def _options(kind: Kind, words: Sequence[str], where: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for word in words:
        key, equals, value = word.partition("=")
        option = kind.option(key)
        if not word:
            raise UsageError(f"{where}: an option is empty; leave out the comma before or after it")
        if option is None:
            keys = ", ".join(option.usage for option in kind.options) or "none"
            near = _meant(kind, word, key)
            raise UsageError(f"{where}: unknown option {word!r}; {kind.name}: takes {keys}{near}")
        if key in found:
            raise UsageError(f"{where}: {key} is given twice; leave one out")
        if option.form == "flag":
            if equals:
                raise UsageError(f"{where}: {key} takes no value; write {key} alone")
            found[key] = True
        elif not equals:
            raise UsageError(f"{where}: {key} needs a value; write {option.usage}")
        else:
            found[key] = option.parse(value, where)
    return found


def parse_port(text: str) -> PortSpec:
    """Read one PORT.

    Parameters
    ----------
    text
        ``KIND:TARGET[,key=value...]``. A target cannot hold a comma.

    Returns
    -------
    PortSpec

    Raises
    ------
    UsageError
        Unknown kind or key, a missing target, a value of the wrong form or out of its range.
    """
    name, colon, rest = text.partition(":")
    kind = _kind(text, name, colon)
    where = f"PORT {text!r}"
    words = rest.split(",") if rest else []
    target = ""
    if kind.target:
        target = words.pop(0) if words else ""
        _check_target(kind, target, where)
    options = _options(kind, words, where)
    if _is_inherited(kind.name, target):
        for key in ("client", "mode"):
            if key in options:
                raise UsageError(f"{where}: {key} is for a PATH; an inherited socket is what it is, so leave it out")
    if kind.name == "vhost" and "control" not in options:
        for key in ("mac", "speed"):
            if key in options:
                raise UsageError(f"{where}: {key} stands in the configuration space; add control, or leave it out")
    if "control" in options and "postcopy" in options:
        # The control queue is served by the thread that would have to wait for its memory.
        raise UsageError(f"{where}: a port with control cannot be the destination of postcopy; leave one out")
    if kind.name == "pcap":
        for key, with_write in PCAP_DIRECTION.items():
            if key in options and with_write != ("write" in options):
                remedy = "add write, or leave it out" if with_write else "leave out write, or this"
                raise UsageError(f"{where}: {key} is for {'writing' if with_write else 'replaying'} a file; {remedy}")
    return PortSpec(kind.name, target, options)


def parse_ports(ports: Sequence[str | PortSpec]) -> tuple[PortSpec, ...]:
    """Read all PORT arguments of a pump and give each a name of its own.

    Kinds without a target are numbered from the second on: ``gen``, ``gen-2``.

    Raises
    ------
    UsageError
        As `parse_port`, or no port at all, or two ports that are the same socket, interface or file.
    """
    if not ports:
        raise UsageError("a pump needs at least one PORT, such as vhost:/run/vq/a.sock; see vq pump --help")
    specs = [parse_port(port) if isinstance(port, str) else port for port in ports]
    seen: dict[tuple[object, ...], PortSpec] = {}
    counts: dict[str, int] = {}
    named = []
    for spec in specs:
        if not spec.target:
            counts[spec.kind] = counts.get(spec.kind, 0) + 1
            number = counts[spec.kind]
            named.append(replace(spec, name=spec.kind if number == 1 else f"{spec.kind}-{number}"))
            continue
        place = _place(spec)
        other = seen.setdefault(place, spec)
        # Two replays of one file do not disturb each other.
        if other is not spec and not (
            spec.kind == other.kind == "pcap" and not spec.flag("write") and not other.flag("write")
        ):
            what = f"the same {place[0]} as {str(other)!r}"
            raise UsageError(f"PORT {str(spec)!r}: {what}; each port needs one of its own")
        twins = sum(1 for earlier in named if earlier.target == spec.target and earlier.kind == spec.kind)
        named.append(replace(spec, name=f"{spec.kind}:{spec.target}" + (f"-{twins + 1}" if twins else "")))
    return tuple(named)
