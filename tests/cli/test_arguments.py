"""Arguments that are more than numbers."""

from __future__ import annotations

import os

import pytest

from vq.cli.arguments import parse_cpus, positive_seconds
from vq.cli.hints import describe
from vq.errors import UsageError
from vq.ports import parse_ports


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize(
    ("text", "cpus"), [("0", [0]), ("0,2-3", [0, 2, 3]), ("5-5", [5]), ("7,0", [7, 0]), (None, None)]
)
def test_cpu_lists(text: str | None, cpus: list[int] | None) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no processor or range"),
        ("a", "no processor or range"),
        ("1,,2", "no processor or range"),
        ("1-", "no processor or range"),
        ("-1", "no processor or range"),
        ("0-99999999999", "no processor or range"),
        ("3-1", "runs backwards; write 1-3"),
        ("0-2,1", "named twice"),
        ("8", "processor 8 is not usable here; usable are 0,1,2"),
    ],
)
def test_wrong_cpu_lists(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_cpus(text)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_times_are_positive_and_finite(value: float) -> None:
    with pytest.raises(UsageError, match="--duration"):
        positive_seconds("--duration", value)


def test_the_description_names_every_port() -> None:
    lines = describe(parse_ports(["vhost:/run/a.sock,queues=1", "vhost:/run/b.sock,client", "tap:vq0"]))
    assert lines[0] == "vhost:/run/a.sock: listens on /run/a.sock, up to 1 queue pair"
    assert lines[2].startswith("vhost:/run/b.sock: connects to /run/b.sock, up to ")
    assert lines[4] == "tap:vq0: open"
    assert "id=vqnet0" in lines[1]
    assert "id=vqnet1" in lines[3]
