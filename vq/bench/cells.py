"""The vocabulary of the side by side: a cell is DIRECTION-LAYOUT-SIZE, such as io-split-64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vq.errors import UsageError

__all__ = ["ALL_CELLS", "DIRECTIONS", "Cell", "Direction", "parse_cells"]

LAYOUTS: Final = ("split", "packed")
SIZE_MIN: Final = 64
SIZE_MAX: Final = 1518  # one mbuf of testpmd's own size


@dataclass(frozen=True, slots=True)
class Direction:
    """Which way packets go.

    Parameters
    ----------
    help
        For people.
    back, front
        Forwarding mode of testpmd as back-end and as front-end.
    guests
        Front-end ports.
    counted
        Which of testpmd's rates at the front-end counts, by the name that it prints: the front-end's view.
    burst
        Packets under way where they go round; 0: what testpmd takes.
    """

    help: str
    back: str
    front: str
    guests: int = 1
    counted: str = "Rx-pps"
    burst: int = 0

    @property
    def primed(self) -> bool:
        """Whether the front-end sends the packets first that go round then."""
        return self.front == "io"


DIRECTIONS: Final[Mapping[str, Direction]] = {
    "sink": Direction("the guest sends; the back-end copies and drops", "rxonly", "txonly", counted="Tx-pps"),
    "gen": Direction("the back-end makes packets, the guest receives them", "txonly", "rxonly"),
    "io": Direction("the back-end returns what the guest sends, 32 under way", "io", "io"),
    "patch": Direction("two guests, joined by the back-end", "io", "io", guests=2),
    "rtt": Direction("as io, one packet under way: 1 / rate is the round trip", "io", "io", burst=1),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement of the side by side.

    Parameters
    ----------
    direction
        A key of `DIRECTIONS`.
    layout
        "split" or "packed".
    size
        Bytes of a packet with its Ethernet header.
    """

    direction: str
    layout: str
    size: int

    def __str__(self) -> str:
        return f"{self.direction}-{self.layout}-{self.size}"

    @property
    def way(self) -> Direction:
        """What the direction means."""
        return DIRECTIONS[self.direction]


ALL_CELLS: Final = tuple(
    Cell(direction, layout, size)
    for direction in DIRECTIONS
    for layout in LAYOUTS
    for size in (SIZE_MIN, SIZE_MAX)
    if direction != "rtt" or size == SIZE_MIN
)


def parse_cells(text: str | None) -> Sequence[Cell]:
    """Read names of cells, with commas between them; None: all.

    Raises
    ------
    UsageError
        One of them is none.
    """
    return ALL_CELLS if text is None else tuple(_parse(name) for name in text.split(","))


def _parse(name: str) -> Cell:
    direction, _, rest = name.strip().partition("-")
    layout, _, size = rest.partition("-")
    known = direction in DIRECTIONS and layout in LAYOUTS and size.isascii() and size.isdigit()
    if not known or not SIZE_MIN <= int(size) <= SIZE_MAX:
        raise UsageError(
            f"--cells {name}: write DIRECTION-LAYOUT-SIZE, such as io-split-64; directions are {', '.join(DIRECTIONS)},"
            f" layouts {', '.join(LAYOUTS)}, sizes {SIZE_MIN} to {SIZE_MAX}"
        )
    return Cell(direction, layout, int(size))
