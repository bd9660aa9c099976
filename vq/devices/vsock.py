"""The socket device (VIRTIO 1.3, 5.10): streams between programs in a guest and Unix sockets of the host.

A program in the guest that connects to port P of the host (CID 2) gets to the Unix socket ``PATH_P``. A program of the
host that connects to ``PATH``, sends ``CONNECT P`` and a line feed gets to port P of the guest; it reads ``OK N`` and a
line feed first, N being its own port.

Either side is told how much room the other one has (credit), so nothing is held here but `BUFFER` bytes of what a guest
has sent, for each stream. What the host sends stays in its socket until the guest has credit and a buffer.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vq.config_layout import ConfigLayout, le64
from vq.device import Device
from vq.devices.vsock_callers import Callers
from vq.devices.vsock_stream import HEADER, HOST, NO_RECEIVE, NO_SEND, STREAM, Op, Packet, Stream
from vq.endpoint import PATH_MAX
from vq.errors import ResourceError, UsageError
from vq.virtio import DeviceId
from vq_core.device_chain import DeviceChain
from vq_core.device_queue import DeviceQueue

__all__ = ["VsockDevice"]

RECEIVEQ, TRANSMITQ = 0, 1  # the guest's; the queue of events has nothing to tell
BUFFER: Final = 256 << 10  # bytes of a guest that wait for the host's program, for each stream
STREAMS_MAX: Final = 1024
ANSWERS_MAX: Final = 256  # packets without data that wait for a buffer of the guest
DATA_MAX: Final = 64 << 10  # bytes of one packet
PACKETS_MAX: Final = 64  # for the guest in one go; then messages and other queues have their turn
CID_FIRST, CID_LAST = 3, 0xFFFFFFFE  # below are the host and what is reserved, above is "any" (5.10.4)
LONGEST: Final = "_4294967295"  # behind the path


class VsockDevice(Device):
    """A guest's sockets at Unix sockets of the host.

    Parameters
    ----------
    cid : int
        Of the guest, 3 to 4294967294: what programs in it see as their own address.
    path : str or os.PathLike
        Where programs of the host connect; ``PATH_P`` are those that the guest reaches. Up to 96 bytes.

    Raises
    ------
    UsageError
        The CID cannot be a guest's.
    ResourceError
        The path cannot be listened on, or is too long.

    Notes
    -----
    Streams end with the front-end's connection and when another driver takes over, as after a reboot of the guest; they
    do not move with a live migration.
    """

    device_id = DeviceId.VSOCK
    queues = ("receiveq", "transmitq", "eventq")
    max_bytes = DATA_MAX + HEADER.size

    class Config(ConfigLayout):
        """VIRTIO 1.3, 5.10.4."""

        guest_cid: le64

    _callers: Callers | None = None  # while they are listened for

    def __init__(self, cid: int, path: str | os.PathLike[str]) -> None:
        if not CID_FIRST <= cid <= CID_LAST:
            raise UsageError(f"a guest's CID is {CID_FIRST} to {CID_LAST}, not {cid}")
        path = os.fsdecode(path)
        size = len(os.fsencode(path + LONGEST))
        if size > PATH_MAX:
            remedy = f"with {LONGEST} behind it, it may have {PATH_MAX}; use a shorter directory"
            raise ResourceError(f"the path has {size} bytes with the longest port", path=path, remedy=remedy)
        self.config.guest_cid = self._cid = cid
        self._path = path
        self._streams: dict[tuple[int, int], Stream] = {}
        self._by_fd: dict[int, Stream] = {}
        self._ready: dict[Stream, None] = {}  # whose sockets have something for the guest, in turns
        self._answers: deque[tuple[tuple[int, int], Op, int]] = deque()
        self._spare: DeviceChain | None = None  # a buffer of the guest, for the next packet
        self._more = False  # `_flush` has ended early, and is called again
        self._ports = itertools.cycle(range(1 << 30, 1 << 31))
        self._events = select.epoll()
        self._callers = Callers(path, self._events, self._dial)
        self.watch(self._events.fileno(), self._look)

    # -- from the guest --

    def handle(self, queue: DeviceQueue) -> None:
        if queue.index == RECEIVEQ:
            self._flush()
        elif queue.index == TRANSMITQ:
            # Both at their very beginning: the driver is another one, whatever the front-end says.
            if queue.begun() and self.chains[RECEIVEQ].begun():
                self._end_streams(lambda stream: not stream.calling)
            # What is answered needs a buffer: a guest that has none is not listened to.
            while len(self._answers) < ANSWERS_MAX and (chain := next(queue, None)):
                self._take(chain)
            self._flush()

    def _take(self, chain: DeviceChain) -> None:
        """One packet of the guest."""
        if chain.readable_bytes < HEADER.size:
            chain.refuse()
            return
        packet = Packet(*HEADER.unpack(chain.read(HEADER.size)))
        data = chain.read()
        chain.complete(0)
        if packet.src_cid != self._cid or packet.dst_cid != HOST:
            return
        key = (packet.src_port, packet.dst_port)
        stream = self._streams.get(key)
        if packet.type != STREAM or packet.len != len(data):
            self._refuse(key, packet.op, stream)
        elif stream is None:
            if packet.op == Op.REQUEST and self._call(key, packet):
                return
            self._refuse(key, packet.op, None)
        else:
            stream.allowed, stream.taken = packet.buf_alloc, packet.fwd_cnt
            if stream.starved and stream.credit:
                stream.starved = False
                self._ready[stream] = None
            self._hear(stream, packet, data)

    def _call(self, key: tuple[int, int], packet: Packet) -> bool:
        """The guest calls a port of the host."""
        if len(self._streams) >= STREAMS_MAX:
            return False
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # too many files are open
            return False
        try:
            sock.connect(f"{self._path}_{key[1]}")
        except OSError:  # nobody is there, or does not come to accept
            sock.close()
            return False
        stream = self._open(Stream(sock, *key, calling=False))
        stream.allowed, stream.taken = packet.buf_alloc, packet.fwd_cnt
        self._answers.append((key, Op.RESPONSE, 0))
        self._want(stream)
        return True

    def _hear(self, stream: Stream, packet: Packet, data: bytes) -> None:
        """What a packet means to its stream."""
        match packet.op:
            case Op.RST:
                self._close(stream)
            case Op.RESPONSE if stream.calling:
                stream.calling = False
                stream.out += b"OK %d\n" % stream.key[1]
                stream.lead = len(stream.out)
                self._drain(stream)
            case Op.RW if not stream.calling and not stream.guest_done & NO_SEND:
                stream.received += len(data)
                if stream.received - stream.forwarded > BUFFER:
                    self._refuse(stream.key, packet.op, stream)
                    return
                stream.out += data
                self._drain(stream)
            case Op.SHUTDOWN if not stream.calling:
                stream.guest_done |= packet.flags & (NO_RECEIVE | NO_SEND)
                if stream.guest_done & NO_RECEIVE and not stream.host_done:
                    self._ready.pop(stream, None)
                    stream.starved = False
                    stream.host_done = NO_SEND
                    with suppress(OSError):
                        stream.sock.shutdown(socket.SHUT_RD)
                self._drain(stream)
            case Op.CREDIT_REQUEST:
                self._answers.append((stream.key, Op.CREDIT_UPDATE, 0))
            case Op.CREDIT_UPDATE:
                pass
            case _:
                self._refuse(stream.key, packet.op, stream)

    def _refuse(self, key: tuple[int, int], op: int, stream: Stream | None) -> None:
        """Reset what makes no sense; a reset is not answered."""
        if stream is not None:
            self._close(stream)
        if op != Op.RST:
            self._answers.append((key, Op.RST, 0))

    def _drain(self, stream: Stream) -> None:
        """Give the host's socket what it takes, and end what is at its end."""
        while stream.out:
            try:
                count = stream.sock.send(stream.out)
            except BlockingIOError:
                break
            except OSError:  # it does not read any more
                self._refuse(stream.key, Op.RW, stream)
                return
            del stream.out[:count]
            ours = min(count, stream.lead)
            stream.lead -= ours
            stream.forwarded += count - ours
        if not stream.out and stream.guest_done & NO_SEND:
            if stream.guest_done & NO_RECEIVE or stream.host_done:
                self._refuse(stream.key, Op.SHUTDOWN, stream)
                return
            with suppress(OSError):  # the other end has gone, which is seen by what is read
                stream.sock.shutdown(socket.SHUT_WR)
        if stream.forwarded - stream.told >= BUFFER // 4:
            stream.told = stream.forwarded
            self._answers.append((stream.key, Op.CREDIT_UPDATE, 0))
        self._want(stream)

    # -- to the guest --

    def _flush(self) -> None:
        """Fill buffers of the guest: answers first, then what host sockets have, a packet of each in turn."""
        for _ in range(PACKETS_MAX):
            if not (self._answers or self._ready) or (chain := self._buffer()) is None:
                return
            if self._answers:
                key, op, flags = self._answers.popleft()
                self._send(chain, key, op, flags)
                continue
            stream = next(iter(self._ready))
            del self._ready[stream]
            if not stream.credit:
                stream.starved = True
                self._answers.append((stream.key, Op.CREDIT_REQUEST, 0))
                continue
            try:
                data = stream.sock.recv(min(stream.credit, chain.writable_bytes - HEADER.size, DATA_MAX))
            except BlockingIOError:
                self._want(stream)
                continue
            except OSError:  # reset by the other end
                data, stream.hung = b"", True
            if data:
                stream.sent += len(data)
                self._ready[stream] = None
                self._send(chain, stream.key, Op.RW, 0, data)
            else:
                self._end_of_host(stream)
        if not self._more:
            self._more = True
            self.call(self._go_on)

    def _go_on(self) -> None:
        self._more = False
        self._flush()

    def _buffer(self) -> DeviceChain | None:
        """A buffer of the guest; it is kept until something was written to it."""
        if self._spare is None or not self._spare.alive:
            self._spare = self.chains[RECEIVEQ].pop()
        if self._spare is not None and self._spare.writable_bytes <= HEADER.size:
            self._spare.refuse()
            self._spare = None
        return self._spare

    def _send(self, chain: DeviceChain, key: tuple[int, int], op: Op, flags: int, data: bytes = b"") -> None:
        stream = self._streams.get(key)
        forwarded = 0
        if stream is not None:
            forwarded = stream.told = stream.forwarded
        packet = Packet(HOST, self._cid, key[1], key[0], len(data), STREAM, op, flags, BUFFER, forwarded & 0xFFFFFFFF)
        chain.write(HEADER.pack(*packet))
        chain.write(data)
        chain.complete()
        self._spare = None

    def _end_of_host(self, stream: Stream) -> None:
        """The host's program will send no more; if it has gone, it will not read either."""
        stream.host_done = NO_SEND | NO_RECEIVE if stream.hung else NO_SEND
        self._answers.append((stream.key, Op.SHUTDOWN, stream.host_done))
        self._drain(stream)

    # -- from the host --

    def _look(self) -> None:
        callers = self._callers
        assert callers is not None
        # The listener last: a descriptor that it brings may have the number of one that has just gone.
        for fd, events in sorted(self._events.poll(0), key=lambda found: callers.listens(found[0])):
            stream = self._by_fd.get(fd)
            if stream is not None:
                self._stir(stream, events)
            else:
                callers.dispatch(fd)
        self._flush()

    def _dial(self, sock: socket.socket, port: int) -> None:
        """A program of the host calls a port of the guest."""
        if len(self._streams) >= STREAMS_MAX or len(self._answers) >= ANSWERS_MAX:
            sock.close()
            return
        key = next(key for number in self._ports if (key := (port, number)) not in self._streams)
        self._open(Stream(sock, *key, calling=True))
        self._answers.append((key, Op.REQUEST, 0))

    def _stir(self, stream: Stream, events: int) -> None:
        """Something happened to a host socket."""
        if events & (select.EPOLLHUP | select.EPOLLERR):
            stream.hung = True
            if stream.calling:
                self._refuse(stream.key, Op.REQUEST, stream)
            elif stream.host_done:  # nothing will be read that tells
                self._end_of_host(stream)
        if stream.key not in self._streams:
            return
        if events & ~select.EPOLLOUT and not (stream.host_done or stream.calling or stream.starved):
            self._ready[stream] = None
        self._drain(stream)

    # -- streams --

    def _open(self, stream: Stream) -> Stream:
        self._streams[stream.key] = stream
        self._by_fd[stream.sock.fileno()] = stream
        self._events.register(stream.sock.fileno(), 0)
        return stream

    def _want(self, stream: Stream) -> None:
        """Watch for what can be used: data that may be passed on, room for what waits."""
        fd = stream.sock.fileno()
        deaf = stream.calling or stream.host_done or stream.guest_done & NO_RECEIVE
        wanted = 0 if deaf or stream.starved or stream in self._ready else select.EPOLLIN
        wanted |= select.EPOLLOUT if stream.out else 0
        if stream.hung:  # which would be told for ever
            if fd in self._by_fd:
                del self._by_fd[fd]
                self._events.unregister(fd)
        elif wanted != stream.watched:
            self._events.modify(fd, wanted)
            stream.watched = wanted

    def _close(self, stream: Stream) -> None:
        fd = stream.sock.fileno()
        del self._streams[stream.key]
        self._by_fd.pop(fd, None)
        self._ready.pop(stream, None)
        stream.sock.close()  # which takes it from the epoll too

    def on_stop(self, queue: DeviceQueue) -> None:
        if queue.index == RECEIVEQ:
            self._spare = None

    def _end_streams(self, which: Callable[[Stream], bool]) -> None:
        """Of what has ended no word is said any more."""
        for stream in [stream for stream in self._streams.values() if which(stream)]:
            self._close(stream)
        self._answers = deque(answer for answer in self._answers if answer[0] in self._streams)

    def on_reset(self) -> None:
        self._end_streams(lambda stream: True)
        self._spare = None

    def close(self) -> None:
        super().close()
        if self._callers is None:
            return
        self.on_reset()
        self._callers.close()
        self._callers = None
        self._events.close()
