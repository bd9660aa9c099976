"""The network device (VIRTIO 1.3, 5.1): what it offers, and its port into the pump."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec

from vq import virtio as v
from vq.device_state import pack_state, unpack_state
from vq.devices.net_control import COMMAND_MAX, Change, CommandError, NetControl
from vq.errors import FrontendError, UsageError
from vq.hosted_device import HostedDevice
from vq.message import BackendRequest
from vq.offer import QUEUES_MAX, Offer, with_postcopy
from vq_core.chain_queue import Chain, ChainQueue
from vq_core.ports.vhost import VhostPort
from vq_core.queue import Queue
from vq_core.receive_filter import ReceiveFilter

__all__ = ["ControlledNetDevice", "NetDevice", "derived_mac"]

logger = logging.getLogger(__name__)

FEATURES: Final = v.mask(
    v.VIRTIO_NET_F_CSUM, v.VIRTIO_NET_F_GUEST_CSUM, v.VIRTIO_NET_F_MTU,
    v.VIRTIO_NET_F_GUEST_TSO4, v.VIRTIO_NET_F_GUEST_TSO6, v.VIRTIO_NET_F_GUEST_ECN, v.VIRTIO_NET_F_GUEST_UFO,
    v.VIRTIO_NET_F_HOST_TSO4, v.VIRTIO_NET_F_HOST_TSO6, v.VIRTIO_NET_F_HOST_ECN, v.VIRTIO_NET_F_HOST_UFO,
    v.VIRTIO_NET_F_GUEST_USO4, v.VIRTIO_NET_F_GUEST_USO6, v.VIRTIO_NET_F_HOST_USO,
    v.VIRTIO_NET_F_MRG_RXBUF, v.VIRTIO_NET_F_GUEST_ANNOUNCE, v.VIRTIO_NET_F_MQ,
    v.VIRTIO_F_ANY_LAYOUT, v.VIRTIO_F_INDIRECT_DESC, v.VIRTIO_F_EVENT_IDX, v.VIRTIO_F_VERSION_1, v.VIRTIO_F_IN_ORDER,
    v.VIRTIO_F_ACCESS_PLATFORM, v.VIRTIO_F_RING_PACKED, v.VHOST_F_LOG_ALL, v.VHOST_USER_F_PROTOCOL_FEATURES,
)  # fmt: skip

PROTOCOL_FEATURES: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ, v.VHOST_USER_PROTOCOL_F_LOG_SHMFD, v.VHOST_USER_PROTOCOL_F_RARP,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK, v.VHOST_USER_PROTOCOL_F_MTU, v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, v.VHOST_USER_PROTOCOL_F_STATUS,
    v.VHOST_USER_PROTOCOL_F_BACKEND_REQ, v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    v.VHOST_USER_PROTOCOL_F_DEVICE_STATE, v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES,
)  # fmt: skip

# What a device with a control queue and a configuration space of its own offers as well.
CONTROL_FEATURES: Final = v.mask(
    v.VIRTIO_NET_F_CTRL_VQ, v.VIRTIO_NET_F_CTRL_RX, v.VIRTIO_NET_F_CTRL_RX_EXTRA, v.VIRTIO_NET_F_CTRL_VLAN,
    v.VIRTIO_NET_F_CTRL_MAC_ADDR, v.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, v.VIRTIO_NET_F_MAC, v.VIRTIO_NET_F_STATUS,
    v.VIRTIO_NET_F_SPEED_DUPLEX,
)  # fmt: skip
CONTROL_PROTOCOL_FEATURES: Final = v.mask(v.VHOST_USER_PROTOCOL_F_CONFIG)

LOG_ALL: Final = v.mask(v.VHOST_F_LOG_ALL)
SERVE_S: Final = 0.005  # that commands are served in one go, and then not, while more of them wait: half of the time
MAC_BYTES: Final = 6  # of the configuration space, from its beginning
OK, ERR = b"\0", b"\1"  # VIRTIO_NET_OK, VIRTIO_NET_ERR


class NetState(msgspec.Struct, frozen=True):
    """What a network device takes along (`vq.device_state`)."""

    features: Annotated[int, msgspec.Meta(ge=0)]  # acknowledged by the driver
    pairs: Annotated[int, msgspec.Meta(ge=1, le=128)]  # offered to it
    mtu: Annotated[int, msgspec.Meta(ge=68, le=65535)] | None = None  # towards the guest
    control: dict[str, Any] | None = None  # of `NetControl.save`, if it has a control queue


class NetDevice(HostedDevice):
    """A vhost-user-net device whose packets go through a `VhostPort`.

    Parameters
    ----------
    name
        For people, and in the pump's counters.
    pairs
        Queue pairs that are offered, 1 to 128.
    report_fd
        Eventfd that is signalled when a guest breaks a queue.
    mtu
        Longest packet towards the guest in bytes, without the Ethernet header, until the front-end says otherwise.
    packed
        Offer the packed ring layout beside the split one.
    slots
        Offer memory slots; without them a front-end sends the whole memory table for each change.
    postcopy
        Offer to be the destination of a postcopy migration, which memory slots cannot be offered with.
    single_queues
        Answer GET_QUEUE_NUM with the number of virtqueues, as cloud-hypervisor expects, in place of pairs.

    Notes
    -----
    The control queue stays with the front-end (QEMU, virtio-user and cloud-hypervisor keep it), so CTRL_VQ is not
    offered. CONFIG is not offered either: these front-ends make the configuration space themselves. For all others
    there is `ControlledNetDevice`.
    """

    in_order = True

    def __init__(
        self,
        name: str,
        *,
        pairs: int = 8,
        report_fd: int | None = None,
        mtu: int | None = None,
        packed: bool = True,
        slots: bool = True,
        postcopy: bool = False,
        single_queues: bool = False,
    ) -> None:
        self.name = name
        self.port = VhostPort(name, pairs, report_fd)
        self.queues = self.port.queues
        self.posted_queues = self.queues[::2]
        features = FEATURES if packed else FEATURES & ~v.mask(v.VIRTIO_F_RING_PACKED)
        protocol = PROTOCOL_FEATURES
        if not slots:
            protocol &= ~v.mask(v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
        if postcopy:
            protocol = with_postcopy(protocol)
            features &= ~v.mask(v.VIRTIO_F_ACCESS_PLATFORM)
        answer = 2 * pairs if single_queues else pairs
        self.offer = Offer(features, protocol, queue_count=2 * pairs, queue_num_answer=answer)
        self._default_mtu = self._mtu = mtu
        self._features = 0

    def set_features(self, features: int) -> None:
        self._features = features
        self.port.configure(features, self._mtu)

    def set_mtu(self, mtu: int) -> None:
        self._mtu = mtu
        self.port.configure(self._features, mtu)

    def send_rarp(self, mac: bytes) -> None:
        self.port.announce(mac)

    def save_state(self) -> bytes:
        return pack_state(v.VIRTIO_ID_NET, NetState(self._features, len(self.queues) // 2, self._mtu))

    def load_state(self, state: bytes) -> None:
        came = unpack_state(state, v.VIRTIO_ID_NET, NetState)
        unoffered = came.features & ~self.offer.features
        if unoffered:
            names = ", ".join(v.feature_names(unoffered))
            raise FrontendError("device state", "features", f"{came.features:#x}", f"{names} is not offered here")
        if came.pairs > len(self.queues) // 2:
            limit = f"there are {len(self.queues) // 2} here; give the port as many (queues=)"
            raise FrontendError("device state", "queue pairs", came.pairs, limit)
        self._take_over(came)

    def _take_over(self, came: NetState) -> None:
        """Go on with a state that suits."""
        self._mtu = came.mtu
        self.port.configure(self._features, self._mtu)

    def reset(self) -> None:
        self._features = 0
        self._mtu = self._default_mtu
        self.port.configure(0, self._mtu)


class ControlledNetDevice(NetDevice):
    """A network device that serves its control queue and its configuration space by itself.

    For front-ends that pass on what their driver does, without knowing of network devices.

    Parameters
    ----------
    name, pairs, report_fd, mtu, packed, slots
        As for `NetDevice`; at most 127 pairs.
    mac
        The address that the driver finds, 6 bytes; None: one that is made of `name` and the name of this host.
    speed
        Of the link, in Mb/s; None: unknown.

    Attributes
    ----------
    control : NetControl
        What the driver has asked for.

    Notes
    -----
    The control queue comes after the queue pairs; its index is 2 for a driver that does not acknowledge MQ, since it
    knows of one pair only (VIRTIO 1.3, 5.1.2). The control thread serves it.

    A front-end does not tell when the driver behind it is another one. But a control ring that starts at its very
    beginning has had no command: then the state is that after a reset.
    """

    def __init__(
        self,
        name: str,
        *,
        pairs: int = 8,
        report_fd: int | None = None,
        mtu: int | None = None,
        packed: bool = True,
        slots: bool = True,
        mac: bytes | None = None,
        speed: int | None = None,
    ) -> None:
        if 2 * pairs + 1 > QUEUES_MAX:
            raise UsageError(f"{pairs} queue pairs and a control queue; {(QUEUES_MAX - 1) // 2} pairs are possible")
        super().__init__(name, pairs=pairs, report_fd=report_fd, mtu=mtu, packed=packed, slots=slots)
        self.control = NetControl(mac or derived_mac(name), pairs)
        self._speed = 0xFFFFFFFF if speed is None else speed
        self._link_up = True
        self._filter: dict[str, Any] | None = None
        self._came: NetState | None = None  # a state that waits for its features
        self._requests = ChainQueue(Queue(2 * pairs, "controlq", report_fd, peer=self.port.peer), COMMAND_MAX)
        self._order_queues()
        # The queue that the control thread serves knows of no IOMMU.
        features = (self.offer.features | CONTROL_FEATURES) & ~v.mask(v.VIRTIO_F_ACCESS_PLATFORM)
        if mtu is None:
            features &= ~v.mask(v.VIRTIO_NET_F_MTU)  # its field would have to say something
        self.offer = Offer(
            features,
            self.offer.protocol_features | CONTROL_PROTOCOL_FEATURES,
            queue_count=2 * pairs + 1,
            queue_num_answer=2 * pairs + 1,
            config_size=v.VIRTIO_NET_CONFIG_SIZE,
        )
        self.requests_fd = self._requests.fileno()

    def close(self) -> None:
        self._requests.close()

    def _order_queues(self) -> None:
        """Put the control queue where the driver looks for it; what stood there takes its place."""
        queues = [*self.port.queues, self._requests.queue]
        if v.has(self._features, v.VIRTIO_NET_F_CTRL_VQ) and not v.has(self._features, v.VIRTIO_NET_F_MQ):
            queues[2], queues[-1] = queues[-1], queues[2]
        for index, queue in enumerate(queues):
            queue.index = index
        self.queues = tuple(queues)

    def _begin_anew(self, features: int) -> None:
        """Forget what was asked for; no ring runs, so that nobody has to settle anything."""
        self._order_queues()
        self.control.set_features(features)
        self._go_on()
        self._obey(~Change.NONE)

    def _go_on(self) -> None:
        """Take over a state that has come, as soon as its features are there."""
        came = self._came
        if came is not None and came.control is not None and came.features == self._features & ~LOG_ALL:
            self._came = None
            self.control.load(came.control)
            self.announce()  # it is at another place now

    # -- what the front-end says --

    def set_features(self, features: int) -> None:
        changed = (features ^ self._features) & ~LOG_ALL
        self._features = features
        if changed:
            self._begin_anew(features)

    def set_mtu(self, mtu: int) -> None:
        self._mtu = mtu
        self._obey(Change.OFFLOADS)

    def send_rarp(self, mac: bytes) -> None:
        super().send_rarp(mac)
        self.announce()

    def reset(self) -> None:
        self._features = 0
        self._mtu = self._default_mtu
        self._came = None
        self._begin_anew(0)

    def save_state(self) -> bytes:
        features, pairs = self._features & ~LOG_ALL, self.control.max_pairs
        return pack_state(v.VIRTIO_ID_NET, NetState(features, pairs, self._mtu, self.control.save()))

    def _take_over(self, came: NetState) -> None:
        if came.control is not None:
            trial = NetControl(self.control.default_mac, self.control.max_pairs)
            trial.set_features(came.features)
            try:
                trial.load(came.control)
            except CommandError as error:
                raise FrontendError("device state", "control queue", "impossible", str(error)) from error
        self._mtu = came.mtu
        self._came = came
        self._go_on()
        self._obey(~Change.NONE)

    # -- the configuration space --

    @property
    def config(self) -> v.NetConfig:
        """The configuration space at this moment."""
        status = v.VIRTIO_NET_S_LINK_UP if self._link_up or not self._can_tell else 0
        status |= v.VIRTIO_NET_S_ANNOUNCE if self.control.announce else 0
        return v.NetConfig(
            mac=self.control.mac,
            status=status,
            max_virtqueue_pairs=self.control.max_pairs,
            mtu=self._mtu or 0,
            speed=self._speed,
            duplex=1,
        )

    def read_config(self, offset: int, size: int) -> bytes:
        return self.config.pack()[offset : offset + size]

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        if not migration and (
            offset + len(data) > MAC_BYTES or v.has(self._features, v.VIRTIO_NET_F_CTRL_MAC_ADDR)
        ):
            limit = "only the address can be written, by a driver without CTRL_MAC_ADDR"
            raise FrontendError("SET_CONFIG", "range", f"{len(data)} bytes at {offset}", limit)
        mac = bytearray(self.control.mac)
        part = data[: max(0, MAC_BYTES - offset)]
        mac[offset : offset + len(part)] = part
        self.control.mac = bytes(mac)
        self._obey(Change.FILTER)

    @property
    def _can_tell(self) -> bool:
        """Whether a front-end that finds the link down will be told when it is up again."""
        return self.channel is not None and self.channel.can_send(BackendRequest.CONFIG_CHANGE_MSG)

    def channel_given(self) -> None:
        if not self._link_up:  # and that could not be said before
            self.config_changed()

    def set_link(self, up: bool) -> None:
        """Tell the driver that the link is up or down."""
        if up != self._link_up:
            self._link_up = up
            self.config_changed()

    def announce(self) -> None:
        """Ask the driver to announce itself to the network, if it can: it is at another place now."""
        if self.control.serves(v.VIRTIO_NET_F_GUEST_ANNOUNCE):
            self.control.announce = True
            self.config_changed()

    # -- the control queue --

    def serve_requests(self) -> None:
        requests = self._requests
        requests.begin()
        if requests.begun():
            self.control.forget()
            self._obey(~Change.NONE, self.settle)
        end = time.monotonic() + SERVE_S
        while time.monotonic() < end:
            request = requests.pop()
            if request is None:
                break
            self._serve(request)
            requests.publish()
        requests.arm(SERVE_S)

    def _serve(self, request: Chain) -> None:
        if request.writable_bytes == 0:
            request.refuse()  # 5.1.6.5: a command without a byte for its ack
            return
        try:
            self._obey(self.control.execute(request.data, request.readable_bytes), self.settle)
        except CommandError as error:
            logger.debug("device=%s control=%r", self.name, str(error))
            request.complete(ERR)
        else:
            request.complete(OK)

    def _obey(self, change: Change, settle: Callable[[], None] = lambda: None) -> None:
        """Have the data plane follow the state; it has when this returns."""
        if Change.OFFLOADS in change:
            self.port.configure(self.control.effective_features, self._mtu)
        if Change.FILTER in change and self.control.filter != self._filter:
            self._filter = self.control.filter
            self.port.set_filter(None if self._filter is None else ReceiveFilter(**self._filter))
        if Change.PAIRS in change:
            self.port.use_pairs(self.control.pairs, settle)

    def snapshot(self) -> dict[str, Any]:
        """What the driver has asked for, for people."""
        return self.control.save() | {"filtering": self.control.filter is not None, "link": self._link_up}


def derived_mac(name: str) -> bytes:
    """A MAC address of our own (locally administered), always the same for a name on this host."""
    digest = hashlib.sha256(f"{socket.gethostname()} {name}".encode()).digest()
    return b"\x02" + digest[:5]
