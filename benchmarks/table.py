"""One table of all stages: cycles per packet or call.

    python -m benchmarks.table RESULT [OLDER]      from JSON that pytest-benchmark kept; beside an older one, if given

The stage benchmarks print it at the end of their run as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LAYOUTS = ("split", "packed", "any")
WHERE = "make bench keeps results under .benchmarks/"
Row = tuple[str, str, str]


def rows(infos: Iterable[Mapping[str, Any]]) -> dict[Row, dict[str, float]]:
    """Cycles by layout under (stage, variant, unit), in the order given."""
    found: dict[Row, dict[str, float]] = {}
    for info in infos:
        if "stage" in info:
            found.setdefault((info["stage"], info["variant"], info["unit"]), {})[info["layout"]] = info["cycles"]
    return found


def cell(cycles: float | None, older: float | None) -> str:
    """A figure, and by how much it is above or below an older one."""
    if cycles is None:
        return ""
    text = f"{cycles:.1f}"
    return text if older is None else f"{text} ({cycles / older - 1:+.0%})"


def table(infos: Iterable[Mapping[str, Any]], older: Iterable[Mapping[str, Any]] = (), title: str = "") -> Table:
    """The table of results.

    Parameters
    ----------
    infos
        `extra_info` of each benchmark.
    older
        Those of another run, to compare with.
    title
        What stands above it.
    """
    result = Table(title=title, title_justify="left")
    result.add_column("stage")
    result.add_column("variant")
    for layout in LAYOUTS:
        result.add_column("either" if layout == "any" else layout, justify="right")
    result.add_column("cycles per")
    before = rows(older)
    last = ""
    for (stage, variant, unit), cycles in rows(infos).items():
        if last and stage != last:
            result.add_section()
        then = before.get((stage, variant, unit), {})
        figures = [cell(cycles.get(layout), then.get(layout)) for layout in LAYOUTS]
        result.add_row(stage if stage != last else "", variant, *figures, unit)
        last = stage
    return result


def read_result(path: str) -> dict[str, Any]:
    """A file that pytest-benchmark wrote.

    Raises
    ------
    ValueError
        There is none; the message says so in a line.
    """
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path}: {getattr(problem, 'strerror', None) or 'no JSON'}; {WHERE}") from problem
    if not isinstance(result, dict) or not {"benchmarks", "commit_info"} <= result.keys():
        raise ValueError(f"{path}: no result of pytest-benchmark; {WHERE}")
    return result


def infos_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`extra_info` of each benchmark."""
    return [item["extra_info"] for item in result["benchmarks"]]


def title_of(path: str, result: Mapping[str, Any]) -> str:
    """The name of a file, and the instruction set of the engine if the result says it."""
    baseline = result.get("build", {}).get("baseline")
    return Path(path).name + (f" for {baseline}" if baseline else "")


def main(paths: list[str]) -> int:
    """Print the table of one file, or of two side by side."""
    if not 1 <= len(paths) <= 2:
        print(f"usage: python -m benchmarks.table RESULT [OLDER]; {WHERE}", file=sys.stderr)
        return 2
    try:
        results = [read_result(path) for path in paths]
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    title = "\nbeside ".join(map(title_of, paths, results))
    Console().print(table(*map(infos_of, results), title=title))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
