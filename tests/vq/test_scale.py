"""Many ports in one process: what idle ones take and what they do not, groups, and who owns which queue."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pump_rig import CLEAN, Background, Guest, faults, port_counters, pumping, two_cpus
from vq.errors import ResourceError, UsageError
from vq.groups import parse_groups
from vq.limits import ensure_open_files
from vq.message import Request
from vq.pump import Pump
from vq_core.driver import DriverQueue
from vq_core.traffic import Exchange
from waiting import wait_for

MANY = 512
ACTIVE = 8
MAC = bytes.fromhex("52540012ab56")


def ports(folder: Path, count: int, options: str = "") -> list[str]:
    return [f"vhost:{folder}/{number}.sock{options}" for number in range(count)]


def path(port: str) -> str:
    return port.removeprefix("vhost:").partition(",")[0]


def flows(pump: Pump) -> list[list[tuple[str, int]]]:
    """By worker: the endpoints in its plan, as the ports know their owners."""
    return [
        [
            (port.name, index)
            for port in pump.ports
            for index, mailbox in enumerate(port.port.mailboxes)
            if mailbox is worker.mailbox
        ]
        for worker in pump.workers
    ]


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    """The soft limit of open files meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(autouse=True)
def same_limit() -> Iterator[None]:
    """A pump raises the limit of the whole process; other tests should not notice."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


# ---- 512 ports ----


@pytest.mark.parametrize("shape", ["echo", "switch"])
def test_traffic_on_8_of_512_ports(tmp_path: Path, shape: str) -> None:
    names = ports(tmp_path, MANY)
    groups: list[Any] = [[name] for name in names] if shape == "echo" else names
    with soft_limit(256), pumping(*groups) as pump, ExitStack() as stack:
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 3 * MANY
        assert flows(pump) == [[]]
        chosen = [number * MANY // ACTIVE for number in range(ACTIVE)]
        guests = [stack.enter_context(Guest(path(names[number]), memory_bytes=1 << 20)) for number in chosen]
        wait_for(lambda: flows(pump) == [[(names[number], 0) for number in chosen]])
        step = 0 if shape == "echo" else 1
        if step:
            introduce(guests)
        streams = [(guests[n].transmitqs[0], guests[(n + step) % ACTIVE].receiveqs[0]) for n in range(ACTIVE)]
        traffic = Exchange(streams, (64, 1514), poll="sleep")
        traffic.run(packets=8000)
        assert faults(traffic) == CLEAN
        assert traffic.counters["verified"] == 8000
        nothing = {"packets": 0, "bytes": 0, "dropped": {}}
        idle = [port.port.snapshot() for number, port in enumerate(pump.ports) if number not in chosen]
        assert idle == [{"to_guest": nothing, "from_guest": nothing}] * (MANY - ACTIVE)
        for guest in guests:
            guest.stop()
        wait_for(lambda: flows(pump) == [[]])


def introduce(guests: list[Guest]) -> None:
    """Tell the switch that the address of stream n is that of guest n + 1."""
    for number in range(len(guests)):
        receiver = guests[(number + 1) % len(guests)]
        receiver.send(b"\x01\x80\xc2\0\0\0" + bytes([2, 0x76, 0x71, 0, number, 2]) + b"\x88\xb5" + bytes(50))
        wait_for(receiver.transmitqs[0].poll)


def test_a_switch_has_a_limit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="port_count 4097 is not in 1 to 4096; join fewer ports, or make several"):
        Pump([f"gen:rate={number + 1}" for number in range(4097)])


MEMORY = """
import gc, json, sys
from pathlib import Path
from vq.pump import Pump

def used():
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kib = {line.split()[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return int(kib["Rss:"]), int(kib["Private_Dirty:"]), len(list(Path("/proc/self/fd").iterdir()))

first, many = json.load(sys.stdin)
with Pump([first]):
    before = used()
    with Pump(many) as pump:
        pump.dispatch(0)
        print(json.dumps([after - then for after, then in zip(used(), before)]))
"""


@pytest.mark.parametrize("shape", ["echo", "switch"])
@pytest.mark.parametrize("options", ["", ",queues=128"])
def test_what_an_idle_port_takes(tmp_path: Path, shape: str, options: str) -> None:
    """Under 256 KiB of memory, by either measure, and three descriptors."""
    names = ports(tmp_path, MANY, options)
    groups: list[Any] = [[name] for name in names] if shape == "echo" else names
    child = subprocess.run(
        [sys.executable, "-c", MEMORY],
        input=json.dumps([f"vhost:{tmp_path}/first.sock", groups]),
        capture_output=True,
        text=True,
        check=True,
    )
    resident, private, fds = json.loads(child.stdout)
    assert 0 < resident / MANY < 256
    assert 0 < private / MANY < 256
    assert fds <= 3 * MANY + 8


def test_the_command_takes_512_ports(tmp_path: Path) -> None:
    """From the shell, with a soft limit that does not suffice."""
    words = " + ".join(ports(tmp_path, MANY)).split()
    command = [sys.executable, "-m", "vq", "pump", *words, "--duration", "0.2", "--json"]
    result = subprocess.run(
        ["sh", "-c", 'ulimit -Sn 300 && exec "$@"', "sh", *command], capture_output=True, timeout=60, check=True
    )
    assert len(json.loads(result.stdout.splitlines()[-1])["ports"]) == MANY


def test_the_hard_limit_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vq", "pump", *ports(tmp_path, MANY)]
    result = subprocess.run(
        ["sh", "-c", 'ulimit -n 700 && exec "$@"', "sh", *command], capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "open files are needed, and this process may have 700" in result.stderr
    assert "LimitNOFILE=" in result.stderr


def test_open_files_are_raised_as_far_as_wanted() -> None:
    used = len(os.listdir("/proc/self/fd"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with soft_limit(used + 200):
        ensure_open_files(10, 20)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == used + 200
        ensure_open_files(10, 300)
        assert used + 300 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < used + 400
        ensure_open_files(10, 1 << 40)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) in {(hard, hard), (used + (1 << 40), hard)}
    if hard != resource.RLIM_INFINITY:
        with pytest.raises(ResourceError, match="open files are needed"):
            ensure_open_files(hard, 0)


# ---- what is announced without a ring ----


def test_an_announcement_of_a_port_without_rings(tmp_path: Path) -> None:
    """The pair joins the flows for it, and leaves them again."""
    names = ports(tmp_path, 4)
    with (
        pumping(*names) as pump,
        Guest(path(names[0])) as far,
        Guest(path(names[1]), running=0) as near,
    ):
        wait_for(lambda: flows(pump) == [[(names[0], 0)]])
        far.post(2000, 8)
        for count in range(1, 4):
            near.frontend.request(Request.SEND_RARP, int.from_bytes(MAC, "little"))
            frame = far.receive()[1]
            assert frame[:14] == b"\xff" * 6 + MAC + b"\x80\x35"
            wait_for(lambda: flows(pump) == [[(names[0], 0)]])
            assert port_counters(pump, 0)["to_guest"]["packets"] == count
        near.start()
        wait_for(lambda: flows(pump) == [[(names[0], 0), (names[1], 0)]])


# ---- groups ----


@pytest.mark.parametrize("form", ["words", "rows"])
def test_groups_are_joined_for_themselves(tmp_path: Path, form: str) -> None:
    a, b, c, d, e = ports(tmp_path, 5)
    groups: list[Any] = [a, b, "+", c, "+", d, e] if form == "words" else [[a, b], [c], [d, e]]
    with pumping(*groups, cpus=two_cpus()) as pump, ExitStack() as stack:
        first, second, alone, third, fourth = (stack.enter_context(Guest(path(port))) for port in (a, b, c, d, e))
        streams = [
            *first.streams(second), *second.streams(first), *alone.streams(), *third.streams(fourth),
            *fourth.streams(third),
        ]  # fmt: skip
        traffic = Exchange(streams, (64, 777), poll="sleep")
        traffic.run(packets=5000)
        assert faults(traffic) == CLEAN
        assert traffic.counters["verified"] == 5000
        assert [len(share) for share in flows(pump)] in ([2, 3], [3, 2], [4, 1], [1, 4])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["+", "null:"], "group 1 of 2 has no PORT"),
        (["null:", "+"], "group 2 of 2 has no PORT"),
        (["null:", "+", "+", "gen:"], "group 2 of 3 has no PORT"),
        ([["null:"], []], "group 2 of 2 has no PORT"),
        ([["null:"], "gen:"], "PORT arguments beside sequences"),
        (["null:", "+", "gen:", "gen:", "echo:"], "echo: reflects one other port"),
        (["null:", "+", "echo:"], "echo: reflects one other port"),
        ([["+"]], r"PORT '\+': no KIND:TARGET"),
        (["vhost:/tmp/x", "+", "vhost:/tmp/x"], "each port needs one of its own"),
    ],
)
def test_groups_that_make_no_sense(words: list[Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse_groups(words)


def test_names_are_unique_among_groups() -> None:
    groups = parse_groups(["gen:", "null:", "+", "gen:", "echo:", "+", "gen:", "null:"])
    assert [[spec.name for spec in group] for group in groups] == [["gen", "null"], ["gen-2"], ["gen-3", "null-2"]]
    assert parse_groups(groups) == groups


# ---- two workers ----


def test_queues_are_spread_by_what_is_started(tmp_path: Path) -> None:
    """The guests sit at ports that a spread over all ports would give to one worker; each pair has one owner."""
    names = ports(tmp_path, 64)
    with pumping(*([f"{name},queues=2"] for name in names), cpus=two_cpus()) as pump, ExitStack() as stack:
        chosen = names[::16]
        guests = [stack.enter_context(Guest(path(name), pairs=2)) for name in chosen]
        everything = sorted((name, pair) for name in chosen for pair in range(2))
        wait_for(lambda: sorted(key for share in flows(pump) for key in share) == everything)
        assert [len(share) for share in flows(pump)] == [4, 4]
        streams = [stream for guest in guests for stream in guest.streams()]
        traffic = Exchange(streams, 64, poll="sleep")
        traffic.run(packets=8000)
        assert faults(traffic) == CLEAN
        assert all(worker["busy_cycles"] > 0 for worker in pump.snapshot()["workers"])
        # All of one worker's queues stop: the other one's are shared out anew.
        for name, pair in flows(pump)[0]:
            guests[chosen.index(name)].stop(pair)
        wait_for(lambda: [len(share) for share in flows(pump)] == [2, 2])


def test_rings_come_and_go_beside_traffic(tmp_path: Path) -> None:
    """Guests that start, stop and go at other ports do not disturb the flows of a guest, on whichever worker."""
    names = ports(tmp_path, 32)
    with pumping(*names[:16], "+", *names[16:], cpus=two_cpus()) as pump, ExitStack() as stack:
        steady = [stack.enter_context(Guest(path(names[number]))) for number in (0, 1, 16, 17)]
        streams: list[tuple[DriverQueue, DriverQueue]] = []
        for near, far in (steady[:2], steady[2:]):
            streams += [*near.streams(far), *far.streams(near)]
        for number, receiver in enumerate((steady[1], steady[0], steady[3], steady[2])):
            receiver.send(b"\x01\x80\xc2\0\0\0" + bytes([2, 0x76, 0x71, 0, number, 2]) + b"\x88\xb5" + bytes(50))
            wait_for(receiver.transmitqs[0].poll)
        background = Background(streams)
        for _ in range(3):
            for number in (2, 15, 18, 31):
                with Guest(path(names[number])) as guest:
                    background.goes_on(20)
                    guest.stop()
                    background.goes_on(20)
        background.finish()
        wait_for(lambda: sorted(map(len, flows(pump))) == [2, 2])
