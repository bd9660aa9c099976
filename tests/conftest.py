"""What every test shares: the options of the suite, its markers, and the rule that makes a skip fail."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# The helpers of tests/interop are a package; it is found the same way under every import mode of pytest.
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

MARKERS = {
    "interop": "drives the pump with a real front-end; slow, needs the peers of scripts/setup-peers.sh",
    "guest": "boots at least one QEMU guest",
    "dpdk": "runs DPDK's testpmd as front-end",
    "checklist": "names the lines of the security checklist (protocol section 11) that the test is about",
    "shows": "names the messages and feature bits of which the test shows something; for docs/protocol-coverage.md",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this suite."""
    group = parser.getgroup("vq")
    group.addoption(
        "--no-skip",
        action="store_true",
        help="a skipped test is a failure: for machines on which every requirement must be there",
    )
    group.addoption(
        "--backend",
        choices=("vq", "dpdk"),
        default="vq",
        help="the back-end under the interop tests; dpdk (testpmd) tells a fault of the rig from one of ours",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, so that --strict-markers holds."""
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2`` guests run in one process, and all else in another, each in the usual order."""
    from xdist.scheduler import LoadScopeScheduling

    class Sides(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "guests" if nodeid.startswith("tests/interop/") else "all else"

    return Sides(config, log)


def _reason(report: Any) -> str:
    """Give the reason of a skip; pytest keeps it as (file, line, text)."""
    longrepr = report.longrepr
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


def _fail_skip(report: Any, config: pytest.Config) -> None:
    """Turn a skip into a failure under --no-skip; an expected failure (xfail) stays what it is."""
    if report.skipped and config.getoption("--no-skip") and not hasattr(report, "wasxfail"):
        report.longrepr = f"skipped although --no-skip was given: {_reason(report)}"
        report.outcome = "failed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Apply --no-skip to a test."""
    report = yield
    _fail_skip(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Apply --no-skip to a whole module."""
    report = yield
    _fail_skip(report, collector.config)
    return report
