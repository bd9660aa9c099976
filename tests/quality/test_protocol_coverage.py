"""docs/protocol-coverage.md is what its script makes, lists everything, and names tests that exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from types import ModuleType

from quality.tree import ROOT

PAGE = ROOT / "docs/protocol-coverage.md"


@cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("protocol_coverage", ROOT / "scripts/protocol_coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_fresh() -> None:
    made = script().page()
    assert PAGE.read_text() == made, "make it anew: python scripts/protocol_coverage.py > docs/protocol-coverage.md"


def test_it_names_tests_that_exist() -> None:
    named = re.findall(r"\[(test_\w+)\]\(\.\./([\w/.]+)\)", PAGE.read_text())
    assert len(named) > 100
    defined = {
        path: {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
        for path in {path for _, path in named}
    }
    assert [(name, path) for name, path in named if name not in defined[path]] == []


def test_whatever_is_done_or_refused_is_shown_by_a_test() -> None:
    rows = [row for rows in script().tables().values() for row in rows]
    assert [row.name for row in rows if row.state != script().NOT_YET and not row.tests] == []


def test_nothing_is_left_out() -> None:
    messages, requests, *bits = script().tables().values()
    assert [int(row.number) for row in messages] == list(range(46))
    assert [int(row.number) for row in requests] == list(range(1, 11))
    for rows in bits:
        found = []
        for part in ", ".join(row.number for row in rows).split(", "):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
        assert sorted(found) == list(range(64))
