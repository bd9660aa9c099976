"""The checks of the control queue pass on our own, and find a back-end out that answers wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vq.check
from pump_rig import pumping
from vq.check import Outcome, Result
from vq.check.control_guest import ERR, UNTOUCHED
from vq.check.guest import DATA
from vq.check.hostile.control import ACK, judge
from vq.check.outcome import Failed
from vq.check.raw_ring import WRITE, Row
from vq.devices import net
from vq.devices.net_control import Change, CommandError, NetControl


def run(path: str, *only: str) -> list[Result]:
    return vq.check.run(path, device="net", only=only or ["control.*", "hostile.control.*"], timeout=1)


@pytest.fixture
def failed(tmp_path: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """Run checks on an echo with a control queue; gives why those that fail do."""
    path = f"{tmp_path}/s"
    with pumping(f"vhost:{path},control,queues=2"):
        yield lambda *only: {
            result.name: result.reason for result in run(path, *only) if result.outcome is Outcome.FAIL
        }


@pytest.mark.parametrize(("layout", "seen"), [("packed", "256 commands (2)"), ("split", "256 commands")])
def test_what_is_right_passes(tmp_path: Path, layout: str, seen: str) -> None:
    path = f"{tmp_path}/s"
    with pumping(f"vhost:{path},control,queues=2,layout={layout}"):
        results = [result for result in run(path) if layout == "packed" or "packed" not in result.name]
    assert {result.name: result.reason for result in results if result.outcome is not Outcome.PASS} == {}
    assert len(results) == (18 if layout == "packed" else 17)
    assert {result.reason for result in results if result.name == "hostile.control.flood"} == {seen}


def test_nothing_is_checked_without_a_control_queue(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    with pumping(f"vhost:{path}"):
        results = run(path)
    assert {result.outcome for result in results} == {Outcome.SKIPPED}
    assert all(result.reason.startswith("not offered: ") and "CTRL_VQ" in result.reason for result in results)


def test_all_is_answered_well(failed: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetControl, "execute", lambda *_: Change.NONE)
    found = failed(
        "control.unknown", "hostile.control.mac-tables", "hostile.control.pair-counts", "hostile.control.flood",
        "hostile.control.short-headers", "hostile.control.short-data",
    )
    flood = found.pop("hostile.control.flood")
    assert all(f"({layout}): a command that is none is answered OK" in flood for layout in ("split", "packed"))
    assert len(found) == 5
    assert all("(split): " in reason and "(packed): " in reason for reason in found.values())
    assert all("answered OK, not ERR" in reason for reason in found.values())


def test_nothing_is_answered_well(failed: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Change:
        raise CommandError("no")

    monkeypatch.setattr(NetControl, "execute", refuse)
    found = failed("control.vlans", "control.any-layout*", "control.pairs")
    assert len(found) == 4
    assert all("answered ERR, not OK" in reason for reason in found.values())


def test_an_ack_that_is_none(failed: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "OK", b"\x07")
    assert "the ack is 0x7; it is 0 or 1" in failed("control.mac-address")["control.mac-address"]


def test_an_ack_of_no_bytes(failed: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "OK", b"")
    assert "the used length is 0; the ack is 1 byte" in failed("control.mac-address")["control.mac-address"]


def test_no_answer(failed: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net.ControlledNetDevice, "_serve", lambda *_: None)
    found = failed("control.mac-address", "hostile.control.flood")
    assert "0 of 1 commands are answered" in found["control.mac-address"]
    assert "0 of 32 commands are answered" in found["hostile.control.flood"]


FULL, HALF = [(DATA, 3, 0), (ACK, 1, WRITE)], [(DATA, 3, 0), (ACK, 0, WRITE)]


@pytest.mark.parametrize(
    ("rows", "used", "ack"), [(FULL, 1, ERR), (FULL, 0, UNTOUCHED), (FULL, None, UNTOUCHED), (HALF, 0, UNTOUCHED)]
)
def test_what_is_no_command_is_refused_in_several_ways(rows: list[Row], used: int | None, ack: int) -> None:
    judge(rows, used, ack)


@pytest.mark.parametrize(
    ("rows", "used", "ack", "problem"),
    [
        (FULL, 1, 0, "the ack is 0x0"),
        (FULL, None, 0, "the ack is 0x0"),
        (FULL, 1, UNTOUCHED, "no ack is written"),
        (FULL, 0, ERR, "the used length is 0; the ack is 1 byte"),
        (FULL, 4, ERR, "the used length is 4; the ack is 1 byte"),
        (HALF, 1, ERR, "no descriptor has room"),
        ([(DATA, 3, 0), (ACK, 1, 0)], 0, ERR, "no descriptor has room"),
    ],
)
def test_what_is_no_command_is_never_answered_otherwise(
    rows: list[Row], used: int | None, ack: int, problem: str
) -> None:
    with pytest.raises(Failed, match=problem):
        judge(rows, used, ack)
