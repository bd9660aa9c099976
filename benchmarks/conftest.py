"""What the benchmarks share: what a result says of its machine and build, and the table of stages at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

# The benchmarks are a package of the checkout, whatever pytest's import mode.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vq
from benchmarks.compiled import flags
from benchmarks.table import table
from vq_core.compiled import compiled

INFOS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin the list that the stage benchmarks write their results into."""
    config.stash[INFOS] = []


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Name the machine by its processor only, so that runs of one machine compare without a warning."""
    cpu = machine_info.get("cpu", {}).get("brand_raw", machine_info.get("processor"))
    machine_info.clear()
    machine_info.update(cpu=cpu)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[dict[str, Any]], output_json: dict[str, Any]
) -> None:
    """Keep commit and build, and drop what is long or says nothing about the engine."""
    commit = output_json["commit_info"]
    output_json["commit_info"] = {name: commit.get(name) for name in ("id", "time", "dirty")}
    build = compiled()
    output_json["build"] = {
        "vq": vq.__version__, "compiler": build["compiler"], "flags": flags(), "baseline": build["baseline"],
    }  # fmt: skip
    for item in output_json["benchmarks"]:
        item["params"] = None
        item.pop("options", None)
        item["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark, which are longer than a screen
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print one table of all stages that ran."""
    infos = config.stash[INFOS]
    if infos:
        terminalreporter.write_line("")
        title = "Stages, in ticks of the time stamp counter; the least of all rounds"
        Console(width=max(100, Console().width)).print(table(infos, title=title))


@pytest.fixture
def note(benchmark: Any, request: pytest.FixtureRequest) -> Any:
    """A function that keeps what a stage benchmark found: in its result, and for the table."""

    def keep(**info: Any) -> None:
        benchmark.extra_info.update(info)
        request.config.stash[INFOS].append(info)

    return keep
