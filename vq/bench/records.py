"""Results as JSON and CSV; each record stands for itself, so that files of several machines can be joined."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vq.bench.facts import Facts
from vq.bench.measure import Run
from vq.bench.sleeping import load_ratios, wake_ups
from vq.bench.summary import Row

__all__ = ["csv_text", "final_record", "flat_rows", "row_record", "run_record"]


def run_record(run: Run) -> dict[str, Any]:
    """A run as it comes."""
    return {"run": {**asdict(run), "ok": run.ok}}


def row_record(row: Row) -> dict[str, Any]:
    """A row with what follows from its fields."""
    return {**asdict(row), "bits": row.bits, "spread": row.spread, "limited_by_driver": row.limited_by_driver}


def final_record(facts: Facts, target: str, rows: Sequence[Row], runs: Sequence[Run]) -> dict[str, Any]:
    """The whole of a measurement."""
    return {
        "facts": asdict(facts),
        "target": target,
        "rows": [row_record(row) for row in rows],
        "wake_ups": [asdict(wake) for wake in wake_ups(rows)],
        "load_ratios": [asdict(load) for load in load_ratios(runs)],
        "runs": [run_record(run)["run"] for run in runs],
        "ok": bool(runs) and all(run.ok for run in runs),
    }


def flat_rows(facts: Facts, target: str, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows for `csv_text`: settings and latencies in columns of their own."""
    found = []
    for row in rows:
        record = row_record(row)
        settings, latency = record.pop("settings"), record.pop("latency")
        names = {f"{name}_ns": round(value, 1) for name, value in latency.items()}
        found.append({"target": target, **settings, **record, **names, **asdict(facts)})
    return found


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """A table with a heading; its columns are those of all records, in the order of their first appearance."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
