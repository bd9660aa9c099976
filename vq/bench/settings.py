"""What can be varied in a measurement, and how it is written on a command line."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from vq.errors import UsageError
from vq.sub_burst import SUB_BURST, SUB_BURST_MAX

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["AXES", "Axis", "Settings", "combinations", "parse_axes", "parse_axis", "points", "words_of"]

SIZE_MIN: Final = 64  # bytes: room for number, length and checksum
SIZE_MAX: Final = 65535
RING_MAX: Final = 32768
VALUES_MAX: Final = 64  # of one axis
SWITCH: Final = ("on", "off")
POINTS_MAX: Final = 400  # of all axes together


@dataclass(frozen=True, slots=True)
class Settings:
    """One point of a sweep.

    Parameters
    ----------
    size
        Bytes of a packet with its Ethernet header.
    ring
        Entries of each ring.
    window
        Most packets under way in a queue pair; 0: as many as the ring holds.
    layout
        "split" or "packed".
    queues
        Queue pairs.
    descriptors
        Descriptors of a buffer: "1", "2" (the header has its own), or "indirect" (two in a table).
    event_idx, mergeable, in_order
        "on" or "off": VIRTIO_F_EVENT_IDX, VIRTIO_NET_F_MRG_RXBUF and VIRTIO_F_IN_ORDER.
    log
        "on" or "off": the dirty log that a live migration needs, taken empty ten times a second.
    poll
        How the back-end waits, if it is ours: "busy" or "adaptive".
    sub_burst
        Packets that the back-end publishes at once, if it is ours.
    program
        A program between the ports of our back-end, as `vq.program.load_program` finds it; "none".
    driver
        How our driver waits: "busy", or "sleep" until it is called.
    pause
        Latency only: microseconds between the return of a packet and the next one.
    """

    size: int = 64
    ring: int = 256
    window: int = 0
    layout: str = "split"
    queues: int = 1
    descriptors: str = "1"
    event_idx: str = "on"
    mergeable: str = "on"
    in_order: str = "off"
    log: str = "off"
    poll: str = "busy"
    sub_burst: int = SUB_BURST
    program: str = "none"
    driver: str = "busy"
    pause: int = 0

    def words(self, *, but: Sequence[str] = ()) -> str:
        """What differs from the defaults, for people; without the axes named in `but`."""
        return words_of(self, Settings(), but)


def words_of(settings: DataclassInstance, default: DataclassInstance, but: Sequence[str] = ()) -> str:
    """What of some settings differs from the defaults, for people; without the axes named in `but`."""
    names = [f.name for f in fields(settings) if f.name not in but]
    return " ".join(f"{n}={getattr(settings, n)}" for n in names if getattr(settings, n) != getattr(default, n))


@dataclass(frozen=True, slots=True)
class Axis:
    """One setting that can be swept.

    Parameters
    ----------
    name
        Field of `Settings`.
    help
        What it is, for people.
    unit
        Of its values, for plots; empty without one.
    choices
        Its words; empty: whole numbers.
    words
        Any words are values.
    low, high
        Range of a number.
    power
        Whether numbers must be powers of two.
    """

    name: str
    help: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    words: bool = False
    low: int = 0
    high: int = 0
    power: bool = False

    def read(self, text: str) -> int | str:
        """One value from its text.

        Raises
        ------
        UsageError
            It is none of the words, or no number of the range.
        """
        if self.words:
            if not text:
                raise UsageError(f"{self.name}=: write {self.help}")
            return text
        if self.choices:
            if text not in self.choices:
                raise UsageError(f"{self.name}={text}: {text!r} is not known; use {', '.join(self.choices)}")
            return text
        if not (text.isascii() and text.isdigit()):
            what = f"{text!r} is no whole number"
            raise UsageError(f"{self.name}={text}: {what}; write one from {self.low} to {self.high}")
        value = int(text)
        if not self.low <= value <= self.high or (self.power and value & (value - 1)):
            what = "a power of two" if self.power else "a number"
            raise UsageError(f"{self.name}={text}: write {what} from {self.low} to {self.high}")
        return value


AXES: Final[Mapping[str, Axis]] = {
    axis.name: axis
    for axis in (
        Axis("size", "bytes of a packet, with its Ethernet header", "bytes", low=SIZE_MIN, high=SIZE_MAX),
        Axis("ring", "entries of a ring (queue size)", "entries", low=2, high=RING_MAX, power=True),
        Axis("window", "most packets under way in a queue pair; 0: what the ring holds", "packets", high=RING_MAX),
        Axis("layout", "layout of the rings", choices=("split", "packed")),
        Axis("queues", "queue pairs, all driven by one driver thread", "pairs", low=1, high=128),
        Axis(
            "descriptors", "descriptors of a buffer: joined, header apart, in a table", choices=("1", "2", "indirect")
        ),
        Axis("event_idx", "suppress notifications by position (EVENT_IDX)", choices=SWITCH),
        Axis("mergeable", "packets over several receive buffers (MRG_RXBUF)", choices=SWITCH),
        Axis("in_order", "buffers are used in their order (IN_ORDER)", choices=SWITCH),
        Axis("log", "the dirty log of a live migration", choices=SWITCH),
        Axis("poll", "how our back-end waits", choices=("busy", "adaptive")),
        Axis("sub_burst", "packets that our back-end publishes at once", "packets", low=1, high=SUB_BURST_MAX),
        Axis("program", "what stands between the ports of our back-end: none, MODULE:NAME or FILE.py:NAME", words=True),
        Axis("driver", "how our driver waits", choices=("busy", "sleep")),
        Axis("pause", "latency only: microseconds between two packets", "µs", high=1_000_000),
    )
}


def parse_axis(text: str, known: Mapping[str, Axis] = AXES) -> tuple[str, list[int | str]]:
    """Read ``AXIS=VALUES``: values with commas, or ``LOW..HIGH``, doubled from LOW on. AXIS may have a hyphen for _.

    Returns
    -------
    tuple of (str, list)
        Name, and the values in the order written, each once.

    Raises
    ------
    UsageError
        Wrong form, unknown axis, or a value out of range.
    """
    name, equals, rest = text.partition("=")
    name = name.replace("-", "_")
    if not equals or not rest or name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        example = "size=64,1518" if "size" in known else "depth=1,32"
        raise UsageError(
            f"{text!r}: write AXIS=VALUES, such as {example} or ring=64..4096; AXIS is {', '.join(known)}"
            + (f"; did you mean {near[0]}?" if near and near[0] != name else "")
        )
    axis = known[name]
    values: list[int | str] = []
    for part in rest.split(","):
        low, dots, high = part.partition("..")
        values += _doubled(axis, low, high) if dots and not axis.words else [axis.read(part)]
    values = list(dict.fromkeys(values))
    if len(values) > VALUES_MAX:
        raise UsageError(f"{name}: {len(values)} values; up to {VALUES_MAX} are measured in one go")
    return name, values


def _doubled(axis: Axis, low: str, high: str) -> list[int | str]:
    # Half a range is no range: its missing end is none of the axis's values.
    first, last = (axis.read(low), axis.read(high)) if low and high else ("", "")
    if not isinstance(first, int) or not isinstance(last, int) or not 0 < first <= last:
        raise UsageError(f"{axis.name}={low}..{high}: a range is of numbers, doubled from LOW (at least 1) up to HIGH")
    values = [first << n for n in range(17) if first << n <= last]
    return [*values, *([last] if values[-1] != last else [])]


def parse_axes(given: Sequence[str], known: Mapping[str, Axis] = AXES) -> dict[str, list[int | str]]:
    """Read several of them, in their order; each axis once.

    Raises
    ------
    UsageError
        As `parse_axis`, or an axis was given twice.
    """
    axes: dict[str, list[int | str]] = {}
    for text in given:
        name, values = parse_axis(text, known)
        if name in axes:
            raise UsageError(f"{text}: {name} was given already; write its values with commas")
        axes[name] = values
    return axes


def points(base: Settings, axes: Mapping[str, Sequence[int | str]]) -> list[Settings]:
    """Every combination of the axes over `base`, each checked.

    The first axis varies fastest: it is the x axis of a plot, the others make its lines.
    """
    return [_checked(replace(base, **values)) for values in combinations(axes)]


def combinations(axes: Mapping[str, Sequence[int | str]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, by name; the first axis varies fastest."""
    names = list(axes)[::-1]
    every = list(itertools.product(*(axes[name] for name in names)))
    if len(every) > POINTS_MAX:
        raise UsageError(f"{len(every)} points; up to {POINTS_MAX} are measured in one go: give fewer values")
    return [dict(zip(names, values, strict=True)) for values in every]


_RULES: Final[Sequence[tuple[Callable[[Settings], bool], str]]] = (
    (
        lambda s: s.ring * min(s.size, 4096) >= s.size + 12 * s.ring or s.size <= 4096,
        "the ring's receive buffers of 4096 bytes cannot hold one packet; use a larger ring or smaller packets",
    ),
    (lambda s: s.descriptors != "2" or s.ring >= 4, "two descriptors a packet need a ring of 4 or more"),
)


def _checked(settings: Settings) -> Settings:
    for rule, remedy in _RULES:
        if not rule(settings):
            raise UsageError(f"size={settings.size} ring={settings.ring}: {remedy}")
    return settings
