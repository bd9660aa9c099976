"""Sockets that the process was started with: named by their fd, or by the name that a service manager gave them.

Spec: vhost-user, "Back-end program conventions"; sd_listen_fds(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from vq.errors import UsageError

__all__ = ["NAME_MAX", "find_fd", "listen_fds", "listening_path"]

FIRST: Final = 3  # SD_LISTEN_FDS_START: those of a service manager follow upon standard error
FDS_MAX: Final = 4096  # more than any service manager passes
NAME_MAX: Final = 255  # of FileDescriptorName=


def listen_fds(environment: Mapping[str, str] | None = None) -> list[tuple[str, int]]:
    """The sockets that a service manager passed, as (name, fd); a name may occur several times.

    Parameters
    ----------
    environment
        LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES; None: that of the process. What is meant for another process, such as
        a parent that did not clear its environment, counts as nothing.
    """
    environment = os.environ if environment is None else environment
    pid, count = environment.get("LISTEN_PID", ""), environment.get("LISTEN_FDS", "")
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit() and int(count) <= FDS_MAX):
        return []
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    # Without names, or with too few, the others are called as systemd calls a socket without a name.
    names += ["unknown"] * int(count)
    return [(name or "unknown", FIRST + place) for place, name in enumerate(names[: int(count)])]


def find_fd(word: str) -> int:
    """The fd that a word means: a number, or the name of a passed socket.

    Raises
    ------
    UsageError
        No socket, or more than one, was passed under this name; or the fd is not open.
    """
    if word.isascii() and word.isdigit():
        fd = int(word)
    else:
        passed = listen_fds()
        found = [number for name, number in passed if name == word]
        if not found:
            known = ", ".join(dict.fromkeys(name for name, _ in passed)) or "none"
            raise UsageError(f"no socket was passed under the name {word!r}; passed are {known}")
        if len(found) > 1:
            numbers = ", ".join(f"fd={number}" for number in found)
            raise UsageError(f"{len(found)} sockets have the name {word!r}; write one of {numbers}")
        fd = found[0]
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        raise UsageError(f"fd {fd} is not open; pass the number of an open Unix stream socket") from None
    return fd


def listening_path(fd: int) -> str:
    """Where an inherited socket listens; empty if it is connected, has no path, or is no Unix socket."""
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
        name = sock.getsockname()
        if isinstance(name, str) and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return name
    return ""
