"""Lines 6, 7, 13 to 20, 23, 36, 39, 40: what the messages of a front-end may not say, and what is not served."""

from __future__ import annotations

import os
import random
import socket
import struct
from typing import Any

import pytest

from hostile.conftest import Connect
from hostile.guest import A_USER, CALL, ERR, KICK, PLAIN, PROTOCOL, A, B, Guest, region_rows
from hostile.process import Host, Neighbour, wait_until
from vhost_rig import Peer
from vq import virtio as v
from vq.errors import FrontendError, VqError
from vq.message import FRONTEND_REQUESTS, NEED_REPLY, VERSION, Request
from vq.payload import Config, Inflight, Iotlb, Log, Transfer, VringAddr, VringState
from vq.session import SERVED_PROTOCOL_FEATURES, TRANSITIONS

R = Request
RINGS = 4  # the host offers two queue pairs


# -- line 6: ring indices --


@pytest.mark.checklist(6)
@pytest.mark.parametrize("index", [RINGS, 255, 256, 65535, 65536, 65537, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_ring_index(connect: Connect, index: int) -> None:
    """Line 6 (CVE-2020-10723): an index is compared whole, not after it was cut to 8 or 16 bits."""
    guest = connect()
    assert guest.say(R.SET_VRING_NUM, VringState(index, 16)) == "refused"
    assert guest.say(R.SET_VRING_BASE, VringState(index, 0)) == "refused"
    assert guest.say(R.SET_VRING_ENABLE, VringState(index, 0)) == "refused"
    assert guest.say(R.SET_VRING_ADDR, VringAddr(index, 0, A_USER, A_USER, A_USER, 0)) == "refused"
    guest.exchange(b"the rings that exist" * 4)
    assert guest.say(R.GET_VRING_BASE, VringState(index, 0)) == "closed"


@pytest.mark.checklist(6)
@pytest.mark.parametrize("index", [RINGS, 5, 255])
@pytest.mark.parametrize("request_id", [KICK, CALL, ERR])
def test_ring_index_of_the_fd_messages(guest: Guest, request_id: Request, index: int) -> None:
    """Line 6: the eight bits of an fd message; its fd is closed."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        assert guest.ring_word(request_id, index, fd) == "refused"
        assert guest.say(request_id, struct.pack("=Q", index | 1 << 8)) == "refused"
    finally:
        os.close(fd)
    guest.exchange(b"the rings that exist" * 4)


@pytest.mark.checklist(6)
def test_bits_above_the_index_are_ignored(guest: Guest) -> None:
    """Line 6: bits 9 and up of an fd word mean nothing."""
    assert guest.ring_word(CALL, 1 | 0xFFFF_FFFF_FFFF_FE00, guest.transmitq.call_fd) == "done"
    guest.exchange(b"still ring 1" * 6)


@pytest.mark.checklist(6)
@pytest.mark.parametrize("index", range(RINGS))
def test_base_of_a_ring_that_never_was(mute: Guest, index: int) -> None:
    """Line 6: GET_VRING_BASE on an unconfigured ring answers the base that was set, 0 at first."""
    assert mute.frontend.get_vring_base(index) == 0
    assert mute.say(R.SET_VRING_BASE, VringState(index, 77)) == "done"
    assert mute.frontend.get_vring_base(index) == 77


# -- line 7: number of entries --


@pytest.mark.checklist(7)
@pytest.mark.parametrize("num", [0, 3, 5, 17, 32767, 32769, 65535, 65536, 65537, 1 << 17, 0x80000000, 0xFFFFFFFF])
def test_number_of_entries(mute: Guest, num: int) -> None:
    """Line 7 (CVE-2017-17381): no zero, no cut to 16 bits, powers of two only."""
    assert mute.say(R.SET_VRING_NUM, VringState(1, num)) == "refused"
    mute.start(0)
    mute.start(1)
    mute.exchange(b"the number of before" * 4)


@pytest.mark.checklist(7)
@pytest.mark.parametrize("num", [1, 2, 32768])
def test_smallest_and_largest_ring(connect: Connect, num: int) -> None:
    """Line 7: the limits themselves are legal."""
    guest = connect(running=False, num=num)
    guest.start(0)
    guest.start(1)
    guest.receiveq.add(writable=[12 + 60])
    guest.receiveq.kick()
    guest.transmitq.add([bytes(12) + b"x" * 60])
    guest.transmitq.kick()
    wait_until("the packet comes back", lambda: guest.receiveq.wait(0.2))
    ((token, length),) = guest.receiveq.poll()
    assert token.written(length)[12:] == b"x" * 60


@pytest.mark.checklist(7, 17)
def test_a_started_ring_keeps_number_base_and_addresses(guest: Guest) -> None:
    """Lines 7, 17: what would move a running ring is refused."""
    desc, avail, used = guest.transmitq.addresses
    assert guest.say(R.SET_VRING_NUM, VringState(1, 8)) == "refused"
    assert guest.say(R.SET_VRING_BASE, VringState(1, 5)) == "refused"
    for wrong in ((desc + 16, used, avail), (desc, used + 4, avail), (desc, used, avail + 2)):
        assert guest.say(R.SET_VRING_ADDR, VringAddr(1, 0, *wrong, 0)) == "refused"
    assert guest.say(R.SET_VRING_ADDR, VringAddr(1, 0, desc, used, avail, 0)) == "done"
    guest.exchange(b"where it was" * 6)


@pytest.mark.checklist(7, 46)
def test_ten_thousand_changes_leak_nothing(host: Host, mute: Guest) -> None:
    """Line 7 (CVE-2019-14818): SET_VRING_NUM again and again."""

    def send(rounds: int) -> None:
        for number in range(rounds):
            mute.frontend.send(R.SET_VRING_NUM, struct.pack("=II", number % RINGS, 1 << number % 16))
        assert mute.frontend.request(R.GET_FEATURES)

    send(1000)
    before = host.private_kilobytes()
    send(10000)
    assert host.private_kilobytes() - before < 512


# -- line 15: configuration space --


@pytest.mark.checklist(15)
def test_configuration_space_is_not_offered(connect: Connect) -> None:
    """Line 15: without CONFIG its messages are refused, and where there is no way to say so, the connection ends."""
    guest = connect()
    assert not v.has(guest.frontend.offered_protocol_features, v.VHOST_USER_PROTOCOL_F_CONFIG)
    assert guest.say(R.SET_CONFIG, Config(0, 0, bytes(4))) == "refused"
    assert guest.say(R.GET_CONFIG, Config(0, 0, bytes(4))) == "closed"


CONFIG_SIZE = 28  # of the session in vhost_rig


@pytest.fixture
def peer() -> Any:
    """A session that offers CONFIG, as other devices will, and whose space holds 1, 2, 3, ..."""
    peer = Peer()
    peer.negotiate()
    yield peer
    peer.close()


@pytest.mark.checklist(15)
@pytest.mark.parametrize(
    ("offset", "size"),
    [(CONFIG_SIZE, 1), (0, 257), (0xFFFFFFFF, 1), (0xFFFFFFF0, 32), (0, 0), (250, 10), (20, 4000)],
)
def test_configuration_read_out_of_range(peer: Peer, offset: int, size: int) -> None:
    """Line 15: offset and size that leave the space, also by overflow, are answered with nothing."""
    assert peer.say(R.GET_CONFIG, Config(offset, 0, bytes(size))) is None


@pytest.mark.checklist(15)
def test_configuration_read_discloses_nothing(peer: Peer) -> None:
    """Line 15 (CVE-2021-3544): what lies behind the space reads as zeroes, not as what stood in the request."""
    reply = peer.say(R.GET_CONFIG, Config(20, 0, b"\xee" * 200))
    assert reply.data == bytes(range(21, 29)) + bytes(192)


@pytest.mark.checklist(15)
@pytest.mark.parametrize(("offset", "size"), [(CONFIG_SIZE, 1), (27, 2), (0, 29), (0xFFFFFFFF, 2), (0, 0), (4, 4000)])
def test_configuration_write_out_of_range(peer: Peer, offset: int, size: int) -> None:
    """Line 15: nothing is written beyond the space, and the space never grows."""
    before = bytes(peer.plane.config)
    assert peer.acked(R.SET_CONFIG, Config(offset, 0, b"\xee" * size)) == 1
    assert bytes(peer.plane.config) == before


@pytest.mark.checklist(15)
@pytest.mark.parametrize("size", [0, 3, 5, 0xFFFFFFFF])
def test_configuration_size_inside_the_payload(mute: Guest, size: int) -> None:
    """Line 15: the size inside must agree with the size outside."""
    assert mute.say(R.SET_CONFIG, struct.pack("=III", 0, size, 0) + bytes(4)) == "closed"


# -- lines 13, 14, 16, 19, 20, 36, 39, 40: what is not built --

INFLIGHT = Inflight(4096, 0, 1, 16)
NOT_SERVED = [
    pytest.param(R.SET_INFLIGHT_FD, INFLIGHT, 1, marks=pytest.mark.checklist(13)),
    pytest.param(
        R.SET_INFLIGHT_FD,
        Inflight(0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 65535, 65535),
        1,
        marks=pytest.mark.checklist(13),
    ),
    pytest.param(R.IOTLB_MSG, Iotlb(0, 0, 0, 255, 255), 0, marks=pytest.mark.checklist(16)),
    pytest.param(R.IOTLB_MSG, Iotlb(1 << 63, 1 << 63, A_USER, 3, 2), 0, marks=pytest.mark.checklist(16)),
    pytest.param(R.SET_BACKEND_REQ_FD, None, 1, marks=pytest.mark.checklist(19)),
    pytest.param(R.SET_VRING_ENDIAN, VringState(0, 1), 0, marks=pytest.mark.checklist(17)),
    pytest.param(R.CLOSE_CRYPTO_SESSION, 0, 0, marks=pytest.mark.checklist(17)),
    pytest.param(R.GPU_SET_SOCKET, None, 1, marks=pytest.mark.checklist(17)),
    pytest.param(R.VRING_KICK, VringState(0, 0), 0, marks=pytest.mark.checklist(17)),
]
NOT_ANSWERED = [
    pytest.param(R.GET_INFLIGHT_FD, Inflight(0, 0, 65535, 65535), 0, marks=pytest.mark.checklist(14)),
    pytest.param(R.SET_DEVICE_STATE_FD, Transfer(0, 0), 1, marks=pytest.mark.checklist(20)),
    pytest.param(R.CHECK_DEVICE_STATE, None, 0, marks=pytest.mark.checklist(20)),
    pytest.param(R.POSTCOPY_ADVISE, None, 0, marks=pytest.mark.checklist(17)),
    pytest.param(R.POSTCOPY_LISTEN, None, 0, marks=pytest.mark.checklist(17)),
    pytest.param(R.POSTCOPY_END, None, 0, marks=pytest.mark.checklist(17)),
    pytest.param(R.CREATE_CRYPTO_SESSION, bytes(64), 0, marks=pytest.mark.checklist(17)),
    pytest.param(R.GET_SHARED_OBJECT, bytes(16), 0, marks=pytest.mark.checklist(17)),
    pytest.param(R.GET_SHMEM_CONFIG, None, 0, marks=pytest.mark.checklist(17)),
    pytest.param(R.GET_VRING_BASE_SKIP_DRAIN, VringState(0, 0), 0, marks=pytest.mark.checklist(17)),
]


def say_with_fds(guest: Guest, request_id: Request, payload: Any, count: int) -> str:
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(count)]
    try:
        return guest.say(request_id, FRONTEND_REQUESTS[request_id].payload.encode(payload), fds)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.shows("SET_VRING_ENDIAN", "CLOSE_CRYPTO_SESSION", "SET_INFLIGHT_FD", "IOTLB_MSG", "GPU_SET_SOCKET")
@pytest.mark.parametrize(("request_id", "payload", "fds"), NOT_SERVED)
def test_what_is_not_negotiated_is_refused(guest: Guest, request_id: Request, payload: Any, fds: int) -> None:
    """Lines 13, 16, 17, 19: nacked, its fds closed, and everything goes on."""
    assert say_with_fds(guest, request_id, payload, fds) == "refused"
    guest.exchange(b"as if nothing had been said" * 3)


@pytest.mark.shows(
    "CREATE_CRYPTO_SESSION", "POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END", "GET_INFLIGHT_FD",
    "GET_SHARED_OBJECT", "SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE", "GET_SHMEM_CONFIG",
    "GET_VRING_BASE_SKIP_DRAIN",
)  # fmt: skip
@pytest.mark.parametrize(("request_id", "payload", "fds"), NOT_ANSWERED)
def test_what_is_not_negotiated_and_has_its_own_answer_closes(
    guest: Guest, request_id: Request, payload: Any, fds: int
) -> None:
    """Lines 14, 17, 20: a reply that could say no does not exist, so the connection ends."""
    assert say_with_fds(guest, request_id, payload, fds) == "closed"


@pytest.mark.checklist(14, 46)
def test_a_hundred_inflight_requests_allocate_nothing(host: Host, connect: Connect) -> None:
    """Line 14 (CVE-2020-10726): huge counts, again and again; no memory, no fd."""
    before = host.private_kilobytes()
    for _ in range(100):
        guest = connect(running=False)
        assert guest.say(R.GET_INFLIGHT_FD, Inflight(0, 0, 65535, 65535)) == "closed"
        guest.close()
    assert host.private_kilobytes() - before < 1024


@pytest.mark.checklist(39, 40)
def test_only_what_is_built_is_offered(mute: Guest) -> None:
    """Lines 39, 40: a control queue cannot be negotiated, so no hostile one can be walked."""
    absent = (v.VIRTIO_NET_F_CTRL_VQ, v.VIRTIO_F_ORDER_PLATFORM, v.VIRTIO_F_NOTIFICATION_DATA)
    offered = mute.frontend.offered_features
    assert not offered & v.mask(*absent)
    for bit in absent:
        assert mute.say(R.SET_FEATURES, offered | v.mask(bit)) == "refused"
    mute.start(0)
    mute.start(1)
    mute.exchange(b"a split ring" * 6)


@pytest.mark.checklist(19)
def test_back_end_channel(peer: Peer) -> None:
    """Line 19: what is no socket is no channel; each new one closes the one before; nothing waits for its peer."""
    for fd in (os.eventfd(0), os.open("/dev/null", os.O_RDWR)):
        assert peer.acked(R.SET_BACKEND_REQ_FD, None, [fd]) == 1
        os.close(fd)
    assert peer.session.backend_channel_fd is None
    ends = []
    for _ in range(50):
        ours, theirs = socket.socketpair()
        assert peer.acked(R.SET_BACKEND_REQ_FD, None, [theirs.fileno()]) == 0
        theirs.close()
        ends.append(ours)
    for ours in ends[:-1]:
        assert ours.recv(1) == b"", "the channel of before is still open"
    for ours in ends:
        ours.close()


# -- line 17: every message in every state --


@pytest.mark.checklist(17, 24)
@pytest.mark.parametrize("missing", ["number", "addresses", "memory"])
def test_kick_before_the_ring_stands(connect: Connect, missing: str) -> None:
    """Lines 17, 24: a ring that lacks a part stays stopped, is nacked, and its err fd tells."""
    guest = connect(running=False)
    if missing == "memory":
        for region in region_rows(guest.memory)[0]:
            guest.frontend.remove_region(region)
    desc, avail, used = guest.transmitq.addresses
    guest.ring_word(ERR, 1, guest.err_fds[1])
    if missing != "number":
        assert guest.say(R.SET_VRING_NUM, VringState(1, 16)) == "done"
    if missing != "addresses":
        assert guest.say(R.SET_VRING_ADDR, VringAddr(1, 0, desc, used, avail, 0)) == "done"
    assert guest.say(R.SET_VRING_ENABLE, VringState(1, 1)) == "done"
    assert guest.ring_word(KICK, 1, guest.transmitq.kick_fd) == "refused"
    assert guest.errors(1) == 1
    assert not guest.host.queue("transmitq0").get("started")
    if missing == "memory":
        regions, fds = region_rows(guest.memory)
        guest.frontend.set_mem_table(regions, fds)
    guest.start(0)
    guest.start(1)
    guest.exchange(b"now it stands" * 6)


@pytest.mark.checklist(17, 18)
def test_features_of_a_running_device(guest: Guest) -> None:
    """Lines 17, 18: while a ring runs nothing but LOG_ALL changes; the same set again is legal."""
    features = guest.frontend.features
    for bit in (v.VIRTIO_F_VERSION_1, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_NET_F_MRG_RXBUF, v.VHOST_USER_F_PROTOCOL_FEATURES):
        assert guest.say(R.SET_FEATURES, features ^ v.mask(bit)) == "refused"
    assert guest.say(R.SET_FEATURES, features) == "done"
    assert guest.say(R.SET_FEATURES, features | v.mask(v.VHOST_F_LOG_ALL)) == "done"
    guest.exchange(b"the header has twelve bytes still" * 2)


@pytest.mark.checklist(17, 45)
def test_reset_in_the_middle_of_packets(guest: Guest) -> None:
    """Lines 17, 45: RESET_DEVICE with buffers under way stops both rings; nothing is touched afterwards."""
    for _ in range(8):
        guest.receiveq.add(writable=[256])
        guest.transmitq.add([bytes(12 + 64)])
    guest.receiveq.kick()
    guest.transmitq.kick()
    assert guest.say(R.RESET_DEVICE) == "done"
    image = bytes(guest.bytes_at(A, 0x10000))
    states = [guest.host.queue(guest.name(index)) for index in (0, 1)]
    assert not any(state["started"] or state["enabled"] for state in states)
    guest.kick(1)
    guest.frontend.barrier()
    assert bytes(guest.bytes_at(A, 0x10000)) == image
    for index in (0, 1):
        guest.queues[index].reset()
        guest.start(index)
    guest.exchange(b"after the reset" * 6)


def random_message(dice: random.Random, guest: Guest, memory_fd: int) -> tuple[int, bytes, list[int]]:
    """Any message that is served, with values that are right half of the time."""
    request_id = dice.choice([*TRANSITIONS, dice.randrange(0, 60)])
    rule = FRONTEND_REQUESTS.get(request_id)
    ring = dice.choice([0, 1, 1, 2, 3, 4, 255])
    number = dice.choice([0, 1, 2, 16, 16, 16, 68, 1500, 65536, dice.getrandbits(32)])
    desc, avail, used = guest.queues[ring & 1].addresses
    regions, fds = region_rows(guest.memory)
    event = guest.queues[ring & 1].kick_fd
    rows: dict[int, tuple[Any, list[int]]] = {
        R.SET_FEATURES: (guest.frontend.features ^ dice.choice([0, 0, 1 << 26, 1 << 29, 1 << 15, 1 << 34]), []),
        R.SET_PROTOCOL_FEATURES: (dice.choice([PROTOCOL, PROTOCOL, dice.getrandbits(24)]), []),
        R.SET_MEM_TABLE: dice.choice(
            [(regions, fds), (regions[:2], fds[:2]), (regions[1:], fds[1:]), (regions, fds[:2])]
        ),
        R.ADD_MEM_REG: (dice.choice(regions), [dice.choice(fds)]),
        R.REM_MEM_REG: (dice.choice(regions), []),
        R.SET_VRING_ADDR: (
            VringAddr(
                ring,
                dice.getrandbits(1),
                desc + dice.choice([0, 0, 8, 1 << 30]),
                used,
                avail,
                dice.choice([B, dice.getrandbits(64)]),
            ),
            [],
        ),
        R.SET_LOG_BASE: (
            Log(dice.choice([4096, 1 << 18, 0, dice.getrandbits(64)]), dice.choice([0, 0, 7, dice.getrandbits(64)])),
            [memory_fd],
        ),
        R.SET_LOG_FD: (None, [event]),
        R.SET_BACKEND_REQ_FD: (None, [event]),
        R.SEND_RARP: (dice.getrandbits(64), []),
        R.NET_SET_MTU: (number, []),
        R.SET_STATUS: (number, []),
        R.GET_CONFIG: (Config(number, 0, bytes(8)), []),
        R.SET_CONFIG: (Config(number, 0, bytes(8)), []),
    }
    for word_request in (KICK, CALL, ERR):
        rows[word_request] = dice.choice([(ring, [event]), (ring | 1 << 8, []), (ring, [])])
    if rule is None:
        return request_id, dice.randbytes(dice.choice([0, 8, 40])), []
    if request_id in rows:
        payload, with_fds = rows[request_id]
        return request_id, rule.payload.encode(payload), with_fds
    if rule.payload is FRONTEND_REQUESTS[R.SET_VRING_NUM].payload:
        return request_id, rule.payload.encode(VringState(ring, number & 0xFFFFFFFF)), []
    return request_id, b"" if rule.payload.fits(0) else dice.randbytes(8), []


@pytest.mark.checklist(17, 46)
@pytest.mark.parametrize("seed", range(8))
def test_any_message_in_any_state(host: Host, neighbour: Neighbour, connect: Connect, seed: int) -> None:
    """Line 17: messages in any order, right and wrong ones, with packets under way; only this connection may suffer."""
    dice = random.Random(seed)
    guest = connect()
    memory_fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(memory_fd, 1 << 18)
    closed = 0
    try:
        for number in range(200):
            if number % 5 == 0 and guest.receiveq.free > 2 and guest.transmitq.free > 2:
                guest.receiveq.add(writable=[200])
                guest.transmitq.add([bytes(100)])
                guest.receiveq.publish()
                guest.transmitq.publish()
                guest.kick(1)
            request_id, body, fds = random_message(dice, guest, memory_fd)
            flags = VERSION | dice.choice([0, NEED_REPLY])
            if not flags & NEED_REPLY:
                gone = not quietly(guest, request_id, body, fds)
            else:
                gone = acknowledges(guest, request_id) and guest.say(request_id, body, fds) == "closed"
            if gone:
                closed += 1
                guest.close()
                guest = connect()
    finally:
        os.close(memory_fd)
    assert closed
    guest.close()
    neighbour.check()
    connect().exchange(b"everything is as new" * 4)


def acknowledges(guest: Guest, request_id: int) -> bool:
    """Whether an answer comes for sure: acks may have been switched off by a message of before."""
    try:
        guest.frontend.request(R.SET_PROTOCOL_FEATURES, PROTOCOL)
    except VqError:
        return True  # the connection is gone, which `say` finds out
    return request_id != R.SET_PROTOCOL_FEATURES


def quietly(guest: Guest, request_id: int, body: bytes, fds: list[int]) -> bool:
    """Send without waiting for an answer; whether the connection still stands afterwards."""
    try:
        guest.frontend.send(request_id, body, fds)
        rule = FRONTEND_REQUESTS.get(request_id)
        if rule is not None and rule.reply is not None:
            guest.frontend.receive(5).close()
        guest.frontend.send(R.GET_FEATURES)
        guest.frontend.receive(5).close()
    except VqError:
        return False
    return True


# -- line 18: features --


@pytest.mark.shows("any feature that is not offered")
@pytest.mark.checklist(18)
def test_features_that_were_not_offered(mute: Guest) -> None:
    """Line 18: each single bit is refused, and the set of before stays."""
    offered = mute.frontend.offered_features
    for bit in range(64):
        if not offered >> bit & 1:
            assert mute.say(R.SET_FEATURES, offered | 1 << bit) == "refused"
    assert mute.frontend.get_status() == 0
    mute.frontend.set_status(v.VIRTIO_CONFIG_S_FEATURES_OK)
    assert mute.say(R.SET_FEATURES, 1 << 63) == "refused"
    assert not mute.frontend.get_status() & v.VIRTIO_CONFIG_S_FEATURES_OK
    mute.frontend.set_features(mute.frontend.features)
    mute.start(0)
    mute.start(1)
    mute.exchange(b"with the features of before" * 3)


@pytest.mark.shows("any protocol feature that is not offered")
@pytest.mark.checklist(18)
def test_protocol_features_that_were_not_offered(mute: Guest) -> None:
    """Line 18: the same for protocol features; what was negotiated stays in force."""
    offered = mute.frontend.offered_protocol_features
    for bit in range(64):
        if not offered >> bit & 1:
            assert mute.say(R.SET_PROTOCOL_FEATURES, offered | 1 << bit) == "refused"
    assert mute.say(R.SET_STATUS, 1) == "done"


@pytest.mark.checklist(18)
def test_in_band_notifications_without_what_they_need(peer: Peer) -> None:
    """Line 18: INBAND_NOTIFICATIONS alone makes no sense, and cannot be nacked into sense."""
    inband = v.mask(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
    assert SERVED_PROTOCOL_FEATURES & inband
    with pytest.raises(FrontendError, match="INBAND_NOTIFICATIONS"):
        peer.say(R.SET_PROTOCOL_FEATURES, inband, ack=True)
    assert peer.session.closed


@pytest.mark.shows("VIRTIO_F_VERSION_1", "VIRTIO_NET_F_MRG_RXBUF")
@pytest.mark.checklist(18)
def test_features_twice_before_the_start(connect: Connect) -> None:
    """Line 18: the last set counts, also for the header's size and the layout of the ring."""
    guest = connect(PLAIN | v.mask(v.VIRTIO_NET_F_MRG_RXBUF, v.VIRTIO_F_EVENT_IDX), running=False)
    desc, avail, used = guest.transmitq.addresses
    assert guest.say(R.SET_VRING_NUM, VringState(1, 16)) == "done"
    assert guest.say(R.SET_VRING_ADDR, VringAddr(1, 0, desc, used, avail, 0)) == "done"
    guest.frontend.set_features(v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES))
    guest.header_bytes = 10
    guest.start(0)
    guest.start(1)
    guest.exchange(b"ten bytes of header" * 4)


# -- line 23 --


@pytest.mark.checklist(23)
@pytest.mark.parametrize("mtu", [0, 1, 67, 65536, 1 << 32, 0xFFFF_FFFF_FFFF_FFFF])
def test_mtu(guest: Guest, mtu: int) -> None:
    """Line 23: a value no network has is refused, and the one of before stays."""
    assert guest.say(R.NET_SET_MTU, 68) == "done"
    assert guest.say(R.NET_SET_MTU, mtu) == "refused"
    guest.exchange(bytes(64))
    guest.receiveq.add(writable=[4096])
    guest.receiveq.kick()
    guest.transmitq.add([bytes(12 + 68 + 18 + 1)])
    guest.transmitq.kick()
    wait_until("the long packet is dropped", lambda: guest.host.queue("receiveq0")["dropped"].get("mtu"))


@pytest.mark.checklist(23)
@pytest.mark.parametrize(
    "mac", [0, 1, 0xFFFF_FFFF_FFFF, 0x0100_005E_0001, 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_0000_0000_0000]
)
def test_rarp_of_nobody(guest: Guest, mac: int) -> None:
    """Line 23: zero and multicast addresses announce nobody: nothing is sent, nothing is refused."""
    before = guest.host.port()["to_guest"]["packets"]
    guest.receiveq.add(writable=[128])
    guest.receiveq.kick()
    assert guest.say(R.SEND_RARP, mac) == "done"
    guest.transmitq.add([bytes(12) + b"after it" * 8])
    guest.transmitq.kick()
    wait_until("the next packet", lambda: guest.receiveq.wait(0.2))
    ((token, length),) = guest.receiveq.poll()
    assert token.written(length)[12:] == b"after it" * 8
    assert guest.host.port()["to_guest"]["packets"] == before + 1


@pytest.mark.checklist(23)
def test_a_flood_of_rarp(guest: Guest, neighbour: Neighbour) -> None:
    """Line 23: thousands of announcements wait in no queue and take no memory; the last one stands for all."""
    before = guest.host.private_kilobytes()
    for number in range(3000):
        guest.frontend.send(R.SEND_RARP, struct.pack("=Q", 0x0002 | number << 16))
    assert guest.frontend.request(R.GET_FEATURES)
    neighbour.check()
    assert guest.host.private_kilobytes() - before < 512
    guest.works()


@pytest.mark.shows("SET_STATUS", "GET_STATUS")
@pytest.mark.checklist(23)
@pytest.mark.parametrize("status", [256, 1 << 32, 0xFFFF_FFFF_FFFF_FFFF])
def test_status(guest: Guest, status: int) -> None:
    """Line 23: the status has eight bits; any value of these stops nothing."""
    guest.frontend.set_status(0x0F)
    assert guest.say(R.SET_STATUS, status) == "refused"
    assert guest.frontend.get_status() == 0x0F
    for value in (0, 0x80, 0xFF):
        guest.frontend.set_status(value)
        guest.exchange(b"it is information only" * 3)


@pytest.mark.checklist(3, 17)
def test_a_row_for_every_request() -> None:
    """Lines 3, 17: each request of the wire table is served, or is among the refused ones of these tests."""
    refused = {parameters.values[0] for parameters in NOT_SERVED + NOT_ANSWERED}
    config = {R.GET_CONFIG, R.SET_CONFIG}
    assert set(FRONTEND_REQUESTS) == set(TRANSITIONS) | refused | config
