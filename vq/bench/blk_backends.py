"""The block back-ends that are measured: `vq blk`, QEMU's storage daemon, or whoever listens on a socket."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

from vq.bench.blk_settings import BlkSettings
from vq.bench.child import Child
from vq.bench.measure import Ended
from vq.errors import ResourceError

__all__ = ["PEERS", "BlkBackend", "OwnBlk", "SocketBlk", "StorageDaemon", "memory_file"]

PEERS: Final = ("qemu-storage-daemon",)
NULL_BYTES: Final = 1 << 30
FILE_BYTES: Final = 256 << 20
FILE_MIN_BYTES: Final = 8 << 20
MEMORY_FOLDER: Final = Path("/dev/shm")
OPEN_S: Final = 20.0  # until the socket is there
LOOK_S: Final = 0.02


class BlkBackend(Protocol):
    """A back-end that can be opened for a run."""

    name: str

    def open(
        self, settings: BlkSettings, disk: Path | None, folder: Path, ended: Callable[[], bool]
    ) -> AbstractContextManager[tuple[str, Sequence[Child]]]: ...


class SocketBlk:
    """Somebody's back-end, which listens already.

    Parameters
    ----------
    path
        Its socket.
    """

    def __init__(self, path: str) -> None:
        self.name = path

    @contextmanager
    def open(
        self, settings: BlkSettings, disk: Path | None, folder: Path, ended: Callable[[], bool]
    ) -> Iterator[tuple[str, Sequence[Child]]]:
        """Give its socket, and no program of ours."""
        yield self.name, ()


class OwnBlk:
    """``vq blk``, as users start it, anew for each run.

    Parameters
    ----------
    cpu
        Processor of all its threads; None: wherever the kernel puts them.
    """

    name = "vq"

    def __init__(self, cpu: int | None) -> None:
        self._cpu = cpu

    def command(self, settings: BlkSettings, disk: Path | None, path: str) -> list[str]:
        """The command line."""
        words = [sys.executable, "-m", "vq", "blk", "--socket-path", path, "--queues", str(settings.queues)]
        words += ["--null", str(NULL_BYTES)] if disk is None else ["--blk-file", str(disk)]
        return [*words, "--poll", settings.poll]

    @contextmanager
    def open(
        self, settings: BlkSettings, disk: Path | None, folder: Path, ended: Callable[[], bool]
    ) -> Iterator[tuple[str, Sequence[Child]]]:
        """Start it; gives its socket and the program."""
        path = folder / "blk.sock"
        path.unlink(missing_ok=True)
        pinned = [] if self._cpu is None else ["taskset", "-c", str(self._cpu)]
        with Child(self.name, [*pinned, *self.command(settings, disk, str(path))], folder) as child:
            end = time.monotonic() + OPEN_S
            while not path.exists():
                if ended():
                    raise Ended
                child.check()
                if time.monotonic() > end:
                    raise child.failure(f"opened no socket in {OPEN_S:g} s")
                time.sleep(LOOK_S)
            yield str(path), (child,)


class StorageDaemon(OwnBlk):
    """QEMU's storage daemon with its vhost-user-blk export.

    Parameters
    ----------
    cpu
        Processor of all its threads; None: wherever the kernel puts them.
    options
        More of the file's ``--blockdev`` options, such as ``aio=io_uring``.
    """

    name = "qemu-storage-daemon"

    def __init__(self, cpu: int | None, options: str = "") -> None:
        super().__init__(cpu)
        self._options = options
        if shutil.which(self.name) is None:
            raise ResourceError(
                "is not installed", path=self.name, remedy="Debian has it in qemu-utils or qemu-system-common"
            )

    def command(self, settings: BlkSettings, disk: Path | None, path: str) -> list[str]:
        """The command line."""
        node = f"driver=null-co,size={NULL_BYTES},read-zeroes=on"
        if disk is not None:
            node = f"driver=file,filename={_quoted(str(disk))}"
            node += f",{self._options}" if self._options else ""
        export = f"vhost-user-blk,id=e,node-name=n,writable=on,num-queues={settings.queues}"
        export += f",addr.type=unix,addr.path={_quoted(path)}"
        return [self.name, "--blockdev", f"{node},node-name=n", "--export", export]


def _quoted(text: str) -> str:
    """A value among QEMU's options."""
    return text.replace(",", ",,")


@contextmanager
def memory_file(points: Iterable[BlkSettings]) -> Iterator[Path | None]:
    """Make the file of the disk on tmpfs, full of random bytes; None if no point needs it.

    Raises
    ------
    ResourceError
        There is no tmpfs, or no room in it.
    """
    if all(point.disk != "tmpfs" for point in points):
        yield None
        return
    where = str(MEMORY_FOLDER)
    if not MEMORY_FOLDER.is_dir():
        raise ResourceError("disk=tmpfs needs a tmpfs there", path=where, remedy="mount one")
    room = os.statvfs(MEMORY_FOLDER)
    size = min(FILE_BYTES, room.f_bavail * room.f_frsize // 2) // FILE_MIN_BYTES * FILE_MIN_BYTES
    if not size:
        raise ResourceError(f"less than {2 * FILE_MIN_BYTES} bytes are free", path=where, remedy="make room")
    with tempfile.NamedTemporaryFile(prefix="vq-bench-", suffix=".img", dir=MEMORY_FOLDER) as file:
        # Each page of its own content, so that nothing can stand for another; made of one random piece, which is fast.
        piece = os.urandom(FILE_MIN_BYTES)
        for number in range(size // FILE_MIN_BYTES):
            file.write(piece[number:] + piece[:number])
        file.flush()
        yield Path(file.name)
