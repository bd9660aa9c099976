"""A device of your own in Python: what it offers, its configuration space, and a handler for its queues."""

from __future__ import annotations

import logging
import os
import select
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, ClassVar, Final

from vq import virtio as v
from vq.config_layout import ConfigLayout
from vq.device_checks import check_class, check_methods, check_object, check_state, feature_mask, queue_names
from vq.errors import FrontendError, UsageError
from vq.hosted_device import HostedDevice
from vq.offer import Offer
from vq.throttle import Throttle
from vq.waker import Waker
from vq_core.device_queue import DeviceQueue
from vq_core.queue import Queue

__all__ = ["Device"]

logger = logging.getLogger(__name__)

FEATURES: Final = v.mask(
    v.VIRTIO_F_VERSION_1, v.VIRTIO_F_RING_PACKED, v.VIRTIO_F_INDIRECT_DESC, v.VIRTIO_F_EVENT_IDX, v.VHOST_F_LOG_ALL,
    v.VHOST_USER_F_PROTOCOL_FEATURES,
)  # fmt: skip
PROTOCOL_FEATURES: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_LOG_SHMFD, v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_RESET_DEVICE, v.VHOST_USER_PROTOCOL_F_STATUS,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES,
)  # fmt: skip
# What a device may assign anew.
OF_THE_OBJECT: Final = frozenset({"name", "_config", "_config_due"})


class Device(HostedDevice):
    """Base of devices in Python. A subclass sets what is listed here, and overrides `handle`.

    Attributes
    ----------
    device_id : int
        What it is, a `vq.DeviceId`; the front-end knows it already, so this is for people.
    queues : int or sequence of str
        How many virtqueues it has, or their names. Of an object: the rings of the control plane.
    features : int or iterable of int
        Feature bits of its own: a mask, or numbers of bits. What concerns rings and memory is offered anyway.
    packed : bool
        Offer the packed layout of rings beside the split one.
    max_bytes : int
        Longest request; see `vq.DeviceQueue`.
    Config : type of ConfigLayout, optional
        Its configuration space; `config` is then an object of it.
    chains : tuple of DeviceQueue
        The virtqueues by index, as `handle` gets them.

    Notes
    -----
    To be overridden: `handle`, the hooks whose names begin with ``on_``, and both of `save_state` and `load_state` if
    the state is to move. To be called: `call`, `watch`, `unwatch`, `close`, and what `channel` has for requests to the
    front-end. All other methods are called by the back-end.
    `__init__` of a subclass need not call this one's.
    Threading: all hooks are called by the control thread, one at a time, and must not wait. Chains may be completed,
    fields of `config` assigned, and `call` be called from any thread.

    Examples
    --------
    ::

        class Rng(vq.Device):
            device_id = vq.DeviceId.RNG

            def handle(self, queue):
                for chain in queue:
                    chain.write(os.urandom(chain.writable_bytes))
                    chain.complete()

        vq.serve(Rng(), socket_path="/tmp/rng.sock")
    """

    device_id: int = 0
    queues: Any = 1
    features: int | Iterable[int] = 0
    packed: bool = True
    max_bytes: int = 1 << 20
    Config: ClassVar[type[ConfigLayout] | None] = None
    chains: tuple[DeviceQueue, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._set_up()
        return self

    def _set_up(self) -> None:
        names = queue_names(self.queues)
        own = feature_mask(self.features)
        check_class(self.max_bytes, self.Config)
        self.name = type(self).__name__.lower()
        self._closed = False
        self._config_due = False
        self._config: ConfigLayout | None = None
        self._throttle = Throttle()
        self._calls: deque[Callable[[], object]] = deque()
        self._watched: dict[int, Callable[[], object]] = {}
        self._waker = Waker()
        self._report = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self.queues = [Queue(index, name, self._report) for index, name in enumerate(names)]
        self.chains = tuple(DeviceQueue(queue, self.max_bytes) for queue in self.queues)
        for fd in (self._waker.fileno(), self._report, *(queue.fileno() for queue in self.chains)):
            self._epoll.register(fd, select.EPOLLIN)
        self.requests_fd = self._epoll.fileno()
        protocol = PROTOCOL_FEATURES
        size = 0
        if self.Config is not None:
            self.config = self.Config()
            size = self.Config.SIZE
            protocol |= v.mask(v.VHOST_USER_PROTOCOL_F_CONFIG)
        if type(self).save_state is not HostedDevice.save_state:
            protocol |= v.mask(v.VHOST_USER_PROTOCOL_F_DEVICE_STATE)
        rings = FEATURES if self.packed else FEATURES & ~v.mask(v.VIRTIO_F_RING_PACKED)
        self._made = {name: value for name, value in vars(self).items() if name not in OF_THE_OBJECT}
        self.offer = Offer(rings | own, protocol, len(names), len(names), config_size=size)

    @property
    def config(self) -> Any:
        """ConfigLayout: the configuration space; assign to its fields from any thread, and the driver is told."""
        if self._config is None:
            raise AttributeError(f"{type(self).__name__} has no configuration space; give it a class Config")
        return self._config

    @config.setter
    def config(self, config: Any) -> None:
        if self.Config is None or not isinstance(config, self.Config):
            wanted = "an object of its class Config" if self.Config else "none, as it has no class Config"
            raise UsageError(f"{type(self).__name__}.config is {config!r}; it must be {wanted}")
        object.__setattr__(config, "_changed", self._config_assigned)
        before, self._config = self._config, config
        if before is not None and before.pack() != config.pack():
            self._config_assigned()

    # -- for subclasses --

    def handle(self, queue: DeviceQueue) -> None:
        """Serve the chains that wait in a queue: take some, complete them now or later, or leave them there.

        Called when the driver has made chains available. An exception breaks this queue.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method handle(self, queue)")

    def on_features(self, features: int) -> None:
        """The driver has accepted these feature bits."""

    def on_status(self, status: int) -> None:
        """The driver has changed its status byte (VIRTIO 1.3, 2.1)."""

    def on_config_written(self, names: frozenset[str]) -> None:
        """The driver has changed these fields of `config`."""

    def on_reset(self) -> None:
        """The driver has reset the device, or its front-end has gone; chains that are out are dead."""

    def on_stop(self, queue: DeviceQueue) -> None:
        """A ring is about to stop. Chains that can be completed at once are; whoever goes on takes the others anew."""

    def on_error(self, queue: DeviceQueue | None, error: Exception) -> None:
        """The code of this class has failed: `handle`, which broke the queue, or something called by the loop (None).

        It is logged already.
        """

    # -- for their users --

    def call(self, action: Callable[[], object]) -> None:
        """Have something done in the control thread soon; from any thread.

        Parameters
        ----------
        action : callable
            Called without arguments, once; never if the device is closed before. What it raises is logged, and goes to
            `on_error`.
        """
        if not self._closed:
            self._calls.append(action)
            self._waker.wake()

    def watch(self, fd: int, ready: Callable[[], object], *, writing: bool = False) -> None:
        """Call `ready` in the control thread whenever a descriptor is readable (or writable), until `unwatch`.

        Parameters
        ----------
        fd : int
            Level-triggered; it stays the caller's, who unwatches it before it is closed.
        ready : callable
            Called without arguments. If it raises, which is logged and goes to `on_error`, the descriptor is not
            watched any more.
        writing : bool
            Wait for room to write instead.

        Raises
        ------
        FileExistsError
            It is watched already.
        PermissionError
            Of this kind of file nothing can be waited for.
        """
        self._epoll.register(fd, select.EPOLLOUT if writing else select.EPOLLIN)
        self._watched[fd] = ready

    def unwatch(self, fd: int) -> None:
        """Do not look at a descriptor any more; nothing happens if nobody did."""
        if self._watched.pop(fd, None) is not None:
            with suppress(OSError):
                self._epoll.unregister(fd)

    def close(self) -> None:
        """Release all descriptors, after the last connection has ended; may be called twice.

        Raises
        ------
        UsageError
            A ring runs; nothing was released.
        """
        if self._closed:
            return
        if any(queue.size for queue in self.chains):
            raise UsageError(f"device {self.name} runs; close its back-end or server first")
        self._closed = True
        self._calls.clear()
        for queue in self.chains:
            queue.close()
        self._epoll.close()
        self._waker.close()
        os.close(self._report)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    # -- for the back-end --

    def _check(self) -> None:
        if type(self).handle is Device.handle and "handle" not in vars(self):
            raise UsageError(f"{type(self).__name__} has no method handle(self, queue), which serves its queues")
        check_methods(self, METHODS)
        check_state(type(self), HostedDevice)
        if self._closed is True:
            raise UsageError(f"the {self.name} was closed, with the server that it had; make a new one")
        check_object(self, self._made)

    def set_features(self, features: int) -> None:
        self.on_features(features)

    def set_status(self, status: int) -> None:
        self.on_status(status)

    def reset(self) -> None:
        # Called at the end of a connection too, where nothing that fails may keep the rest from being released.
        self._guarded(None, self.on_reset)

    def ring_stopping(self, index: int) -> None:
        queue = self.chains[index]
        queue.begin()
        self._guarded(None, lambda: self.on_stop(queue))
        lost = queue.stopping()
        more = self._throttle.passes(f"{queue.name} lost {lost}") if lost else None
        if more is not None:
            text = f"{lost} chains were never completed"
            logger.warning("device=%s queue=%s error=%r%s", self.name, queue.name, text, more)

    def read_config(self, offset: int, size: int) -> bytes:
        found: bytes = self.config.pack()[offset : offset + size]
        return found

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        if self.Config is None:
            raise FrontendError("SET_CONFIG", "offset", offset, f"device {self.name} has no configuration space")
        names = self.config.write(offset, data, migration=migration)
        if names:
            self._guarded(None, lambda: self.on_config_written(names))

    def serve_requests(self) -> None:
        for queue in self.chains:  # all of them: what serves one may complete chains of another
            queue.begin()
        for fd, _ in self._epoll.poll(0):
            if fd in self._watched:
                self._guarded(None, self._watched[fd], fd)
            elif fd == self._waker.fileno():
                os.eventfd_read(fd)
            elif fd == self._report:
                os.eventfd_read(fd)
                self.report()
        for _ in range(len(self._calls)):
            if self._calls:  # `close`, or who serves this device itself, leaves none
                self._guarded(None, self._calls.popleft())
        for queue in self.chains:
            if queue.waiting:
                self._guarded(queue, lambda queue=queue: self.handle(queue))  # type: ignore[misc]
                queue.publish()
        for queue in self.chains:
            queue.end()

    def _config_assigned(self) -> None:
        """Have the driver told, from any thread: once for all that is assigned until then."""
        if not self._config_due:
            self._config_due = True
            self.call(self._tell_config)

    def _tell_config(self) -> None:
        self._config_due = False  # before it is read: what is assigned from here on is told again
        self.config_changed()

    def _guarded(self, queue: DeviceQueue | None, action: Callable[[], object], fd: int | None = None) -> None:
        """Run code of the subclass; what it raises ends one queue at most."""
        try:
            action()
        except Exception as error:
            more = self._throttle.passes(f"{queue and queue.name} {error!r}")
            if more is not None:
                logger.exception("device=%s queue=%s%s", self.name, "-" if queue is None else queue.name, more)
            if queue is not None:
                queue.fail()
            if fd is not None:
                self.unwatch(fd)
            try:
                self.on_error(queue, error)
            except Exception as again:
                more = self._throttle.passes(f"on_error {again!r}")
                if more is not None:
                    logger.exception("device=%s on_error%s", self.name, more)


METHODS: Final = tuple(name for name in vars(Device) if name[0] != "_" and callable(getattr(Device, name)))
