"""The front-end role against a back-end that answers anything: it raises its own errors, ends, and leaks nothing."""

from __future__ import annotations

import array
import gc
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import message_strategies as m
from backend_rig import DEADLINE_S, Things, machine_settings, settled
from vhost_rig import open_fds
from vq import virtio as v
from vq.errors import BackendError, ConnectionClosed, VqError
from vq.frontend import Frontend, RingSetup
from vq.message import FRONTEND_REQUESTS, HEADER, REPLY_FLAGS, Request, encode, fds_allowed
from vq.payload import U64, Region

pytestmark = pytest.mark.timeout(3600)  # of the long profile
R = Request
TIMEOUT_S = 0.02  # of the front-end: answers are there before it asks
ALL_PROTOCOL = v.mask(*range(24)) & ~v.mask(v.VHOST_USER_PROTOCOL_F_XEN_MMAP)
mostly = st.sampled_from([True] * 4 + [False])
request_number = st.sampled_from(sorted(FRONTEND_REQUESTS))


class Front(RuleBasedStateMachine):
    """A front-end, and the bytes that a hostile back-end has for it."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()  # of an example that failed everything goes now, and not in the middle of this one
        self.before = open_fds()
        self.things = Things()
        self.idle = open_fds()
        self.frontend: Frontend | None = None

    @initialize()
    def begin(self) -> None:
        self.connect(negotiated=True)

    def connect(self, negotiated: bool) -> None:
        ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.frontend = Frontend.adopt(ours, timeout=TIMEOUT_S)
        self.answering = True
        if negotiated:
            self.frontend.protocol_features = ALL_PROTOCOL
            self.frontend.features = m.SPLIT

    def teardown(self) -> None:
        try:
            self.hang_up()
        finally:
            self.things.close()
        settled(lambda: None, lambda: self.before)

    def hang_up(self) -> None:
        if self.frontend is not None:
            self.frontend.close()
            self.frontend = None
            self.theirs.close()
        settled(lambda: None, lambda: self.idle)

    # --- The back-end ---------------------------------------------------------------------------------------------

    def answer(self, data: bytes, fds: int = 0, kind: str = "area") -> None:
        """Leave bytes for the front-end to find, with copies of a descriptor at the first of them."""
        if self.answering and data:
            rights = array.array("i", [self.things.fds[kind]] * fds)
            self.theirs.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else [])

    def drain(self) -> None:
        """Read what the front-end has said, and close what came along."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.theirs, 65536, 64)
            except (BlockingIOError, ConnectionResetError):
                return
            for fd in fds:
                os.close(fd)
            if not data:
                return

    def any_answer(self, request: int, data: st.DataObject) -> None:
        """Something that may be an answer, and often nearly is."""
        rule_ = FRONTEND_REQUESTS[request]
        codec = U64 if rule_.reply is None else rule_.reply
        body = codec.encode(data.draw(m.STRATEGIES[codec]))
        right = encode(request, body, REPLY_FLAGS)
        for _ in range(data.draw(st.sampled_from([1, 1, 1, 0, 2]))):
            match data.draw(st.integers(0, 9)):
                case 0:
                    self.answer(right, data.draw(st.integers(1, 3)), data.draw(st.sampled_from(["area", "socket"])))
                case 1:
                    self.answer(encode(data.draw(request_number), body, REPLY_FLAGS))
                case 2:
                    self.answer(encode(request, body, data.draw(st.sampled_from([0, 1, 4, 6, 9, 13, 0xFFFFFFFF]))))
                case 3:
                    self.answer(encode(request, data.draw(st.binary(max_size=80)), REPLY_FLAGS))
                case 4:
                    size = data.draw(st.sampled_from([0, 7, 9, 4096, 4097, 0xFFFFFFFF]))
                    self.answer(HEADER.pack(request, REPLY_FLAGS, size) + body)
                case 5:
                    self.answer(right[: data.draw(st.integers(0, len(right)))], data.draw(st.integers(0, 1)))
                case 6:
                    self.answer(data.draw(st.binary(max_size=60)), data.draw(st.integers(0, 2)))
                case _:
                    self.answer(right)
        if data.draw(st.integers(0, 19)) == 0:
            self.stop_answering()

    def stop_answering(self) -> None:
        self.answering = False
        self.theirs.shutdown(socket.SHUT_WR)

    # --- The front-end --------------------------------------------------------------------------------------------

    def connected(self) -> bool:
        return self.frontend is not None

    def attempt(self, action: Callable[[], Any]) -> tuple[Any, VqError | None]:
        """Do something; give its result or the error, of which there are only our own, and not late."""
        began = time.monotonic()
        result, problem = None, None
        try:
            result = action()
        except VqError as error:
            problem = error
        assert time.monotonic() - began < DEADLINE_S
        self.drain()
        return result, problem

    @rule(request=request_number, data=st.data(), takes_fd=st.booleans())
    @precondition(connected)
    def ask(self, request: int, data: st.DataObject, takes_fd: bool) -> None:
        assert self.frontend is not None
        payload = data.draw(m.payload_of(request))
        fds = [self.things.event] * fds_allowed(FRONTEND_REQUESTS[request].fds, payload)[0]
        self.any_answer(request, data)
        ask = self.frontend.request_fd if takes_fd else self.frontend.request
        result, problem = self.attempt(lambda: ask(request, payload, fds))
        if problem is None and takes_fd and result[1] is not None:
            os.close(result[1])

    @rule(request=request_number, data=st.data())
    @precondition(lambda self: self.connected() and self.answering and self.quiet())
    def right_answer(self, request: int, data: st.DataObject) -> None:
        """Nothing is left over of before: then what is right is believed."""
        assert self.frontend is not None
        payload = data.draw(m.payload_of(request))
        fds = [self.things.event] * fds_allowed(FRONTEND_REQUESTS[request].fds, payload)[0]
        rule_ = FRONTEND_REQUESTS[request]
        acked = rule_.ack_always or self.frontend.has_protocol(v.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        value = None
        if rule_.reply is not None:
            value = data.draw(m.STRATEGIES[rule_.reply])
            self.answer(encode(request, rule_.reply.encode(value), REPLY_FLAGS))
        elif acked:
            self.answer(encode(request, U64.encode(0), REPLY_FLAGS))
        result, problem = self.attempt(lambda: self.frontend.request(request, payload, fds))  # type: ignore[union-attr]
        assert problem is None, problem
        assert result == value

    def quiet(self) -> bool:
        """Whether the front-end has nothing to read, and has read nothing by halves."""
        assert self.frontend is not None
        poll = select.poll()
        poll.register(self.frontend.fileno(), select.POLLIN)
        connection = self.frontend._connection
        return not poll.poll(0) and not connection._header and connection._parsed is None

    @rule(data=st.data(), what=st.integers(0, 9))
    @precondition(connected)
    def do(self, data: st.DataObject, what: int) -> None:
        """What users call, each of which says several messages."""
        frontend = self.frontend
        assert frontend is not None
        region = Region(m.GUEST, m.PAGE, m.USER, 0)
        event, memory = self.things.event, self.things.memory
        ring = RingSetup(0, 16, m.USER, m.USER + 512, m.USER + 1024, 0, event, event, event)
        action, requests = [
            (lambda: frontend.negotiate(m.SPLIT, ALL_PROTOCOL), [R.GET_FEATURES, R.GET_PROTOCOL_FEATURES]),
            (lambda: frontend.set_features(m.SPLIT), [R.SET_FEATURES]),
            (frontend.queue_num, [R.GET_QUEUE_NUM]),
            (lambda: frontend.set_mem_table([region], [memory]), [R.SET_MEM_TABLE, R.GET_FEATURES]),
            (lambda: frontend.add_region(region, memory), [R.ADD_MEM_REG]),
            (lambda: frontend.remove_region(region), [R.REM_MEM_REG]),
            (lambda: frontend.start_ring(ring), [R.SET_VRING_NUM, R.SET_VRING_BASE, R.SET_VRING_ADDR]),
            (lambda: frontend.stop_ring(0), [R.SET_VRING_ENABLE, R.GET_VRING_BASE]),
            (lambda: frontend.get_config(0, 28), [R.GET_CONFIG]),
            (lambda: frontend.set_log_base(self.things.log, m.PAGE), [R.SET_LOG_BASE]),
        ][what]
        for request in requests:
            self.any_answer(request, data)
        self.attempt(action)

    @rule(data=st.data(), request=request_number)
    @precondition(connected)
    def listen(self, data: st.DataObject, request: int) -> None:
        """Whatever comes without having been asked for."""
        assert self.frontend is not None
        self.any_answer(request, data)
        message, problem = self.attempt(lambda: self.frontend.receive(0))  # type: ignore[union-attr]
        assert problem is None or isinstance(problem, (BackendError, ConnectionClosed))
        if message is not None:
            message.close()

    @rule(data=st.binary(max_size=80))
    @precondition(connected)
    def say_anything(self, data: bytes) -> None:
        assert self.frontend is not None
        self.attempt(lambda: self.frontend.send_bytes(data, [self.things.event]))  # type: ignore[union-attr]

    @rule(often=mostly)
    @precondition(connected)
    def wait_for_the_end(self, often: bool) -> None:
        if not often:
            self.stop_answering()
            assert self.frontend is not None
            ended, problem = self.attempt(lambda: self.frontend.wait_closed(TIMEOUT_S))  # type: ignore[union-attr]
            assert problem is None
            assert isinstance(ended, bool)

    @rule(negotiated=mostly, when=st.booleans())
    def come_again(self, negotiated: bool, when: bool) -> None:
        """Often: after most mistakes a connection is of no use any more."""
        if when or not self.connected() or not self.answering:
            self.hang_up()
            self.connect(negotiated)

    # --- What always holds ----------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_left_open(self) -> None:
        """Besides the connection, at most what waits in it for the rest of its message."""
        if self.frontend is None:
            return
        now = open_fds()
        ours = {self.frontend.fileno(), self.theirs.fileno(), *self.frontend._connection._fds}
        settled(lambda: None, lambda: self.idle | {fd: now.get(fd, "closed") for fd in ours})


TestFront = Front.TestCase
TestFront.settings = machine_settings(40)
