"""From runs to rows, curves, verdicts and files: arithmetic, on runs that are made by hand."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest

import vq
from vq.bench.child import complaints
from vq.bench.curves import knee_lines, panels_of
from vq.bench.distance import tag_of
from vq.bench.facts import gather
from vq.bench.measure import PERCENTILES, Run
from vq.bench.peers import Pair, peer_rows
from vq.bench.records import csv_text, final_record, flat_rows
from vq.bench.settings import Settings
from vq.bench.sleeping import load_ratios, sleeping_lines, wake_ups
from vq.bench.summary import knee, rows_of
from vq.bench.testpmd import cycles_per_packet, rates
from vq.bench.tune import BETTER, FEW, SAME, WORSE, Trial, combine, how_to_set, judge, make_tries
from vq.cli.bench_peers import peer_records
from vq.cli.bench_report import fit, print_table


def run(settings: Settings, rate: float, *, near: bool = True, kind: str = "throughput", **more: object) -> Run:
    ns = 80.0 if near else 400.0
    fields = {
        "settings": settings, "measure": kind, "packets": int(rate), "seconds": 1.0, "lost": 0, "duplicated": 0,
        "reordered": 0, "changed": 0, "rate": rate, "latency": {}, "busy": 0.9, "cycles": 30.0, "sleeps": 0.0,
        "distances": (ns, ns), "tag": tag_of(ns, ns),
    }  # fmt: skip
    return Run(**{**fields, **more})


def test_tags() -> None:
    assert [tag_of(80, 199), tag_of(201), tag_of(80, 300), tag_of(None, None)] == ["near", "far", "mixed", "unknown"]


def test_runs_of_one_tag_are_put_together_and_mixed_ones_left_out() -> None:
    point = Settings()
    runs = [
        run(point, 10e6),
        run(point, 3e6, near=False),
        run(point, 12e6),
        run(point, 14e6),
        run(point, 1e6, tag="mixed"),
    ]
    near, far = rows_of(runs)
    assert (near.tag, near.runs, near.rate, near.low, near.high) == ("near", 3, 12e6, 10e6, 14e6)
    assert (far.tag, far.runs, far.rate, far.distance) == ("far", 1, 3e6, 400.0)
    assert near.spread == pytest.approx(4 / 12)
    assert near.bits == 12e6 * 64 * 8


def test_a_point_with_mixed_runs_only_says_so() -> None:
    (row,) = rows_of([run(Settings(), 1e6, tag="mixed")])
    assert row.tag == "mixed"


def test_wrong_packets_are_counted() -> None:
    (row,) = rows_of([run(Settings(), 1e6, lost=1, changed=2), run(Settings(), 1e6, duplicated=3, reordered=4)])
    assert row.wrong == 10
    assert not run(Settings(), 1e6, lost=1).ok
    assert not run(Settings(), 0).ok


@pytest.mark.parametrize(("busy", "limited"), [(0.5, True), (0.95, False), (None, False)])
def test_an_idle_back_end_is_not_blamed(busy: float | None, limited: bool) -> None:
    (row,) = rows_of([run(Settings(), 1e6, busy=busy)])
    assert row.limited_by_driver is limited


@pytest.mark.parametrize(
    ("values", "index"), [([1, 5, 9, 10], 2), ([10, 10, 10], None), ([1, 2, 20], 2), ([], None), ([0, 0], None)]
)
def test_the_knee(values: list[float], index: int | None) -> None:
    assert knee(values) == index


def test_curves_have_a_knee_each() -> None:
    rates_of = {64: [5e6, 19e6, 20e6], 1518: [1e6, 2e6, 4e6]}
    runs = [
        run(Settings(size=size, window=window), rate)
        for size, values in rates_of.items()
        for window, rate in zip((1, 8, 64), values, strict=True)
    ]
    (panel,) = panels_of(rows_of(runs))
    assert (panel.axis, panel.xs) == ("window", ["1", "8", "64"])
    assert [(curve.label, curve.knee) for curve in panel.curves] == [("size 64", 1), ("size 1518", 2)]
    assert panel.curves[0].ys == [5.0, 19.0, 20.0]
    assert [line.split(" is ")[0] for line in knee_lines(rows_of(runs))] == ["knee: window=8", "knee: window=64"]


def test_sizes_have_their_knee_in_bits() -> None:
    packets, bits = panels_of(rows_of([run(Settings(size=size), 1e10 / size) for size in (64, 512, 1518)]))
    assert packets.curves[0].knee is None
    assert (bits.y, bits.curves[0].knee) == ("Gbit/s", None)  # the same everywhere


def test_latencies_are_lines_over_percentiles() -> None:
    latency = {"mean": 600.0, "p50": 500.0, "p99": 2000.0, "p99_9": 8000.0, "max": 1e6}
    runs = [run(Settings(poll=poll), 1e6, kind="latency", latency=latency) for poll in ("busy", "adaptive")]
    (panel,) = panels_of(rows_of(runs))
    assert panel.xs == ["p50", "p99", "p99.9"]
    assert [curve.label for curve in panel.curves] == ["poll busy", "poll adaptive"]
    assert panel.curves[0].ys == [0.5, 2.0, 8.0]


def test_a_narrow_terminal_is_spared_columns() -> None:
    from rich.table import Table

    table = Table(title="of widths")
    for heading in ("first", "second", "third"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("1", "2", "3", style="red")
    assert fit(table, 80, ("second", "third")) == (table, [])
    narrow, left_out = fit(table, 20, ("verified", "third", "second"))
    assert left_out == ["third"]  # the first spare one that is there was enough
    assert [str(column.header) for column in narrow.columns] == ["first", "second"]
    assert [list(column.cells) for column in narrow.columns] == [["1"], ["2"]]
    assert (narrow.title, narrow.rows[0].style) == ("of widths", "red")


def test_a_terminal_too_narrow_for_a_table_gets_lines_with_all_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.table import Table

    table = Table(title="of widths")
    for heading in ("setting", "first", "second"):
        table.add_column(heading, no_wrap=True)
    table.add_row("busy", "123456.78", "", style="red")
    for width, found in ((40, "│ 123456.78 │"), (20, "of widths\nsetting busy, first\n123456.78\nbelow\n")):
        for name, value in (("COLUMNS", str(width)), ("TTY_COMPATIBLE", "1"), ("NO_COLOR", "1"), ("TERM", "xterm")):
            monkeypatch.setenv(name, value)
        print_table(table, [("below", "")])
        assert found in capsys.readouterr().out


def test_a_percentile_of_a_few_round_trips_is_not_shown() -> None:
    latency = {"mean": 600.0, "p50": 500.0, "p99": 2000.0, "p99_9": 8000.0, "max": 1e6}
    counts = {19: [], 20: ["p50"], 999: ["p50"], 1000: ["p50", "p99"], 9999: ["p50", "p99"], 10_000: [*PERCENTILES]}
    for count, names in counts.items():
        rows = rows_of([run(Settings(), count, kind="latency", latency=latency)])
        assert [name for name in PERCENTILES if rows[0].firm(name)] == names
        (panel,) = panels_of(rows)
        assert len(panel.curves[0].ys) == len(names)
    asleep = trips(Settings(pause=200, poll="adaptive"), 9500, 90_000, sleeps=4000.0)
    few = dataclasses.replace(trips(Settings(pause=200), 500, 900), packets=500)
    (wake,) = wake_ups(rows_of([asleep, few]))
    assert (wake.asleep, wake.added) == ({"p50": 9500}, {"p50": 9000})
    assert wake_ups(rows_of([asleep, dataclasses.replace(few, packets=19)])) == []


def test_a_knee_says_how_sure_it_is() -> None:
    rates_of = {1: (1e6, 1e6, 1e6), 8: (8e6, 8.5e6, 9.5e6), 64: (9e6, 9.5e6, 10e6), 128: (5e6, 10e6, 11e6)}
    runs = [run(Settings(window=window), rate) for window, rates in rates_of.items() for rate in rates]
    (line,) = knee_lines(rows_of(runs))
    assert line == (
        "knee: window=64 is the first to reach 90% of the best Mpps; within the spread it may be 8 to 64"
    )
    runs = [run(Settings(window=window), rates[1], busy=0.5) for window, rates in rates_of.items()]
    (line,) = knee_lines(rows_of(runs))
    assert line.endswith("the best Mpps; it is the driver's or the window's (*)")


def test_a_csv_of_peers_has_both_rates() -> None:
    pair = Pair("io-split-64", (80.0,) * 4, "near", 2e6, 3e6, None, None)
    (record,) = csv.DictReader(io.StringIO(csv_text(peer_records(gather("vq bench peers"), peer_rows([pair])))))
    assert (record["dpdk"], record["vq"], record["vq_version"]) == ("2000000.0", "3000000.0", vq.__version__)


def test_facts_belong_to_every_row_of_a_csv() -> None:
    facts = gather("vq bench --made 'by hand'")
    assert facts.cpu_model and facts.kernel and facts.compiler and facts.date.endswith("+00:00")
    assert any("vq bench --made" in line for line in facts.lines())
    text = csv_text(flat_rows(facts, "vq", rows_of([run(Settings(), 2e6), run(Settings(size=128), 1e6)])))
    first, second = csv.DictReader(io.StringIO(text))
    assert (first["size"], second["size"], first["rate"]) == ("64", "128", "2000000.0")
    for name, value in dataclasses.asdict(facts).items():
        assert first[name] == second[name] == str(value)


def pair(dpdk: float, ours: float, *ns: float) -> Pair:
    distances = (ns * 3)[:3]
    return Pair("io-split-64", distances, tag_of(*distances), dpdk, ours, None, 12.0)


def test_pairs_of_one_tag_are_put_together() -> None:
    near, far = peer_rows([pair(10, 20, 80), pair(10, 40, 80), pair(10, 30, 80), pair(5, 5, 400), pair(1, 9, 80, 400)])
    assert (near.pairs, near.ratio, near.low, near.high, near.tag) == (3, 3.0, 2.0, 4.0, "near")
    assert (far.pairs, far.ratio, far.tag) == (1, 1.0, "far")
    assert (near.dpdk_cycles, near.vq_cycles) == (None, 12.0)


def test_testpmd_is_read() -> None:
    from vq.bench.cells import Cell

    text = "".join(f"  Rx-pps:   {n}   Rx-bps: 1\n  Tx-pps:   {n + 1}   Tx-bps: 1\n" for n in (1, 2, 3, 4, 5))
    assert rates(text, Cell("io", "split", 64)) == [1, 2, 3, 4, 5]
    assert rates(text, Cell("sink", "split", 64)) == [2, 3, 4, 5, 6]
    assert rates(text, Cell("patch", "split", 64)) == [3, 7]  # two ports; the last second is not whole yet
    assert (
        cycles_per_packet("  CPU cycles/packet=44.51 (busy cycles=1 / total io packets=2) at 2596 MHz Clock") == 44.51
    )
    assert cycles_per_packet("nothing") is None


def test_of_a_long_output_the_complaints_are_shown() -> None:
    screens = "\x1b[2J\x1b[1;1HPort statistics ====\n" * 100
    text = f"EAL: No free 1048576 kB hugepages reported on node 0\nEAL: Bus (vdev) probe failed.\n{screens}"
    assert complaints(text) == "EAL: Bus (vdev) probe failed."
    assert complaints("\x1b[2Jall is well\n") == "all is well"
    assert complaints("") == ""


def trials(name: str, settings: Settings, *ratios: float) -> list[Trial]:
    return [Trial(name, settings, ratio, 1e6, ratio * 1e6, "near", True) for ratio in ratios]


def test_noise_is_not_called_gain() -> None:
    base = Settings(poll="adaptive")
    big, small = Settings(poll="adaptive", ring=1024), Settings(poll="adaptive", ring=64)
    found = [
        *trials("defaults", base, 1.04, 0.95, 1.0),
        *trials("poll=busy", Settings(), 1.2, 1.3, 1.15),
        *trials("ring=1024", big, 1.02, 1.04, 1.03),  # always better, but by less than the noise
        *trials("ring=128", small, 1.5, 0.9, 1.4),  # by more than the noise, but not always
        *trials("ring=64", small, 0.5, 0.6, 0.55),
    ]
    noise, verdicts = judge(found)
    assert noise == pytest.approx(0.05)
    assert {v.name: v.verdict for v in verdicts} == {
        "poll=busy": BETTER, "ring=1024": SAME, "ring=128": SAME, "ring=64": WORSE,
    }  # fmt: skip
    best = combine(base, verdicts, ["poll", "ring"])
    assert best == Settings(poll="busy", ring=256)
    assert how_to_set(base, best) == ["poll=busy: vq pump ... --poll busy"]


@pytest.mark.parametrize(("own", "pairs"), [(2, 5), (5, 2), (1, 1)])
def test_fewer_than_three_pairs_are_no_verdict(own: int, pairs: int) -> None:
    base = Settings(poll="adaptive")
    found = [*trials("defaults", base, *[1.0] * own), *trials("poll=busy", Settings(), *[2.0] * pairs)]
    _, (verdict,) = judge(found)
    assert (verdict.verdict, verdict.trials) == (FEW, pairs)
    assert combine(base, [verdict], ["poll"]) == base


def test_tries_change_one_setting_each() -> None:
    tries = make_tries(Settings(), {"ring": [128, 256], "poll": ["adaptive"]})
    assert tries == [("ring=128", Settings(ring=128)), ("poll=adaptive", Settings(poll="adaptive"))]


def trips(settings: Settings, p50: float, p99: float, *, sleeps: float | None = 0.0, near: bool = True) -> Run:
    return run(settings, 4000.0, near=near, kind="latency", latency={"p50": p50, "p99": p99}, sleeps=sleeps)


def test_wake_latency_is_what_sleeping_adds() -> None:
    pause = Settings(pause=200)
    asleep, other = dataclasses.replace(pause, poll="adaptive"), Settings(pause=200, poll="adaptive", driver="sleep")
    rows = rows_of(
        [
            trips(Settings(), 400, 700),
            trips(Settings(poll="adaptive"), 400, 700, sleeps=100.0),  # no pause, no sleep worth the name
            trips(pause, 500, 1500),
            trips(pause, 900, 2500, near=False),
            trips(asleep, 20_500, 41_500, sleeps=3900.0),
            trips(other, 40_000, 80_000, sleeps=4000.0),  # its busy row is missing
        ]
    )
    wake, alone = wake_ups(rows)
    assert (wake.settings, wake.tag, wake.share) == (asleep, "near", pytest.approx(0.975))
    assert wake.asleep == {"p50": 20_500, "p99": 41_500}
    assert wake.awake == {"p50": 500, "p99": 1500}  # of the same tag
    assert wake.added == {"p50": 20_000, "p99": 40_000}
    assert (alone.settings, alone.awake, alone.added) == (other, {}, {})
    assert sleeping_lines(rows, []) == [
        "wake latency, pause=200 near: p50 +20.00 µs (20.50 asleep, 0.50 awake), p99 +40.00 µs (41.50 asleep, 1.50"
        " awake); it slept before 98%",
        "wake latency, driver=sleep pause=200 near: p50 40.00 µs asleep, p99 80.00 µs asleep; it slept before 100%",
    ]


def test_who_does_not_say_how_often_it_sleeps_has_no_wake_latency() -> None:
    assert wake_ups(rows_of([trips(Settings(pause=200, poll="adaptive"), 500, 900, sleeps=None)])) == []


def test_rates_of_both_ways_to_poll_are_paired_turn_by_turn() -> None:
    busy, adaptive = Settings(), Settings(poll="adaptive")
    turns = [(10e6, 9.9e6), (5e6, 5.0e6), (8e6, 7.9e6)]
    runs = [run(point, rate) for turn in turns for point, rate in zip((busy, adaptive), turn, strict=True)]
    (load,) = load_ratios(runs)
    assert (load.settings, load.tag, load.pairs) == (adaptive, "near", 3)
    assert (load.ratio, load.low, load.high) == (pytest.approx(0.99), pytest.approx(0.9875), pytest.approx(1.0))
    assert sleeping_lines([], runs) == ["adaptive / busy under load, near: 0.990 (0.988 to 1.000, 3 pairs)"]
    torn = [run(busy, 10e6), run(adaptive, 1e6, near=False), run(busy, 10e6), run(adaptive, 9e6), run(adaptive, 9e6)]
    (load,) = load_ratios(torn)  # a change of the distance within a turn, and a turn that was ended early
    assert (load.pairs, load.ratio) == (1, pytest.approx(0.9))
    assert load_ratios(runs[::2]) == []


def test_a_record_has_what_sleeping_costs() -> None:
    runs = [trips(Settings(pause=200), 500, 900), trips(Settings(pause=200, poll="adaptive"), 9500, 900, sleeps=4000.0)]
    record = final_record(gather("vq bench latency"), "vq", rows_of(runs), runs)
    (wake,) = record["wake_ups"]
    assert wake["added"]["p50"] == 9000
    assert record["load_ratios"] == []
