"""The TAP port against the real kernel: sockets of a namespace on one side, our endpoint on the other."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from cython_support import load
from netns import ip, mac_of, needs_root, own_network, receive_all
from vq import netlink
from vq_core.ports.tap import TapPort

pytestmark = needs_root

CSUM, TSO4, TSO6, ECN, UFO, USO4, USO6 = 1, 2, 4, 8, 16, 32, 64
ARM_PULL, ARM_PUSH = 1, 2
NEEDS_CSUM, GSO_TCPV4, GSO_UDP_L4 = 1, 1, 5
BURST_MAX, PACKET_MAX = 32, 65553
HOST, PEER, PEER_MAC = "10.77.0.1", "10.77.0.2", "02:00:00:00:00:02"
UDP_SEGMENT = 103
HEADER = struct.Struct(
    "<BBHHHHH"
)  # virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, buffers


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


def drive(port: TapPort, index: int = 0) -> Any:
    return load("port_driver").Driver(port, index)


def bring_up(port: TapPort, mtu: int = 1500, host: str = HOST, peer: str = PEER, peer_mac: str = PEER_MAC) -> str:
    """Address the host's side and tell it where its neighbour is; returns the host's MAC."""
    netlink.configure(port.ifname, mtu=mtu, up=True)
    ip(f"addr add {host}/24 dev {port.ifname}")
    ip(f"neigh add {peer} lladdr {peer_mac} dev {port.ifname}")
    return mac_of(port.ifname)


@pytest.fixture
def tap() -> Iterator[TapPort]:
    port = TapPort("tap", "vqt0")
    yield port
    port.close()


def host_udp(number: int = 5000) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((HOST, number))
    return sock


def udp_frame(host_mac: str, payload: bytes, sport: int = 9, dport: int = 5000) -> bytes:
    return bytes(Ether(dst=host_mac, src=PEER_MAC) / IP(src=PEER, dst=HOST) / UDP(sport=sport, dport=dport) / payload)


def fold(data: bytes) -> int:
    """One's complement sum of 16-bit words, not inverted: what NEEDS_CSUM expects over the pseudo header."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def partial_udp(host_mac: str, payload: bytes, gso_size: int = 0) -> tuple[bytes, bytes]:
    """A UDP frame whose checksum (and segmentation) is left to the receiver, with the header that says so."""
    frame = bytearray(udp_frame(host_mac, payload))
    pseudo = socket.inet_aton(PEER) + socket.inet_aton(HOST) + struct.pack("!BBH", 0, 17, 8 + len(payload))
    frame[40:42] = struct.pack("!H", fold(pseudo))
    return bytes(frame), HEADER.pack(NEEDS_CSUM, GSO_UDP_L4 if gso_size else 0, 42, gso_size, 34, 6, 0)


# ---- packets of the host ----


def test_host_packet_arrives_with_its_header(tap: TapPort) -> None:
    bring_up(tap)
    driver = drive(tap)
    with host_udp() as sock:
        sock.sendto(b"hello pump", (PEER, 7))
    [(payload, header, wants)] = driver.collect(1)
    frame = Ether(payload)
    assert (frame.dst, frame[IP].src, frame[UDP].dport, bytes(frame[UDP].payload)) == (PEER_MAC, HOST, 7, b"hello pump")
    flags, gso_type, _, _, start, offset, _ = HEADER.unpack(header)
    assert (flags, gso_type, start, offset, wants) == (NEEDS_CSUM, 0, 34, 6, CSUM)
    counted = tap.snapshot()["from_tap"]
    assert counted == {"packets": 1, "bytes": len(payload), "dropped": {}}


def test_ping_and_arp_of_the_host(tap: TapPort) -> None:
    mac = bring_up(tap)
    driver = drive(tap)
    request = Ether(dst="ff:ff:ff:ff:ff:ff", src=PEER_MAC) / ARP(op=1, hwsrc=PEER_MAC, psrc=PEER, pdst=HOST)
    echo = Ether(dst=mac, src=PEER_MAC) / IP(src=PEER, dst=HOST) / ICMP(id=77, seq=3) / Raw(b"x" * 1400)
    assert driver.push([bytes(request), bytes(echo)]) == 2
    first, second = (Ether(payload) for payload, _, _ in driver.collect(2))
    assert (first[ARP].op, first[ARP].hwsrc, first[ARP].psrc) == (2, mac, HOST)
    assert (second[ICMP].type, second[ICMP].id, second[ICMP].seq) == (0, 77, 3)
    assert bytes(second[ICMP].payload)[:1400] == b"x" * 1400
    assert tap.snapshot()["to_tap"] == {"packets": 2, "bytes": len(request) + len(echo), "dropped": {}}


def test_burst_is_bounded_and_in_order(tap: TapPort) -> None:
    bring_up(tap)
    driver = drive(tap)
    with host_udp() as sock:
        for i in range(100):
            sock.sendto(struct.pack("!I", i), (PEER, 7))
    assert len(driver.take(5)) == 5
    assert len(driver.take()) == BURST_MAX
    rest = driver.collect(63)
    assert [struct.unpack("!I", payload[42:46])[0] for payload, _, _ in rest] == list(range(37, 100))


def test_unreleased_packets_keep_their_bytes(tap: TapPort) -> None:
    """A second pull before the release takes other room, and none when there is none left."""
    bring_up(tap, mtu=60000)
    held, driver = drive(tap), drive(tap)
    with host_udp() as sock:
        for i in range(12):
            sock.sendto(bytes([i]) * 50000, (PEER, 7))
        first = held.pull(2)
        pulled = []
        for _ in range(20):
            pulled += driver.pull()
        assert 2 <= len(pulled) < 10  # 320 KiB of buffer
        assert [p[42] for p in held.again()] == [0, 1] == [p[0][42] for p in first]
        assert all(p == bytes(q[0]) for p, q in zip(held.again(), first, strict=True))
        held.release(1)
        assert driver.pull() == []
        driver.release()
        assert len(driver.collect(10 - len(pulled))) == 10 - len(pulled)


def tcp_stream(tap: TapPort, driver: Any, mac: str, mss: int, amount: int) -> list[tuple[bytes, bytes, int]]:
    """Answer a connection of the host by hand and let it send; the data packets as pulled."""
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.setblocking(False)
    client.bind((HOST, 4000))
    assert client.connect_ex((PEER, 80)) == errno.EINPROGRESS
    [(payload, _, _)] = driver.collect(1)
    syn = Ether(payload)[TCP]
    answer = Ether(dst=mac, src=PEER_MAC) / IP(src=PEER, dst=HOST)
    answer /= TCP(sport=80, dport=4000, flags="SA", seq=1000, ack=syn.seq + 1, window=65535, options=[("MSS", mss)])
    driver.push([bytes(answer)])
    driver.collect(1)
    assert client.send(b"d" * amount) == amount
    packets, end, seen = [], time.monotonic() + 60, 0
    while seen < amount:
        assert time.monotonic() < end
        for packet in driver.take():
            frame = Ether(packet[0])
            if seen == frame[TCP].seq - syn.seq - 1:
                packets.append(packet)
                seen += frame[IP].len - 20 - 4 * frame[TCP].dataofs
    client.close()
    return packets


def test_segmentation_is_left_to_the_guest(tap: TapPort) -> None:
    mac = bring_up(tap)
    packets = tcp_stream(tap, drive(tap), mac, 1400, 14000)
    large = max(packets, key=lambda packet: len(packet[0]))
    flags, gso_type, hdr_len, gso_size, start, offset, _ = HEADER.unpack(large[1])
    assert len(large[0]) > 4 * 1500
    assert (flags, gso_type, gso_size, start, offset) == (NEEDS_CSUM, GSO_TCPV4, 1400, 34, 16)
    assert hdr_len >= 54
    assert large[2] == CSUM | TSO4


def test_offloads_can_be_refused(tap: TapPort) -> None:
    mac = bring_up(tap)
    tap.set_offloads(0)
    assert tap.offloads == 0
    packets = tcp_stream(tap, drive(tap), mac, 1400, 14000)
    assert len(packets) == 10
    for payload, header, wants in packets:
        assert len(payload) <= 1514
        assert (header, wants) == (bytes(12), 0)
        frame = Ether(payload)
        given = frame[TCP].chksum
        del frame[TCP].chksum
        assert Ether(bytes(frame))[TCP].chksum == given
    with pytest.raises(OSError, match="TUNSETOFFLOAD") as caught:
        tap.set_offloads(TSO4)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "vqt0")


def test_offloads_of_the_constructor() -> None:
    port = TapPort("tap", "vqt1", offloads=CSUM)
    assert port.offloads == CSUM
    assert port.accepts & (CSUM | TSO4 | TSO6 | ECN) == CSUM | TSO4 | TSO6 | ECN
    assert drive(port).accepts == port.accepts
    assert drive(port).holds == 1
    port.close()


def test_host_segments_udp_for_us_only_if_asked(tap: TapPort) -> None:
    """UDP segmentation offload, where the kernel has it (6.2 and later)."""
    bring_up(tap)
    driver = drive(tap)
    with host_udp() as sock:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sock.sendto(b"u" * 5000, (PEER, 7))
        if tap.accepts & USO4:
            [(payload, header, wants)] = driver.collect(1)
            assert len(payload) == 5042
            assert HEADER.unpack(header)[1] == GSO_UDP_L4
            assert HEADER.unpack(header)[3] == 1000
            assert wants == CSUM | USO4 | USO6
            tap.set_offloads(tap.accepts & ~(USO4 | USO6))
            sock.sendto(b"u" * 5000, (PEER, 7))
        assert [len(payload) for payload, _, _ in driver.collect(5)] == [1042] * 5


# ---- packets to the host ----


def test_checksum_is_completed_by_the_host(tap: TapPort) -> None:
    mac = bring_up(tap)
    driver = drive(tap)
    frame, header = partial_udp(mac, b"partial")
    wrong = bytearray(udp_frame(mac, b"wrong!!"))
    wrong[40] ^= 0x55
    with host_udp() as sock:
        assert driver.push([bytes(wrong), (frame, header), udp_frame(mac, b"complete")]) == 3
        assert receive_all(sock, 2) == [b"partial", b"complete"]


def test_udp_segments_are_cut_by_the_host(tap: TapPort) -> None:
    if not tap.accepts & USO4:
        pytest.skip("this kernel has no USO (Linux 6.2); run on a newer one")
    mac = bring_up(tap)
    payload = b"".join(bytes([i]) * 1000 for i in range(5))
    with host_udp() as sock:
        assert drive(tap).push([partial_udp(mac, payload, gso_size=1000)]) == 1
        assert receive_all(sock, 5) == [bytes([i]) * 1000 for i in range(5)]


@pytest.mark.parametrize("pieces", [1, 2, 62, 63, 64, 1025])
def test_segments_are_joined_in_order(tap: TapPort, pieces: int) -> None:
    mac = bring_up(tap, mtu=9000)
    payload = os.urandom(6000)
    frame = udp_frame(mac, payload)
    cuts = [len(frame) * i // pieces for i in range(pieces + 1)]
    with host_udp() as sock:
        assert drive(tap).push([[frame[a:b] for a, b in itertools.pairwise(cuts)]]) == 1
        assert receive_all(sock, 1) == [payload]


def test_impossible_lengths_are_dropped_and_counted(tap: TapPort) -> None:
    mac = bring_up(tap)
    driver = drive(tap)
    with host_udp() as sock:
        assert driver.push([bytes(13), bytes(PACKET_MAX + 1), udp_frame(mac, b"good")]) == 3
        assert receive_all(sock, 1) == [b"good"]
    assert tap.snapshot()["to_tap"]["dropped"] == {"too_short": 1, "too_long": 1}
    assert tap.syscalls["push"] == 1


def test_packets_the_kernel_refuses_are_counted(tap: TapPort) -> None:
    """A header that this kernel cannot make sense of (an unknown gso_type) costs that packet only."""
    mac = bring_up(tap)
    driver = drive(tap)
    with host_udp() as sock:
        bad = (udp_frame(mac, b"bad"), HEADER.pack(NEEDS_CSUM, 0x7E, 42, 1000, 34, 6, 0))
        assert driver.push([bad, udp_frame(mac, b"good")]) == 2
        assert receive_all(sock, 1) == [b"good"]
    counted = tap.snapshot()["to_tap"]
    assert (counted["packets"], counted["dropped"]) == (1, {"io_error": 1})


def test_interface_that_is_down_drops(tap: TapPort) -> None:
    mac = bring_up(tap)
    driver = drive(tap)
    netlink.set_up(tap.ifname, False)
    assert driver.push([udp_frame(mac, b"lost")] * 3) == 3
    assert tap.snapshot()["to_tap"] == {"packets": 0, "bytes": 0, "dropped": {"io_error": 3}}
    assert tap.error is None
    netlink.set_up(tap.ifname)
    with host_udp() as sock:
        assert driver.push([udp_frame(mac, b"kept")]) == 1
        assert receive_all(sock, 1) == [b"kept"]


# ---- both ways: TCP of two real hosts over our patch ----


@pytest.mark.parametrize("offloads", [CSUM | TSO4, CSUM, 0])
def test_tcp_between_two_hosts(offloads: int) -> None:
    """Two TAPs in two namespaces joined by hand: segmentation passes from one stack to the other untouched."""
    data = os.urandom(4 << 20)
    port = TapPort("near", "near0", offloads=offloads)
    bring_up(port, peer_mac="02:00:00:00:00:22")
    ip(f"link set {port.ifname} address 02:00:00:00:00:11")
    listener = socket.create_server((HOST, 80))
    with own_network():
        other = TapPort("far", "far0", offloads=offloads)
        ip(f"link set {other.ifname} address 02:00:00:00:00:22")
        bring_up(other, host=PEER, peer=HOST, peer_mac="02:00:00:00:00:11")
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    stop = load("port_driver").Patch(port, other)
    patch = threading.Thread(target=stop.run)
    patch.start()
    try:
        client.settimeout(60)
        client.connect((HOST, 80))
        server, _ = listener.accept()
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        server.settimeout(60)
        got = b"".join(iter(lambda: server.recv(1 << 20), b""))
        sender.join()
    finally:
        stop.stop()
        patch.join()
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    counted = other.snapshot()["from_tap"]
    mean = counted["bytes"] / counted["packets"]
    assert mean > 2000 if offloads & TSO4 else mean < 1515
    assert port.snapshot()["to_tap"]["dropped"] == {}
    for each in (client, server, listener, port, other):
        each.close()


# ---- several queues ----


def test_each_queue_moves_packets_and_keeps_its_flows() -> None:
    port = TapPort("tap", "vqm0", queues=3)
    mac = bring_up(port)
    drivers = [drive(port, i) for i in range(3)]
    with host_udp() as sock:
        for index, driver in enumerate(drivers):
            assert driver.push([udp_frame(mac, bytes([index]), sport=100 + index)]) == 1
        assert sorted(receive_all(sock, 3)) == [b"\0", b"\1", b"\2"]
        # The kernel answers a flow on the queue on which it came.
        for index in range(3):
            sock.sendto(bytes([index]) * 20, (PEER, 100 + index))
    for index, driver in enumerate(drivers):
        [(payload, _, _)] = driver.collect(1)
        assert Ether(payload)[UDP].dport == 100 + index
        assert port.endpoint_snapshot(index)["from_tap"]["packets"] == 1
        assert port.endpoint_snapshot(index)["to_tap"]["packets"] == 1
    link = netlink.get_link("vqm0")
    assert link is not None
    assert (link.multi_queue, link.queues) == (True, 3)
    port.close()


def test_new_interface_vanishes_with_the_port() -> None:
    port = TapPort("tap", "vqn%d")
    assert port.ifname == "vqn0"
    assert not port.persistent
    assert not port.multi_queue
    assert netlink.exists("vqn0")
    port.close()
    assert not netlink.exists("vqn0")
    port.close()
    with pytest.raises(ValueError, match="closed"):
        port.set_carrier(True)


def test_pattern_names_all_queues_alike() -> None:
    port = TapPort("tap", "vqn%d", queues=4)
    link = netlink.get_link("vqn0")
    assert link is not None
    assert link.queues == 4
    assert not netlink.exists("vqn1")
    port.close()


@pytest.mark.parametrize(("made", "queues"), [("", 1), ("multi_queue", 1), ("multi_queue", 2)])
def test_premade_interface(made: str, queues: int) -> None:
    """Persistent, made without a vnet header by `ip tuntap`; it stays when we go."""
    ip(f"tuntap add vqp0 mode tap {made}")
    for _ in range(2):
        port = TapPort("tap", "vqp0", queues=queues)
        assert port.persistent
        assert port.multi_queue == bool(made)
        mac = bring_up(port)
        with host_udp() as sock:
            assert drive(port, queues - 1).push([partial_udp(mac, b"premade")]) == 1
            assert receive_all(sock, 1) == [b"premade"]
        port.close()
        ip("addr flush dev vqp0")
        ip("neigh flush dev vqp0 nud permanent")
    assert netlink.exists("vqp0")


# ---- what can go wrong at the start ----


def test_premade_without_multi_queue_has_one_queue_only() -> None:
    ip("tuntap add vqp0 mode tap")
    with pytest.raises(OSError, match="TUNSETIFF: Invalid argument") as caught:
        TapPort("tap", "vqp0", queues=2)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "vqp0")


def test_no_tap_at_all() -> None:
    with pytest.raises(OSError, match="TUNSETIFF") as caught:
        TapPort("tap", "lo")
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "lo")


def test_in_use_by_another() -> None:
    first = TapPort("tap", "vqt0")
    with pytest.raises(OSError, match="busy") as caught:
        TapPort("tap", "vqt0")
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, "vqt0")
    first.close()


def test_in_use_without_a_vnet_header() -> None:
    """The first program settles the framing of all queues; ours would be misread."""
    with open("/dev/net/tun", "r+b", buffering=0) as other:
        fcntl.ioctl(other, 0x400454CA, struct.pack("16sH22x", b"vqt0", 0x0002 | 0x1000 | 0x0100))
        with pytest.raises(OSError, match="without a vnet header") as caught:
            TapPort("tap", "vqt0", queues=2)
        assert caught.value.errno == errno.EBUSY


def test_failed_starts_leak_no_descriptors() -> None:
    ip("tuntap add vqp0 mode tap")
    before = len(os.listdir("/proc/self/fd"))
    for name, queues in (("vqp0", 2), ("lo", 1), ("lo", 3)):
        with pytest.raises(OSError, match="TUNSETIFF"):
            TapPort("tap", name, queues=queues)
    port = TapPort("tap", "vqt0", queues=4)
    with pytest.raises(OSError, match="TUNSETOFFLOAD"):
        port.set_offloads(TSO4)
    port.close()
    del port
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["", "a" * 16, "a b", "a/b", "a:b", ".", "..", "tap\n"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(ValueError, match="interface name"):
        TapPort("tap", name)


@pytest.mark.parametrize("queues", [0, -1, 257])
def test_impossible_queue_counts(queues: int) -> None:
    with pytest.raises(ValueError, match="1 to 256"):
        TapPort("tap", "vqt0", queues=queues)


ATTEMPT = """
import os, sys
from vq_core.ports.tap import TapPort
if sys.argv[2:]:
    os.setgroups([])
    os.setuid(int(sys.argv[2]))
try:
    print("opened", TapPort("tap", sys.argv[1]).ifname)
except OSError as error:
    print(error.errno, error.filename)
"""


def attempt(*words: str, before: str = "true") -> str:
    """What a process of its own says that tries to open a TAP, after a shell command in its own mount namespace."""
    command = ["unshare", "-m", "sh", "-c", before + ' && exec "$@"', "-", sys.executable, "-c", ATTEMPT, *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120, env=environment
    ).stdout.strip()


def test_without_privileges() -> None:
    assert attempt("vqt0", "65534") == f"{errno.EPERM} vqt0"
    ip("tuntap add vqp0 mode tap user 65534")
    assert attempt("vqp0", "65534") == "opened vqp0"
    assert attempt("vqp0", "65533") == f"{errno.EPERM} vqp0"


def test_without_the_device() -> None:
    assert attempt("vqt0", before="mount -t tmpfs none /dev/net") == f"{errno.ENOENT} /dev/net/tun"


# ---- waking, carrier, deletion ----


def test_wake_ups_are_never_lost(tap: TapPort) -> None:
    bring_up(tap)
    driver = drive(tap)
    with select.epoll() as poll, host_udp() as sock:
        driver.attach(poll.fileno())
        poll.poll(0)
        assert driver.take() == []
        assert driver.arm(ARM_PULL) == 0
        assert poll.poll(0) == []
        sock.sendto(b"one", (PEER, 7))
        assert len(poll.poll(60)) == 1
        assert poll.poll(0) == []  # an edge, once
        assert driver.arm(ARM_PULL) == 1  # but what waits is seen by whoever asks
        assert len(driver.take()) == 1
        assert driver.arm(ARM_PULL) == 0
        sock.sendto(b"two", (PEER, 7))
        assert len(poll.poll(60)) == 1
        assert len(driver.collect(1)) == 1
        assert driver.arm(ARM_PUSH) == 0  # no push was short of room
        driver.attach(-1)
        sock.sendto(b"three", (PEER, 7))
        assert poll.poll(0.05) == []


def test_idle_port_costs_few_system_calls(tap: TapPort) -> None:
    bring_up(tap)
    driver = drive(tap)
    for _ in range(800):
        driver.take()
    assert 1 <= tap.syscalls["pull"] <= 110
    with host_udp() as sock:
        sock.sendto(b"x", (PEER, 7))
    assert any(driver.take() for _ in range(8))  # and a packet is seen within eight rounds


def test_room(tap: TapPort) -> None:
    assert drive(tap).room() == BURST_MAX


def test_carrier_follows_the_guest(tap: TapPort) -> None:
    bring_up(tap)

    def carrier() -> bool:
        link = netlink.get_link(tap.ifname)
        assert link is not None
        return link.carrier

    def wait_for(state: bool) -> bool:
        end = time.monotonic() + 60
        while carrier() != state and time.monotonic() < end:
            time.sleep(0.01)
        return carrier() == state

    assert wait_for(True)
    tap.set_carrier(False)
    assert wait_for(False)
    assert "NO-CARRIER" in ip(f"link show {tap.ifname}")
    tap.set_carrier(True)
    assert wait_for(True)


def test_deleted_interface_ends_the_port_quietly(tap: TapPort) -> None:
    mac = bring_up(tap)
    driver = drive(tap)
    with select.epoll() as poll:
        driver.attach(poll.fileno())
        ip(f"link del {tap.ifname}")
        for _ in range(20):
            assert driver.take() == []
        assert driver.arm(ARM_PULL) == 0  # a worker may sleep: there will never be anything
        calls = tap.syscalls
        assert driver.push([udp_frame(mac, b"lost")] * 5) == 5
        for _ in range(20):
            assert driver.take() == []
        assert tap.syscalls == calls
    assert tap.snapshot()["to_tap"]["dropped"] == {"io_error": 5}
    assert tap.error is not None
    assert "vqt0 was deleted" in tap.error
    with pytest.raises(OSError, match="TUNSETCARRIER") as caught:
        tap.set_carrier(False)
    assert caught.value.errno == errno.EBADFD


def test_closed_port_is_inert(tap: TapPort) -> None:
    driver = drive(tap)
    tap.close()
    assert driver.take() == []
    assert driver.push([bytes(60)]) == 1
    assert driver.arm(ARM_PULL | ARM_PUSH) == 0
    assert tap.snapshot()["to_tap"]["dropped"] == {"io_error": 1}
    assert tap.error is None
