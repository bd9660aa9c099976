"""Keep a result in the repository: `results/stages.json`, one line a benchmark, times to five digits.

    python -m benchmarks.keep RESULT               RESULT is a file that pytest-benchmark wrote

`pytest-benchmark compare` and `python -m benchmarks.table` read what comes of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.table import WHERE, read_result

KEPT = Path(__file__).with_name("results") / "stages.json"


def shorter(value: Any) -> Any:
    """The same with every number rounded to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: shorter(item) for name, item in value.items()}
    return value


def compact(result: dict[str, Any]) -> str:
    """The text of a result, stages only.

    Raises
    ------
    ValueError
        The commit was changed, so that nobody could repeat the result.
    """
    if result["commit_info"]["dirty"]:
        raise ValueError(f"result of a changed commit {result['commit_info']['id']}; commit first, then measure")
    stages = [shorter(item) for item in result.pop("benchmarks") if "stage" in item["extra_info"]]
    head = json.dumps(result, indent=1).removesuffix("\n}")
    return head + ',\n "benchmarks": [\n' + ",\n".join(map(json.dumps, stages)) + "\n ]\n}\n"


def main(paths: list[str]) -> int:
    """Keep the stages of one file."""
    if len(paths) != 1:
        print(f"usage: python -m benchmarks.keep RESULT; {WHERE}", file=sys.stderr)
        return 2
    try:
        text = compact(read_result(paths[0]))
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
