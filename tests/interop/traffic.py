"""What the tests send, and how they judge it."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from interop.host import Station
from interop.process import wait_until

BULK_MIB = 64
BULK_SECONDS = 180  # at most; 10 s is usual
MTU = 1500
FRAME_BYTES = MTU + 14  # what the interface counters call the length of a full packet
_ports = itertools.count(5001)


class Ping(NamedTuple):
    """Result of one ping."""

    sent: int
    received: int
    output: str

    @property
    def lost(self) -> int:
        return self.sent - self.received


def ping(source: Station, target: Station, *, count: int = 200, size: int = 56) -> Ping:
    """Send echo requests of ``size`` payload bytes, each when the one before was answered.

    By busybox, which waits a second at least for the last answer. The full-grown ping waits for two of the round trips
    that it has seen, and calls what comes later lost.
    """
    # A big one is up to 45 fragments; more of them at once than a ring has entries would be lost in a real switch too.
    output = source.run(f"busybox ping -q -A -c {count} -s {size} {target.address}", 20 + count).output
    match = re.search(r"(\d+) packets transmitted, (\d+) packets received", output)
    assert match, f"{source.name}: no result from ping:\n{output}"
    assert "DUP!" not in output and "duplicates" not in output, f"a packet came twice:\n{output}"
    return Ping(int(match[1]), int(match[2]), output)


def assert_ping(source: Station, target: Station, *, count: int = 200, size: int = 56) -> None:
    """Ping, with no loss allowed.

    One packet beforehand resolves the address, so that no queue of a neighbour entry has to hold the others.
    """
    await_path(source, target)
    result = ping(source, target, count=count, size=size)
    story = f"{result.lost} of {count} packets of {size} bytes lost:\n{result.output}"
    assert result.sent == count and not result.lost, story


def assert_whole(source: Station, target: Station, size: int) -> None:
    """Check that ``size`` payload bytes get through in one packet, which nobody may take to pieces."""
    source.check(f"/bin/ping -q -n -c 1 -W 5 -M do -s {size} {target.address}")


def await_path(source: Station, target: Station, timeout: float = 60) -> float:
    """Wait until packets get through; gives the seconds."""

    # The path is named, since busybox's shell takes its own ping otherwise.
    def one() -> bool:
        return source.run(f"/bin/ping -q -n -c 1 -W 1 {target.address}", 5).code == 0

    return wait_until(f"a path from {source.name} to {target.name}", one, timeout)


def bulk_data(station: Station, mib: int = BULK_MIB) -> tuple[str, str]:
    """Make random data on a station, once.

    Returns
    -------
    tuple of str
        The file's path there, and its SHA-256.
    """
    path = f"{station.scratch}/bulk{mib}"
    make = f"dd if=/dev/urandom of={path} bs=1048576 count={mib} 2>&1 && busybox sha256sum < {path} > {path}.sum"
    digest = station.check(f"{{ [ -s {path}.sum ] || {{ {make}; }} >&2; }} && cat {path}.sum", 120).splitlines()[-1]
    return path, digest.split()[0]


def send_bulk(source: Station, target: Station, *, mib: int = BULK_MIB, ipv6: bool = False) -> float:
    """Send random data by TCP, and compare its SHA-256 on both sides.

    Returns
    -------
    float
        Seconds from the first SYN to the last digest.
    """
    path, sent = bulk_data(source, mib)
    port = next(_ports)
    address = target.address6 if ipv6 else target.address
    result = f"{target.scratch}/received{port}"
    # Each side's standard input stays open or ends as its role asks: nc closes its half when that ends.
    digest = f"{{ busybox sha256sum > {result}.part; mv {result}.part {result}; }}"
    target.background(f"sleep {BULK_SECONDS} | busybox nc -l -p {port} | {digest}")
    wait_until(f"{target.name} listens", listening(target, port), 10)
    begin = time.monotonic()
    source.check(f"busybox nc {address} {port} < {path}", BULK_SECONDS)
    wait_until("the digest", lambda: target.run(f"[ -e {result} ]").code == 0, BULK_SECONDS)
    seconds = time.monotonic() - begin
    received = target.check(f"cat {result}").split()[0]
    assert received == sent, f"{mib} MiB from {source.name} to {target.name}: SHA-256 {sent} became {received}"
    return seconds


def stream(source: Station, target: Station, *, mib: int = 8) -> None:
    """Send by TCP in writes so long that segmentation has something to do, however fast they are taken away."""
    port = next(_ports)
    target.check(f"iperf3 -s -1 -D -p {port}")
    wait_until("iperf3", listening(target, port), 10)
    source.check(f"iperf3 -c {target.address} -p {port} -n {mib}M", BULK_SECONDS)


def listening(station: Station, port: int) -> Callable[[], bool]:
    """Give a test whether somebody listens on a TCP port of the station."""
    row = f":{port:04X} 0+:0000 0A"  # local port, no peer, TCP_LISTEN
    return lambda: station.run(f"grep -Eq '{row}' /proc/net/tcp /proc/net/tcp6").code == 0


class PacketSizes:
    """Mean bytes of a packet that a station sent and received between entering and leaving."""

    def __init__(self, station: Station) -> None:
        self.station = station
        self.sent = self.received = 0.0

    def __enter__(self) -> PacketSizes:
        self._before = self.station.counters()
        return self

    def __exit__(self, *_: object) -> None:
        after = self.station.counters()
        moved = {name: after[name] - self._before[name] for name in after}
        self.sent = moved["tx_bytes"] / max(moved["tx_packets"], 1)
        self.received = moved["rx_bytes"] / max(moved["rx_packets"], 1)
