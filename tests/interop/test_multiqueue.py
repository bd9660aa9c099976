"""Several queue pairs: each of them carries packets, and their number may change while they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interop.backend import Backend
from interop.features import PACKED, assert_packed
from interop.guest import Guest
from interop.host import Host, Station
from interop.process import wait_until
from interop.rig import Rig
from interop.traffic import assert_ping, await_path, listening, send_bulk

pytestmark = pytest.mark.guest
PAIRS = 2
FLOWS = 8
SECONDS = 2
MINIMUM = 200  # packets that no chatter of the kernels brings together


@pytest.fixture(scope="module", params=[{}, PACKED], ids=["split", "packed"])
def tap(request: pytest.FixtureRequest) -> Iterator[tuple[Host, Guest]]:
    """Boot a guest of two queue pairs with a TAP of two."""
    with Rig(request.config.getoption("--backend"), "multiqueue over a TAP") as rig:
        if "queues over a TAP" in rig.backend_class.lacks:
            pytest.skip("the stand-in has one queue on a TAP")
        host = rig.host()
        rig.backend(f"vhost:{rig.sock()},queues={PAIRS}", f"tap:vq0,queues={PAIRS}", host=host)
        guest = rig.guest(rig.sock(), queues=PAIRS, cpus=PAIRS, properties=request.param)
        host.configure(1)
        guest.configure(2)
        assert_packed(guest, request.param is PACKED)
        yield host, guest


@pytest.fixture(scope="module")
def patch(request: pytest.FixtureRequest) -> Iterator[tuple[Backend, Guest, Guest]]:
    """Boot two guests of two queue pairs, the second of them on packed rings."""
    with Rig(request.config.getoption("--backend"), "multiqueue over a patch") as rig:
        backend = rig.backend(*(f"vhost:{rig.sock(name)},queues={PAIRS}" for name in "ab"))
        started = [
            rig.guest(rig.sock(name), boot=False, queues=PAIRS, cpus=PAIRS, properties=properties)
            for name, properties in {"a": {}, "b": PACKED}.items()
        ]
        first, second = (guest.wait_booted() for guest in started)
        first.configure(1)
        second.configure(2)
        assert_packed(first, False)
        assert_packed(second, True)
        yield backend, first, second


def _many_flows(source: Station, target: Station) -> None:
    """Send over many connections, half of them from each CPU of the source."""
    await_path(source, target)
    ports = [5201, 5202]
    for port in ports:
        target.check(f"iperf3 -s -1 -D -p {port}")
        wait_until("iperf3", listening(target, port), 10)
    runs = " & ".join(
        f"taskset {1 << cpu} iperf3 -c {target.address} -p {port} -P {FLOWS // 2} -t {SECONDS}"
        f" >{source.scratch}/iperf{cpu} 2>&1"
        for cpu, port in enumerate(ports)
    )
    source.check(f"{runs} & wait", 30 + SECONDS)
    logs = source.check(f"cat {source.scratch}/iperf?")
    assert "error" not in logs and logs.count("[SUM]") >= 2 * 2, f"iperf3 from {source.name}:\n{logs}"


def _used(guest: Guest, before: dict[str, list[int]], queue: str) -> list[int]:
    return [now - then for now, then in zip(guest.queue_packets()[queue], before[queue], strict=True)]


def test_all_queues_carry_packets_over_a_tap(tap: tuple[Host, Guest]) -> None:
    host, guest = tap
    before = guest.queue_packets()
    assert len(before["receiveq"]) == len(before["transmitq"]) == PAIRS
    _many_flows(guest, host)
    used = _used(guest, before, "transmitq")
    assert min(used) > MINIMUM, f"packets of each transmitq: {used}"
    before = guest.queue_packets()
    _many_flows(host, guest)
    used = _used(guest, before, "receiveq")
    assert min(used) > MINIMUM, f"packets of each receiveq: {used}"


def test_all_queues_carry_packets_between_guests(patch: tuple[Backend, Guest, Guest]) -> None:
    _, first, second = patch
    sent_before, received_before = first.queue_packets(), second.queue_packets()
    _many_flows(first, second)
    sent = _used(first, sent_before, "transmitq")
    received = _used(second, received_before, "receiveq")
    assert min(sent) > MINIMUM, f"packets of each transmitq: {sent}"
    assert min(received) > MINIMUM, f"packets of each receiveq: {received}"


@pytest.mark.shows("VIRTIO_NET_F_MQ", "VHOST_USER_PROTOCOL_F_MQ")
def test_number_of_pairs_changes_while_running(patch: tuple[Backend, Guest, Guest]) -> None:
    backend, first, second = patch
    backend.requires("queue steering")
    for pairs in (1, 2):
        for guest in (first, second):
            guest.check(f"ethtool -L eth0 combined {pairs}")
            assert_ping(first, second, count=50)
            assert_ping(second, first, count=50)
    send_bulk(second, first, mib=8)
    for guest in (first, second):
        assert guest.check("ethtool -l eth0").count(f"Combined:\t{PAIRS}") == 2


def test_guest_that_uses_fewer_pairs_than_offered(rig: Rig) -> None:
    """A guest of two pairs and one of a single pair: what is for the second queue still arrives."""
    rig.backend(f"vhost:{rig.sock('a')},queues={PAIRS}", f"vhost:{rig.sock('b')},queues={PAIRS}").requires(
        "queue steering"
    )
    started = [
        rig.guest(rig.sock("a"), boot=False, queues=PAIRS, cpus=PAIRS),
        rig.guest(rig.sock("b"), boot=False, properties=PACKED),
    ]
    wide, narrow = (guest.wait_booted() for guest in started)
    wide.configure(1)
    narrow.configure(2)
    assert_ping(narrow, wide, count=100)
    _many_flows(wide, narrow)
    send_bulk(narrow, wide, mib=8)
