"""What can be varied, and how it is written."""

from __future__ import annotations

import pytest

from vq.bench.cells import ALL_CELLS, Cell, parse_cells
from vq.bench.settings import AXES, Settings, parse_axis, points
from vq.errors import UsageError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("size=64,1518,64", [64, 1518]),
        ("ring=64..512", [64, 128, 256, 512]),
        ("size=64..1518", [64, 128, 256, 512, 1024, 1518]),
        ("window=1..3,32", [1, 2, 3, 32]),
        ("layout=packed,split", ["packed", "split"]),
        ("descriptors=1,indirect", ["1", "indirect"]),
        ("program=none,../a.py:f,module.b:g", ["none", "../a.py:f", "module.b:g"]),
    ],
)
def test_an_axis_is_read(text: str, values: list[int | str]) -> None:
    assert parse_axis(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("size", "write AXIS=VALUES"),
        ("speed=3", "AXIS is size, ring"),
        ("size=", "write AXIS=VALUES"),
        ("program=none,", "MODULE:NAME"),
        ("size=63", "from 64 to 65535"),
        ("size=x", "is no whole number"),
        ("ring=100", "a power of two from 2 to 32768"),
        ("layout=round", "use split, packed"),
        ("layout=split..packed", "a range is of numbers"),
        ("ring=512..64", "doubled from LOW"),
        ("window=0..8", "doubled from LOW"),
        ("size=" + ",".join(map(str, range(64, 200))), "up to 64"),
    ],
)
def test_a_wrong_axis_is_refused_with_the_remedy(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part.replace("..", r"\.\.")):
        parse_axis(text)


def test_points_are_every_combination_and_the_first_axis_is_the_fastest() -> None:
    found = points(Settings(poll="adaptive"), {"ring": [64, 128], "size": [64, 1518]})
    assert [(p.ring, p.size) for p in found] == [(64, 64), (128, 64), (64, 1518), (128, 1518)]
    assert {p.poll for p in found} == {"adaptive"}


def test_a_ring_that_cannot_hold_a_packet_is_refused() -> None:
    with pytest.raises(UsageError, match="use a larger ring"):
        points(Settings(), {"size": [65535], "ring": [2]})


def test_too_many_points_are_refused() -> None:
    with pytest.raises(UsageError, match="give fewer values"):
        points(Settings(), {"size": list(range(64, 564))})


def test_every_axis_is_a_setting_and_takes_its_default() -> None:
    for axis in AXES.values():
        value = getattr(Settings(), axis.name)
        assert axis.read(str(value)) == value


def test_words_name_what_differs() -> None:
    assert Settings().words() == ""
    assert Settings(ring=64, layout="packed").words() == "ring=64 layout=packed"
    assert Settings(ring=64, layout="packed").words(but=["ring"]) == "layout=packed"


def test_cells_are_read() -> None:
    assert parse_cells("io-split-64, patch-packed-1518") == (Cell("io", "split", 64), Cell("patch", "packed", 1518))
    assert len(parse_cells(None)) == len(set(ALL_CELLS)) == 18
    assert parse_cells(",".join(map(str, ALL_CELLS))) == ALL_CELLS


@pytest.mark.parametrize(
    "name", ["", "io", "io-split", "io-split-x", "io-round-64", "up-split-64", "io-split-63", "io-split-1519"]
)
def test_no_cell_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="write DIRECTION-LAYOUT-SIZE"):
        parse_cells(name)
