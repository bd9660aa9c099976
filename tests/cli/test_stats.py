"""Snapshots to rates, lines and JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vq.cli.lines import plain_lines, scaled
from vq.queue_stats import BATCHES, queue_works
from vq.stats import encode, flows, loads, queue_words
from vq_core.counters import BURST_NAMES


def queue(name: str, packets: int, **more: Any) -> dict[str, Any]:
    """A queue whose rounds move 32 packets at 50 cycles each; every fourth of them ends in a call."""
    return {
        "name": name,
        "packets": packets,
        "busy_cycles": 50 * packets,
        "bursts": {"8-15": 1, "32": packets // 32},
        "empty_polls": packets // 2 if name.startswith("transmitq") else 0,
        "layout": "packed",
        "calls": packets // 128,
        "calls_suppressed": packets // 32 - packets // 128,
        "size": 256,
        "started": True,
        "enabled": True,
        "broken": None,
    } | more


def snapshot(uptime: float, packets: int, **more: Any) -> dict[str, Any]:
    return {
        "time": 1.0e9 + uptime,
        "uptime": uptime,
        "ports": {
            "vhost:a": {
                "kind": "vhost",
                "state": "running",
                "features": ["VIRTIO_F_VERSION_1"],
                "to_guest": {"packets": 2 * packets, "bytes": 200 * packets, "dropped": {"mtu": 3, "disabled": 1}},
                "from_guest": {"packets": packets, "bytes": 100 * packets, "dropped": {}},
                "queues": [
                    queue("receiveq0", 2 * packets, enabled=False),
                    queue("transmitq0", packets, broken="loop in a chain"),
                ],
            }
        },
        "workers": [{"cpu": 3, "busy_cycles": 10 * packets, "idle_cycles": 30 * packets, "sleeps": packets}],
        **more,
    }


def test_rates_are_differences_over_time() -> None:
    incoming, outgoing = flows(snapshot(1.0, 1000), snapshot(3.0, 5000))
    assert (incoming.direction, outgoing.direction) == ("from_guest", "to_guest")
    assert incoming.packets == 5000
    assert incoming.packet_rate == pytest.approx(2000)
    assert incoming.bit_rate == pytest.approx(4000 * 100 * 8 / 2)
    assert outgoing.packet_rate == pytest.approx(4000)
    assert outgoing.drops == "mtu 3, disabled 1"


def test_without_an_earlier_snapshot_rates_are_since_the_start() -> None:
    incoming, _ = flows(None, snapshot(2.0, 1000))
    assert incoming.packet_rate == pytest.approx(500)


def test_a_port_that_came_in_between_starts_at_zero() -> None:
    empty = snapshot(1.0, 0)
    empty["ports"] = {}
    incoming, _ = flows(empty, snapshot(2.0, 1000))
    assert incoming.packet_rate == pytest.approx(1000)


def test_worker_load() -> None:
    (load,) = loads(snapshot(1.0, 1000), snapshot(2.0, 3000))
    assert load.cpu == 3
    assert load.busy == pytest.approx(0.25)
    assert load.sleep_rate == pytest.approx(2000)


def test_no_time_and_no_cycles_divide_nothing_by_zero() -> None:
    now = snapshot(1.0, 1000)
    assert all(flow.packet_rate == 0 for flow in flows(now, now))
    assert loads(now, now)[0].busy == 0.0


def test_queues_that_do_not_run_are_told() -> None:
    port = snapshot(1.0, 1)["ports"]["vhost:a"]
    assert queue_words(port) == ["receiveq0 disabled", "transmitq0 broken: loop in a chain"]


def test_queues_between_two_snapshots() -> None:
    receiveq, transmitq = queue_works(snapshot(1.0, 32_000), snapshot(3.0, 160_000))
    assert (receiveq.port, receiveq.queue, receiveq.ring, receiveq.packets) == (
        "vhost:a", "receiveq0", "packed 256", 256_000,
    )  # fmt: skip
    assert transmitq.cycles == pytest.approx(50)
    assert transmitq.empty_rate == pytest.approx(32_000)
    assert receiveq.empty_rate is None  # nobody pulls from it
    assert transmitq.call_rate == pytest.approx(500)
    assert transmitq.suppressed_rate == pytest.approx(1500)
    assert (transmitq.median, transmitq.largest) == ("32", "32")
    assert sum(transmitq.batches) == 4000  # the burst of 8 to 15 was before


def test_batches_have_the_names_of_the_engine() -> None:
    assert BATCHES == BURST_NAMES


def test_batches_of_the_whole_run_have_a_median_and_a_largest() -> None:
    now = snapshot(2.0, 320)
    now["ports"]["vhost:a"]["queues"][1]["bursts"] = {"1": 2, "4-7": 5, "32": 4}
    _, transmitq = queue_works(None, now)
    assert (transmitq.median, transmitq.largest) == ("4-7", "32")
    assert dict(zip(BATCHES, transmitq.batches, strict=True))["4-7"] == 5


def test_a_queue_that_nobody_timed_or_that_rested_has_no_cycles() -> None:
    now = snapshot(2.0, 320)
    now["ports"]["vhost:a"]["queues"][0] |= {"busy_cycles": 0, "bursts": {}}  # a switch delivered
    receiveq, _ = queue_works(None, now)
    assert (receiveq.cycles, receiveq.median, receiveq.largest) == (None, "", "")
    assert all(work.cycles is None and work.packets == 0 for work in queue_works(now, now))
    assert queue_works(None, snapshot(2.0, 0)) == []


def test_plain_lines_tell_what_queues_cost() -> None:
    lines = plain_lines(snapshot(1.0, 0), snapshot(2.0, 1_280_000))
    assert (
        "2.0s vhost:a transmitq0 packed 256: 50.0 cycles/packet, batch 32, largest 32, 640k empty polls/s,"
        " 10k calls/s, 30k suppressed/s"
    ) in lines
    rested = plain_lines(snapshot(1.0, 64), snapshot(2.0, 64))
    assert not any("cycles/packet" in line or "suppressed" in line for line in rested)
    assert any("suppressed" in line for line in plain_lines(None, snapshot(2.0, 64), everything=True))


def test_plain_lines_say_port_state_direction_rate_and_drops() -> None:
    lines = plain_lines(snapshot(1.0, 0), snapshot(2.0, 2_000_000))
    assert lines[0] == "2.0s vhost:a running from_guest 2 Mpps 1.6 Gbit/s 2000000 packets"
    assert lines[1].endswith("4000000 packets, dropped: mtu 3, disabled 1")
    assert "2.0s vhost:a transmitq0 broken: loop in a chain" in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 pps"), (0.25, "0.2 pps"), (5, "5 pps"), (999.96, "1 kpps"), (1234, "1.2 kpps"), (999_949, "999.9 kpps"),
     (999_960, "1 Mpps"), (24.4e6, "24.4 Mpps"), (1e9, "1 Gpps"), (3e15, "3000 Tpps")],
)  # fmt: skip
def test_rates_have_the_unit_that_fits(value: float, text: str) -> None:
    assert scaled(value, "pps") == text


def test_plain_lines_leave_out_what_never_had_a_packet() -> None:
    now = snapshot(2.0, 5)
    now["ports"]["vhost:a"]["from_guest"]["packets"] = 0
    directions = [line.split()[3] for line in plain_lines(None, now) if " running " in line]
    assert directions == ["to_guest"]
    assert sum(" from_guest 0 pps " in line for line in plain_lines(None, now, everything=True)) == 1
    now["ports"]["vhost:a"]["to_guest"] = {"packets": 0, "bytes": 0, "dropped": {}}
    assert plain_lines(None, now)[0] == "2.0s vhost:a running, no packet yet"


def test_a_direction_that_only_dropped_is_told() -> None:
    now = snapshot(2.0, 0)
    assert any("dropped: mtu 3" in line for line in plain_lines(None, now))


def test_json_is_one_line_and_marks_the_end() -> None:
    line = encode(snapshot(1.0, 5), final=True)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    record = json.loads(line)
    assert record.pop("final") is True
    assert record == snapshot(1.0, 5)
    assert "final" not in json.loads(encode(snapshot(1.0, 5)))


def test_the_table_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from vq.cli.tables import pump_view

    Console(width=100).print(pump_view(snapshot(1.0, 0), snapshot(2.0, 2_000_000), width=100))
    text = capsys.readouterr().out
    for part in (
        "vhost:a",
        "running",
        "from_guest",
        "2 Mpps",
        "1.6 Gbit/s",
        "4,000,000",
        "mtu 3",
        "receiveq0 disabled",
    ):
        assert part in text
    assert "worker 0 on cpu 3: 25% busy" in text


@pytest.mark.parametrize(("width", "bars"), [(90, True), (104, True), (105, True), (200, True), (200, False)])
def test_the_table_of_queues(width: int, bars: bool, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from vq.cli.tables import pump_view

    now = snapshot(1.0, 2_000_000)
    now["ports"]["vhost:a-name-that-is-too-long-for-this"] = now["ports"].pop("vhost:a")
    now["ports"]["vhost:a-name-that-is-too-long-for-this"]["queues"][0]["bursts"] |= {"16-31": 4_000_000}
    Console(width=width).print(pump_view(None, now, width=width, bars=bars))
    text = capsys.readouterr().out
    for line in text.splitlines():
        assert len(line) <= width
        assert line[0] not in "┏┡┃│└" or line.rstrip()[-1] in "┓┩┃│┘", "cut off"
    for part in ("transmitq0", "packed", "50.0", " 1M ", "15.6k", "46.9k"):
        assert part in text
    assert ("···▁·█    32" in text) == (bars and width >= 105)


def test_a_low_terminal_gets_the_busiest_queues(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from vq.cli.tables import pump_view

    now = snapshot(2.0, 1000)
    now["ports"]["vhost:a"]["queues"] = [queue(f"transmitq{i}", 32 * (i % 7 + 1)) for i in range(40)]
    Console(width=120).print(pump_view(None, now, width=120, height=24))
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 24
    assert "transmitq6 " in text and "transmitq7 " not in text
    assert "and 32 queues that moved less" in text
    Console(width=120).print(pump_view(None, now, width=120, final=True))
    assert capsys.readouterr().out.count(" transmitq") == 40


def test_a_narrow_terminal_gets_lines_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from vq.cli.tables import pump_view

    view = pump_view(snapshot(1.0, 0), snapshot(36.0, 2_000_000), width=60, final=True)
    Console(width=60).print(view)
    text = capsys.readouterr().out
    assert text.startswith("vq pump, 36 s in all\n")
    assert "2.0s" not in text
    for part in ("vhost:a running from_guest", "kpps", "worker 0 on cpu 3"):
        assert part in text
