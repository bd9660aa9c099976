"""The options that the specification wants of every back-end program.

Spec: vhost-user, "Backend program conventions".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vq.cli.output import write_json
from vq.errors import UsageError
from vq.stats import encode

__all__ = ["CAPABILITIES_OPTION", "conventional_ports", "print_capabilities"]

CAPABILITIES_OPTION: Final = "--print-capabilities"


def print_capabilities(kind: str, features: Sequence[str] = ()) -> None:
    """Print what management software may know of a back-end.

    Parameters
    ----------
    kind
        Its type, as QEMU's ``VHostUserBackendType`` has it.
    features
        Those of its options that the specification has a name for; there are none for net.
    """
    write_json(encode({"type": kind, "features": list(features)}))


def conventional_ports(socket_path: str | None, fd: str | None) -> tuple[str, ...]:
    """The PORT argument that ``--socket-path`` or ``--fd`` means; nothing if neither is given.

    Raises
    ------
    UsageError
        Both are given.
    """
    if socket_path is not None and fd is not None:
        raise UsageError("--socket-path and --fd name the same socket; leave one out")
    if fd is not None:
        return (f"vhost:fd={fd}",)
    if socket_path is not None:
        return (f"vhost:./{socket_path}" if socket_path.startswith("fd=") else f"vhost:{socket_path}",)
    return ()
