"""Room for descriptors: the limit of open files of this process, raised as far as we may."""

from __future__ import annotations

import errno
import os
import resource

from vq.errors import ResourceError

__all__ = ["SPARE", "ensure_open_files"]

SPARE = 64  # descriptors beyond what is counted: epolls, eventfds, what Python opens for a moment


def ensure_open_files(needed: int, wanted: int) -> None:
    """Raise the soft limit of open files (RLIMIT_NOFILE) if it stands in the way; it is never lowered.

    Parameters
    ----------
    needed
        Descriptors without which nothing goes, beyond those that are open now.
    wanted
        And with everything that peers may bring; as many of these as the hard limit allows.

    Raises
    ------
    ResourceError
        The hard limit is below what is needed.
    """
    used = len(os.listdir("/proc/self/fd")) + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    goal = used + max(needed, wanted)
    if soft == endless or goal <= soft:
        return
    allowed = goal if hard == endless else min(goal, hard)
    if used + needed > allowed:
        raise ResourceError(
            f"{used + needed} open files are needed, and this process may have {allowed}",
            errno=errno.EMFILE,
            remedy="raise the hard limit (ulimit -Hn as root, LimitNOFILE= of systemd), or use fewer ports",
        )
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
