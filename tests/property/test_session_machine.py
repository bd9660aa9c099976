"""Messages in any order, right and wrong: what must hold after each of them, and after the end.

The machine keeps a model of its own, as plain as possible, of what a session should know. A message is either accepted,
and then the model follows, or refused, and then nothing may have changed.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backend_rig import machine_settings
from vhost_rig import (
    NET_FEATURES,
    NET_PROTOCOL_FEATURES,
    PACKED,
    PAGE,
    SPLIT,
    USER,
    Recorder,
    make_message,
    net_offer,
    open_fds,
    raw,
    read_reply,
)
from vq import effects as e
from vq import virtio as v
from vq.errors import VqError
from vq.message import FRONTEND_REQUESTS, HEADER, Message, Request, decode, decode_header
from vq.payload import VRING_NOFD_MASK, Config, Log, Region, VringAddr, VringState
from vq.session import Session

R = Request
RINGS = 4
LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)
PROTOCOL = NET_PROTOCOL_FEATURES & ~v.mask(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)

ring_index = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4, 255, 0x10000, 0xFFFFFFFF])
mostly_ring = st.sampled_from([0, 0, 1, 1, 2, 3] * 3 + [4, 0x100])
signal_request = st.sampled_from([R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR])
ring_byte = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4, 255])
small = st.integers(0, 3)
address = st.sampled_from([USER, USER + PAGE, USER + 2, USER + 1, USER + 8, 0, 2**64 - 16])
region = st.builds(
    Region,
    st.sampled_from([0, PAGE, 16 * PAGE, 1 << 32, 2**64 - PAGE]),
    st.sampled_from([PAGE] * 5 + [16 * PAGE, 0, 2**64 - 1]),
    st.sampled_from([USER, USER + PAGE, 1 << 44, 2**64 - PAGE]),
    st.sampled_from([0, 0, 0, PAGE, 2**64 - PAGE]),
)
EFFECTS = [e.SetMemory, e.AddRegion, e.StartRing, e.SetCall, e.SetKick, e.EnableRing, e.SetFeatures, e.SetLog, e.SetErr]


def spoken(**strategies: Any) -> Callable[[Any], Any]:
    """Make a rule that needs an open connection."""

    def decorate(function: Any) -> Any:
        make: Any = rule(**strategies)
        return precondition(lambda self: not self.session.closed)(make(function))

    return decorate


class Front(RuleBasedStateMachine):
    """A front-end that knows no manners."""

    def __init__(self) -> None:
        super().__init__()
        self.before = open_fds()
        self.memory = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, 64 * PAGE)
        self.event = os.eventfd(0, os.EFD_CLOEXEC)
        self.ours, self.theirs = socket.socketpair()
        self.connect(ack=False)

    def connect(self, ack: bool) -> None:
        """Begin a session; with acks every refusal is visible, without many end it."""
        self.plane = Recorder()
        self.session = Session(net_offer(protocol_features=PROTOCOL), self.plane)
        self.ack = ack
        if ack:
            self.session.receive(make_message(R.SET_PROTOCOL_FEATURES, PROTOCOL))
        self.num = [0] * RINGS
        self.base = [0] * RINGS
        self.enabled = [False] * RINGS
        self.kicked = [False] * RINGS
        self.failed_once = False  # from then on the enable flags may stand half-way

    def teardown(self) -> None:
        """Whatever happened, in the end nothing is left."""
        self.session.close()
        assert self.session.closed
        assert not self.plane.rings
        assert not self.plane.regions
        assert self.plane.log is None
        os.close(self.memory)
        os.close(self.event)
        self.ours.close()
        self.theirs.close()
        assert open_fds() == self.before

    def say(self, request: int, payload: Any = None, fds: list[int] | None = None) -> Any:
        """Send a message; returns True, False (refused) or the reply. A refusal must have changed nothing."""
        before = self.snapshot()
        message = make_message(request, payload, fds or [], need_reply=self.ack)
        try:
            reply = self.session.receive(message)
        except VqError:
            assert self.session.closed
            halfway = e.EnableRing in self.plane.fail and request in (R.SET_FEATURES, R.RESET_OWNER)
            assert halfway or not self.ack or FRONTEND_REQUESTS[request].reply is not None
            return False
        assert message.fds == ()
        rule_ = FRONTEND_REQUESTS[request]
        if rule_.reply is not None:
            assert reply is not None
            return read_reply(reply)
        assert (reply is not None) == self.ack
        if reply is None:
            return self.snapshot() != before or None
        answer = read_reply(reply)
        if answer:
            assert self.snapshot() == before
        return answer == 0

    def snapshot(self) -> tuple[Any, ...]:
        """Everything that a refused message must leave alone."""
        session = self.session
        rings = tuple(
            (r.num, r.base, r.addr, r.kick_fd, r.call_fd, r.err_fd, r.started, r.enabled) for r in session.rings
        )
        known = (session.features, session.protocol_features, session.status, session.regions)
        return known, rings, self.plane.rings.copy()

    # --- Rules -----------------------------------------------------------------------------------------------------

    @initialize(ack=st.sampled_from([True, True, True, False]))
    def begin(self, ack: bool) -> None:
        self.connect(ack)

    @spoken(features=st.sampled_from([SPLIT, PACKED, 0, SPLIT | LOG_ALL, PACKED | LOG_ALL, 1 << 63]))
    def set_features(self, features: int) -> None:
        changed = features ^ self.session.features
        running = bool(self.plane.rings)
        done = self.say(R.SET_FEATURES, features)
        if features & ~NET_FEATURES or (running and changed & ~LOG_ALL):
            assert not done
        elif not self.session.closed and self.session.features == features and not features & SPLIT & 1 << 30:
            self.enabled = [True] * RINGS

    @spoken(index=ring_index, num=st.sampled_from([256, 256, 1, 3, 100, 0, 32768, 32769, 65536]))
    def set_num(self, index: int, num: int) -> None:
        running = index in self.plane.rings
        done = self.say(R.SET_VRING_NUM, VringState(index, num))
        if index >= RINGS or not 1 <= num <= 32768 or running:
            assert not done
        elif not self.session.closed and self.session.rings[index].num == num:
            self.num[index] = num

    @spoken(index=ring_index, base=st.sampled_from([0, 3, 100, 0x8000, 0x80008000, 0x8064, 0xFFFFFFFF]))
    def set_base(self, index: int, base: int) -> None:
        running = index in self.plane.rings
        done = self.say(R.SET_VRING_BASE, VringState(index, base))
        if index >= RINGS or running:
            assert not done
        elif not self.session.closed:
            self.base[index] = base

    @spoken(index=ring_index, flags=st.sampled_from([0, 1]), desc=address, used=address, avail=address)
    def set_addr(self, index: int, flags: int, desc: int, used: int, avail: int) -> None:
        done = self.say(R.SET_VRING_ADDR, VringAddr(index, flags, desc, used, avail, 0))
        if index >= RINGS or desc % 16 or used % 4 or avail % 2:
            assert not done

    @spoken(index=ring_byte, kind=signal_request, fd=st.booleans())
    def set_fd(self, index: int, kind: Request, fd: bool) -> None:
        # A kick that cannot start its ring is an honest reason to close where no ack can tell.
        word = index if fd else index | VRING_NOFD_MASK
        done = self.say(kind, word, [self.event] if fd else [])
        if index >= RINGS:
            assert not done
        elif kind == R.SET_VRING_KICK and not self.session.closed and index in self.plane.rings:
            ring = self.plane.rings[index]
            assert ring.num == self.num[index] > 0
            if not self.kicked[index]:
                low = self.base[index] & 0xFFFF
                assert ring.base == (low << 16 | low if ring.packed else low)
            self.kicked[index] = True

    @spoken(index=ring_byte, kind=signal_request)
    @precondition(lambda self: self.ack)
    def set_useless_fd(self, index: int, kind: Request) -> None:
        assert not self.say(kind, index, [self.memory])

    @spoken(index=mostly_ring, answer=st.integers(0, 0xFFFF))
    def get_base(self, index: int, answer: int) -> None:
        running = index in self.plane.rings
        self.plane.next_base[index] = answer
        reply = self.say(R.GET_VRING_BASE, VringState(index, 0))
        if index >= RINGS:
            assert reply is False
        elif not self.session.closed:
            assert reply == VringState(index, answer if running else self.base[index])
            self.base[index] = reply.num
            self.kicked[index] = False
            assert index not in self.plane.rings
            ring = self.session.rings[index]
            assert ring.kick_fd is None and ring.call_fd is None

    @spoken(index=ring_index, value=st.sampled_from([0, 1, 1, 2]))
    def enable(self, index: int, value: int) -> None:
        done = self.say(R.SET_VRING_ENABLE, VringState(index, value))
        if index >= RINGS or value > 1:
            assert not done
        elif not self.session.closed:
            self.enabled[index] = bool(value)

    @spoken(regions=st.lists(region, min_size=1, max_size=3))
    def set_table(self, regions: list[Region]) -> None:
        self.say(R.SET_MEM_TABLE, tuple(regions), [self.memory] * len(regions))

    @spoken()
    def set_good_table(self) -> None:
        self.say(R.SET_MEM_TABLE, (Region(0, 16 * PAGE, USER, 0),), [self.memory])

    @spoken(index=st.integers(0, RINGS - 1))
    def start_properly(self, index: int) -> None:
        if index in self.plane.rings:
            return
        self.plane.fail = set()
        if not self.session.regions:
            self.set_good_table()
        self.set_num(index, 256)
        self.set_base(index, 7)
        self.set_addr(index, 0, USER, USER + 2 * PAGE, USER + PAGE)
        self.set_fd(index, R.SET_VRING_KICK, True)
        assert index in self.plane.rings

    @spoken(new=region, fds=st.sampled_from([1, 1, 1, 1, 0, 2]))
    @precondition(lambda self: self.ack)
    def add_region(self, new: Region, fds: int) -> None:
        done = self.say(R.ADD_MEM_REG, new, [self.memory] * fds)
        assert not done or fds == 1

    @spoken(data=st.data())
    @precondition(lambda self: self.ack and self.session.regions)
    def remove_region(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from([live.region for live in self.session.regions]))
        fds = data.draw(st.sampled_from([[], [self.memory]]))
        if e.RemoveRegion not in self.plane.fail:
            assert self.say(R.REM_MEM_REG, known, fds)
        assert not self.say(R.REM_MEM_REG, known)

    @spoken(size=st.sampled_from([PAGE] * 10 + [0, 2**64 - 1]), offset=st.sampled_from([0, PAGE]))
    @precondition(lambda self: self.ack)
    def set_log(self, size: int, offset: int) -> None:
        self.say(R.SET_LOG_BASE, Log(size, offset), [self.memory])

    @spoken(what=st.sampled_from([R.SET_OWNER, R.GET_FEATURES, R.GET_PROTOCOL_FEATURES]))
    def ask(self, what: Request) -> None:
        self.say(what)

    @spoken(status=st.sampled_from([0, 1, 0xF, 256]))
    @precondition(lambda self: self.ack)
    def set_status(self, status: int) -> None:
        assert bool(self.say(R.SET_STATUS, status)) == (status < 256)
        self.say(R.GET_STATUS)

    @spoken(socket_=st.booleans())
    @precondition(lambda self: self.ack)
    def set_channel(self, socket_: bool) -> None:
        done = self.say(R.SET_BACKEND_REQ_FD, None, [self.ours.fileno() if socket_ else self.memory])
        assert bool(done) == socket_

    @spoken(offset=st.sampled_from([0, 6, 27, 28, 2**32 - 1]), size=st.sampled_from([0, 1, 6, 28, 256, 300]))
    @precondition(lambda self: self.ack)
    def config(self, offset: int, size: int) -> None:
        reply = self.say(R.GET_CONFIG, Config(offset, 0, bytes(size)))
        if reply is not None:
            assert (reply.offset, len(reply.data)) == (offset, size)
        self.say(R.SET_CONFIG, Config(offset, 0, bytes(size)))

    @spoken()
    def reset_owner(self) -> None:
        if self.say(R.RESET_OWNER) is not False:
            self.enabled = [False] * RINGS

    @spoken()
    @precondition(lambda self: self.ack and not self.plane.fail)
    def reset_device(self) -> None:
        if self.say(R.RESET_DEVICE):
            assert not self.plane.rings
            self.num = [0] * RINGS
            self.base = [0] * RINGS
            self.enabled = [False] * RINGS
            self.kicked = [False] * RINGS

    @spoken(request=st.integers(1, 60), body=st.binary(max_size=64), flags=st.sampled_from([1, 9]), fds=small)
    @precondition(lambda self: self.ack)
    def anything(self, request: int, body: bytes, flags: int, fds: int) -> None:
        """Throw bytes at the codecs and at a session of its own, which ends there."""
        plane = Recorder()
        other = Session(net_offer(protocol_features=PROTOCOL), plane)
        other.receive(make_message(R.SET_PROTOCOL_FEATURES, PROTOCOL))
        data = raw(request, body, flags=flags)
        given = [os.dup(self.event) for _ in range(fds)]
        message: Message | None = None
        try:
            message = decode(decode_header(data[: HEADER.size]), body, given)
            reply = other.receive(message)
            if reply is not None:
                decode(decode_header(reply[: HEADER.size], reply=True), reply[HEADER.size :], [], reply=True)
        except VqError:
            pass
        finally:
            for fd in given:  # a wrong header leaves them with the transport
                os.close(fd)
            other.close()
        assert not plane.rings and not plane.regions and plane.log is None

    @spoken(classes=st.sets(st.sampled_from(EFFECTS), max_size=2))
    @precondition(lambda self: self.ack)
    def let_fail(self, classes: set[type]) -> None:
        self.plane.fail = classes
        self.failed_once = self.failed_once or bool(classes)

    @spoken(often=st.integers(0, 9))
    def end(self, often: int) -> None:
        if often == 0:
            self.session.close()

    @rule(ack=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.session.closed)
    def connect_again(self, ack: bool) -> None:
        assert not self.plane.rings and not self.plane.regions and self.plane.log is None
        self.connect(ack)

    # --- Invariants ------------------------------------------------------------------------------------------------

    @invariant()
    def data_plane_knows_what_the_session_knows(self) -> None:
        started = {ring.index for ring in self.session.rings if ring.started}
        assert started == set(self.plane.rings)
        assert self.session.suspended == (not started)
        assert len(self.session.regions) == len(self.plane.regions)
        if not self.session.closed:
            assert {ring.index for ring in self.session.rings if ring.enabled} == self.plane.enabled
            assert self.session.features == self.plane.features
            assert [ring.num for ring in self.session.rings] == self.num
            assert [ring.base for ring in self.session.rings] == self.base
            assert self.failed_once or [ring.enabled for ring in self.session.rings] == self.enabled

    @invariant()
    def started_rings_are_sound(self) -> None:
        for ring in self.plane.rings.values():
            assert 1 <= ring.num <= 32768
            assert ring.packed == v.has(self.session.features, v.VIRTIO_F_RING_PACKED)
            assert ring.packed or ring.num & (ring.num - 1) == 0
            assert ring.desc % 16 == 0 and ring.used % 4 == 0 and ring.avail % (4 if ring.packed else 2) == 0
            assert not ring.packed or ring.base & 0x7FFF < ring.num
            assert ring.packed or ring.base <= 0xFFFF

    @invariant()
    def regions_do_not_overlap(self) -> None:
        for start in (0, 2):
            spans = sorted((live.region[start], live.region[1]) for live in self.session.regions)
            for (low, size), (high, _) in itertools.pairwise(spans):
                assert low + size <= high
            assert all(low + size <= 2**64 and size for low, size in spans)

    @invariant()
    def every_fd_is_accounted_for(self) -> None:
        session = self.session
        owned = [fd for ring in session.rings for fd in (ring.kick_fd, ring.call_fd, ring.err_fd) if fd is not None]
        owned += [fd for fd in (session.log_fd, session.backend_channel_fd) if fd is not None]
        assert len(owned) == len(set(owned))
        ours = {self.memory, self.event, self.ours.fileno(), self.theirs.fileno()}
        assert set(open_fds()) == set(self.before) | ours | set(owned)


TestFront = Front.TestCase
TestFront.settings = machine_settings(50)
