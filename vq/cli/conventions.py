"""The options that the specification wants of every back-end program.

Spec: vhost-user, "Backend program conventions".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from vq.cli.output import write_json
from vq.errors import UsageError
from vq.stats import encode

__all__ = ["CAPABILITIES", "CAPABILITIES_OPTION", "conventional_ports", "print_capabilities"]

CAPABILITIES_OPTION: Final = "--print-capabilities"

# Of each command that is a back-end program: its type, and those of its options that the specification has a name for.
CAPABILITIES: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType(
    {"pump": {"type": "net", "features": []}, "blk": {"type": "block", "features": ["read-only", "blk-file"]}}
)


def print_capabilities(words: Sequence[str]) -> bool:
    """Print what management software may know of a back-end, if the words of a command line ask for that.

    Whatever stands beside the option is ignored, also what would be wrong by itself.

    Returns
    -------
    bool
        Whether they did; then nothing else is to be done.
    """
    if not words or words[0] not in CAPABILITIES or CAPABILITIES_OPTION not in words:
        return False
    write_json(encode(CAPABILITIES[words[0]]))
    return True


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
