"""vq: a vhost-user back-end as a library and a program; Python in control, Cython on the way of a packet.

Everything named here is loaded when it is first used, so that ``import vq`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vq.backend import Backend
    from vq.chain_io import ChainReader, ChainWriter
    from vq.config_layout import ConfigLayout, le16, le32, le64, u8, writable
    from vq.demo import DemoResult, run_demo
    from vq.device import Device
    from vq.devices.blk import BlkDevice
    from vq.errors import (
        BackendError,
        ConnectionClosed,
        FrontendError,
        GuestError,
        PeerError,
        ResourceError,
        UsageError,
        VqError,
    )
    from vq.frontend import Frontend
    from vq.hosted_device import HostedDevice
    from vq.offer import Offer
    from vq.ports import PortSpec, parse_port, parse_ports
    from vq.pump import Pump
    from vq.server import Server, serve
    from vq.virtio import DeviceId
    from vq_core.device_burst import DeviceBurst
    from vq_core.device_chain import DeviceChain
    from vq_core.device_queue import DeviceQueue
    from vq_core.program import Burst, NativeProgram, Program, PythonProgram

__all__ = [
    "Backend",
    "BackendError",
    "BlkDevice",
    "Burst",
    "ChainReader",
    "ChainWriter",
    "ConfigLayout",
    "ConnectionClosed",
    "DemoResult",
    "Device",
    "DeviceBurst",
    "DeviceChain",
    "DeviceId",
    "DeviceQueue",
    "Frontend",
    "FrontendError",
    "GuestError",
    "HostedDevice",
    "NativeProgram",
    "Offer",
    "PeerError",
    "PortSpec",
    "Program",
    "Pump",
    "PythonProgram",
    "ResourceError",
    "Server",
    "UsageError",
    "VqError",
    "le16",
    "le32",
    "le64",
    "parse_port",
    "parse_ports",
    "run_demo",
    "serve",
    "u8",
    "writable",
]

__version__ = "0.1.0"

_ROOMS: Final = {
    "vq.backend": ("Backend",),
    "vq.demo": ("DemoResult", "run_demo"),
    "vq.chain_io": ("ChainReader", "ChainWriter"),
    "vq.config_layout": ("ConfigLayout", "le16", "le32", "le64", "u8", "writable"),
    "vq.device": ("Device",),
    "vq.devices.blk": ("BlkDevice",),
    "vq.errors": (
        "BackendError",
        "ConnectionClosed",
        "FrontendError",
        "GuestError",
        "PeerError",
        "ResourceError",
        "UsageError",
        "VqError",
    ),
    "vq.frontend": ("Frontend",),
    "vq.hosted_device": ("HostedDevice",),
    "vq.offer": ("Offer",),
    "vq.ports": ("PortSpec", "parse_port", "parse_ports"),
    "vq.pump": ("Pump",),
    "vq.server": ("Server", "serve"),
    "vq.virtio": ("DeviceId",),
    "vq_core.device_burst": ("DeviceBurst",),
    "vq_core.device_chain": ("DeviceChain",),
    "vq_core.device_queue": ("DeviceQueue",),
    "vq_core.program": ("Burst", "NativeProgram", "Program", "PythonProgram"),
}
_HOME: Final = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vq' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
