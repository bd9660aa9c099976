"""A whole back-end in the test's own thread, as the state machines drive it: real device, engine, worker and socket.

`Hosted` says what the process may hold at any moment; `Talk` sends messages and knows which replies are due.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping

from hypothesis import HealthCheck, Phase, settings

from vhost_rig import open_fds
from vq import virtio as v
from vq.devices.blk import BlkDevice
from vq.errors import BackendError, ConnectionClosed
from vq.frontend import Frontend
from vq.hosted_device import HostedDevice
from vq.message import FRONTEND_REQUESTS, NEED_REPLY, VERSION, Message, Request, encode
from vq.payload import U64
from vq.pump import Pump
from vq.server import Server
from vq.session import Session
from vq.session_state import Postcopy
from vq_core.disk import Disk
from waiting import wait_for

DEADLINE_S = 60.0  # for anything at all, on a machine that has other work too


def machine_settings(usual: int) -> settings:
    """Settings of a state machine: so many examples in the usual profile, more in proportion in a longer one.

    To make a failure smaller takes many times as long as to find it, so that is left to the long profile.
    """
    scale = settings.default.max_examples / 100
    phases = [Phase.explicit, Phase.reuse, Phase.generate] + ([Phase.shrink] if scale > 1 else [])
    return settings(
        max_examples=max(1, round(usual * scale)), stateful_step_count=50, deadline=None, print_blob=True,
        suppress_health_check=list(HealthCheck), phases=phases,
    )  # fmt: skip


class Errors(logging.Handler):
    """Keeps what vq logs as an error: a defect of its own, whatever a peer does."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(logging.Formatter().format(record))

    def __enter__(self) -> Errors:
        logging.getLogger("vq").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("vq").removeHandler(self)


class Hosted:
    """A back-end that listens, with the threads of its device; served by `dispatch` alone.

    Parameters
    ----------
    kind
        "net": a pump of one port, which reflects packets. "postcopy": the same as destination of a postcopy migration.
        "blk": a disk that holds nothing.
    """

    def __init__(self, kind: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="vq", dir="/tmp")
        self.path = f"{self.folder}/s"
        if kind != "blk":
            pump = Pump([f"vhost:{self.path},queues=2" + (",postcopy" if kind == "postcopy" else "")])
            pump.start()
            assert pump.ports[0].backend is not None
            self.dispatch, self._close, self.backend = pump.dispatch, pump.stop, pump.ports[0].backend
        else:
            server = Server(BlkDevice(Disk(None, size=1 << 20), queues=4), path=self.path)
            assert server.backend is not None
            self.dispatch, self._close, self.backend = server.dispatch, server.close, server.backend

    def close(self) -> None:
        self._close()
        shutil.rmtree(self.folder)

    @property
    def device(self) -> HostedDevice:
        return self.backend.device

    @property
    def session(self) -> Session | None:
        return self.backend._session

    def owned(self) -> set[int]:
        """Every descriptor that a part of the present connection knows of; some may be closed already."""
        backend = self.backend
        parts = (backend._connection, backend._session, backend._applier, backend.channel, backend._inband)
        found: set[int] = set()
        _collect(parts, "", found, {id(backend), id(self.device)})
        return found

    def serve(self) -> None:
        """Dispatch until there is nothing to do."""
        end = time.monotonic() + DEADLINE_S
        while True:
            self.dispatch(0)
            poll = select.poll()
            poll.register(self.backend.fileno(), select.POLLIN)
            if not poll.poll(0):
                return
            assert time.monotonic() < end, "the back-end is never done"


def _collect(value: object, name: str, found: set[int], seen: set[int]) -> None:
    """Look for descriptors in an object and all that it holds: by their names, and in what has a `fileno`."""
    if isinstance(value, int):
        if name.endswith(("_fd", "_fds", "fds")):
            found.add(value)
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (socket.socket, select.epoll)) or type(value).__module__.startswith("vq_core"):
        if hasattr(value, "fileno"):
            found.add(value.fileno())
    elif isinstance(value, Mapping):
        for one in value.values():
            _collect(one, name, found, seen)
    elif isinstance(value, (list, tuple, set, deque)):
        names = getattr(value, "_fields", [name] * len(value))
        for one_name, one in zip(names, value, strict=True):
            _collect(one, one_name, found, seen)
    elif type(value).__module__.split(".")[0] == "vq":
        slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
        for attribute in [*getattr(value, "__dict__", ()), *slots]:
            _collect(getattr(value, attribute, None), attribute, found, seen)


class Things:
    """What a front-end sends along, one of each kind, and how often the process has mapped which of it."""

    def __init__(self) -> None:
        self.memory = self._file()
        self.log = self._file()
        self.area = self._file()
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.pipe = os.pipe()
        self.sockets = socket.socketpair()
        self.folder = os.open("/tmp", os.O_RDONLY | os.O_CLOEXEC)

    @staticmethod
    def _file() -> int:
        fd = os.memfd_create("thing", os.MFD_CLOEXEC)
        os.ftruncate(fd, 64 * 4096)
        return fd

    @property
    def fds(self) -> dict[str, int]:
        return {
            "memory": self.memory, "log": self.log, "area": self.area, "event": self.event, "pipe out": self.pipe[0],
            "pipe in": self.pipe[1], "socket": self.sockets[1].fileno(), "folder": self.folder,
        }  # fmt: skip

    def close(self) -> None:
        for end in self.sockets:
            end.close()
        for fd in (self.memory, self.log, self.area, self.event, *self.pipe, self.folder):
            os.close(fd)


def mappings() -> dict[int, int]:
    """How often this process has mapped each file without a name in the file system, by inode."""
    found: dict[int, int] = {}
    with open("/proc/self/maps") as maps:
        for line in maps:
            words = line.split(maxsplit=5)
            if len(words) == 6 and words[5].startswith("/memfd:"):
                found[int(words[4])] = found.get(int(words[4]), 0) + 1
    return found


class Talk:
    """A connection on which every reply must come exactly when it is due."""

    def __init__(self, hosted: Hosted) -> None:
        self.hosted = hosted
        self.frontend = Frontend.connect(hosted.path, timeout=DEADLINE_S)
        self.open = True
        hosted.serve()

    def close(self) -> None:
        self.frontend.close()
        self.open = False
        self.hosted.serve()

    def say(
        self, request: int, body: bytes, fds: list[int], *, ack: bool = False, pieces: int = 1
    ) -> tuple[str, Message | None]:
        """Send a message and have it served.

        Returns
        -------
        tuple
            What became of it: "closed", "answered" (its own reply), "done" or "refused" (by its ack), or "silent".
        """
        encoded = encode(request, body, VERSION | NEED_REPLY if ack else VERSION)
        self._transmit(encoded, fds, pieces)
        if self.hosted.session is None:
            self._ended()
            return "closed", None
        due = self._due(request, ack)
        try:
            message = self.frontend.receive(DEADLINE_S if due else 0)
        except BackendError as nothing:
            if due or nothing.field != "time":
                raise AssertionError(f"{due or 'no'} reply is due; {nothing}") from nothing
            return "silent", None
        except ConnectionClosed:
            raise AssertionError("the connection is closed, and the back-end believes it open") from None
        assert due, f"no reply is due, but one came: {message!r}"
        assert message.request == request
        rule = FRONTEND_REQUESTS.get(request)
        if due == "own":
            assert rule is not None
            return "answered", message
        # The answer to a request that is in no table arrives as bytes.
        failed = U64.decode(message.payload) if rule is None else message.payload
        assert failed in (0, 1)
        assert not message.fds
        return ("refused" if failed else "done"), message

    def send(self, data: bytes, fds: list[int]) -> None:
        """Send bytes that are no message, or a part of one, and have them served."""
        self._transmit(data, fds, 1)
        if self.hosted.session is None:
            self._ended()

    def _transmit(self, data: bytes, fds: list[int], pieces: int) -> None:
        step = max(1, -(-len(data) // pieces))
        try:
            for at in range(0, len(data), step):
                self.frontend.send_bytes(data[at : at + step], fds if at == 0 else [])
                self.hosted.serve()
        except ConnectionClosed:
            pass

    def _ended(self) -> None:
        """The back-end has closed: nothing comes any more."""
        self.open = False
        try:
            message = self.frontend.receive(1)
            raise AssertionError(f"a reply came before the end: {message!r}")
        except ConnectionClosed:
            pass
        except BackendError as problem:
            raise AssertionError(f"the end came in the middle: {problem}") from problem
        self.frontend.close()

    def _due(self, request: int, ack: bool) -> str:
        """Which reply is due now that the message has been served without an end: "own", "ack", or none."""
        session = self.hosted.session
        assert session is not None
        rule = FRONTEND_REQUESTS.get(request)
        acks = ack and v.has(session.protocol_features, v.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        if rule is None:
            return "ack" if acks else ""
        if rule.reply is not None and (request != Request.SET_LOG_BASE or self.logs_by_fd()):
            return "own"
        if session.postcopy is Postcopy.TABLE_SENT and rule.postcopy_reply is not None:
            return "own"
        return "ack" if acks or (ack and rule.ack_always) else ""

    def logs_by_fd(self) -> bool:
        """Whether SET_LOG_BASE has a reply of its own; without LOG_SHMFD it is an older message, which has none."""
        session = self.hosted.session
        return session is not None and v.has(session.protocol_features, v.VHOST_USER_PROTOCOL_F_LOG_SHMFD)


class Patience:
    """How long closing may take a thread; much less once it has failed, so that a failure is made small soon."""

    seconds = 5.0


def settled(serve: Callable[[], None], expected: Callable[[], dict[int, str]]) -> None:
    """Insist that the process comes to hold exactly these descriptors."""
    try:
        wait_for(lambda: (serve(), open_fds() == expected())[1], Patience.seconds)
    except AssertionError:
        Patience.seconds = 0.2
        wanted, now = expected(), open_fds()
        more = {fd: name for fd, name in now.items() if wanted.get(fd) != name}
        less = {fd: name for fd, name in wanted.items() if now.get(fd) != name}
        raise AssertionError(f"descriptors that should not be there: {more}; that should: {less}") from None
