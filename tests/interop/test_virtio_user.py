"""DPDK's virtio-user as front-end, in the directions of a benchmark, judged by the counters of both sides."""

from __future__ import annotations

import time
from typing import NamedTuple

import pytest

from interop.backend import Backend, PortCounters
from interop.process import wait_until
from interop.rig import Rig
from interop.testpmd import PortStatistics, Testpmd

pytestmark = pytest.mark.dpdk
RING = 256
BURST = 32
SECONDS = 0.7
MINIMUM = 10_000  # packets; a working pair moves millions in a second
PACKED = ",packed_vq=1"
LAYOUTS = {"split": "", "packed": PACKED}
VARIANTS = {
    "defaults": "",
    "not mergeable": ",mrg_rxbuf=0",
    "not in order": ",in_order=0",
    "neither": ",mrg_rxbuf=0,in_order=0",
    "packed": PACKED,
    "packed, not mergeable": PACKED + ",mrg_rxbuf=0",
    "packed, not in order": PACKED + ",in_order=0",
    "packed, neither": PACKED + ",mrg_rxbuf=0,in_order=0",
}
# What is left out concerns the size of a packet or who forwards it, of which the layout knows nothing.
SIZES = [(64, name) for name in VARIANTS] + [(1518, name) for name in VARIANTS if "packed, " not in name]
LOOPS = [("io", name) for name in VARIANTS] + [("rtt", name) for name in VARIANTS if "packed, " not in name]
# The two guests of a patch.
PAIRS = {
    **{name: (VARIANTS[name],) * 2 for name in ("defaults", "not mergeable", "not in order", "neither", "packed")},
    "packed, neither": (VARIANTS["packed, neither"],) * 2,
    "split to packed": ("", PACKED),
    "packed to split, neither": (VARIANTS["packed, neither"], VARIANTS["neither"]),
}
MODES = {"sink": "txonly", "gen": "rxonly", "io": "io", "patch": "io", "rtt": "io"}


class Run(NamedTuple):
    """Counters of both sides after the front-end stopped and nothing moves any more."""

    front: list[PortStatistics]
    back: list[PortCounters]
    testpmd: Testpmd
    backend: Backend


def _vdev(rig: Rig, index: int = 0, *, more: str = "") -> str:
    """Argument of testpmd for a front-end on the socket of this number."""
    return f"net_virtio_user{index},path={rig.sock('ab'[index])},queue_size={RING}{more}"


def _start(
    rig: Rig, direction: str, *, size: int = 64, more: tuple[str, ...] = ("",), queues: int = 1, server: bool = False
) -> Run:
    """Let packets move for a moment.

    Parameters
    ----------
    direction : str
        As in ``MODES``: which side makes, drops or returns packets.
    size : int
        Bytes of a packet.
    more : tuple of str
        Further arguments of net_virtio_user, for each front-end.
    queues : int
        Queue pairs.
    server : bool
        The front-end listens, the back-end connects.
    """
    names = "ab" if direction == "patch" else "a"
    pairs = f",queues={queues}" if queues > 1 else ""
    vhost = [f"vhost:{rig.sock(name)}{',client' if server else ''}{pairs}" for name in names]
    ports = {"sink": [*vhost, "null:copy"], "gen": [f"gen:size={size}", *vhost]}.get(direction, vhost)
    backend = rig.backend(*ports, core=0, start=not server)
    if server:
        backend.launch()  # it comes first here, and has to keep trying until the front-end listens
    role = f",queues={queues}{',server=1' if server else ''}"
    vdevs = [_vdev(rig, index, more=role + arguments) for index, arguments in enumerate(more)]
    options = [f"--forward-mode={MODES[direction]}", f"--txpkts={size}", f"--rxq={queues}", f"--txq={queues}"]
    options += [f"--burst={1 if direction == 'rtt' else BURST}"]
    options += ["--port-topology=chained"] if direction == "patch" else []
    testpmd = rig.testpmd("front", *vdevs, core=1, options=options)
    if server:
        backend.wait_ready()
    wait_until("the link", lambda: "up" in testpmd.command("show port info 0").lower().split("link status:")[1][:8], 10)
    testpmd.command("start tx_first" if MODES[direction] == "io" else "start")
    time.sleep(SECONDS)
    testpmd.command("stop")
    front = testpmd.statistics()
    back = backend.counters()
    assert len(front) == len(names)
    guests = [counters for counters, port in zip(back, backend.ports, strict=True) if port.kind == "vhost"]
    for guest, arguments in zip(guests, more, strict=True):
        assert guest.layouts in (None, {"packed" if PACKED in arguments else "split"})
    return Run(front, guests, testpmd, backend)


@pytest.mark.parametrize(("size", "variant"), SIZES)
def test_sink_takes_every_packet(rig: Rig, size: int, variant: str) -> None:
    run = _start(rig, "sink", size=size, more=(VARIANTS[variant],))
    (front,), (back,) = run.front, run.back
    assert front.transmitted > MINIMUM
    assert back.from_guest == front.transmitted
    assert not back.dropped
    rig.note(f"{front.transmitted / SECONDS / 1e6:.1f} million packets a second")


@pytest.mark.parametrize(("size", "variant"), SIZES)
def test_generator_reaches_the_guest(rig: Rig, size: int, variant: str) -> None:
    run = _start(rig, "gen", size=size, more=(VARIANTS[variant],))
    (front,), (back,) = run.front, run.back
    assert front.received > MINIMUM
    # What came after the front-end stopped fills its ring and stays there; and testpmd sometimes drops, uncounted, a
    # ring full that was waiting before its `start` (seen with DPDK at both ends as well).
    assert 0 <= back.to_guest - front.received <= 2 * RING
    rig.note(f"{front.received / SECONDS / 1e6:.1f} million packets a second")


@pytest.mark.parametrize(("direction", "variant"), LOOPS)
def test_echo_returns_every_packet(rig: Rig, direction: str, variant: str) -> None:
    run = _start(rig, direction, more=(VARIANTS[variant],))
    (front,), (back,) = run.front, run.back
    assert front.received > MINIMUM / 10
    assert back.from_guest == back.to_guest == front.transmitted, "the echo lost or doubled packets"
    assert not back.dropped
    assert 0 <= back.to_guest - front.received <= BURST
    rig.note(f"{front.received / SECONDS / 1e6:.2f} million packets a second")


@pytest.mark.parametrize("pair", list(PAIRS.values()), ids=list(PAIRS))
def test_patch_carries_every_packet_over(rig: Rig, pair: tuple[str, str]) -> None:
    run = _start(rig, "patch", more=pair)
    assert min(front.received for front in run.front) > MINIMUM
    for here, there in ((0, 1), (1, 0)):
        assert run.back[here].from_guest == run.front[here].transmitted
        assert run.back[there].to_guest == run.back[here].from_guest, "the patch lost or doubled packets"
        assert 0 <= run.back[there].to_guest - run.front[there].received <= BURST * 2
        assert not run.back[here].dropped
    rig.note(f"{sum(front.received for front in run.front) / SECONDS / 1e6:.1f} million packets a second")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_queue_pairs_both_carry_packets(rig: Rig, layout: str) -> None:
    run = _start(rig, "io", queues=2, more=(LAYOUTS[layout],))
    streams = run.testpmd.streams()
    assert set(streams) == {(0, 0), (0, 1)} and min(streams.values()) > MINIMUM / 10, streams
    assert run.back[0].from_guest == run.back[0].to_guest == run.front[0].transmitted
    assert not run.back[0].dropped


@pytest.mark.parametrize(("direction", "layout"), [("sink", "split"), ("io", "split"), ("io", "packed")])
def test_back_end_connects(rig: Rig, direction: str, layout: str) -> None:
    run = _start(rig, direction, server=True, more=(LAYOUTS[layout],))
    assert run.front[0].transmitted > MINIMUM
    assert run.back[0].from_guest == run.front[0].transmitted


def test_front_end_leaves_and_another_comes(rig: Rig) -> None:
    """In order and by SIGKILL, with either layout; the back-end keeps listening and leaks nothing."""
    backend = rig.backend(f"vhost:{rig.sock()}", core=0)
    before = len(backend.descriptors())
    comings = [("split", True), ("packed", False), ("packed", True), ("split", False), ("split", True)]
    for turn, (layout, in_order) in enumerate(comings):
        vdev = _vdev(rig, more=LAYOUTS[layout])
        testpmd = rig.testpmd(f"front{turn}", vdev, core=1, options=["--forward-mode=io"])
        testpmd.command("start tx_first")
        time.sleep(0.3)
        assert testpmd.statistics()[0].received > MINIMUM / 10
        if in_order:
            testpmd.quit()
        testpmd.kill()
        assert backend.child.running
    wait_until("the last connection to be given up", lambda: len(backend.descriptors()) <= before, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_back_end_is_killed_and_front_end_listens_on(rig: Rig, layout: str) -> None:
    """virtio-user as server takes a new back-end and starts its rings anew."""
    backend = rig.backend(f"vhost:{rig.sock()},client", core=0, start=False)
    backend.launch()
    vdev = _vdev(rig, more=",server=1" + LAYOUTS[layout])
    testpmd = rig.testpmd("front", vdev, core=1, options=["--forward-mode=txonly"])
    backend.wait_ready()
    testpmd.command("start")
    _await_packets(testpmd)
    for _ in range(2):
        backend.kill()
        time.sleep(0.3)
        backend.start()
        _await_packets(testpmd)


def _await_packets(testpmd: Testpmd) -> None:
    """Wait until the front-end transmits."""
    before = testpmd.statistics()[0].transmitted
    wait_until("packets", lambda: testpmd.statistics()[0].transmitted > before + MINIMUM, 10, [testpmd.child])
