"""From a PORT argument to an open port: the vq_core object, and for vhost the back-end that serves its socket."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from vq import virtio as v
from vq.backend import Backend
from vq.devices.net import ControlledNetDevice, NetDevice
from vq.errors import ResourceError, UsageError
from vq.inherited import find_fd
from vq.ports import PortSpec
from vq.postcopy import check_userfault
from vq_core.port import Port
from vq_core.ports.gen import GenPort
from vq_core.ports.null import NullPort

__all__ = ["OpenPort", "descriptors", "lanes_of", "open_port"]


class OpenPort:
    """A port of a pump, open.

    Attributes
    ----------
    name, kind : str
    port : vq_core.port.Port
    backend : Backend or None
        For a vhost port.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        port: Port,
        *,
        backend: Backend | None = None,
        close: Callable[[], None] | None = None,
        set_carrier: Callable[[bool], None] | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.port = port
        self.backend = backend
        self._close = close
        self._set_carrier = set_carrier
        self._carrier: bool | None = None

    @property
    def finished(self) -> bool:
        """Whether no packet will ever come from this port again."""
        return not self.port.sources or bool(self.port.finished)

    @property
    def error(self) -> str | None:
        """Why the port has ended by itself, or what was wrong with its file; None if nothing was."""
        return getattr(self.port, "error", None)

    def follow(self, carrier: bool) -> None:
        """Show the host or guest whether a guest is at the other end: the carrier of a TAP, the link of a guest."""
        if self._set_carrier is not None and carrier != self._carrier:
            self._carrier = carrier
            with suppress(OSError):  # the interface was deleted: `error` says so
                self._set_carrier(carrier)

    def close(self) -> None:
        """Release what the port holds of the system; its endpoints are nobody's by now."""
        if self.backend is not None:
            self.backend.close()
        if self._close is not None:
            self._close()

    def snapshot(self) -> dict[str, Any]:
        """Kind, state and counters."""
        result: dict[str, Any] = {"kind": self.kind}
        if self.backend is None:
            result["state"] = "finished" if self.port.sources and self.finished else "open"
        else:
            result["state"] = self.backend.state
            result["connections"] = self.backend.connections
            result["features"] = v.feature_names(self.backend.features, v.DeviceId.NET)
        if self.error is not None:
            result["error"] = self.error
        result.update(self.port.snapshot())
        if self.backend is not None:
            result["queues"] = [
                {"name": queue.name, **queue.snapshot()} for queue in self.backend.device.queues if queue.num
            ]
            if isinstance(self.backend.device, ControlledNetDevice):
                result["control"] = self.backend.device.snapshot()
        return result


def _open_vhost(spec: PortSpec, lanes: int, report_fd: int, changed: Callable[[], None]) -> OpenPort:
    if spec.flag("postcopy"):
        check_userfault()
    pairs, mtu, packed = spec.number("queues"), spec.maybe_number("mtu"), spec.get("layout") == "packed"
    slots = spec.get("slots") == "on"
    device: NetDevice
    set_carrier = None
    if spec.flag("control"):
        mac = spec.get("mac")
        device = controlled = ControlledNetDevice(
            spec.name, pairs=pairs, report_fd=report_fd, mtu=mtu, packed=packed, slots=slots,
            mac=bytes.fromhex(mac.replace(":", "")) if isinstance(mac, str) else None,
            speed=spec.maybe_number("speed"),
        )  # fmt: skip
        set_carrier = controlled.set_link
    else:
        device = NetDevice(
            spec.name, pairs=pairs, report_fd=report_fd, mtu=mtu, packed=packed, slots=slots,
            postcopy=spec.flag("postcopy"), single_queues=spec.get("queue-num") == "queues",
        )  # fmt: skip
    try:
        if spec.inherited:
            backend = Backend(device, fd=find_fd(spec.inherited), changed=changed)
        else:
            client, mode = spec.flag("client"), spec.maybe_number("mode")
            backend = Backend(device, path=spec.target, client=client, mode=mode, changed=changed)
    except BaseException:
        device.close()
        raise
    return OpenPort(spec.name, spec.kind, device.port, backend=backend, close=device.close, set_carrier=set_carrier)


def _open_tap(spec: PortSpec, lanes: int, report_fd: int, changed: Callable[[], None]) -> OpenPort:
    from vq import netlink  # pyroute2 is slow to import
    from vq_core.ports.tap import TapPort

    try:
        port = TapPort(spec.name, spec.target, queues=spec.number("queues"))
    except OSError as error:
        raise ResourceError(
            "cannot open the TAP", errno=error.errno or 0, path=spec.target, remedy=_tap_remedy(error)
        ) from error
    try:
        netlink.configure(port.ifname, mtu=spec.maybe_number("mtu"), up=True)
    except BaseException:
        port.close()
        raise
    return OpenPort(spec.name, spec.kind, port, close=port.close, set_carrier=port.set_carrier)


def _tap_remedy(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "run with CAP_NET_ADMIN, or make it for your user: ip tuntap add NAME mode tap user $(id -un)"
    if error.errno in (errno.ENOENT, errno.ENODEV):
        return "load the tun module (modprobe tun); in a container, pass /dev/net/tun in"
    if error.errno == errno.EBUSY:
        return "another process uses it; stop that or choose another name"
    if error.errno == errno.EINVAL:
        return (
            "an interface of that name is no TAP, or was made without multi_queue; choose another name or make it anew"
        )
    if error.errno == errno.E2BIG:
        return "an interface has at most 256 queues; ask for fewer"
    return "see ip -details link show"


def _open_pcap(spec: PortSpec, lanes: int, report_fd: int, changed: Callable[[], None]) -> OpenPort:
    from vq_core.ports.pcap import PcapPort

    try:
        if spec.flag("write"):
            port = PcapPort(spec.name, spec.target, write=True, snaplen=spec.number("snaplen"))
        else:
            port = PcapPort(spec.name, spec.target, speed=spec.real("speed"), loop=spec.number("loop"))
    except OSError as error:
        remedy = "check the path and its permissions"
        raise ResourceError(
            "cannot open the capture file", errno=error.errno or 0, path=spec.target, remedy=remedy
        ) from error
    return OpenPort(spec.name, spec.kind, port, close=port.close)


def _open_null(spec: PortSpec, lanes: int, report_fd: int, changed: Callable[[], None]) -> OpenPort:
    return OpenPort(spec.name, spec.kind, NullPort(spec.name, copy=spec.flag("copy"), endpoints=lanes))


def _open_gen(spec: PortSpec, lanes: int, report_fd: int, changed: Callable[[], None]) -> OpenPort:
    count, rate = spec.maybe_number("count"), spec.maybe_number("rate")
    # Both are said of the whole port, so one endpoint keeps them.
    endpoints = lanes if count is None and rate is None else 1
    port = GenPort(spec.name, spec.number("size"), count, rate, endpoints)
    return OpenPort(spec.name, spec.kind, port, close=port.close)


OPENERS: Final[dict[str, Callable[[PortSpec, int, int, Callable[[], None]], OpenPort]]] = {
    "vhost": _open_vhost,
    "tap": _open_tap,
    "pcap": _open_pcap,
    "null": _open_null,
    "gen": _open_gen,
}


def descriptors(spec: PortSpec) -> tuple[int, int]:
    """How many descriptors a port takes to be open, and how many at most with a peer that uses all that it offers.

    Of a vhost port: listener, timer and epoll, these two once more for a control queue; then the connection, the dirty
    log, its log's eventfd, four of the back-end channel, the userfaultfd and its copy, and kick, call and err of each
    queue. Memory is mapped, and its descriptors are closed again.
    """
    if spec.kind == "vhost":
        control, postcopy = int(spec.flag("control")), int(spec.flag("postcopy"))
        return 3 + 2 * control, 10 + 2 * (control + postcopy) + 3 * (2 * spec.number("queues") + control)
    queues = spec.number("queues") if spec.kind == "tap" else 1
    return 1 + queues, 1 + queues


def lanes_of(port: PortSpec | Port) -> int:
    """How many endpoints a port asks of interchangeable ones beside it."""
    if isinstance(port, Port):
        return max(1, port.endpoint_count)
    return port.number("queues") if port.kind in ("vhost", "tap") else 1


def open_port(spec: PortSpec | Port, *, lanes: int, report_fd: int, changed: Callable[[], None]) -> OpenPort:
    """Open one port.

    Parameters
    ----------
    spec
        The parsed PORT argument; or a port that somebody else has opened and will close.
    lanes
        Endpoints that interchangeable ports (null, gen) get: the most queue pairs of any other port.
    report_fd
        Eventfd that a vhost port signals when a guest breaks a queue.
    changed
        Called when the flows of the pump are to be made anew.

    Raises
    ------
    UsageError
        A value of the argument is impossible.
    ResourceError
        The system refused.
    """
    if isinstance(spec, Port):
        return OpenPort(spec.name, "own", spec)
    try:
        return OPENERS[spec.kind](spec, lanes, report_fd, changed)
    except ValueError as error:
        raise UsageError(f"{spec.name}: {error}") from error
