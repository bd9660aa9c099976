"""The back-end: one device behind one socket, for any event loop.

A back-end waits for a front-end (listening, or connecting again and again), serves one connection at a time by a
`Session`, and forgets everything of it when it ends; then it waits for the next.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from vq import virtio as v
from vq.apply import Applier
from vq.backend_channel import BackendChannel
from vq.closing import Closing
from vq.endpoint import Connector, Listener, adopt, listen
from vq.errors import ConnectionClosed, FrontendError, GuestError, PeerError, ResourceError, UsageError, VqError
from vq.hosted_device import HostedDevice, check_hosted
from vq.inband import Inband
from vq.message import BackendRequest
from vq.payload import Iotlb
from vq.postcopy import PATIENCE_S
from vq.reaper import Reaper
from vq.session import Session
from vq.state_transfer import StateTransfer
from vq.throttle import Throttle
from vq.translation import Translation
from vq.transport import Connection
from vq_core.timer import Timer

__all__ = ["Backend"]

logger = logging.getLogger(__name__)

MESSAGES_MAX: Final = 64  # served in one go, so that one front-end's flood does not delay the others
SERVE_S: Final = 0.005  # and no more of them after this
IOTLB_MISS: Final = 1  # type of the question for a translation
UNPOSTED_S: Final = 4.0  # Linux fills its receive ring as soon as the interface is up
UNCLOSED_MAX: Final = 64  # descriptors of one front-end that hang in close()
SENTENCE_S: Final = 30.0  # until a front-end may come after one that held us up
PAUSE_S: Final = 0.1  # until the next accept after one that failed for want of descriptors


class Backend(Closing):
    """Hosts a device on a vhost-user socket.

    Parameters
    ----------
    device
        The device; its queues live as long as it, whoever is connected.
    path
        Socket path.
    client
        Connect to `path` (and reconnect) instead of listening on it.
    fd
        An inherited socket, listening or connected, instead of `path`; never unlinked.
    mode
        Permission bits of the socket file when listening.
    changed
        Called after a ring was started, stopped, enabled or disabled, and when a connection begins or ends.

    Attributes
    ----------
    one_connection : bool
        It was given a connected socket: when that ends, nobody comes after.
    channel : BackendChannel
        Our own requests to the front-end; the device has it too.
    before_reply : callable
        Called before each reply, which means that the data plane has obeyed: what `changed` announced is due by then.

    Raises
    ------
    UsageError
        `device` is no object of a device, not exactly one of `path` and `fd` is given, or `fd` is no Unix stream
        socket; or the device offers an IOMMU that its queues would not heed.
    ResourceError
        The socket cannot be made: it is in use, there is no permission, the path is too long.

    Notes
    -----
    Event loops wait until `fileno()` is readable and call `dispatch()`. Threading: one control thread.
    Spec: vhost-user, "Communication", "Back-end program conventions".
    """

    def __init__(
        self,
        device: HostedDevice,
        *,
        path: str | os.PathLike[str] | None = None,
        client: bool = False,
        fd: int | None = None,
        mode: int | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        check_hosted(device)
        if (path is None) == (fd is None):
            raise UsageError("a back-end needs either the path of a socket or an inherited descriptor (fd)")
        if device.requests_fd is not None and v.has(device.offer.features, v.VIRTIO_F_ACCESS_PLATFORM):
            reason = "queues that no worker serves (requests_fd) know of no IOMMU; leave ACCESS_PLATFORM out"
            raise UsageError(f"device {device.name}: {reason}")
        self.device = device
        self.path = os.fsdecode(path) if path is not None else f"fd {fd}"
        self.connections = 0
        self.before_reply: Callable[[], None] = lambda: None
        self._changed = changed
        self._listener: Listener | None = None
        self._connector: Connector | None = None
        self._connection: Connection | None = None
        self._unposted_since: float | None = None
        self._told_unposted = False
        self._session: Session | None = None
        self._applier: Applier | None = None
        self._translation: Translation | None = None
        self.one_connection = False
        self._throttle = Throttle()
        self.closed = False
        self._dispatching = self._ending = False
        device.settle = self._settle
        device.report = self.report
        self._epoll = select.epoll()
        self.channel = BackendChannel(self._epoll, self.warn)
        device.channel = self.channel
        self._inband = Inband(self._epoll, self.channel)
        self._transfer = StateTransfer(self._epoll, self.warn)
        self._timer = Timer()
        self._reaper = Reaper()
        self._epoll.register(self._timer.fileno(), select.EPOLLIN)
        if device.requests_fd is not None:
            self._epoll.register(device.requests_fd, select.EPOLLIN)
        try:
            if fd is not None:
                taken = adopt(fd)
                if isinstance(taken, Connection):
                    self.one_connection = True
                    self._begin(taken)
                else:
                    self._listener = taken
            elif client:
                assert path is not None
                self._connector = Connector(path)
                self._connect()
            else:
                assert path is not None
                self._listener = listen(path, mode=mode)
            if self._listener is not None:
                self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor to wait for: readable when `dispatch` has something to do."""
        return self._epoll.fileno()

    @property
    def state(self) -> str:
        """One of listening, connecting, connected (no ring started), running and closed."""
        if self._session is not None:
            return "connected" if self._session.suspended else "running"
        if self.closed or (self._listener is None and self._connector is None):
            return "closed"
        return "listening" if self._listener is not None else "connecting"

    @property
    def features(self) -> int:
        """Acknowledged virtio features of the present connection; 0 without one."""
        return self._session.features if self._session is not None else 0

    def dispatch(self) -> None:
        """Serve what is there, without waiting; never raises for what a peer did.

        Raises
        ------
        UsageError
            A hook of the device, or `changed`, calls it: what it is called from is not done yet.
        """
        if self._dispatching:
            raise UsageError(f"device {self.device.name}: dispatch was called by what it has called; return from that")
        self._dispatching = True
        try:
            with self._reaper.active():
                self._dispatch()
        finally:
            self._dispatching = False

    def _dispatch(self) -> None:
        found = dict(self._epoll.poll(0))
        # The front-end of before may be coming again: its old connection is read to its end first.
        leaving = self._connection is not None and found.get(self._connection.fileno(), 0) & select.EPOLLHUP
        for fd, events in found.items():
            if self.closed:  # by what was called
                return
            if fd == self._timer.fileno():
                self._timer.clear()
                self._on_timer()
                self.check()
            elif self._listener is not None and fd == self._listener.fileno():
                if not leaving:
                    self._accept()
            elif self._connection is not None and fd == self._connection.fileno():
                self._serve(self._connection, events)
            elif fd == self.channel.fileno():
                self.channel.dispatch()
                self.check()
            elif fd == self.device.requests_fd:
                self._serve_requests()
            elif self._translation is not None and fd in (self._translation.fileno(), self._translation.timer.fileno()):
                self._translate_again(timed=fd == self._translation.timer.fileno())
            elif not self._inband.dispatch(fd) and self._transfer.dispatch(fd) and self._connection is not None:
                self._serve(self._connection, 0)  # an answer may have waited for this

    def check(self) -> None:
        """End the connection if the front-end truncated memory or dirty log under us, or makes signals to it last."""
        if self._applier is not None and self._applier.hopeless:
            self._end("a page of the migrating guest did not come")
            reason = f"the front-end let a worker wait {PATIENCE_S:.0f} s for a page of its guest, which is lost"
            self._look_away(f"{reason}; none may come for {SENTENCE_S:.0f} s", SENTENCE_S)
        elif self._applier is not None and self._applier.lost:
            reason = "the front-end truncated the memory that it shares; keep memory files at their size"
            self.warn(reason)
            self._end(reason)
        elif self._applier is not None and self._applier.muted:
            self._end("too many wait for the front-end's call or err descriptors")
            reason = f"signals to the front-end took too long; none may come for {SENTENCE_S:.0f} s"
            self._look_away(reason, SENTENCE_S)
        elif self.channel.broken and v.has(self.features, v.VIRTIO_F_ACCESS_PLATFORM):
            self._end("without a back-end channel no address can be asked for")

    def _wake(self) -> None:
        """Have `dispatch` called soon, from any thread."""
        self._timer.set(0)

    def warn(self, text: str) -> None:
        """Log what a peer or guest did wrong; one that does it again and again does not fill the log.

        Parameters
        ----------
        text
            What happened; `Throttle` says how often.
        """
        more = self._throttle.passes(text)
        if more is not None:
            logger.warning("device=%s error=%r%s", self.device.name, text, more)

    def report(self) -> None:
        """Say which queues have been broken by their driver, and end a connection that cannot go on."""
        for queue in self.device.queues:
            report = queue.poll_report()
            if report is not None:
                head, cause, section = report
                self.warn(str(GuestError(queue.index, head, f"({queue.name}) {cause}", section)))
        self.check()

    def watch(self) -> bool:
        """Warn once of a connection that runs and whose guest has posted no receive buffer for a while.

        Returns
        -------
        bool
            Whether another look in a second is worth it.
        """
        if self._session is None or self._told_unposted:
            return False
        receiveqs = [queue for queue in self.device.posted_queues if queue.live]
        if not receiveqs or any(queue.posted for queue in receiveqs):
            self._unposted_since = None
            return not receiveqs
        now = time.monotonic()
        if self._unposted_since is None:
            self._unposted_since = now
        if now - self._unposted_since > UNPOSTED_S:
            self._told_unposted = True
            self.warn(
                f"{receiveqs[0].name} has run for {UNPOSTED_S:.0f} s and the guest has posted no buffer: "
                "its interface is down, or its memory is not shared; QEMU needs share=on"
            )
        return not self._told_unposted

    def disconnect(self) -> None:
        """End the present connection; the back-end goes on waiting for the next."""
        self._end("closed by us")

    def close(self) -> None:
        """End the connection, stop listening, release everything; may be called twice."""
        if self.closed:
            return
        self.closed = True
        self._end("closed by us")

    def _release(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self.channel.close()
        self._reaper.stop()
        self._timer.close()
        self._epoll.close()

    # -- connections --

    def _accept(self) -> None:
        assert self._listener is not None
        if self._reaper.busy:
            self._look_away("what a front-end left behind cannot be closed; it takes no other until then")
            return
        try:
            connection = self._listener.accept()
        except ResourceError as error:
            self._look_away(str(error))
            return
        if connection is None:
            return
        if self._connection is not None:
            self.warn("a second front-end was refused; one is connected already")
            connection.close()
            return
        self._begin(connection)

    def _look_away(self, reason: str, pause: float = PAUSE_S) -> None:
        """Do not accept for a moment: the connection that waits would wake us again at once."""
        self.warn(reason)
        if self._listener is not None:
            with suppress(FileNotFoundError):  # we look away already
                self._epoll.unregister(self._listener.fileno())
        self._timer.set(pause)

    def _on_timer(self) -> None:
        if self._connector is not None and self._connection is None:
            self._connect()
        elif self._listener is not None:
            with suppress(FileExistsError):
                self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def _connect(self) -> None:
        assert self._connector is not None
        due = self._connector.next_attempt_in() <= 0 and not self._reaper.busy
        connection = self._connector.attempt() if due else None
        if connection is not None:
            self._begin(connection)
        else:
            self._timer.set(max(self._connector.next_attempt_in(), PAUSE_S if self._reaper.busy else 0))

    def _begin(self, connection: Connection) -> None:
        self._connection = connection
        self._applier = Applier(
            self.device,
            self._changed,
            self.warn,
            self._give_channel,
            self._inband,
            self._wake,
            self._transfer,
            self._translate,
        )
        self._session = Session(self.device.offer, self._applier, self.warn)
        self.channel.begin(self._session)
        for queue in self.device.queues:
            queue.unmute()
        self._unposted_since = None
        self._told_unposted = False
        self.connections += 1
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        logger.info("device=%s connected=%s", self.device.name, self.path)
        self._changed()

    def _end(self, reason: str) -> None:
        """Forget the connection and everything that came by it."""
        if self._ending:  # a hook that is told of the end calls this too; what it asked for is done below
            return
        self._ending = True
        try:
            self._forget(reason)
        finally:
            self._ending = False
        if self.closed and not self._epoll.closed:
            self._release()

    def _forget(self, reason: str) -> None:
        connection, session, applier = self._connection, self._session, self._applier
        self._connection = self._session = self._applier = None
        with self._reaper.active():
            self.channel.end()
            if session is not None:
                session.close()
                with self._surviving():
                    self.device.reset()
            self._inband.close()
            self._transfer.forget()
            if applier is not None:
                applier.close()
            if connection is not None:
                logger.info("device=%s disconnected=%r", self.device.name, reason)
                self._epoll.unregister(connection.fileno())
                connection.close()
                self._changed()
        if self._connector is not None and not self.closed and connection is not None:
            self._connector.lost()
            self._timer.set(self._connector.next_attempt_in())

    # -- an IOMMU --

    def _translate(self, translation: Translation | None) -> None:
        """Wait for what is missing in `translation`; for nothing any more with None."""
        if self._translation is not None:
            for fd in (self._translation.fileno(), self._translation.timer.fileno()):
                self._epoll.unregister(fd)
        self._translation = translation
        if translation is not None:
            for fd in (translation.fileno(), translation.timer.fileno()):
                self._epoll.register(fd, select.EPOLLIN)

    def _translate_again(self, *, timed: bool) -> None:
        """Go on where something is missing; `timed`: where answers are."""
        with self._ending_on_failure():
            if timed and self._applier is not None:
                self._applier.ask_again()
            self._ask()

    def _ask(self) -> None:
        """Ask the front-end for the translations that somebody misses."""
        translation = self._translation
        if translation is None:
            return
        if not self.channel.can_send(BackendRequest.IOTLB_MSG):
            translation.set_aside()  # updates may come unasked, and the channel later
            return
        try:
            for iova, perm in translation.take():
                self.channel.send(BackendRequest.IOTLB_MSG, Iotlb(iova, 0, 0, perm, IOTLB_MISS))
        except VqError as error:
            self.warn(str(error))

    def _serve(self, connection: Connection, events: int) -> None:
        session = self._session
        assert session is not None
        with self._ending_on_failure():
            if events & select.EPOLLOUT:
                connection.flush()
            if session.owing:
                if events & (select.EPOLLHUP | select.EPOLLERR):
                    raise ConnectionClosed("the peer closed the connection before it was answered")
                self._reply(connection, session, session.resume())
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                end = time.monotonic() + SERVE_S
                for _ in range(MESSAGES_MAX):
                    message = None if session.owing else connection.receive()
                    if message is None:
                        break
                    logger.debug("device=%s message=%r", self.device.name, message)
                    self._reply(connection, session, session.receive(message))
                    if self._reaper.busy > UNCLOSED_MAX:
                        limit = f"at most {UNCLOSED_MAX} may take long"
                        raise FrontendError(message.name, "fds that cannot be closed", self._reaper.busy, limit)
                    if time.monotonic() > end:
                        break
            wanted = 0 if session.owing else select.EPOLLIN
            self._epoll.modify(connection.fileno(), wanted | (select.EPOLLOUT if connection.wants_write else 0))
            if self.device.requests_fd is not None:
                self.device.serve_requests()
            self.channel.flush()
            self._ask()
            self.check()

    @contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """End the connection for whatever goes wrong inside."""
        try:
            yield
        except ConnectionClosed as end:
            self._end(str(end))
        except PeerError as error:
            self.warn(str(error))
            self._end("protocol error")
        except (VqError, OSError) as error:
            self.warn(str(error))
            self._end("could not go on")
        except Exception as error:
            # A defect of ours or of a device's hook ends this connection, not the process.
            self._log_defect(error)
            self._end("internal error")

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Go on, whatever a hook of the device raises."""
        try:
            yield
        except Exception as error:
            self._log_defect(error)

    def _log_defect(self, error: Exception) -> None:
        """Log where it came from; a front-end that knows how to provoke it does not fill the log."""
        more = self._throttle.passes(f"defect {error!r}")
        if more is not None:
            logger.error("device=%s%s", self.device.name, more, exc_info=error)

    def _reply(self, connection: Connection, session: Session, reply: bytes | None) -> None:
        if self._connection is not connection:
            raise ConnectionClosed("closed by us")  # in a hook
        if reply is not None:
            self.before_reply()
            connection.send(reply, session.reply_fds)

    def _serve_requests(self) -> None:
        try:
            self.device.serve_requests()
        except Exception as error:
            self._log_defect(error)
            self._end("internal error")

    def _settle(self) -> None:
        self._changed()
        self.before_reply()

    def _give_channel(self, fd: int) -> None:
        self.channel.give(fd)
        self.device.channel_given()
