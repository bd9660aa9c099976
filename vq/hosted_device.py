"""What every device is to its back-end: what it offers, its queues, and hooks for what the front-end says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from vq.backend_channel import BackendChannel
from vq.errors import FrontendError, UsageError
from vq.offer import Offer
from vq_core.queue import Queue

__all__ = ["HostedDevice"]


class HostedDevice:
    """Base of all devices: subclasses set the attributes and override the hooks that they need.

    Attributes
    ----------
    name : str
        For people: log lines and errors.
    offer : Offer
        What every front-end that connects is offered; never shrinks.
    queues : sequence of vq_core.queue.Queue
        The virtqueues by index; as many as `offer.queue_count`.
    posted_queues : sequence of vq_core.queue.Queue
        Those that a healthy driver fills with buffers soon after their start; a warning says so if it does not.
    in_order : bool
        Requests are completed in order and none outlives a crash, so that a ring resumes at its used index.
    report_fd : int or None
        Eventfd that is readable when a queue has been broken by its driver; who hosts the device waits for it.
    channel : BackendChannel
        Requests of the device to the front-end; its back-end sets it.
    requests_fd : int or None
        Readable when `serve_requests` has something to do; for queues that no worker serves.
    settle : callable
        The device calls it after it has changed which queues take and give packets; those who send to them know it
        when it returns.

    report : callable
        Says which queues have been broken; for devices that wait for that themselves, and have no `report_fd`.

    Notes
    -----
    Threading: hooks are called by the control thread, one at a time.
    What a hook raises ends the connection; rings stop and memory goes all the same.
    """

    name: str
    offer: Offer
    queues: Sequence[Queue]
    posted_queues: Sequence[Queue] = ()
    in_order = False
    report_fd: int | None = None
    channel: BackendChannel | None = None
    requests_fd: int | None = None
    settle: Callable[[], None] = staticmethod(lambda: None)
    report: Callable[[], None] = staticmethod(lambda: None)

    def config_changed(self) -> None:
        """Tell the front-end that the configuration space has changed; the device calls it after that."""
        if self.channel is not None:
            self.channel.config_changed()

    def start(self) -> None:
        """Begin to serve the queues; called once, before any front-end comes."""

    def close(self) -> None:
        """Release everything, after the last connection has ended; may be called twice."""

    def set_features(self, features: int) -> None:
        """The front-end acknowledged these virtio features (SET_FEATURES)."""

    def set_status(self, status: int) -> None:
        """The driver's device status byte changed (SET_STATUS)."""

    def set_mtu(self, mtu: int) -> None:
        """The front-end set the MTU, 68 to 65535 bytes (NET_SET_MTU)."""

    def send_rarp(self, mac: bytes) -> None:
        """Announce a MAC address to the network (SEND_RARP)."""

    def ring_starting(self, index: int) -> None:
        """A ring is about to start; a ResourceError ends the connection instead."""

    def ring_stopping(self, index: int) -> None:
        """A ring is about to stop: the last moment to use buffers of it in this thread."""

    def ring_stopped(self, index: int) -> None:
        """A ring has stopped: nothing of it is under way any more, and the front-end has not been told yet."""

    def channel_given(self) -> None:
        """The front-end has given a channel for our own requests (SET_BACKEND_REQ_FD)."""

    def reset(self) -> None:
        """Bring internal state back to its beginning (RESET_DEVICE); all rings are stopped."""

    def save_state(self) -> bytes:
        """Everything that a device of the same kind needs to go on elsewhere (SET_DEVICE_STATE_FD); all rings stand."""
        raise UsageError(f"device {self.name} has no state to save")

    def load_state(self, state: bytes) -> None:
        """Take over what `save_state` gave elsewhere; raises VqError, and changes nothing, if anything is wrong."""
        raise UsageError(f"device {self.name} has no state to load")

    def shared_object(self, uuid: bytes) -> int | None:
        """The descriptor of an object that the device shares (GET_SHARED_OBJECT), which stays its own; or None."""
        return self.channel.objects.find(uuid) if self.channel is not None else None

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space from `offset`, which lie inside it (GET_CONFIG)."""
        return bytes(size)

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """Write to the configuration space (SET_CONFIG); raises FrontendError for read-only fields."""
        raise FrontendError("SET_CONFIG", "offset", offset, f"device {self.name} has no writable field")

    def serve_requests(self) -> None:
        """Serve some of what waits in queues that no worker serves, and ask to be woken for the rest.

        Called when `requests_fd` is readable, and after messages, which may have started or enabled such a queue.
        """

    def _check(self) -> None:
        """Refuse what cannot be served as it was left by its class or `__init__`; raises UsageError."""


HOOKS: Final = tuple(name for name in vars(HostedDevice) if name[0] != "_" and callable(getattr(HostedDevice, name)))


def check_hosted(device: object) -> None:
    """Refuse what is no device: its class, or something else.

    Raises
    ------
    UsageError
        It is not a `HostedDevice`, or something that it has hides what its base has, or it is served already.
    """
    if isinstance(device, type):
        raise UsageError(f"{device.__name__} is a class; give an object of it: {device.__name__}()")
    if not isinstance(device, HostedDevice):
        raise UsageError(f"{device!r} is of type {type(device).__name__}; give an object of a vq.Device")
    for name in HOOKS:
        if not callable(getattr(device, name)):
            what = f"{type(device).__name__}.{name} is {getattr(device, name)!r}"
            raise UsageError(f"{what}, which hides a method of its base; take another name")
    if device.channel is not None and not device.channel.closed:
        raise UsageError(f"device {device.name} is served by another back-end; give each its own object")
    device._check()
