"""What the protocol tests share: a data plane that records, a peer with the real codecs, fd accounting."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from vq import effects as e
from vq import virtio as v
from vq.errors import ConnectionClosed, VqError
from vq.message import FRONTEND_REQUESTS, HEADER, VERSION, Message, Request, decode, decode_header, encode_request
from vq.payload import Region, VringAddr
from vq.session import Offer, Session
from vq.transport import Connection

PAGE = 4096
NET_FEATURES = v.mask(
    v.VIRTIO_NET_F_CSUM,
    v.VIRTIO_NET_F_GUEST_CSUM,
    v.VIRTIO_NET_F_MTU,
    v.VIRTIO_NET_F_GUEST_TSO4,
    v.VIRTIO_NET_F_MRG_RXBUF,
    v.VIRTIO_NET_F_GUEST_ANNOUNCE,
    v.VIRTIO_NET_F_MQ,
    v.VHOST_F_LOG_ALL,
    v.VIRTIO_F_INDIRECT_DESC,
    v.VIRTIO_F_EVENT_IDX,
    v.VHOST_USER_F_PROTOCOL_FEATURES,
    v.VIRTIO_F_VERSION_1,
    v.VIRTIO_F_RING_PACKED,
)
NET_PROTOCOL_FEATURES = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ,
    v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    v.VHOST_USER_PROTOCOL_F_RARP,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    v.VHOST_USER_PROTOCOL_F_MTU,
    v.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    v.VHOST_USER_PROTOCOL_F_CONFIG,
    v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    v.VHOST_USER_PROTOCOL_F_STATUS,
)
SPLIT = v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES, v.VIRTIO_F_VERSION_1)
PACKED = SPLIT | v.mask(v.VIRTIO_F_RING_PACKED)
USER = 0x7F66_5FFF_F000
PLACE = 0x7E00_0000_0000  # of guest address 0 in a recorder


def net_offer(**changes: Any) -> Offer:
    """Make the offer of a net device with two queue pairs."""
    offer: dict[str, Any] = {
        "features": NET_FEATURES,
        "protocol_features": NET_PROTOCOL_FEATURES,
        "queue_count": 4,
        "queue_num_answer": 2,
        "max_mem_slots": 8,
        "config_size": 28,
    }
    return Offer(**(offer | changes))


def open_fds() -> dict[int, str]:
    """List the open fds of this process with what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the directory's own fd
    return found


def memfd(size: int = 16 * PAGE) -> int:
    """Make a file in memory."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def region(guest: int = 0, size: int = 16 * PAGE, user: int = USER, offset: int = 0) -> Region:
    """Describe a region."""
    return Region(guest, size, user, offset)


def addresses(ring: int, flags: int = 0, start: int = USER) -> VringAddr:
    """Describe ring parts inside of `region()`."""
    base = start + ring * 3 * PAGE
    return VringAddr(ring, flags, base, base + 2 * PAGE, base + PAGE, 0x2000 * ring)


def make_message(request: int, payload: Any = None, fds: Iterable[int] = (), *, need_reply: bool = False) -> Message:
    """Make a message the way it arrives: through the codecs, with fds of its own."""
    data = encode_request(request, payload, need_reply=need_reply)
    return decode(decode_header(data[: HEADER.size]), data[HEADER.size :], [os.dup(fd) for fd in fds])


def read_reply(data: bytes | None) -> Any:
    """Decode what a session answered, with all checks of a front-end."""
    if data is None:
        return None
    return decode(decode_header(data[: HEADER.size], reply=True), data[HEADER.size :], [], reply=True).payload


class Recorder:
    """A data plane that only keeps books, and insists that what it is told makes sense.

    `fail` holds effect classes that fail; a failing effect changes nothing, as the contract says.
    """

    def __init__(self) -> None:
        self.effects: list[e.Effect] = []
        self.fail: set[type] = set()
        self.next_base: dict[int, int] = {}
        self.features = 0
        self.regions: tuple[e.MemoryRegion, ...] = ()
        self.prepared: tuple[e.MemoryRegion, ...] = ()
        self.postcopy = False
        self.log: e.SetLog | None = None
        self.inflight: e.SetInflight | None = None
        self.rings: dict[int, e.RingConfig] = {}
        self.enabled: set[int] = set()
        self.config = bytearray(range(1, 29))

    def take(self) -> list[e.Effect]:
        """Give what was applied since the last call."""
        effects, self.effects = self.effects, []
        return effects

    def __call__(self, effect: e.Effect) -> Any:
        """Apply an effect."""
        for fd in _fds_of(effect):
            os.fstat(fd)  # every fd lives while its effect is applied
        if type(effect) in self.fail and effect != e.SetMemory(()):  # letting go cannot fail
            self.effects.append(effect)
            raise VqError(f"{type(effect).__name__} fails")
        result = self._book(effect)
        self.effects.append(effect)
        return result

    def _book(self, effect: e.Effect) -> Any:
        match effect:
            case e.SetFeatures(features):
                assert not self.rings or (features ^ self.features) & ~v.mask(v.VHOST_F_LOG_ALL) == 0
                self.features = features
            case e.SetMemory(regions):
                self.regions = regions
            case e.AdvisePostcopy():
                self.postcopy = True
                return os.eventfd(0, os.EFD_CLOEXEC)
            case e.PrepareMemory(regions):
                assert self.postcopy
                assert not self.prepared
                self.prepared = regions
                return tuple(PLACE + region.guest_addr for region in regions)
            case e.AdoptMemory():
                assert self.prepared
                self.regions, self.prepared = self.prepared, ()
            case e.EndPostcopy():
                assert self.postcopy
                assert not self.prepared
                self.postcopy = False
            case e.AbandonPostcopy():
                assert self.postcopy
                self.prepared, self.postcopy = (), False
            case e.AddRegion(added):
                self.regions = (*self.regions, added)
            case e.RemoveRegion(gone):
                kept = tuple(
                    r
                    for r in self.regions
                    if (r.guest_addr, r.size, r.user_addr) != (gone.guest_addr, gone.size, gone.user_addr)
                )
                assert len(kept) == len(self.regions) - 1
                self.regions = kept
            case e.StartRing(ring):
                assert ring.index not in self.rings
                assert self.regions
                self.rings[ring.index] = ring
            case e.StopRing(index):
                ring = self.rings.pop(index)
                return self.next_base.get(index, ring.base)
            case e.EnableRing(index, enabled):
                (self.enabled.add if enabled else self.enabled.discard)(index)
            case e.SetKick(index) | e.SetCall(index) | e.SetErr(index) | e.SetRingAddresses(index) | e.Kick(index):
                assert index in self.rings
            case e.SetLog():
                self.log = effect
            case e.ClearLog():
                assert self.log is not None
                self.log = None
            case e.MakeInflight(queues, size):
                return memfd(), queues * 64 * size
            case e.SetInflight():
                assert not self.rings
                self.inflight = effect
            case e.ClearInflight():
                assert not self.rings and self.inflight is not None
                self.inflight = None
            case e.ConfigRead(offset, size):
                return bytes(self.config[offset : offset + size])
            case e.ConfigWrite(offset, data):
                self.config[offset : offset + len(data)] = data
        return None


def _fds_of(effect: e.Effect) -> list[int]:
    match effect:
        case e.SetMemory(regions) | e.PrepareMemory(regions):
            return [region.fd for region in regions]
        case e.AddRegion(added):
            return [added.fd]
        case e.StartRing(ring):
            return [fd for fd in (ring.kick_fd, ring.call_fd, ring.err_fd) if fd not in (None, e.INBAND)]
        case e.SetKick(_, fd) | e.SetCall(_, fd) | e.SetErr(_, fd):
            return [] if fd is None else [fd]
        case e.SignalErr(_, fd) | e.SetLog(fd) | e.SetInflight(fd):
            return [fd]
    return []


class Peer:
    """A front-end that talks to a session directly, and checks that replies come exactly when they are due."""

    def __init__(self, offer: Offer | None = None) -> None:
        self.plane = Recorder()
        self.session = Session(offer or net_offer(), self.plane)
        self.memory_fd = memfd()

    def close(self) -> None:
        """End the session."""
        self.session.close()
        os.close(self.memory_fd)

    def say(self, request: int, payload: Any = None, fds: Sequence[int] = (), *, ack: bool = False) -> Any:
        """Send a message; returns the decoded reply or ack, None if none came."""
        reply = self.session.receive(make_message(request, payload, fds, need_reply=ack))
        if reply is None:
            assert FRONTEND_REQUESTS[request].reply is None, "a request with a reply of its own was not answered"
            return None
        assert HEADER.unpack(reply[: HEADER.size])[0] == request
        return read_reply(reply)

    def say_postcopy_table(self, table: tuple[Region, ...], fds: Sequence[int] = ()) -> Any:
        """Send a memory table that is answered with a table."""
        message = make_message(Request.SET_MEM_TABLE, table, fds or [self.memory_fd] * len(table))
        return read_reply(self.session.receive(message))

    def acked(self, request: int, payload: Any = None, fds: Sequence[int] = ()) -> int:
        """Send a message with NEED_REPLY; returns the ack: 0 done, 1 refused."""
        answer = self.say(request, payload, fds, ack=True)
        assert answer in (0, 1)
        return int(answer)

    def negotiate(self, features: int = SPLIT, protocol_features: int = NET_PROTOCOL_FEATURES) -> None:
        """Agree on features, with a memory table of one region."""
        self.say(Request.SET_PROTOCOL_FEATURES, protocol_features)
        self.say(Request.SET_FEATURES, features)

    def share_memory(self) -> None:
        """Send a memory table of one region."""
        self.say(Request.SET_MEM_TABLE, (region(),), [self.memory_fd])

    def start(self, ring: int = 0, *, num: int = 256, base: int = 0) -> None:
        """Set up and start a ring."""
        kick, call, err = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))
        try:
            self.say(Request.SET_VRING_NUM, (ring, num))
            self.say(Request.SET_VRING_BASE, (ring, base))
            self.say(Request.SET_VRING_ADDR, addresses(ring))
            self.say(Request.SET_VRING_CALL, ring, [call])
            self.say(Request.SET_VRING_ERR, ring, [err])
            self.say(Request.SET_VRING_KICK, ring, [kick])
        finally:
            for fd in (kick, call, err):
                os.close(fd)


class BackendThread:
    """A whole back-end over a real socket: connection, session, recorder, in a thread of its own."""

    def __init__(self, sock: socket.socket, offer: Offer | None = None) -> None:
        self.plane = Recorder()
        self.failure: BaseException | None = None
        self.session = Session(offer or net_offer(), self.plane)
        self._sock = sock
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connection = Connection(self._sock)
        try:
            self._serve(connection)
        except ConnectionClosed:
            pass
        except BaseException as failure:
            self.failure = failure
        finally:
            self.session.close()
            connection.close()

    def _serve(self, connection: Connection) -> None:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        while True:
            message = connection.receive()
            if message is None:
                poll.poll()
                continue
            reply = self.session.receive(message)
            if reply is not None:
                connection.send(reply, self.session.reply_fds)

    def join(self) -> None:
        """Wait for the end, which the front-end brings about by closing."""
        self._thread.join(60)
        assert not self._thread.is_alive()


def raw(request: int, body: bytes = b"", *, flags: int = VERSION, size: int | None = None) -> bytes:
    """Lay out any header before any bytes."""
    return HEADER.pack(request, flags, len(body) if size is None else size) + body


def close_because(peer: Peer, request: int, payload: Any = None, fds: tuple[int, ...] = (), **how: bool) -> str:
    """Expect that a message ends the connection with everything released; returns the reason."""
    with pytest.raises(VqError) as caught:
        peer.say(request, payload, fds, **how)
    assert peer.session.closed
    assert not peer.plane.rings
    assert not peer.plane.regions
    return str(caught.value)
