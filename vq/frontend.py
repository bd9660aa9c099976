"""The front-end role: drives a back-end, ours or any other, for tests, demo, bench and check.

`Frontend` says each message, waits for the answer that is due, and believes nothing: flags, request, size and number of
fds of every reply are checked, and every wait ends. It knows sockets and messages, not guest memory: the caller makes
the memory, places the rings in it (`vq_core.driver`) and passes fds and addresses.

Spec: vhost-user, "Communication", "Starting and stopping rings"; a front-end's duties.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self
from uuid import UUID

from vq import virtio as v
from vq.closing import Closing
from vq.endpoint import Connector, listen
from vq.errors import BackendError, ConnectionClosed, ResourceError, UsageError
from vq.message import (
    FRONTEND_REQUESTS,
    VERSION,
    Message,
    Request,
    Rule,
    encode,
    encode_request,
    request_name,
)
from vq.offer import PAGE_BYTES
from vq.payload import VRING_NOFD_MASK, Config, Inflight, Log, Region, Transfer, VringAddr, VringState
from vq.request_server import Handler, RequestServer
from vq.state_transfer import STATE_MAX
from vq.transport import Connection

INFLIGHT_BYTES_MAX: Final = 1 << 30  # 256 queues of 32768 entries take a quarter of it
STATE_NO_FD: Final = 1 << 8  # the back-end uses the pipe that it was given

# Replies that may bring an fd, and that must not bring more than one.
_REPLIES_WITH_FD: Final = frozenset(
    {Request.POSTCOPY_ADVISE, Request.GET_INFLIGHT_FD, Request.GET_SHARED_OBJECT, Request.SET_DEVICE_STATE_FD}
)


@dataclass(frozen=True, slots=True)
class RingSetup:
    """What `start_ring` tells the back-end about a ring.

    Parameters
    ----------
    index
        Ring index.
    num
        Entries.
    desc, avail, used
        User addresses, inside the `user_addr` ranges of the memory table. Packed: descriptor ring, driver event
        suppression, device event suppression.
    base
        Next available index; for a packed ring all four values, 0x80008000 at first.
    kick_fd, call_fd, err_fd
        The caller's fds; None says NOFD (no message at all for `err_fd`).
    log_guest_addr, flags
        Where the used ring lies for the dirty log, and whether it is logged (VHOST_VRING_F_LOG).
    inband
        Kick by VRING_KICK and be called by VRING_CALL, without fds (needs INBAND_NOTIFICATIONS and `open_channel`).
    """

    index: int
    num: int
    desc: int
    avail: int
    used: int
    base: int = 0
    kick_fd: int | None = None
    call_fd: int | None = None
    err_fd: int | None = None
    log_guest_addr: int = 0
    flags: int = 0
    inband: bool = False


class _Expected:
    """A reply on its way, and the message when it has come."""

    __slots__ = ("message",)

    def __init__(self) -> None:
        self.message: Message | None = None


class Frontend(Closing):
    """A connection to a back-end; made by `connect`, `listen` or `adopt`.

    Parameters
    ----------
    connection
        A connection that expects replies.
    timeout
        Seconds that any answer may take.

    Attributes
    ----------
    features, protocol_features
        What has been acknowledged so far.
    offered_features, offered_protocol_features
        What the back-end has offered.
    channel
        Serves the requests of the back-end, while we wait for something and in `serve`; None before `open_channel`.
    """

    def __init__(self, connection: Connection, *, timeout: float = 5.0) -> None:
        self._connection = connection
        self.timeout = timeout
        self.offered_features = 0
        self.offered_protocol_features = 0
        self.features = 0
        self.protocol_features = 0
        self.channel: RequestServer | None = None
        self._expected: deque[_Expected] = deque()  # replies on their way, in order

    @classmethod
    def connect(cls, path: str, *, timeout: float = 5.0) -> Self:
        """Connect to a back-end that listens, trying again until the time is over.

        Raises
        ------
        ResourceError
            Nobody listened in time.
        """
        connector = Connector(path, first_delay=0.01, last_delay=0.1)
        end = time.monotonic() + timeout
        while True:
            connection = connector.attempt(replies=True)
            if connection is not None:
                return cls(connection, timeout=timeout)
            if time.monotonic() >= end and connector.last_error is not None:
                raise connector.last_error
            time.sleep(connector.next_attempt_in())

    @classmethod
    def listen(cls, path: str, *, timeout: float = 5.0) -> Self:
        """Wait for a back-end that connects to us (client mode).

        Raises
        ------
        ResourceError
            Nobody connected in time.
        """
        listener = listen(path)
        try:
            _wait(listener.fileno(), select.POLLIN, timeout)
            connection = listener.accept(replies=True)
        finally:
            listener.close()
        if connection is None:
            remedy = "start the back-end in client mode"
            raise ResourceError(f"no back-end connected within {timeout:g} s", path=path, remedy=remedy)
        return cls(connection, timeout=timeout)

    @classmethod
    def adopt(cls, sock: socket.socket, *, timeout: float = 5.0) -> Self:
        """Use a connected socket, such as one end of a socketpair; the front-end owns it from now on."""
        return cls(Connection(sock, replies=True), timeout=timeout)

    def fileno(self) -> int:
        """Give the socket's fd; -1 when closed."""
        return self._connection.fileno()

    def peer_process(self) -> int:
        """Give the number of the process that listens, as the kernel knows it."""
        return self._connection.peer_process()

    def close(self) -> None:
        """Close the connection: the back-end must then let go of everything."""
        self._connection.close()
        if self.channel is not None:
            self.channel.close()

    def has_protocol(self, bit: int) -> bool:
        """Tell whether a protocol feature has been acknowledged."""
        return v.has(self.protocol_features, bit)

    # --- Messages ----------------------------------------------------------------------------------------------------

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION) -> None:
        """Send any bytes as a message, right or wrong, and wait for nothing."""
        self._transmit(encode(request, payload, flags), fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send any bytes, with fds at the first of them, and wait for nothing: pieces of messages, several at once."""
        self._transmit(data, fds)

    def end_sending(self) -> None:
        """Send nothing more: what the back-end has got of a message is all that comes of it."""
        self._connection.end_sending()

    def receive(self, timeout: float | None = None) -> Message:
        """Wait for the next reply, whatever it answers; its form has been checked.

        Raises
        ------
        BackendError
            Wrong form, end inside a message, or nothing in time.
        ConnectionClosed
            The back-end ended the connection.
        """
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        message = None
        while message is None:
            message = self._receive_or_serve(end, timeout or self.timeout)
        return message

    def _receive_or_serve(self, end: float, timeout: float) -> Message | None:
        """Wait for something to come and take it: a reply, or requests of the back-end, which are served."""
        message = self._connection.receive()
        if message is not None:
            return message
        left = end - time.monotonic()
        if left <= 0:
            raise BackendError("reply", "time", "over", f"nothing came within {timeout:g} s")
        self._wait(left)
        return None

    def _wait(self, seconds: float, events: int = select.POLLIN) -> None:
        """Wait for the main socket, and serve the channel, if there is one, once something comes there."""
        channel = self.channel
        poller = select.poll()
        poller.register(self._connection.fileno(), events)
        if channel is not None and not channel.closed:
            poller.register(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.wants_write else 0))
        ready = [fd for fd, _ in poller.poll(max(0.0, seconds) * 1000)]
        if channel is not None and channel.fileno() in ready:
            channel.dispatch()

    def request(self, request: int, payload: Any = None, fds: Sequence[int] = ()) -> Any:
        """Send a request, and wait for its reply or ack if one is due.

        Parameters
        ----------
        request
            Request number.
        payload
            Value for the request's codec (`vq.payload`), None for none.
        fds
            Fds to go along; they stay the caller's.

        Returns
        -------
        object
            The decoded payload of the request's own reply; None for a request that is only acked.

        Raises
        ------
        BackendError
            A nack, a wrong reply, or none in time.
        ConnectionClosed
            The back-end ended the connection.
        """
        message = self._exchange(request, payload, fds)
        if message is None:
            return None
        try:
            if message.fds:
                limit = "this request takes its reply without; use request_fd"
                raise BackendError(message.name, "number of fds", len(message.fds), limit)
            return message.payload
        finally:
            message.close()

    def request_fd(self, request: int, payload: Any = None, fds: Sequence[int] = ()) -> tuple[Any, int | None]:
        """Send a request whose reply may bring an fd; the caller owns that fd."""
        message = self._exchange(request, payload, fds)
        if message is None:
            return None, None
        return message.payload, message.take_fd()

    def _exchange(self, request: int, payload: Any, fds: Sequence[int]) -> Message | None:
        rule = FRONTEND_REQUESTS[request]
        acked = rule.reply is None and (rule.ack_always or self.has_protocol(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))
        self._transmit(encode_request(request, payload, need_reply=acked), fds)
        if rule.reply is None and not acked:
            return None
        message = self._reply()
        try:
            self._check(request, message, acked)
        except BaseException:
            message.close()
            raise
        return None if acked else message

    def _reply(self) -> Message:
        """Wait for the reply to what was sent last.

        Who serves the back-end meanwhile may send requests too (an IOTLB update, because of a miss): replies are handed
        out in the order of the requests.
        """
        mine = _Expected()
        self._expected.append(mine)
        end = time.monotonic() + self.timeout
        try:
            while mine.message is None:
                message = self._receive_or_serve(end, self.timeout)
                if message is not None:
                    self._expected.popleft().message = message
            return mine.message
        finally:
            with suppress(ValueError):  # it has come
                self._expected.remove(mine)

    def _check(self, request: int, message: Message, acked: bool) -> None:
        name = request_name(request)
        if message.request != request:
            raise BackendError(name, "reply", message.name, "a reply repeats the request", fatal=True)
        limit = 1 if request in _REPLIES_WITH_FD else 0
        if len(message.fds) > limit:
            raise BackendError(name, "number of fds", len(message.fds), f"the reply takes up to {limit}", fatal=True)
        if acked and message.payload != 0:
            raise BackendError(name, "ack", message.payload, "the back-end refused; see its log")

    def _transmit(self, data: bytes, fds: Sequence[int]) -> None:
        end = time.monotonic() + self.timeout
        self._connection.send(data, fds)
        while self._connection.wants_write:
            left = end - time.monotonic()
            if left <= 0:
                raise BackendError("request", "time", "over", f"the back-end read nothing for {self.timeout:g} s")
            self._wait(left, select.POLLOUT)
            self._connection.flush()

    # --- The back-end channel ----------------------------------------------------------------------------------------

    def open_channel(self, handlers: Mapping[int, Handler] | None = None) -> RequestServer:
        """Give the back-end a channel for its own requests; one that was given before is closed.

        Parameters
        ----------
        handlers
            Who serves which request; may be changed later (`RequestServer.handlers`). They run while we wait for a
            reply, and in `serve`; they may send requests, except under a `receive` of the caller's own.

        Raises
        ------
        UsageError
            BACKEND_REQ was not negotiated.
        """
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_BACKEND_REQ):
            raise UsageError("open_channel: BACKEND_REQ was not negotiated; want it in negotiate()")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        server = RequestServer(ours, self.may_ask, handlers)
        try:
            with theirs:
                self.request(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])
        except BaseException:
            server.close()
            raise
        if self.channel is not None:
            self.channel.close()
        self.channel = server
        return server

    def may_ask(self, rule: Rule, with_fds: bool) -> bool:
        """Whether the back-end may make a request, by what was negotiated."""
        protocol, feature = rule.gate
        return (
            (protocol is None or self.has_protocol(protocol))
            and (feature is None or v.has(self.features, feature))
            and (not with_fds or self.has_protocol(v.VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD))
        )

    def serve(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Serve the back-end until a condition holds or the time is over; tells whether it holds."""
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while not until():
            left = end - time.monotonic()
            if left <= 0:
                return False
            poller = select.poll()
            if self.channel is not None and not self.channel.closed:
                poller.register(self.channel.fileno(), select.POLLIN)
            if poller.poll(min(left, 0.01) * 1000) and self.channel is not None:
                self.channel.dispatch()
        return True

    # --- Negotiation -------------------------------------------------------------------------------------------------

    def negotiate(self, features: int, protocol_features: int = 0) -> int:
        """Agree on features, in the order of QEMU, up to and without SET_FEATURES.

        Parameters
        ----------
        features
            virtio feature bits that are wanted; VHOST_USER_F_PROTOCOL_FEATURES comes along by itself.
        protocol_features
            Protocol feature bits that are wanted.

        Returns
        -------
        int
            The features that both want; pass them, or fewer, to `set_features`.
        """
        self.offered_features = self.request(Request.GET_FEATURES)
        if v.has(self.offered_features, v.VHOST_USER_F_PROTOCOL_FEATURES):
            self.offered_protocol_features = self.request(Request.GET_PROTOCOL_FEATURES)
            agreed = protocol_features & self.offered_protocol_features
            self.request(Request.SET_PROTOCOL_FEATURES, agreed)
            self.protocol_features = agreed
        self.request(Request.SET_OWNER)
        return self.offered_features & (features | v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES))

    def set_features(self, features: int) -> None:
        """Acknowledge features, or switch VHOST_F_LOG_ALL later."""
        self.request(Request.SET_FEATURES, features)
        self.features = features

    def queue_num(self) -> int:
        """Ask how many queues the back-end has; 1 if it was not negotiated that one may ask."""
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_MQ):
            return 1
        return int(self.request(Request.GET_QUEUE_NUM))

    def set_status(self, status: int) -> None:
        """Tell the device status byte, if STATUS was negotiated."""
        if self.has_protocol(v.VHOST_USER_PROTOCOL_F_STATUS):
            self.request(Request.SET_STATUS, status)

    def get_status(self) -> int:
        """Ask for the device status byte."""
        return int(self.request(Request.GET_STATUS))

    # --- Memory ------------------------------------------------------------------------------------------------------

    def set_mem_table(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        """Give the back-end the whole memory table, an fd for each region; returns when it has it.

        Without REPLY_ACK a GET_FEATURES behind it serves as a barrier.
        """
        if len(regions) != len(fds):
            raise UsageError(f"set_mem_table: {len(regions)} regions with {len(fds)} fds; each region needs one")
        self.request(Request.SET_MEM_TABLE, tuple(regions), fds)
        self.barrier()

    def postcopy_advise(self) -> int | None:
        """Announce a postcopy migration; returns the back-end's userfaultfd, the caller's from here on, or None."""
        return self.request_fd(Request.POSTCOPY_ADVISE)[1]

    def postcopy_listen(self) -> None:
        """From here on memory tables go by `send_postcopy_table`."""
        self._must_be_done(Request.POSTCOPY_LISTEN)

    def postcopy_end(self) -> None:
        """All pages have come; the back-end has let go of the userfaultfd."""
        self._must_be_done(Request.POSTCOPY_END)

    def _must_be_done(self, request: int) -> None:
        # These are answered always; DPDK wants to be asked nevertheless, and QEMU asks.
        self._transmit(encode_request(request, need_reply=True), ())
        message = self.receive()
        try:
            self._check(request, message, acked=True)
        finally:
            message.close()

    def send_postcopy_table(self, regions: Sequence[Region], fds: Sequence[int]) -> tuple[Region, ...]:
        """Give the memory table of a postcopy migration; the back-end may not touch it before `release_postcopy_table`.

        Returns
        -------
        tuple of Region
            The same regions, with where they lie in the back-end in place of `user_addr`: its page faults say so.
        """
        self._transmit(encode_request(Request.SET_MEM_TABLE, tuple(regions)), fds)
        message = self.receive()
        try:
            self._check(Request.SET_MEM_TABLE, message, acked=False)
            reply = message.payload
        finally:
            message.close()
        if isinstance(reply, int) or [r[:2] for r in reply] != [tuple(r[:2]) for r in regions]:
            raise BackendError("SET_MEM_TABLE", "reply", reply, "the same regions, with other addresses, were expected")
        return tuple(reply)

    def release_postcopy_table(self) -> None:
        """Page faults are served: the back-end may use the table that was sent last."""
        self._transmit(encode_request(Request.SET_MEM_TABLE, 0), ())
        self.request(Request.GET_FEATURES)

    def add_region(self, region: Region, fd: int) -> None:
        """Add one region."""
        self.request(Request.ADD_MEM_REG, region, [fd])
        self.barrier()

    def remove_region(self, region: Region) -> None:
        """Remove one region; it may be unmapped afterwards."""
        self.request(Request.REM_MEM_REG, region)
        self.barrier()

    def set_log_base(self, fd: int, size: int, offset: int = 0) -> None:
        """Give the back-end a dirty log; it writes to it after `set_features` with VHOST_F_LOG_ALL."""
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD):
            raise UsageError("set_log_base: LOG_SHMFD was not negotiated; want it in negotiate()")
        self.request(Request.SET_LOG_BASE, Log(size, offset), [fd])

    def barrier(self) -> None:
        """Wait until the back-end has served everything so far, where acks do not tell already."""
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_REPLY_ACK):
            self.request(Request.GET_FEATURES)

    # --- Rings -------------------------------------------------------------------------------------------------------

    def start_ring(self, ring: RingSetup, *, enable: bool = True) -> None:
        """Set a ring up, start it, and (by default) enable it; returns when the back-end has obeyed.

        Old back-ends start only when the kick fd becomes readable, so the caller writes to it once afterwards.
        """
        self.request(Request.SET_VRING_NUM, VringState(ring.index, ring.num))
        self.request(Request.SET_VRING_BASE, VringState(ring.index, ring.base))
        self.set_ring_addresses(ring)
        if ring.inband:
            self.kick_ring(ring.index)
            if enable:
                self.enable_ring(ring.index, True)
            return
        self.set_call(ring.index, ring.call_fd)
        if ring.err_fd is not None:
            self._ring_fd(Request.SET_VRING_ERR, ring.index, ring.err_fd)
        self._ring_fd(Request.SET_VRING_KICK, ring.index, ring.kick_fd)
        if enable:
            self.enable_ring(ring.index, True)

    def set_ring_addresses(self, ring: RingSetup) -> None:
        """Send the addresses; on a started ring only to switch its logging."""
        addr = VringAddr(ring.index, ring.flags, ring.desc, ring.used, ring.avail, ring.log_guest_addr)
        self.request(Request.SET_VRING_ADDR, addr)

    def set_call(self, index: int, fd: int | None) -> None:
        """Replace the call fd, None = the back-end calls nobody."""
        self._ring_fd(Request.SET_VRING_CALL, index, fd)

    def kick_ring(self, index: int) -> None:
        """Kick by a message; the first one starts the ring."""
        self.request(Request.VRING_KICK, VringState(index, 0))

    def enable_ring(self, index: int, enabled: bool) -> None:
        """Enable or disable a ring, if it can be said (VHOST_USER_F_PROTOCOL_FEATURES acknowledged)."""
        if v.has(self.features, v.VHOST_USER_F_PROTOCOL_FEATURES):
            self.request(Request.SET_VRING_ENABLE, VringState(index, int(enabled)))
            self.barrier()

    def get_vring_base(self, index: int) -> int:
        """Stop a ring and learn where it stopped; the back-end has let go of it then."""
        state: VringState = self.request(Request.GET_VRING_BASE, VringState(index, 0))
        if state.ring != index:
            raise BackendError("GET_VRING_BASE", "ring index", state.ring, f"{index} was asked for")
        return state.num

    def get_vring_base_skip_drain(self, index: int) -> int:
        """Stop a ring without waiting for what it has in flight, which the in-flight region tells of; its base."""
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN):
            raise UsageError("get_vring_base_skip_drain: not negotiated; want GET_VRING_BASE_SKIP_DRAIN in negotiate()")
        state: VringState = self.request(Request.GET_VRING_BASE_SKIP_DRAIN, VringState(index, 0))
        if state.ring != index:
            raise BackendError("GET_VRING_BASE_SKIP_DRAIN", "ring index", state.ring, f"{index} was asked for")
        return state.num

    def stop_ring(self, index: int) -> int:
        """Disable and stop a ring; returns its base for the next start."""
        self.enable_ring(index, False)
        return self.get_vring_base(index)

    def _ring_fd(self, request: int, index: int, fd: int | None) -> None:
        word = index if fd is not None else index | VRING_NOFD_MASK
        self.request(request, word, [] if fd is None else [fd])

    # --- In-flight region --------------------------------------------------------------------------------------------

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """Ask for an in-flight region.

        Returns
        -------
        Inflight, int
            Its shape, as `set_inflight` takes it, and its fd, which is the caller's: kept as long as the guest lives.

        Raises
        ------
        BackendError
            There is none, or the file is not what the reply says.
        """
        self._need_inflight()
        shape, fd = self.request_fd(Request.GET_INFLIGHT_FD, Inflight(0, 0, num_queues, queue_size))
        try:
            if fd is None or shape.mmap_size == 0:
                raise BackendError("GET_INFLIGHT_FD", "region", "none", "the back-end makes none of this shape")
            have, needed = os.fstat(fd).st_size, shape.mmap_offset + shape.mmap_size
            if (shape.num_queues, shape.queue_size) != (num_queues, queue_size):
                value = f"{shape.num_queues} queues of {shape.queue_size}"
                raise BackendError("GET_INFLIGHT_FD", "shape", value, f"{num_queues} of {queue_size} were asked for")
            if not num_queues * queue_size <= shape.mmap_size <= INFLIGHT_BYTES_MAX or needed > have:
                value = f"{shape.mmap_size} bytes at {shape.mmap_offset} of a file of {have}"
                raise BackendError("GET_INFLIGHT_FD", "size", value, f"at most {INFLIGHT_BYTES_MAX}, inside the file")
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        return shape, fd

    def set_inflight(self, shape: Inflight, fd: int) -> None:
        """Give an in-flight region to a back-end whose rings all stand; the fd stays the caller's."""
        self._need_inflight()
        self.request(Request.SET_INFLIGHT_FD, shape, [fd])
        self.barrier()

    def _need_inflight(self) -> None:
        if not self.has_protocol(v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            raise UsageError("in-flight region: INFLIGHT_SHMFD was not negotiated; want it in negotiate()")

    # --- Device ------------------------------------------------------------------------------------------------------

    def get_config(self, offset: int, size: int) -> bytes:
        """Read a part of the configuration space."""
        reply: Config | None = self.request(Request.GET_CONFIG, Config(offset, 0, bytes(size)))
        if reply is None:
            raise BackendError("GET_CONFIG", "reply", "empty", f"{size} bytes at {offset} were asked for")
        if (reply.offset, len(reply.data)) != (offset, size):
            value = f"{len(reply.data)} bytes at {reply.offset}"
            raise BackendError("GET_CONFIG", "reply", value, f"{size} bytes at {offset} were asked for")
        return reply.data

    def begin_state(self, fd: int, *, load: bool) -> None:
        """Have the device save its state to a pipe, or load it from there (the end is where nobody writes any more).

        Raises
        ------
        BackendError
            It refuses.
        """
        word, came = self.request_fd(Request.SET_DEVICE_STATE_FD, Transfer(int(load), 0), [fd])
        if came is not None:
            os.close(came)
        if word != STATE_NO_FD or came is not None:
            limit = f"{STATE_NO_FD:#x} is a success without a descriptor; other channels are not used"
            raise BackendError("SET_DEVICE_STATE_FD", "reply", f"{word:#x}", limit)

    def check_state(self) -> None:
        """Wait for the end of the transfer; raises BackendError if it has failed."""
        if self.request(Request.CHECK_DEVICE_STATE) != 0:
            raise BackendError("CHECK_DEVICE_STATE", "state", "not transferred", "see the log of the back-end")

    def save_state(self) -> bytes:
        """Have the device save its state, and read it; at most STATE_MAX bytes. All rings must stand."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self.begin_state(writer, load=False)
            finally:
                os.close(writer)
            state = b""
            end = time.monotonic() + self.timeout
            while True:
                if not select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
                    raise BackendError("SET_DEVICE_STATE_FD", "state", "incomplete", f"no end in {self.timeout:g} s")
                data = os.read(reader, 1 << 16)
                if not data:
                    break
                state += data
                if len(state) > STATE_MAX:
                    raise BackendError("SET_DEVICE_STATE_FD", "state", "too long", f"the limit is {STATE_MAX} bytes")
        finally:
            os.close(reader)
        self.check_state()
        return state

    def load_state(self, state: bytes) -> None:
        """Have the device load a state; raises BackendError if it does not like it. All rings must stand."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self.begin_state(reader, load=True)
            finally:
                os.close(reader)
            os.set_blocking(writer, False)
            end = time.monotonic() + self.timeout
            left = memoryview(state)
            with suppress(BrokenPipeError):  # it has refused already, and says so below
                while left:
                    if not select.select([], [writer], [], max(0.0, end - time.monotonic()))[1]:
                        raise BackendError("SET_DEVICE_STATE_FD", "state", "unread", f"for {self.timeout:g} s")
                    left = left[os.write(writer, left[: 1 << 16]) :]
        finally:
            os.close(writer)
        self.check_state()

    def get_shared_object(self, uuid: UUID) -> int | None:
        """Ask for an object that the device shares; the descriptor is the caller's. None: there is none."""
        _, fd = self.request_fd(Request.GET_SHARED_OBJECT, uuid.bytes)
        return fd

    def get_shmem_config(self) -> dict[int, int]:
        """Ask for the shared memory regions of the device: size by id.

        Raises
        ------
        BackendError
            Their number is wrong, or a size that cannot be.
        """
        count, *sizes = self.request(Request.GET_SHMEM_CONFIG)
        found = {shmid: size for shmid, size in enumerate(sizes) if size}
        if count != len(found):
            raise BackendError("GET_SHMEM_CONFIG", "nregions", count, f"{len(found)} sizes are not 0")
        for shmid, size in found.items():
            if size % PAGE_BYTES or size >= 1 << 63:
                limit = f"a region has whole pages of {PAGE_BYTES} bytes"
                raise BackendError("GET_SHMEM_CONFIG", f"size of region {shmid}", size, limit)
        return found

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Tell whether the back-end closes the connection in time; replies on the way are thrown away."""
        try:
            while True:
                self.receive(timeout).close()
        except ConnectionClosed:
            return True
        except BackendError as problem:
            return problem.field == "stream"  # closed in the middle of a reply; anything else is no end


def _wait(fd: int, events: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(fd, events)
    poll.poll(max(0.0, seconds) * 1000)
