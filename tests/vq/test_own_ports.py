"""Ports of one's own beside PORT arguments: who closes them, and what they must be called."""

from __future__ import annotations

import pytest

from vq.errors import UsageError
from vq.pump import Pump
from vq_core.port import Port
from vq_core.ports.gen import GenPort
from vq_core.ports.null import NullPort


class Nameless(Port):
    """A port whose constructor has said nothing."""


def test_an_open_port_is_joined() -> None:
    port = NullPort("mine")
    with Pump(["gen:size=64,count=1000", port]) as pump:
        snapshot = pump.run(duration=30)
    assert snapshot["ports"]["mine"]["to_null"]["packets"] == 1000
    assert port.snapshot()["to_null"]["packets"] == 1000
    # It is its owner's still, and another pump can have it.
    source = GenPort("source", 64, 500)
    with Pump([[source, port], ["gen:count=10", "null:"]]) as pump:
        pump.run(duration=30)
    assert port.snapshot()["to_null"]["packets"] == 1500
    source.close()


def test_interchangeable_ports_follow_its_endpoints() -> None:
    with Pump([NullPort("mine", endpoints=3), "gen:count=30"]) as pump:
        assert [port.port.endpoint_count for port in pump.ports] == [3, 1]  # a count is said of the whole port
    with Pump([NullPort("mine", endpoints=3), "gen:"]) as pump:
        assert [port.port.endpoint_count for port in pump.ports] == [3, 3]


@pytest.mark.parametrize(
    ("ports", "problem"),
    [
        ([NullPort("gen"), "gen:"], "called 'gen'"),
        ([NullPort("a"), NullPort("a")], "called 'a'"),
        ([Nameless(), "gen:"], "has the name None"),
        ([NullPort(""), "gen:"], "has the name ''"),
        ([NullPort("a"), "echo:", "gen:"], "exactly one"),
    ],
)
def test_what_cannot_be_joined(ports: list[Port | str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Pump(ports)
