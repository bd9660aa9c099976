"""Whether a file that a front-end sends may hold memory: of the guest, a dirty log, or an in-flight region.

Looking at a file, mapping it and touching its pages can take as long as the file system likes, and a file system in
user space or on a network likes what its server likes, which may be the front-end. So a file is taken when the kernel
alone holds its pages: memfd, tmpfs and hugetlbfs, or a file system known to lie on local disks (devtmpfs: /dev/dax).
All this is found without asking the file system itself anything.

Spec: vhost-user, "Memory regions description".
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

from vq.errors import FrontendError

__all__ = ["check_memory_file"]

ON_DISK: Final = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "xfs", "zfs")
IN_MEMORY: Final = ("devtmpfs", "hugetlbfs", "ramfs", "rootfs", "tmpfs")
REMEDY: Final = "share memory from a memfd, tmpfs or hugetlbfs"


def check_memory_file(request: str, fd: int) -> None:
    """Refuse a file whose pages somebody else could withhold.

    Parameters
    ----------
    request
        Name of the message that brought the file.
    fd
        The file, just received.

    Raises
    ------
    FrontendError
        It is no file, or its file system is not known to be local: it may be served by a program or another machine.
        So is one that this process does not see.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        return  # only files that live in memory have seals: memfd, tmpfs, hugetlbfs
    except OSError:
        pass
    kind = _file_system(fd)
    if kind is None:
        what = os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
        raise FrontendError(request, "memory file", f"of an unknown file system ({what})", REMEDY)
    if kind not in ON_DISK + IN_MEMORY:
        raise FrontendError(request, "memory file", f"on a {kind} file system, which may keep us waiting", REMEDY)


def _file_system(fd: int) -> str | None:
    """Type of the file system that an open file lies in, or None if it is mounted nowhere that we can see."""
    with open(f"/proc/self/fdinfo/{fd}") as info:
        mount = next((line.split()[1] for line in info if line.startswith("mnt_id:")), None)
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            if line.split(maxsplit=1)[0] == mount:
                return line.partition(" - ")[2].split(maxsplit=1)[0]
    return None
