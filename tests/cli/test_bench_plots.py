"""Plots: into files and of characters."""

from __future__ import annotations

from pathlib import Path

import pytest

from vq.bench.curves import Curve, Panel
from vq.bench.facts import gather
from vq.bench.plot import check_plot
from vq.errors import ResourceError, UsageError


def panel(*labels: str) -> Panel:
    xs = ["1", "8", "64"]
    curves = [
        Curve(label, xs, [1.0, 9.5, 10.0 + i], [0.5, 9.0, 9.9], [1.5, 9.6, 12.0], 1) for i, label in enumerate(labels)
    ]
    return Panel("window (packets)", "million packets a second", "window", xs, curves)


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_a_file(tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    from vq.bench.plot import save_plot

    path = tmp_path / f"plot{suffix}"
    save_plot(str(path), [panel("size 64", "size 1518"), panel("")], "made by hand", gather("vq bench").lines())
    assert path.read_bytes().startswith(magic)


def test_it_says_where_the_knee_is_and_carries_the_facts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vq.bench.plot import save_plot

    path, caption = tmp_path / "plot.svg", gather("vq bench").lines()
    save_plot(str(path), [panel("")], "made by hand", caption)
    text = path.read_text()  # text is drawn as shapes; what it says stands in comments beside them
    for part in ("knee: 8", "made by hand", "window (packets)", caption[0].split(",")[0], caption[2].split("T")[0]):
        assert part in text, part


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vq.bench.plot import save_plot

    for name in "ab":
        save_plot(str(tmp_path / f"{name}.svg"), [panel("x")], "title", ["caption"])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_of_characters() -> None:
    pytest.importorskip("plotext")
    from vq.bench.plot_terminal import draw_plot

    text = draw_plot([panel("size 64", "size 128")], "made by hand", ["caption"], colours=False)
    assert "\x1b" not in text
    for part in ("made by hand", "window (packets)", "A  size 64", "B  size 128", "*: the knee", "caption"):
        assert part in text, part


@pytest.mark.parametrize("where", ["plot.txt", "plot", "Terminal"])
def test_what_cannot_be_drawn_is_refused(where: str) -> None:
    with pytest.raises(UsageError, match=r"write a file that ends in .png, .svg, .pdf, or terminal"):
        check_plot(where)


def test_a_folder_that_is_not_there_is_an_error_before(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"no such folder.*make it first"):
        check_plot(str(tmp_path / "none" / "plot.svg"))


@pytest.mark.parametrize("where", ["plot.svg", "terminal"])
def test_a_missing_library_is_named_with_the_line_to_run(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"run: pip install 'vq\[plots\]'"):
        check_plot(where)
