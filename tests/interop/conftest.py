"""Fixtures of the interop tests, and the long report of a failure."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from interop.guest import Guest
from interop.process import LIVE
from interop.rig import FACTS, Rig

HERE = Path(__file__).parent
MEASURED = "measured"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("interop")


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Give a set-up of this test's own."""
    with Rig(request.config.getoption("--backend"), request.node.name) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the test measured, and what the programs of a failing one printed; they still run at this moment."""
    report = yield
    report.user_properties.extend((MEASURED, fact) for fact in FACTS)
    FACTS.clear()
    if report.failed:
        for child in LIVE:
            report.sections.extend((title, text) for title, text in child.report() if text)
        for guest in Guest.running:
            report.sections.append((f"{guest.name}: console", guest.console()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests measured, in whatever process they ran."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    facts = [fact for report in reports for name, fact in getattr(report, "user_properties", ()) if name == MEASURED]
    if facts:
        terminalreporter.section("interop: measured")
        for title, fact in facts:
            terminalreporter.line(f"{title:60} {fact}")
