"""The capture port: files that others read, files that others wrote, and files that are wrong."""

from __future__ import annotations

import errno
import os
import resource
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.utils import PcapReader, RawPcapNgWriter, rdpcap, wrpcap

from cython_support import load
from vq_core.ports.pcap import PcapPort

ARM_PULL, ARM_PUSH = 1, 2
BURST_MAX, PACKET_MAX, SNAPLEN_MAX, BUFFER = 32, 65553, 262144, 262144
MICRO, NANO = 0xA1B2C3D4, 0xA1B23C4D


class Record(NamedTuple):
    """One record of a capture file."""

    seconds: int
    fraction: int
    original: int
    data: bytes


def header(magic: int = NANO, order: str = "<", major: int = 2, network: int = 1) -> bytes:
    return struct.pack(order + "IHHiIII", magic, major, 4, 0, 0, 65535, network)


def record(data: bytes, at: float = 0.0, order: str = "<", unit: float = 1e-9, original: int | None = None) -> bytes:
    length = len(data) if original is None else original
    return struct.pack(order + "IIII", int(at), round((at % 1) / unit), len(data), length) + data


def parse(raw: bytes) -> list[Record]:
    """Read a file of ours by nothing but the format's description; every byte has to be accounted for."""
    assert raw[:4] == b"\x4d\x3c\xb2\xa1"
    assert struct.unpack("<HHiI", raw[4:16]) == (2, 4, 0, 0)
    assert struct.unpack("<I", raw[20:24]) == (1,)
    records, at = [], 24
    while at < len(raw):
        seconds, fraction, captured, original = struct.unpack_from("<IIII", raw, at)
        assert at + 16 + captured <= len(raw), "half a record"
        assert fraction < 10**9
        records.append(Record(seconds, fraction, original, raw[at + 16 : at + 16 + captured]))
        at += 16 + captured
    return records


def drive(port: PcapPort) -> Any:
    return load("port_driver").Driver(port)


def frames(count: int, size: int = 60) -> list[bytes]:
    return [struct.pack("!I", i).ljust(size, bytes([i & 0xFF])) for i in range(count)]


def play(port: PcapPort, limit: int = 100000) -> list[bytes]:
    """Everything that a replay gives until it says that it is through."""
    driver = drive(port)
    packets: list[bytes] = []
    while not port.finished:
        packets += [payload for payload, _, _ in driver.take()]
        assert len(packets) <= limit
    return packets


@contextmanager
def opened(*args: Any, **options: Any) -> Iterator[PcapPort]:
    port = PcapPort("cap", *args, **options)
    try:
        yield port
    finally:
        port.close()


# ---- writing ----


def test_written_file_is_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    sent = [bytes(Ether() / IP(dst="10.0.0.2") / UDP(sport=i + 1) / (b"x" * i * 17)) for i in range(80)]
    before = time.time()
    with opened(path, write=True) as port:
        driver = drive(port)
        assert driver.accepts == 0
        for i in range(0, 80, BURST_MAX):
            assert driver.push(sent[i : i + BURST_MAX]) == len(sent[i : i + BURST_MAX])
            driver.flush()
        port.close()
        assert port.snapshot() == {
            "to_pcap": {"packets": 80, "bytes": sum(map(len, sent)), "dropped": {}},
            "from_pcap": {"packets": 0, "bytes": 0, "dropped": {}},
        }
    after = time.time()
    records = parse(path.read_bytes())
    assert [r.data for r in records] == sent
    assert all(before - 0.001 <= r.seconds + r.fraction / 1e9 <= after for r in records)
    with PcapReader(str(path)) as reader:
        assert reader.nano
        packets = list(reader)
    assert [bytes(packet) for packet in packets] == sent
    assert [packet[UDP].sport for packet in packets] == list(range(1, 81))


def test_segments_and_snaplen(tmp_path: Path) -> None:
    data = os.urandom(3000)
    pieces = [data[i : i + 3] for i in range(0, 3000, 3)]
    with opened(tmp_path / "whole", write=True) as port:
        assert drive(port).push([pieces, [b"", data], [data, b""]]) == 3
    assert [r.data for r in parse((tmp_path / "whole").read_bytes())] == [data] * 3
    with opened(tmp_path / "cut", write=True, snaplen=100) as port:
        assert drive(port).push([pieces, data, data[:99], [data[:100], data[100:]]]) == 4
    raw = (tmp_path / "cut").read_bytes()
    assert struct.unpack_from("<I", raw, 16) == (100,)
    assert [(r.data, r.original) for r in parse(raw)] == [
        (data[:100], 3000),
        (data[:100], 3000),
        (data[:99], 99),
        (data[:100], 3000),
    ]
    assert port.snapshot()["to_pcap"]["bytes"] == 3000 * 3 + 99


def test_impossible_lengths_are_dropped(tmp_path: Path) -> None:
    with opened(tmp_path / "out", write=True) as port:
        assert drive(port).push([b"", bytes(PACKET_MAX + 1), bytes(PACKET_MAX)]) == 3
    assert [len(r.data) for r in parse((tmp_path / "out").read_bytes())] == [PACKET_MAX]
    assert port.snapshot()["to_pcap"]["dropped"] == {"too_short": 1, "too_long": 1}


def test_bursts_larger_than_the_buffer(tmp_path: Path) -> None:
    big = [bytes([i]) * 60000 for i in range(BURST_MAX)]
    with opened(tmp_path / "out", write=True) as port:
        for _ in range(3):
            assert drive(port).push(big) == BURST_MAX
    assert [r.data for r in parse((tmp_path / "out").read_bytes())] == big * 3


def test_written_when_half_full_or_after_100_ms(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path, write=True) as port, select.epoll() as poll:
        driver = drive(port)
        driver.attach(poll.fileno())
        assert path.stat().st_size == 24  # a reader finds the header at once
        start = time.monotonic()
        driver.push([b"a" * 60])
        driver.flush()
        assert path.stat().st_size == 24
        assert driver.arm(ARM_PULL) == 0
        assert len(poll.poll(60)) == 1  # the timer wakes a worker that sleeps
        assert 0.09 < time.monotonic() - start < 10
        driver.flush()
        assert len(parse(path.read_bytes())) == 1
        assert port.snapshot()["to_pcap"]["packets"] == 1
        assert poll.poll(0.15) == []  # and only while something waits
        for size in (60000, 60000):
            driver.push([bytes(size)])
            driver.flush()
            assert path.stat().st_size == 24 + 76
        driver.push([bytes(60000)])
        driver.flush()
        assert len(parse(path.read_bytes())) == 4
        driver.push([b"rest" * 20])
        driver.attach(-1)  # the worker lets go
        assert len(parse(path.read_bytes())) == 5


def test_written_port_gives_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "out", write=True) as port:
        driver = drive(port)
        assert (driver.take(), driver.arm(ARM_PULL), driver.room()) == ([], 0, BURST_MAX)
        assert (port.write, port.finished, port.sources, port.targets) == (True, True, [], [0])
    assert drive(port).push([bytes(60)] * 3) == 3  # after close: dropped, and said
    assert port.snapshot()["to_pcap"]["dropped"] == {"io_error": 3}


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size`: writes fall short at that byte, then fail with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [24, 30, 40, 24 + 76 * 3, 24 + 76 * 3 + 1, 24 + 76 * 3 + 20, 24 + 76 * 20 - 1])
def test_short_writes_leave_whole_records(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "out"
    sent = frames(20)
    port = PcapPort("cap", path, write=True)
    driver = drive(port)
    fit = (limit - 24) // 76
    with file_limit(limit):
        driver.push(sent)
        driver.attach(-1)
        assert [r.data for r in parse(path.read_bytes())] == sent[:fit]
        counted = port.snapshot()["to_pcap"]
        assert counted == {"packets": fit, "bytes": 60 * fit, "dropped": {"io_error": 20 - fit}}
        assert port.error == f"{path}: write refused: File too large; packets are lost"
    driver.push(sent[:5])  # there is room again
    port.close()
    assert [r.data for r in parse(path.read_bytes())] == sent[:fit] + sent[:5]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a small file system of its own; run: sudo make test")
def test_full_disk_and_room_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True, timeout=60)
    try:
        (disk / "filler").write_bytes(bytes(32768))
        sent = frames(BURST_MAX, 3000)
        port = PcapPort("cap", disk / "out", write=True)
        driver = drive(port)
        driver.push(sent)
        driver.attach(-1)
        kept = parse((disk / "out").read_bytes())
        assert 0 < len(kept) < BURST_MAX
        assert port.snapshot()["to_pcap"]["dropped"] == {"io_error": BURST_MAX - len(kept)}
        assert port.error is not None
        assert "No space left" in port.error
        assert "make room" in port.error
        (disk / "filler").unlink()
        driver.push(sent[:3])
        port.close()
        assert [r.data for r in parse((disk / "out").read_bytes())] == sent[: len(kept)] + sent[:3]
        with pytest.raises(OSError, match="No space left"):
            (disk / "filler").write_bytes(bytes(65536))
        with pytest.raises(OSError, match="No space left") as caught:
            PcapPort("cap", disk / "more", write=True)
        assert caught.value.filename == str(disk / "more")
    finally:
        subprocess.run(["umount", disk], check=True, timeout=60)


def test_pipe_holds_the_sender_and_loses_nothing(tmp_path: Path) -> None:
    """A FIFO whose reader is slow: push says that there is no room, and the stream stays whole."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match="No such device") as caught:
        PcapPort("cap", path, write=True)
    assert (caught.value.errno, caught.value.filename) == (errno.ENXIO, str(path))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sent = [os.urandom(5000) for _ in range(200)]
    with opened(path, write=True) as port, select.epoll() as poll:
        driver = drive(port)
        driver.attach(poll.fileno())
        done, stuck, got = 0, 0, b""
        while done < len(sent):
            room = driver.room()
            taken = driver.push(sent[done : done + BURST_MAX])
            done += taken
            driver.flush()
            if taken == 0:
                stuck += 1
                assert room == 0 or stuck == 1
                assert driver.arm(ARM_PUSH) == 0
                poll.poll(0)
                got += os.read(reader, 100000)
                assert poll.poll(0.05)  # room makes an edge; the timer of 100 ms is slower
                assert driver.arm(ARM_PUSH) == 1
        assert stuck > 2
        while len(got) < 24 + 5016 * 200:
            got += os.read(reader, 1 << 20)
            driver.arm(ARM_PUSH)
        assert [r.data for r in parse(got)] == sent
        assert port.snapshot()["to_pcap"] == {"packets": 200, "bytes": 1000000, "dropped": {}}
        os.close(reader)
        assert driver.push([bytes(60)] * 2) == 2
        driver.attach(-1)
        assert driver.push([bytes(60)] * 3) == 3
        assert port.snapshot()["to_pcap"]["dropped"] == {"io_error": 5}
        assert port.error is not None
        assert "Broken pipe" in port.error


def test_what_a_full_pipe_does_not_take_is_counted_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with opened(path, write=True) as port:
        assert drive(port).push([bytes(5000)] * BURST_MAX) == BURST_MAX
    os.close(reader)
    counted = port.snapshot()["to_pcap"]
    assert counted["packets"] > 0
    assert counted["packets"] + counted["dropped"]["io_error"] == BURST_MAX


# ---- replay ----


def test_scapys_file_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "in.pcap"
    packets = [Ether() / IP(dst="10.0.0.2") / UDP(sport=i + 1) / (b"y" * i * 13) for i in range(100)]
    wrpcap(str(path), packets)
    with opened(path) as port:
        driver = drive(port)
        assert driver.holds == 1
        assert (port.write, port.finished, port.sources, port.targets) == (False, False, [0], [])
        first = driver.take(5)
        assert [(h, w) for _, h, w in first] == [(bytes(12), 0)] * 5
        assert [payload for payload, _, _ in first] + play(port) == [bytes(packet) for packet in packets]
        assert port.error is None
        assert port.cut_packets == 0
        counted = port.snapshot()["from_pcap"]
        assert (counted["packets"], counted["bytes"]) == (100, sum(len(packet) for packet in packets))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "unit"), [(MICRO, 1e-6), (NANO, 1e-9)])
def test_byte_orders_and_units(tmp_path: Path, order: str, magic: int, unit: float) -> None:
    """All four forms; the time stamps are obeyed in each (20 ms at the pace of the capture)."""
    path = tmp_path / "in"
    sent = frames(3)
    path.write_bytes(
        header(magic, order) + b"".join(record(f, 1e9 + 0.01 * i, order, unit) for i, f in enumerate(sent))
    )
    start = time.monotonic()
    with opened(path, speed=1) as port:
        assert play(port) == sent
        assert 0.0199 < time.monotonic() - start < 10  # a wrong unit would make it 20 s at least, or nothing
    assert [bytes(packet) for packet in rdpcap(str(path))] == sent


def test_what_we_write_we_replay(tmp_path: Path) -> None:
    sent = [os.urandom(14 + 997 * i % 9000) for i in range(300)]
    with opened(tmp_path / "f", write=True) as port:
        driver = drive(port)
        for i in range(0, 300, 30):
            assert driver.push(sent[i : i + 30]) == 30
    with opened(tmp_path / "f") as port:
        assert play(port) == sent


def test_passes_and_the_end(tmp_path: Path) -> None:
    path = tmp_path / "in"
    sent = frames(5)
    path.write_bytes(header() + b"".join(map(record, sent)))
    with opened(path, loop=3) as port:
        assert play(port) == sent * 3
    with opened(path, loop=0) as port:
        driver = drive(port)
        assert [p for p, _, _ in driver.collect(1000)][:1000] == (sent * 200)[:1000]
        assert driver.arm(ARM_PULL) == 1
        assert not port.finished
    with opened(path) as port:  # through only when all was released
        driver = drive(port)
        assert len(driver.take(3)) == 3
        assert len(driver.pull()) == 2
        assert driver.arm(ARM_PULL) == 0
        assert not port.finished
        driver.release(1)
        assert not port.finished
        driver.release()
        assert port.finished


def test_pace_of_the_capture(tmp_path: Path) -> None:
    """A sleeping worker is woken when the next packet is due; twice as fast takes half the time."""
    path = tmp_path / "in"
    sent = frames(6)
    stamps = [100.0, 100.05, 100.05, 100.02, 100.1, 100.2]  # a clock that was set back is no reason to wait
    path.write_bytes(header() + b"".join(map(record, sent, stamps)))
    for speed in (1, 2):
        due = [stamp / speed for stamp in (0, 0.05, 0.05, 0.05, 0.1, 0.2)]
        soonest = [inf] * len(due)
        for _ in range(50):  # a busy machine makes packets late, but not each of them each time
            with opened(path, speed=speed) as port, select.epoll() as poll:
                driver = drive(port)
                driver.attach(poll.fileno())
                got, when = [], []
                start = time.monotonic()
                while not port.finished:
                    taken = driver.take()
                    got += [payload for payload, _, _ in taken]
                    when += [time.monotonic() - start] * len(taken)
                    if not port.finished and not driver.arm(ARM_PULL):
                        assert poll.poll(60)
                driver.attach(-1)
            assert got == sent
            assert all(at >= stamp - 0.001 for at, stamp in zip(when, due, strict=True))
            soonest = list(map(min, soonest, when))
            if all(at < stamp + 0.05 for at, stamp in zip(soonest, due, strict=True)):
                break
        else:
            pytest.fail(f"packets due at {due} came at {soonest}")


def test_paced_passes_begin_anew(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(header() + b"".join(map(record, frames(2), [5.0, 5.04])))
    start = time.monotonic()
    with opened(tmp_path / "in", speed=1, loop=3) as port:
        assert len(play(port)) == 6
    assert 0.119 < time.monotonic() - start < 10


def test_far_time_stamps_wait_and_do_not_overflow(tmp_path: Path) -> None:
    last = struct.pack("<IIII", 0xFFFFFFFF, 0xFFFFFFFF, 60, 60) + bytes(60)
    (tmp_path / "in").write_bytes(header(MICRO) + record(bytes(60)) + last)
    for speed in (1, 1e-9):
        with opened(tmp_path / "in", speed=speed) as port:
            driver = drive(port)
            assert len(driver.take()) == 1
            assert driver.take() == []
            assert driver.arm(ARM_PULL) == 0
            assert not port.finished


def test_frames_that_are_none_are_skipped(tmp_path: Path) -> None:
    good = frames(2)
    records = [b"", good[0], bytes(13), bytes(PACKET_MAX + 1), good[1], bytes(SNAPLEN_MAX)]
    (tmp_path / "in").write_bytes(header() + b"".join(map(record, records)))
    with opened(tmp_path / "in") as port:
        assert play(port) == good
        assert port.snapshot()["from_pcap"]["dropped"] == {"too_short": 2, "too_long": 2}
        assert port.error is None


def test_file_of_empty_records_does_not_hold_a_worker(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(header() + record(b"") * 100000 + record(bytes(60)))
    with opened(tmp_path / "in") as port:
        driver = drive(port)
        assert driver.take() == []
        assert port.snapshot()["from_pcap"]["dropped"]["too_short"] <= 256
        assert play(port) == [bytes(60)]


def test_cut_packets_are_replayed_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(header() + record(bytes(60), original=1500) + record(bytes(64)))
    with opened(tmp_path / "in") as port:
        assert play(port) == [bytes(60), bytes(64)]
        assert port.cut_packets == 1


def test_replayed_file_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(header() + record(bytes(60)))
    with opened(tmp_path / "in") as port:
        driver = drive(port)
        assert driver.push([bytes(60)] * 3) == 3
        driver.flush()
        assert driver.room() == BURST_MAX
        assert port.snapshot()["to_pcap"]["dropped"] == {"no_target": 3}
    assert (tmp_path / "in").stat().st_size == 100


# ---- damaged files ----


def expected(raw: bytes) -> list[bytes]:
    """The reference: frames up to the first damage (little-endian, nanoseconds)."""
    result, at = [], 24
    while at + 16 <= len(raw):
        captured, original = struct.unpack_from("<II", raw, at + 8)
        if captured > original or captured > SNAPLEN_MAX or captured > len(raw) - at - 16:
            break
        if 14 <= captured <= PACKET_MAX:
            result.append(raw[at + 16 : at + 16 + captured])
        at += 16 + captured
    return result


def test_file_cut_anywhere(tmp_path: Path) -> None:
    whole = header() + b"".join(map(record, frames(4, 40)))
    path = tmp_path / "in"
    for size in range(24, len(whole) + 1):
        path.write_bytes(whole[:size])
        with opened(path, loop=2) as port:
            assert play(port) == expected(whole[:size]) * (2 if size >= 80 else 1)
            number, rest = divmod(size - 24, 56)
            if size == 24:
                assert port.error == f"{path}: record 0 at byte 24: no packet in it can be replayed"
            elif rest == 0:
                assert port.error is None
            elif rest < 16:
                assert port.error == (
                    f"{path}: record {number} at byte {size - rest}: the file ends inside the record's header"
                )
            else:
                assert port.error is not None
                assert f"record {number} at byte {size - rest}: the file ends inside the record" in port.error


@pytest.mark.parametrize(("captured", "original"), [(61, 60), (0xFFFFFFFF, 0xFFFFFFFF), (SNAPLEN_MAX + 1, 1 << 20)])
def test_impossible_record_ends_the_replay(tmp_path: Path, captured: int, original: int) -> None:
    bad = struct.pack("<IIII", 0, 0, captured, original) + bytes(SNAPLEN_MAX + 100)
    (tmp_path / "in").write_bytes(header() + record(bytes(60)) + bad)
    with opened(tmp_path / "in") as port:
        assert play(port) == [bytes(60)]
        assert port.error is not None
        assert f"record 1 at byte 100: captured length {captured} is impossible" in port.error


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbage_is_never_followed(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes behind a good header, and any damage to a good file: what the reference reads, and not a byte more."""
    good = b"".join(map(record, frames(data.draw(st.integers(0, 6)), data.draw(st.integers(14, 80)))))
    body = bytearray(good if data.draw(st.booleans()) else data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 4))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    raw = header() + bytes(body)
    (tmp_path / "in").write_bytes(raw)
    with opened(tmp_path / "in") as port:
        assert play(port) == expected(raw)


SHRINK = """
import sys
sys.path[:0] = sys.argv[2:]
from port_driver import Driver
from vq_core.ports.pcap import PcapPort
port = PcapPort("cap", sys.argv[1], loop=0)
driver = Driver(port)
borrowed = driver.pull(8)
open(sys.argv[1], "r+b").truncate(100)
driver.again()
driver.release()
rounds = 0
while not port.finished:
    driver.take()
    rounds += 1
    assert rounds < 1000000
print(driver.arm(1), port.error)
port.close()
"""


def test_file_that_shrinks_under_the_replay(tmp_path: Path) -> None:
    """In a process of its own: without the guard the kernel kills it by SIGBUS."""
    path = tmp_path / "in"
    path.write_bytes(header() + b"".join(map(record, frames(1000, 1500))))
    command = [sys.executable, "-c", SHRINK, str(path), str(Path(load("port_driver").__file__).parent), *sys.path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("0 ")
    assert "the file was truncated while it was replayed" in result.stdout


# ---- what can go wrong at the start ----


def pcapng(path: Path) -> None:
    with RawPcapNgWriter(str(path)) as writer:
        writer.write(bytes(60))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes; a pcap file has a header of 24"),
        (header()[:23], "23 bytes; a pcap file has a header of 24"),
        (b"#!/bin/sh\necho hello, this is a script", "not a pcap file: it begins with 23 21 2f 62"),
        (b"\x1f\x8b" + bytes(60), "compressed by gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(60), "compressed by zstd"),
        (header(0xA1B2CD34), "modified form"),
        (header(0xA1B2CD34, ">"), "modified form"),
        (header(major=3), "pcap version 3.4; only 2 is known"),
        (header(network=113), "link type 113; a pump moves Ethernet frames"),
        (header(order=">", network=101), "link type 101"),
        (header(network=1 | 0x24000000), "check sequences"),
    ],
)
def test_what_is_no_capture_of_frames(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PcapPort("cap", tmp_path / "in")


def test_pcapng_says_how_to_convert(tmp_path: Path) -> None:
    pcapng(tmp_path / "in.pcapng")
    with pytest.raises(ValueError, match=r"a pcapng file; convert it: tcpdump -r .*in\.pcapng -w NEW\.pcap"):
        PcapPort("cap", tmp_path / "in.pcapng")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        PcapPort("cap", tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        PcapPort("cap", tmp_path / "missing" / "out", write=True)
    with pytest.raises(IsADirectoryError):
        PcapPort("cap", tmp_path, write=True)
    with pytest.raises(ValueError, match="not a regular file"):
        PcapPort("cap", tmp_path)
    with pytest.raises(ValueError, match="not a regular file"):
        PcapPort("cap", "/dev/zero")
    with pytest.raises(OSError, match="No space left") as caught:
        PcapPort("cap", "/dev/full", write=True)
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"write": True, "snaplen": 13}, "14 to 262144"),
        ({"write": True, "snaplen": SNAPLEN_MAX + 1}, "14 to 262144"),
        ({"write": True, "speed": 1}, "for a replay"),
        ({"write": True, "loop": 2}, "for a replay"),
        ({"snaplen": 100}, "goes with write"),
        ({"speed": -1}, "speed"),
        ({"speed": float("nan")}, "speed"),
        ({"speed": float("inf")}, "speed"),
        ({"loop": -1}, "loop"),
        ({"loop": 1 << 32}, "loop"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(header() + record(bytes(60)))
    with pytest.raises(ValueError, match=message):
        PcapPort("cap", path, **options)
    assert path.stat().st_size == 100  # an argument that is refused empties no file


def test_nothing_leaks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(header() + record(bytes(60)))
    (tmp_path / "bad").write_bytes(b"x" * 100)

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    wrong: list[Callable[[], PcapPort]] = [
        lambda: PcapPort("cap", tmp_path / "bad"),
        lambda: PcapPort("cap", "/dev/full", write=True),
        lambda: PcapPort("cap", path, snaplen=3),
    ]
    before = len(os.listdir("/proc/self/fd"))
    for make in wrong:
        with pytest.raises((ValueError, OSError)):
            make()
    for closed in (True, False):
        ports = [PcapPort("cap", path), PcapPort("cap", tmp_path / "out", write=True)]
        assert mappings() == 1
        drive(ports[1]).push([bytes(60)])
        if closed:
            for port in ports * 2:
                port.close()
            assert drive(ports[0]).take() == []
            assert drive(ports[0]).arm(ARM_PULL) == 0
        del ports
        if closed:
            del port
        assert len(parse((tmp_path / "out").read_bytes())) == 1
        assert mappings() == 0
        assert len(os.listdir("/proc/self/fd")) == before
