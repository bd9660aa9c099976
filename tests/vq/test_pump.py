"""Whole pumps on real sockets with verified traffic of our own driver."""

from __future__ import annotations

import gc
import os
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from pump_rig import (
    CLEAN,
    PACKED,
    PLAIN,
    USUAL,
    Background,
    Guest,
    faults,
    mapped,
    port_counters,
    pumping,
    two_cpus,
)
from vhost_rig import open_fds
from vq import virtio as v
from vq.demo import open_exchange
from vq.errors import ResourceError, UsageError
from vq.message import Request
from vq.pump import Pump
from vq_core.traffic import Exchange, Sink, traffic_memory_bytes
from waiting import wait_for

F = v.mask
KINDS = {
    "legacy": 0,
    "legacy-mrg": F(v.VIRTIO_NET_F_MRG_RXBUF),
    "plain": PLAIN,
    "event-idx": USUAL,
    "mrg": USUAL | F(v.VIRTIO_NET_F_MRG_RXBUF),
    "in-order": PLAIN | F(v.VIRTIO_F_IN_ORDER),
    "indirect": USUAL | F(v.VIRTIO_F_INDIRECT_DESC),
}
KINDS |= {f"packed-{kind}": KINDS[kind] | PACKED for kind in ("plain", "mrg", "in-order", "indirect")}


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [str(tmp_path / f"{name}.sock") for name in "abcd"]


# ---- wiring ----


@pytest.mark.parametrize("kind", KINDS)
def test_echo(paths: list[str], kind: str) -> None:
    sizes = (64, 1514, 100, 9000)
    options = (
        {"receive_bytes": 1000} if "mrg" in kind else {"descriptors": 4, "indirect": True} if "indirect" in kind else {}
    )
    with (
        pumping(f"vhost:{paths[0]}") as pump,
        Guest(paths[0], KINDS[kind], memory_bytes=2 * traffic_memory_bytes(256, 9000)) as guest,
    ):
        assert guest.features & KINDS[kind] == KINDS[kind]
        traffic = Exchange(guest.streams(), sizes, poll="sleep", **options)
        traffic.run(packets=2000)
        assert faults(traffic) == CLEAN
        assert traffic.counters["verified"] == 2000
        counted = {"packets": 2000, "bytes": 500 * sum(sizes), "dropped": {}}
        snapshot = port_counters(pump, 0)
        assert snapshot["to_guest"] == snapshot["from_guest"] == counted
        assert (snapshot["state"], snapshot["connections"]) == ("running", 1)
        assert [queue["name"] for queue in snapshot["queues"]] == ["receiveq0", "transmitq0"]
        bases = guest.stop()
        assert bases == [guest.receiveqs[0].used_idx, guest.transmitqs[0].used_idx]
        # And once more from there.
        guest.receiveqs[0].reset(bases[0])
        guest.transmitqs[0].reset(bases[1])
        guest.start()
        again = Exchange(guest.streams(), 64, poll="sleep", descriptors=options.get("descriptors", 1))
        again.run(packets=500)
        assert faults(again) == CLEAN


def test_echo_port_is_the_same_as_one_port(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]}", "echo:"), Guest(paths[0]) as guest:
        traffic = Exchange(guest.streams(), 64, poll="sleep")
        traffic.run(packets=500)
        assert faults(traffic) == CLEAN


def test_patch(paths: list[str]) -> None:
    with (
        pumping(f"vhost:{paths[0]},queues=1", f"vhost:{paths[1]},client") as pump,
        Guest(paths[1], 0, listen=True) as far,
        Guest(paths[0], USUAL | F(v.VIRTIO_NET_F_MRG_RXBUF)) as near,
    ):
        traffic = Exchange(near.streams(far) + far.streams(near), (64, 1514, 777), poll="sleep")
        traffic.run(packets=4000)
        assert faults(traffic) == CLEAN
        assert traffic.counters["verified"] == 4000
        one, other = (port_counters(pump, number) for number in range(2))
        assert one["to_guest"] == other["from_guest"]
        assert other["to_guest"] == one["from_guest"]
        assert one["to_guest"]["packets"] + other["to_guest"]["packets"] == 4000


@pytest.mark.parametrize("workers", [1, 2])
def test_switch(paths: list[str], workers: int) -> None:
    """A ring of three guests with two pairs each; each has told the switch where it is."""
    ports = [f"vhost:{path},queues=2" for path in paths[:3]]
    with pumping(*ports, cpus=two_cpus() if workers == 2 else None) as pump:
        guests = [Guest(path, pairs=2) for path in paths[:3]]
        try:
            streams = [(guests[i % 3].transmitqs[i // 3], guests[(i + 1) % 3].receiveqs[i // 3]) for i in range(6)]
            for number in range(6):  # the frame's source is the address that stream `number` is sent to
                receiver = guests[(number + 1) % 3]
                receiver.send(
                    b"\xff" * 6 + bytes([2, 0x76, 0x71, 0, number, 2]) + b"\x88\xb5" + bytes(50), pair=number // 3
                )
                wait_for(lambda receiver=receiver, number=number: receiver.transmitqs[number // 3].poll())
            before = [port_counters(pump, number)["to_guest"]["packets"] for number in range(3)]
            traffic = Exchange(streams, (64, 1514), poll="sleep")
            traffic.run(packets=6000)
            assert faults(traffic) == CLEAN
            assert traffic.counters["verified"] == 6000
            after = [port_counters(pump, number)["to_guest"]["packets"] for number in range(3)]
            assert sum(after) - sum(before) == 6000  # nobody got what was not for him
            if workers == 2:
                assert all(worker["busy_cycles"] > 0 for worker in pump.snapshot()["workers"])
        finally:
            for guest in guests:
                guest.close()


def test_pairs_are_spread_over_workers(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]},queues=4", cpus=two_cpus()) as pump, Guest(paths[0], pairs=4) as guest:
        traffic = Exchange(guest.streams(), (64, 1514), poll="sleep")
        traffic.run(packets=4000)
        assert faults(traffic) == CLEAN
        assert [worker["cpu"] for worker in pump.snapshot()["workers"]] == two_cpus()
        owners = [pump.ports[0].port.mailboxes[pair] for pair in range(4)]
        assert [owner is pump.workers[0].mailbox for owner in owners] == [True, False, True, False]
        assert all(worker["busy_cycles"] > 0 for worker in pump.snapshot()["workers"])


def test_flows_move_between_workers_without_loss(paths: list[str]) -> None:
    """The two pairs of one worker go, so that one of the other worker's takes their place."""
    for _ in range(5):
        with pumping(f"vhost:{paths[0]},queues=4", cpus=two_cpus()) as pump, Guest(paths[0], pairs=4) as guest:
            background = Background([guest.streams()[pair] for pair in (0, 2)])
            background.goes_on()
            boxes = pump.ports[0].port.mailboxes
            assert boxes[0] is boxes[2] is pump.workers[0].mailbox
            guest.stop(1)
            background.goes_on()
            assert boxes[0] is boxes[2]  # nobody moves as long as that would not even things out
            guest.stop(3)
            wait_for(lambda boxes=boxes: {id(boxes[0]), id(boxes[2])} == {id(w.mailbox) for w in pump.workers})
            background.goes_on()
            for pair in (1, 3):
                guest.start(pair)
                background.goes_on()
            background.finish()


@pytest.mark.shows("VIRTIO_NET_F_MQ", "SET_VRING_ENABLE")
def test_pairs_are_enabled_and_disabled_while_others_run(paths: list[str]) -> None:
    with (
        pumping(*(f"vhost:{path},queues=2" for path in paths[:2]), cpus=two_cpus()) as pump,
        Guest(paths[0], pairs=2) as near,
        Guest(paths[1], pairs=2) as far,
    ):
        background = Background([near.streams(far)[0], far.streams(near)[0]])
        for _ in range(10):
            for guest in (near, far):
                guest.enable(1, False)
                background.goes_on(20)
            for guest in (far, near):
                guest.enable(1, True)
                background.goes_on(20)
        background.finish()
        assert not port_counters(pump, 0)["to_guest"]["dropped"]


def test_a_disabled_pair(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]}", f"vhost:{paths[1]}") as pump, Guest(paths[0]) as near, Guest(paths[1]) as far:
        far.post(100, 10)
        near.frontend.enable_ring(1, False)
        near.send(b"never seen")
        wait_for(near.transmitqs[0].poll)
        assert port_counters(pump, 0)["from_guest"] == {"packets": 0, "bytes": 0, "dropped": {"disabled": 1}}
        near.frontend.enable_ring(1, True)
        far.frontend.enable_ring(0, False)
        near.send(b"nor this")
        wait_for(near.transmitqs[0].poll)
        assert port_counters(pump, 1)["to_guest"]["dropped"] == {"disabled": 1}
        assert far.receiveqs[0].poll() == []
        far.frontend.enable_ring(0, True)
        near.send(b"but this")
        assert far.receive() == (bytes(10) + b"\1\0", b"but this")


def test_generator_and_sink(paths: list[str]) -> None:
    with pumping("gen:count=5000,size=100", f"vhost:{paths[0]}") as pump, Guest(paths[0], size=64) as guest:
        sink = Sink([guest.receiveqs[0]], 200, poll="sleep")
        sink.run(packets=5000)
        assert (sink.counters["received"], sink.counters["received_bytes"]) == (5000, 500000)
        wait_for(lambda: pump.ports[0].finished)
        assert port_counters(pump, 0)["from_gen"]["packets"] == port_counters(pump, 1)["to_guest"]["packets"] == 5000
    with pumping(f"vhost:{paths[0]},queues=2", "null:copy") as pump, Guest(paths[0], pairs=2) as guest:
        for pair in range(2):
            for number in range(100):
                guest.transmitqs[pair].add([bytes(12) + bytes(100 + number)])
            guest.transmitqs[pair].kick()
        wait_for(lambda: port_counters(pump, 1)["to_null"]["packets"] == 200)
        assert port_counters(pump, 1)["to_null"]["bytes"] == 2 * sum(range(100, 200))


# ---- features and messages ----


@pytest.mark.shows("NET_SET_MTU", "VIRTIO_NET_F_MTU")
def test_mtu(paths: list[str]) -> None:
    features = USUAL | F(v.VIRTIO_NET_F_MTU)
    with (
        pumping(f"vhost:{paths[0]}", f"vhost:{paths[1]}") as pump,
        Guest(paths[0]) as near,
        Guest(paths[1], features) as far,
    ):
        far.frontend.request(Request.NET_SET_MTU, 600)
        far.post(2000, 4)
        near.send(bytes([1]) * 618)
        near.send(bytes([2]) * 619)
        near.send(bytes([3]) * 60)
        assert [far.receive()[1] for _ in range(2)] == [bytes([1]) * 618, bytes([3]) * 60]
        assert port_counters(pump, 1)["to_guest"]["dropped"] == {"mtu": 1}
        assert near.stop() and far.frontend.queue_num() == 8


@pytest.mark.shows("SEND_RARP", "VHOST_USER_PROTOCOL_F_RARP")
def test_rarp_comes_out_at_the_other_port(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]}", f"vhost:{paths[1]}"), Guest(paths[0]) as near, Guest(paths[1]) as far:
        far.post(2000, 4)
        near.post(2000, 4)
        mac = bytes.fromhex("52540012ab56")
        for _ in range(3):
            near.frontend.request(Request.SEND_RARP, int.from_bytes(mac, "little"))
            header, frame = far.receive()
            assert header == bytes(10) + b"\1\0"
            assert frame == (
                b"\xff" * 6
                + mac
                + b"\x80\x35"
                + struct.pack("!HHBBH", 1, 0x800, 6, 4, 3)
                + mac
                + bytes(4)
                + mac
                + bytes(4)
            ).ljust(60, b"\0")
        assert near.receiveqs[0].poll() == []


OFFLOADS = F(v.VIRTIO_NET_F_CSUM, v.VIRTIO_NET_F_HOST_TSO4)
GUEST_OFFLOADS = F(v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_GUEST_TSO4)


@pytest.mark.shows("VIRTIO_NET_F_GUEST_CSUM", "VIRTIO_NET_F_GUEST_TSO4", "VIRTIO_NET_F_HOST_TSO4")
@pytest.mark.parametrize("reset", [False, True])
def test_offloads_of_each_guest(paths: list[str], reset: bool) -> None:
    """One guest gets the packet as it was sent, the other one gets segments with complete checksums."""
    payload = bytes(i * 7 & 255 for i in range(4000))
    packet = bytes(
        Ether(dst="ff:ff:ff:ff:ff:ff", src="02:00:00:00:00:01")
        / IP(src="10.0.0.1", dst="10.0.0.2")
        / TCP(sport=1, dport=2, seq=1000, chksum=0)
        / payload
    )
    header = struct.pack("<BBHHHH", 1, 1, 54, 1000, 34, 16) + bytes(2)
    with (
        pumping(*(f"vhost:{path}" for path in paths[:3])),
        Guest(paths[0], USUAL | OFFLOADS) as sender,
        Guest(paths[1], USUAL | GUEST_OFFLOADS) as able,
        Guest(paths[2]) as unable,
    ):
        if reset:
            # RESET_DEVICE leaves the features negotiated; the rings are set up again.
            able.frontend.request(Request.RESET_DEVICE)
            able.receiveqs[0].reset()
            able.transmitqs[0].reset()
            able.frontend.set_features(able.features)
            able.start()
        able.post(9000, 8)
        unable.post(9000, 8)
        sender.send(packet, header)
        assert able.receive() == (header[:10] + b"\1\0", packet)
        total = b""
        for number in range(4):
            got, segment = unable.receive()
            assert got == bytes(10) + b"\1\0"
            parsed = Ether(segment)
            assert parsed[TCP].seq == 1000 + 1000 * number
            stated = parsed[IP].chksum, parsed[TCP].chksum
            del parsed[IP].chksum, parsed[TCP].chksum
            again = Ether(bytes(parsed))
            assert (again[IP].chksum, again[TCP].chksum) == stated
            total += segment[54:]
        assert total == packet[54:]
        assert able.receiveqs[0].poll() == unable.receiveqs[0].poll() == []


# ---- life ----


def test_reconnect_again_and_again(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]}") as pump:
        for number in range(1, 11):
            with Guest(paths[0]) as guest:
                traffic = Exchange(guest.streams(), 64, poll="sleep")
                traffic.run(packets=100)
                assert faults(traffic) == CLEAN
            wait_for(lambda: pump.ports[0].backend.state == "listening")
            assert port_counters(pump, 0)["connections"] == number
        assert port_counters(pump, 0)["from_guest"]["packets"] == 1000


def test_one_guest_dies_and_the_other_goes_on(paths: list[str]) -> None:
    with pumping(f"vhost:{paths[0]}", f"vhost:{paths[1]}") as pump, Guest(paths[0]) as near:
        for _ in range(3):
            with Guest(paths[1]) as far:
                far.post(64, 4)
                near.send(b"hello")
                assert far.receive()[1] == b"hello"
            wait_for(lambda: pump.ports[1].backend.state == "listening")
            near.transmitqs[0].poll()
            before = port_counters(pump, 1)["to_guest"]["dropped"].get("not_connected", 0)
            near.send(b"is anybody there")
            wait_for(near.transmitqs[0].poll)
            assert port_counters(pump, 1)["to_guest"]["dropped"]["not_connected"] == before + 1


def test_nothing_is_left_of_a_pump(paths: list[str]) -> None:
    gc.collect()
    maps, fds, threads = mapped(), open_fds(), threading.active_count()
    for _ in range(5):
        with pumping(
            f"vhost:{paths[0]},queues=2", f"vhost:{paths[1]},client", "gen:rate=1000", "null:", cpus=two_cpus()
        ):
            with Guest(paths[0], pairs=2):
                pass
            with Guest(paths[0], pairs=2), Guest(paths[1], listen=True):
                pass
        # At once, without waiting for the garbage collector: the context manager has released it.
        assert open_fds() == fds
    gc.collect()
    assert (mapped(), threading.active_count()) == (maps, threads)
    assert not os.path.exists(paths[0])


def test_stop_may_be_called_twice_and_without_a_start(paths: list[str]) -> None:
    fds = open_fds()
    pump = Pump([f"vhost:{paths[0]}"])
    pump.stop()
    pump.stop()
    with Pump(["gen:count=10", "null:"]) as pump:
        assert pump.run()["ports"]["null"]["to_null"]["packets"] == 10
        pump.stop()
        pump.request_stop()
    pump.stop()
    assert open_fds() == fds


def test_ports_that_were_opened_are_closed_when_a_later_one_cannot_be(paths: list[str]) -> None:
    fds = open_fds()
    Path(paths[1]).write_text("precious")
    with pytest.raises(ResourceError, match="not a socket"):
        Pump([f"vhost:{paths[0]}", f"vhost:{paths[1]}"])
    assert not os.path.exists(paths[0])
    assert open_fds() == fds


@pytest.mark.parametrize("ports", [["echo:"], ["gen:", "null:", "echo:"], ["vhost:/nowhere", "echo:", "echo:"], []])
def test_impossible_pumps(ports: list[str]) -> None:
    with pytest.raises(UsageError):
        Pump(ports)


def test_impossible_processors() -> None:
    with pytest.raises(UsageError, match="not among the processors"):
        Pump(["gen:", "null:"], cpus=[4711])


def test_a_thread_too_many_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun = threading.Thread.start, []

    def one_only(thread: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    before = open_fds()
    cpu = min(os.sched_getaffinity(0))
    pump = Pump(["gen:", "null:"], cpus=[cpu, cpu])
    monkeypatch.setattr(threading.Thread, "start", one_only)
    with pytest.raises(ResourceError, match=r"worker 1 gets no thread.*ulimit -u"):
        pump.start()
    assert not begun[0].is_alive()
    pump.stop()
    assert open_fds() == before


def test_duration_and_intervals() -> None:
    seen: list[dict[str, Any]] = []
    with Pump(["gen:rate=1000", "null:"]) as pump:
        start = time.monotonic()
        last = pump.run(duration=1.0, interval=0.1, on_interval=seen.append)
        elapsed = time.monotonic() - start
        assert elapsed >= 1.0
    assert 2 <= len(seen) <= 10
    counts = [snapshot["ports"]["null"]["to_null"]["packets"] for snapshot in [*seen, last]]
    assert counts == sorted(counts)
    assert counts[-1] <= 1000 * elapsed + 33


def test_a_broken_queue_is_logged_and_the_others_go_on(paths: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with pumping(f"vhost:{paths[0]},queues=2") as pump, Guest(paths[0], pairs=2) as guest:
        background = Background([guest.streams()[1]])
        guest.transmitqs[0].add([bytes(12) + b"bad"])
        guest.transmitqs[0].avail[2] = 999
        guest.transmitqs[0].kick()
        wait_for(lambda: port_counters(pump, 0)["queues"][1]["broken"])
        wait_for(lambda: "head outside queue_size" in caplog.text)
        background.goes_on()
        background.finish()
        assert [queue["broken"] for queue in port_counters(pump, 0)["queues"]] == [
            None,
            "head outside queue_size",
            None,
            None,
        ]
        guest.transmitqs[0].reset()
        guest.receiveqs[0].reset()
        guest.stop(0)
        guest.start(0)
        traffic = Exchange(guest.streams()[:1], 64, poll="sleep")
        traffic.run(packets=100)
        assert faults(traffic) == CLEAN
    assert caplog.text.count("head outside queue_size") == 1


@pytest.mark.parametrize("sub_burst", [1, 3, 32])
def test_any_sub_burst_moves_every_packet(paths: list[str], sub_burst: int) -> None:
    with Pump([f"vhost:{paths[0]},queues=1"], sub_burst=sub_burst) as pump:
        control = threading.Thread(target=pump.run)
        control.start()
        try:
            with open_exchange(paths[0], 64, 64, ()) as exchange:
                exchange.run(packets=2000)
                assert exchange.counters["verified"] == 2000
        finally:
            pump.request_stop()
            control.join()


@pytest.mark.shows("GET_QUEUE_NUM")
@pytest.mark.parametrize(("option", "answer"), [("", 3), (",queue-num=pairs", 3), (",queue-num=queues", 6)])
def test_number_of_queues_as_the_front_end_counts_them(paths: list[str], option: str, answer: int) -> None:
    with pumping(f"vhost:{paths[0]},queues=3{option}"), Guest(paths[0], running=0) as guest:
        assert guest.frontend.queue_num() == answer
